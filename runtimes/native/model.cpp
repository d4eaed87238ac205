#include "model.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// Rows of logits computed together: bounds llama.cpp's buffer for them (64 x 49,152 x 4 bytes = 12.6 MB).
constexpr size_t LOGIT_ROWS = 64, PROMPT_BATCH = 512, FIRST_LENGTH = 512, MOST_SEQUENCES = 64;

ggml_type kv_type(const std::string & name) {
    return name == "f32" ? GGML_TYPE_F32 : name == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
}

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
    const json backend = raw.value("backend", json());
    if (!backend.is_null() && backend != "cpu") {
        throw Error("UsageError", "llama.cpp has no backend " + shown(backend) + " here", "leave backend out");
    }
    const json extra = raw.value("extra", json::object());
    const Error unknown("UsageError", "unknown option for llama.cpp in " + shown(extra), "kv, flash, mmap");
    if (!extra.is_object()) throw unknown;
    for (const auto & [key, value] : extra.items()) {
        if (key == "kv" && (value == "f16" || value == "f32" || value == "q8_0")) options.kv = value;
        else if (key == "flash" && (value == "auto" || value == "on" || value == "off")) options.flash = value;
        else if (key == "mmap" && value.is_boolean()) options.mmap = value;
        else throw unknown;
    }
    // Flash attention rounds keys and values to float16 whatever the cache holds.
    if (options.flash.empty()) options.flash = options.kv == "f32" ? "off" : "auto";
    return options;
}

Model::Model(Artifact artifact, Options options) : artifact_(std::move(artifact)), options_(std::move(options)) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.load_mode = options_.mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    model_ = llama_model_load_from_file(artifact_.entry.c_str(), params);
    if (!model_) {
        throw bad_input("llama.cpp can't load " + artifact_.entry, "the file is damaged or of a newer llama.cpp");
    }
    vocab_size_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    if (vocab_size_ != artifact_.vocab_size) {
        llama_model_free(model_);
        throw bad_input(artifact_.entry + ": " + std::to_string(vocab_size_) + " tokens, artifact.json says " +
                            std::to_string(artifact_.vocab_size),
                        "export it again");
    }
}

Model::~Model() {
    close_context();
    llama_model_free(model_);
}

json Model::info() const {
    json capabilities = {"forward", "score", "latency"};
    if (generates()) capabilities.push_back("decode");
    const std::string version = std::string(ENGINE_VERSION) + " (llama.cpp " + llama_version() + ", native " + LEVEL + ")";
    return {{"runtime", "llama.cpp"},
            {"version", version},
            {"backend", "cpu"},
            {"task", artifact_.task},
            {"capabilities", capabilities},
            {"vocab_size", vocab_size_},
            {"max_length", artifact_.max_length},
            {"placement", generates() ? json{{"kv:" + options_.kv, 1}} : json::object()}};
}

