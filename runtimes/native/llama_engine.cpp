#include "llama_engine.h"

#include "errors.h"
#include "timing.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <type_traits>

static_assert(std::is_same_v<Token, llama_token>, "tokens are handed to llama.cpp as they are");

namespace {

// Rows of logits computed together: bounds llama.cpp's buffer for them (64 x 49,152 x 4 bytes = 12.6 MB).
constexpr size_t LOGIT_ROWS = 64, PROMPT_BATCH = 512, FIRST_LENGTH = 512, MOST_SEQUENCES = 64;

ggml_type kv_type(const std::string & name) {
    return name == "f32" ? GGML_TYPE_F32 : name == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
}

void log_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

LlamaEngine::LlamaEngine(Artifact artifact, Options options) : Engine(std::move(artifact), std::move(options)) {
    if (!options_.backend.is_null() && options_.backend != "cpu") {
        throw Error("UsageError", "llama.cpp has no backend " + shown(options_.backend) + " here", "leave backend out");
    }
    const json & extra = options_.extra;
    const Error unknown("UsageError", "unknown option for llama.cpp in " + shown(extra), "kv, flash, mmap");
    if (!extra.is_object()) throw unknown;
    for (const auto & [key, value] : extra.items()) {
        if (key == "kv" && (value == "f16" || value == "f32" || value == "q8_0")) kv_ = value;
        else if (key == "flash" && (value == "auto" || value == "on" || value == "off")) flash_ = value;
        else if (key == "mmap" && value.is_boolean()) mmap_ = value;
        else throw unknown;
    }
    // Flash attention rounds keys and values to float16 whatever the cache holds.
    if (flash_.empty()) flash_ = kv_ == "f32" ? "off" : "auto";
    llama_log_set(log_errors, nullptr);
    llama_backend_init();
}

LlamaEngine::~LlamaEngine() {
    close_context();
    llama_model_free(model_);
}

void LlamaEngine::load() {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.load_mode = mmap_ ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    model_ = llama_model_load_from_file(artifact_.entry.c_str(), params);
    if (!model_) {
        throw bad_input("llama.cpp can't load " + artifact_.entry, "the file is damaged or of a newer llama.cpp");
    }
    const int64_t tokens = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    if (tokens != vocab_size()) {
        throw bad_input(artifact_.entry + ": " + std::to_string(tokens) + " tokens, artifact.json says " +
                            std::to_string(vocab_size()),
                        "export it again");
    }
}

json LlamaEngine::info() const {
    const std::string version = std::string(ENGINE_VERSION) + " (llama.cpp " + llama_version() + ", native " + LEVEL + ")";
    return describe("llama.cpp", version, "cpu", generates(), generates() ? json{{"kv:" + kv_, 1}} : json::object());
}

int64_t LlamaEngine::width() const {
    return artifact_.task == "text-classification" ? llama_model_n_cls_out(model_) : llama_model_n_embd(model_);
}

std::vector<int64_t> LlamaEngine::shape(const Batch & batch) const {
    if (generates()) return {batch.rows, batch.length, vocab_size()};
    return {batch.rows, width()};
}

Output LlamaEngine::forward(const Batch & batch) {
    Output output{shape(batch), {}};
    int64_t size = 1;
    for (int64_t length : output.shape) size *= length;
    std::vector<float> & out = output.values;
    out.resize(size);
    float * next = out.data();
    if (generates()) {
        for (const auto & row : batch.tokens) {
            open_context(Kind::logits, row.size(), LOGIT_ROWS);
            forget();
            for (size_t first = 0; first < row.size(); first += LOGIT_ROWS) {
                const size_t count = std::min(LOGIT_ROWS, row.size() - first);
                feed(row.data() + first, count, /* all_logits */ true);
                std::memcpy(next + first * vocab_size(), llama_get_logits(context_), count * vocab_size() * sizeof(float));
            }
            next += batch.length * vocab_size();
        }
        return output;
    }
    // Sequences share a batch as far as they fit; each attends to itself only.
    size_t longest = PROMPT_BATCH, used = 0;
    for (const auto & row : batch.tokens) longest = std::max(longest, row.size());
    open_context(Kind::pooled, longest, 0);
    std::vector<std::vector<Token>> group;
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
        for (float * vector = out.data(); vector < out.data() + out.size(); vector += width()) normalize(vector, width());
    }
    return output;
}

void LlamaEngine::decode(const std::vector<Token> & prompt, int64_t new_tokens, const Told & told) {
    double last = now_seconds();
    open_context(Kind::decode, prompt.size() + new_tokens, 1);
    forget();
    for (size_t first = 0; first < prompt.size(); first += batch_) {
        feed(prompt.data() + first, std::min(batch_, prompt.size() - first), false);
    }
    for (int64_t step = 0; step < new_tokens; step++) {
        const float * logits = llama_get_logits(context_);
        const Token chosen = std::max_element(logits, logits + vocab_size()) - logits;  // the lowest of equal ones
        told(chosen, logits, now_seconds() - last);
        last = now_seconds();
        if (step + 1 < new_tokens) feed(&chosen, 1, false);
    }
}

void LlamaEngine::open_context(Kind kind, size_t length, int outputs) {
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
    params.type_k = params.type_v = kv_type(kv_);
    params.flash_attn_type = flash_ == "on"    ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                             : flash_ == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED
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

void LlamaEngine::close_context() {
    if (context_) llama_free(context_);
    context_ = nullptr;
}

void LlamaEngine::forget() {
    if (llama_memory_t memory = llama_get_memory(context_)) llama_memory_clear(memory, false);
}

void LlamaEngine::feed(const Token * tokens, size_t count, bool all_logits) {
    std::vector<int8_t> wanted(count, 1);
    llama_batch batch = llama_batch_get_one(const_cast<Token *>(tokens), count);
    if (all_logits) batch.logits = wanted.data();
    run(batch);
}

void LlamaEngine::pool(const std::vector<std::vector<Token>> & group, float * out) {
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

void LlamaEngine::run(const llama_batch & batch) {
    if (const int code = llama_decode(context_, batch)) {
        throw Error("EdgestillError", "llama.cpp failed with code " + std::to_string(code) + " on a batch of " +
                                          std::to_string(batch.n_tokens) + " tokens",
                    "more tokens than the context holds, or too little memory");
    }
}
