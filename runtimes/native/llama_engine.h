// A GGUF artifact opened by llama.cpp: what runtimes/llamacpp_session.py does in Python.
#pragma once

#include "engine.h"

#include <llama.h>

class LlamaEngine : public Engine {
  public:
    LlamaEngine(Artifact artifact, Options options);
    ~LlamaEngine() override;

    void load() override;
    json info() const override;
    Output forward(const Batch & batch) override;
    void decode(const std::vector<Token> & prompt, int64_t new_tokens, const Told & told) override;

  private:
    enum class Kind { none, logits, decode, pooled };
    void open_context(Kind kind, size_t length, int outputs);
    void close_context();
    void forget();
    void feed(const Token * tokens, size_t count, bool all_logits);
    void run(const llama_batch & batch);
    int64_t width() const;
    std::vector<int64_t> shape(const Batch & batch) const;
    void pool(const std::vector<std::vector<Token>> & group, float * out);

    std::string kv_ = "f16", flash_;  // types of the KV cache; "auto", "on", "off"
    bool mmap_ = true;
    llama_model * model_ = nullptr;
    llama_context * context_ = nullptr;
    Kind kind_ = Kind::none;
    size_t room_ = 0, batch_ = 0;
};
