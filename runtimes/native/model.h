// A GGUF artifact opened by llama.cpp on the CPU: what runtimes/llamacpp_session.py does in Python.
#pragma once

#include "artifact.h"
#include "exchange.h"

#include <llama.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct Options {
    int threads = 2;
    std::string kv = "f16", flash;  // types of the KV cache; "auto", "on", "off"
    bool mmap = true;
};

// What `open` may say; BadInput for anything else.
Options read_options(const json & raw);

struct Batch {  // checked: right padding, ids of the vocabulary
    int64_t rows = 0, length = 0;
    std::vector<std::vector<llama_token>> tokens;  // of each row, without padding
};

class Model {
  public:
    Model(Artifact artifact, Options options);
    ~Model();
    Model(const Model &) = delete;

    const std::string & task() const { return artifact_.task; }
    bool generates() const { return artifact_.task == "text-generation"; }
    int64_t vocab_size() const { return vocab_size_; }
    json info() const;

    Batch check_batch(const Tensor & ids, const Tensor & mask) const;
    std::vector<llama_token> check_prompt(const json & ids, int64_t new_tokens, const std::string & op) const;

    // The output of `forward` and its shape: [rows, length, vocab], or [rows, width] pooled.
    std::vector<int64_t> shape(const Batch & batch) const;
    std::vector<float> forward(const Batch & batch);
    // Greedy: calls `told` with each token and the logits it was chosen from, as soon as it is known.
    void decode(const std::vector<llama_token> & prompt, int64_t new_tokens,
                const std::function<void(llama_token, const float *)> & told);

  private:
    enum class Kind { none, logits, decode, pooled };
    void open_context(Kind kind, size_t length, int outputs);
    void close_context();
    void forget();
    void feed(const llama_token * tokens, size_t count, bool all_logits);
    void run(const llama_batch & batch);
    int64_t width() const;
    void pool(const std::vector<std::vector<llama_token>> & group, float * out);

    Artifact artifact_;
    Options options_;
    llama_model * model_ = nullptr;
    llama_context * context_ = nullptr;
    Kind kind_ = Kind::none;
    size_t room_ = 0, batch_ = 0;
    int64_t vocab_size_ = 0;
};
