// The process of ONNX Runtime as the runner holds it: started, asked, ended (wire.h says what is said).
#pragma once

#include "ort_api.h"
#include "wire.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// What the host answers that it can't do: the runtime's own words.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Request {
  public:
    Request() = default;  // a part of one
    explicit Request(int64_t verb) { number(verb); }
    Request & number(int64_t value);
    Request & text(const std::string & value) { return data(value.data(), value.size()); }
    Request & data(const void * from, size_t bytes);
    Request & shape(int type, const std::vector<int64_t> & sizes);
    Request & append(const Request & part);
    const std::vector<char> & bytes() const { return bytes_; }

  private:
    std::vector<char> bytes_;
};

class Reply {
  public:
    explicit Reply(std::vector<char> bytes) : bytes_(std::move(bytes)) {}
    int64_t number();
    std::string text();

  private:
    std::vector<char> bytes_;
    size_t at_ = 0;
};

class OrtHost {
  public:
    // Starts it and waits until it has loaded the library. BadInput or MissingDependency when it can't.
    OrtHost(const std::string & program, const std::string & library);
    ~OrtHost();
    OrtHost(const OrtHost &) = delete;

    const std::string & version() const { return version_; }
    int process() const { return process_; }

    Reply ask(const Request & request);  // throws Refusal
    void take(void * to, size_t bytes);  // what follows a reply

  private:
    Reply answer();
    void read_all(void * to, size_t bytes);
    void end();
    [[noreturn]] void mourn();

    int channel_ = -1, process_ = 0;
    std::string version_;
};