Batch Model::check_batch(const Tensor & ids, const Tensor & mask) const {
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
    if (*low < 0 || *high >= vocab_size_) {
        throw bad_input("token ids " + std::to_string(*low) + " to " + std::to_string(*high) +
                            ", the vocabulary has " + std::to_string(vocab_size_),
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

std::vector<llama_token> Model::check_prompt(const json & ids, int64_t new_tokens, const std::string & op) const {
    for (const json & id : ids) {
        if (!id.is_number_integer()) throw bad_input(op + ": prompt_ids are not all integers", "token ids");
    }
    if (!generates()) throw unsupported("a " + artifact_.task + " model does not decode", "use forward");
    if (ids.empty() || new_tokens < 1) {
        throw bad_input(std::to_string(ids.size()) + " prompt tokens, " + std::to_string(new_tokens) + " new ones",
                        "at least one of each");
    }
    for (const json & id : ids) {
        if (id < 0 || id >= vocab_size_) {
            throw bad_input("a prompt id is outside the vocabulary of " + std::to_string(vocab_size_),
                            "use the model's tokenizer");
        }
    }
    if (new_tokens > artifact_.max_length || int64_t(ids.size()) + new_tokens > artifact_.max_length) {
        throw bad_input(std::to_string(ids.size()) + " + " + std::to_string(new_tokens) + " tokens, the model takes " +
                            std::to_string(artifact_.max_length),
                        "shorten the prompt");
    }
    return ids.get<std::vector<llama_token>>();
}

int64_t Model::width() const {
    return artifact_.task == "text-classification" ? llama_model_n_cls_out(model_) : llama_model_n_embd(model_);
}

std::vector<int64_t> Model::shape(const Batch & batch) const {
    if (generates()) return {batch.rows, batch.length, vocab_size_};
    return {batch.rows, width()};
}

std::vector<float> Model::forward(const Batch & batch) {
    int64_t size = 1;
    for (int64_t length : shape(batch)) size *= length;
    std::vector<float> out(size);
    float * next = out.data();
    if (generates()) {
        for (const auto & row : batch.tokens) {
            open_context(Kind::logits, row.size(), LOGIT_ROWS);
            forget();
            for (size_t first = 0; first < row.size(); first += LOGIT_ROWS) {
                const size_t count = std::min(LOGIT_ROWS, row.size() - first);
                feed(row.data() + first, count, /* all_logits */ true);
                std::memcpy(next + first * vocab_size_, llama_get_logits(context_), count * vocab_size_ * sizeof(float));
            }
            next += batch.length * vocab_size_;
        }
        return out;
    }
    // Sequences share a batch as far as they fit; each attends to itself only.
    size_t longest = PROMPT_BATCH, used = 0;
    for (const auto & row : batch.tokens) longest = std::max(longest, row.size());
    open_context(Kind::pooled, longest, 0);
    std::vector<std::vector<llama_token>> group;
    auto flush = [&] {
        pool(group, next);
        next += group.size() * width();
        group.clear();
        used = 0;
    };
    for (const auto & row : batch.tokens) {
        if (!group.empty() && (used + row.size() > batch_ || group.size() == MOST_SEQUENCES)) flush();
        group.push_back(row);
        used += row.size();
    }
    flush();
    if (artifact_.normalize) {
        for (float * vector = out.data(); vector < out.data() + out.size(); vector += width()) {
            double sum = 0;
            for (int64_t i = 0; i < width(); i++) sum += double(vector[i]) * vector[i];
            const float norm = std::max(float(std::sqrt(sum)), 1e-12f);
            for (int64_t i = 0; i < width(); i++) vector[i] /= norm;
        }
    }
    return out;
}

void Model::decode(const std::vector<llama_token> & prompt, int64_t new_tokens,
                   const std::function<void(llama_token, const float *)> & told) {
    open_context(Kind::decode, prompt.size() + new_tokens, 1);
    forget();
    for (size_t first = 0; first < prompt.size(); first += batch_) {
        feed(prompt.data() + first, std::min(batch_, prompt.size() - first), false);
    }
    for (int64_t step = 0; step < new_tokens; step++) {
        const float * logits = llama_get_logits(context_);
        const llama_token chosen = std::max_element(logits, logits + vocab_size_) - logits;  // the lowest of equal ones
        told(chosen, logits);
        if (step + 1 < new_tokens) feed(&chosen, 1, false);
    }
}

void Model::open_context(Kind kind, size_t length, int outputs) {
    if (context_ && kind_ == kind && room_ >= length) return;
    close_context();
    size_t room = FIRST_LENGTH;
    while (room < length) room *= 2;
    const bool pooled = kind == Kind::pooled;
    llama_context_params params = llama_context_default_params();
    batch_ = kind == Kind::logits ? LOGIT_ROWS : pooled ? room : PROMPT_BATCH;
    params.n_ctx = room;
    params.n_batch = batch_;
    params.n_seq_max = pooled ? MOST_SEQUENCES : 1;
    // Attention without a causal mask needs a sequence whole in one physical batch.
    params.n_ubatch = pooled ? batch_ : std::min(batch_, PROMPT_BATCH);
    params.n_outputs_max = params.n_outputs_max_per_seq = outputs;
    params.n_threads = params.n_threads_batch = options_.threads;
    params.type_k = params.type_v = kv_type(options_.kv);
    params.flash_attn_type = options_.flash == "on"    ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                             : options_.flash == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED
                                                       : LLAMA_FLASH_ATTN_TYPE_AUTO;
    params.embeddings = params.kv_unified = pooled;
    context_ = llama_init_from_model(model_, params);
    if (!context_) {
        throw Error("EdgestillError", "llama.cpp can't make a context of " + std::to_string(room) + " tokens",
                    "take a shorter context, or free memory");
    }
    room_ = llama_n_ctx(context_);
    kind_ = kind;
}

void Model::close_context() {
    if (context_) llama_free(context_);
    context_ = nullptr;
}

void Model::forget() {
    if (llama_memory_t memory = llama_get_memory(context_)) llama_memory_clear(memory, false);
}

void Model::feed(const llama_token * tokens, size_t count, bool all_logits) {
    std::vector<int8_t> wanted(count, 1);
    llama_batch batch = llama_batch_get_one(const_cast<llama_token *>(tokens), count);
    if (all_logits) batch.logits = wanted.data();
    run(batch);
}

void Model::pool(const std::vector<std::vector<llama_token>> & group, float * out) {
    std::vector<llama_token> token;
    std::vector<llama_pos> position;
    std::vector<llama_seq_id> owner;
    for (size_t index = 0; index < group.size(); index++) {
        for (size_t place = 0; place < group[index].size(); place++) {
            token.push_back(group[index][place]);
            position.push_back(place);
            owner.push_back(index);
        }
    }
    std::vector<int32_t> ones(token.size(), 1);
    std::vector<int8_t> wanted(token.size(), 1);
    std::vector<llama_seq_id *> owners;
    for (llama_seq_id & id : owner) owners.push_back(&id);
    llama_batch batch = {};
    batch.n_tokens = token.size();
    batch.token = token.data();
    batch.pos = position.data();
    batch.n_seq_id = ones.data();
    batch.seq_id = owners.data();
    batch.logits = wanted.data();
    forget();
    run(batch);
    for (size_t index = 0; index < group.size(); index++, out += width()) {
        std::memcpy(out, llama_get_embeddings_seq(context_, index), width() * sizeof(float));
    }
}

void Model::run(const llama_batch & batch) {
    if (const int code = llama_decode(context_, batch)) {
        throw Error("EdgestillError", "llama.cpp failed with code " + std::to_string(code) + " on a batch of " +
                                          std::to_string(batch.n_tokens) + " tokens",
                    "more tokens than the context holds, or too little memory");
    }
}
