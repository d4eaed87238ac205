#include "engine.h"

#include "errors.h"
#include "llama_engine.h"
#include "ort_engine.h"
#include "timing.h"

#include <algorithm>
#include <cmath>

namespace {

std::string python_list(const std::vector<int64_t> & values) {
    std::string text;
    for (int64_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
    return "[" + text + "]";
}

const char * const HINT = "ids and attention_mask are int64 [batch, length], padded on the right";

}  // namespace

Options read_options(const json & raw) {
    bool known = raw.is_object();
    if (known) {
        for (const auto & item : raw.items()) {
            known = known && (item.key() == "threads" || item.key() == "backend" || item.key() == "extra");
        }
    }
    if (!known) throw bad_input("open: options are " + shown(raw), "known: backend, extra, threads");
    Options options;
    const json threads = raw.value("threads", json(2));
    if (!threads.is_number_integer() || threads < 1 || threads > 4096) {
        throw bad_input("open: " + shown(threads) + " threads", "at least 1");
    }
    options.threads = threads;
    options.backend = raw.value("backend", json());
    options.extra = raw.value("extra", json::object());
    return options;
}

std::unique_ptr<Engine> make_engine(Artifact artifact, Options options, const OnnxRuntime & onnxruntime) {
    if (artifact.format == "gguf") return std::make_unique<LlamaEngine>(std::move(artifact), std::move(options));
    if (artifact.format == "onnx" && !onnxruntime.library.empty()) {
        return std::make_unique<OrtEngine>(std::move(artifact), std::move(options), onnxruntime);
    }
    if (artifact.format == "onnx") {
        throw unsupported("the native runner opens gguf; for onnx it needs a libonnxruntime.so, and none was given",
                          "start it with --onnxruntime LIBRARY --host PROGRAM");
    }
    throw unsupported("the native runner opens gguf and onnx, not " + shown(artifact.format),
                      "export the model with --to gguf:…");
}

Batch Engine::check_batch(const Tensor & ids, const Tensor & mask) const {
    if (ids.shape.size() != 2 || ids.shape != mask.shape || ids.shape[0] == 0 || ids.shape[1] == 0) {
        throw bad_input("ids " + python_list(ids.shape) + " with mask " + python_list(mask.shape), HINT);
    }
    if (ids.dtype != "int64" || mask.dtype != "int64") {
        throw bad_input("ids of " + ids.dtype + " with mask of " + mask.dtype, HINT);
    }
    Batch batch;
    batch.rows = ids.shape[0];
    batch.length = ids.shape[1];
    const int64_t * id = ids.int64s();
    const int64_t * real = mask.int64s();
    const auto [low, high] = std::minmax_element(id, id + batch.rows * batch.length);
    if (*low < 0 || *high >= vocab_size()) {
        throw bad_input("token ids " + std::to_string(*low) + " to " + std::to_string(*high) +
                            ", the vocabulary has " + std::to_string(vocab_size()),
                        HINT);
    }
    for (int64_t row = 0; row < batch.rows; row++, id += batch.length, real += batch.length) {
        const int64_t * end = real + batch.length;
        const int64_t * padding = std::find(real, end, 0);
        if (padding == real || std::any_of(real, padding, [](int64_t value) { return value != 1; }) ||
            std::any_of(padding, end, [](int64_t value) { return value != 0; })) {
            throw bad_input("the mask is not ones followed by zeros", HINT);
        }
        batch.tokens.emplace_back(id, id + (padding - real));
    }
    if (batch.length > artifact_.max_length) {
        throw bad_input(std::to_string(batch.length) + " tokens, the model takes " +
                            std::to_string(artifact_.max_length),
                        "cut the text");
    }
    return batch;
}

std::vector<Token> Engine::check_prompt(const json & ids, int64_t new_tokens, const std::string & op) const {
    for (const json & id : ids) {
        if (!id.is_number_integer()) throw bad_input(op + ": prompt_ids are not all integers", "token ids");
    }
    if (!generates()) throw unsupported("a " + artifact_.task + " model does not decode", "use forward");
    if (ids.empty() || new_tokens < 1) {
        throw bad_input(std::to_string(ids.size()) + " prompt tokens, " + std::to_string(new_tokens) + " new ones",
                        "at least one of each");
    }
    for (const json & id : ids) {
        if (id < 0 || id >= vocab_size()) {
            throw bad_input("a prompt id is outside the vocabulary of " + std::to_string(vocab_size()),
                            "use the model's tokenizer");
        }
    }
    if (new_tokens > artifact_.max_length || int64_t(ids.size()) + new_tokens > artifact_.max_length) {
        throw bad_input(std::to_string(ids.size()) + " + " + std::to_string(new_tokens) + " tokens, the model takes " +
                            std::to_string(artifact_.max_length),
                        "shorten the prompt");
    }
    return ids.get<std::vector<Token>>();
}

double Engine::time_forward(const Batch & batch) {
    const double begin = now_seconds();
    forward(batch);
    return now_seconds() - begin;
}

json Engine::describe(const std::string & runtime, const std::string & version, const std::string & backend,
                      bool decodes, const json & placement) const {
    json capabilities = {"forward", "score", "latency"};
    if (decodes) capabilities.push_back("decode");
    return {{"runtime", runtime},
            {"version", version},
            {"backend", backend},
            {"task", artifact_.task},
            {"capabilities", capabilities},
            {"vocab_size", artifact_.vocab_size},
            {"max_length", artifact_.max_length},
            {"placement", placement}};
}

void normalize(float * vector, int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < width; i++) sum += double(vector[i]) * vector[i];
    const float norm = std::max(float(std::sqrt(sum)), 1e-12f);
    for (int64_t i = 0; i < width; i++) vector[i] /= norm;
}
