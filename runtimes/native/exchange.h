// The exchange folder: tensors travel as raw little-endian files beside the messages (docs/worker-protocol.md).
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

using json = nlohmann::json;

// sha256 as 64 hexadecimal digits.
std::string sha256_of(const void * data, size_t size);
std::string sha256_of_file(const std::string & path);  // throws BadInput when it can't be read

// A JSON file; BadInput names what is wrong with it.
json read_json(const std::string & path);

// A relative POSIX path below `folder`; BadInput when it would leave it.
std::string join_safely(const std::string & folder, const std::string & relative);

bool is_folder(const std::string & path);
bool is_file(const std::string & path);

// A value as Python shows it, cut short: the messages of both workers are the same.
std::string shown(const json & value);

struct Tensor {  // of int64 or int32, as it came
    std::string dtype;
    std::vector<int64_t> shape;
    std::vector<char> bytes;
    const int64_t * int64s() const { return reinterpret_cast<const int64_t *>(bytes.data()); }
};

class Exchange {
  public:
    explicit Exchange(std::string folder) : folder_(std::move(folder)) {}
    const std::string & folder() const { return folder_; }

    // Read the tensor that `reference` names and remove its file; name, dtype, size and sha256 are checked.
    Tensor take(const json & reference) const;
    // Write values and return their reference.
    json put(const void * data, const char * dtype, const std::vector<int64_t> & shape);

    template <typename T> json put(const std::vector<T> & values, const char * dtype) {
        return put(values.data(), dtype, {static_cast<int64_t>(values.size())});
    }

  private:
    std::string folder_;
    int count_ = 0;
};
