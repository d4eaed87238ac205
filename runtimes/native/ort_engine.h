// An ONNX artifact opened by the ONNX Runtime that the user gave: what runtimes/ort_session.py does in Python.
#pragma once

#include "engine.h"
#include "ort_host.h"

#include <map>
#include <string>
#include <vector>

class OrtEngine : public Engine {
  public:
    // Starts the process that loads the library.
    OrtEngine(Artifact artifact, Options options, const OnnxRuntime & where);

    void load() override;
    json info() const override;
    int process() const override { return host_.process(); }
    Output forward(const Batch & batch) override;
    double time_forward(const Batch & batch) override;
    void decode(const std::vector<Token> & prompt, int64_t new_tokens, const Told & told) override;

  private:
    struct Port {  // an input or output of the graph: a size is -1 where it is free, with a name where it has one
        std::string name;
        int type;
        std::vector<int64_t> sizes;
        std::vector<std::string> symbols;
    };

    static std::vector<Port> ports(Reply & reply);
    const Port * input(const std::string & name) const;
    int64_t feed(Request & request, const std::vector<std::vector<Token>> & rows, int64_t length, int64_t past) const;
    Reply ask(const Request & request);
    Output taken(Reply & reply);
    Output pooled(const Output & hidden, const Batch & batch) const;
    Output run(const Batch & batch, double & seconds, bool wanted);

    OrtHost host_;
    std::vector<std::pair<std::string, std::string>> entries_;  // session config entries
    int64_t optimisation_ = 99;
    std::vector<Port> inputs_, past_;
    std::string output_;
    bool appends_ = false;  // `present` is the past with the new tokens behind it; else one buffer that is written on
};
