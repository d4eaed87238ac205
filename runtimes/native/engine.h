// A model opened by a runtime on the CPU: what the worker asks of it, whichever runtime that is.
#pragma once

#include "artifact.h"
#include "exchange.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

using Token = int32_t;

struct Options {  // `extra` is the runtime's own: each engine checks it
    int threads = 2;
    json backend, extra = json::object();
};

// What `open` may say; BadInput for anything else.
Options read_options(const json & raw);

struct Batch {  // checked: right padding, ids of the vocabulary
    int64_t rows = 0, length = 0;
    std::vector<std::vector<Token>> tokens;  // of each row, without padding
};

struct Output {  // [rows, length, vocab or classes], or [rows, classes or width]
    std::vector<int64_t> shape;
    std::vector<float> values;
};

// Called with each token, the logits that it was chosen from and the seconds since the one before, as soon as it is
// known; what happens in the call is not timed.
using Told = std::function<void(Token, const float *, double)>;

class Engine {
  public:
    Engine(Artifact artifact, Options options) : artifact_(std::move(artifact)), options_(std::move(options)) {}
    virtual ~Engine() = default;
    Engine(const Engine &) = delete;

    const std::string & task() const { return artifact_.task; }
    bool generates() const { return artifact_.task == "text-generation"; }
    int64_t vocab_size() const { return artifact_.vocab_size; }

    // Open the model: what `load_seconds` counts. Libraries were loaded by the constructor.
    virtual void load() = 0;
    virtual json info() const = 0;
    // The process whose memory the model takes; 0: this one.
    virtual int process() const { return 0; }

    Batch check_batch(const Tensor & ids, const Tensor & mask) const;
    std::vector<Token> check_prompt(const json & ids, int64_t new_tokens, const std::string & op) const;

    virtual Output forward(const Batch & batch) = 0;
    // The seconds that `forward` takes.
    virtual double time_forward(const Batch & batch);
    // Greedy: exactly `new_tokens` tokens.
    virtual void decode(const std::vector<Token> & prompt, int64_t new_tokens, const Told & told) = 0;

  protected:
    json describe(const std::string & runtime, const std::string & version, const std::string & backend,
                  bool decodes, const json & placement) const;

    Artifact artifact_;
    Options options_;
};

struct OnnxRuntime {  // where the user's library and the program that loads it lie; empty: there is none
    std::string library, host;
};

// The engine of the artifact's format, its libraries loaded.
std::unique_ptr<Engine> make_engine(Artifact artifact, Options options, const OnnxRuntime & onnxruntime);

// Scale the vector to length 1.
void normalize(float * vector, int64_t width);
