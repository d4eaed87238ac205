#include "exchange.h"

#include "errors.h"

extern "C" {
#include "hash/sha256/sha256.h"
}

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <sys/stat.h>
#include <unistd.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are written as they lie in memory");

namespace {

const std::vector<std::pair<std::string, int>> DTYPES = {{"float32", 4}, {"float64", 8}, {"int32", 4},
                                                         {"int64", 8},   {"uint8", 1},   {"bool", 1}};

std::string hex(const unsigned char * digest) {
    static const char digits[] = "0123456789abcdef";
    std::string text;
    for (int i = 0; i < SHA256_DIGEST_SIZE; i++) {
        text += digits[digest[i] >> 4];
        text += digits[digest[i] & 15];
    }
    return text;
}

using File = std::unique_ptr<FILE, int (*)(FILE *)>;

File open_file(const std::string & path, const char * mode) { return File(std::fopen(path.c_str(), mode), std::fclose); }

}  // namespace

std::string sha256_of(const void * data, size_t size) {
    sha256_t state;
    unsigned char digest[SHA256_DIGEST_SIZE];
    sha256_init(&state);
    sha256_update(&state, static_cast<const unsigned char *>(data), size);
    sha256_final(&state, digest);
    return hex(digest);
}

std::string sha256_of_file(const std::string & path) {
    File file = open_file(path, "rb");
    if (!file) throw bad_input(path + " can't be read: " + std::strerror(errno), "check its permissions");
    sha256_t state;
    sha256_init(&state);
    std::vector<unsigned char> chunk(1 << 20);
    size_t got;
    while ((got = std::fread(chunk.data(), 1, chunk.size(), file.get())) > 0) {
        sha256_update(&state, chunk.data(), got);
    }
    unsigned char digest[SHA256_DIGEST_SIZE];
    sha256_final(&state, digest);
    return hex(digest);
}

bool is_folder(const std::string & path) {
    struct stat status;
    return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool is_file(const std::string & path) {
    struct stat status;
    return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

json read_json(const std::string & path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw bad_input(path + " does not exist", "check the path");
    std::stringstream text;
    text << stream.rdbuf();
    json parsed = json::parse(text.str(), nullptr, /* allow_exceptions */ false);
    if (parsed.is_discarded()) throw bad_input(path + " is not JSON", "make it again");
    return parsed;
}

std::string join_safely(const std::string & folder, const std::string & relative) {
    bool leaves = relative.empty() || relative[0] == '/' || relative.find('\0') != std::string::npos;
    std::stringstream parts(relative);
    for (std::string part; std::getline(parts, part, '/');) leaves = leaves || part == "..";
    if (leaves) throw bad_input("path " + shown(relative) + " leaves its folder", "refused");
    return folder + "/" + relative;
}

std::string shown(const json & value) {
    std::string text = value.is_null() ? "None" : value.is_boolean() ? (value.get<bool>() ? "True" : "False") : "";
    if (text.empty()) text = value.dump(-1, ' ', false, json::error_handler_t::replace);
    if (value.is_string() && text.find('\'') == std::string::npos) text = "'" + text.substr(1, text.size() - 2) + "'";
    return text.size() <= 80 ? text : text.substr(0, 80) + " …";
}

Tensor Exchange::take(const json & reference) const {
    bool whole = reference.is_object() && reference.contains("shape") && reference["shape"].is_array();
    for (const char * name : {"file", "dtype", "sha256"}) {
        whole = whole && reference.contains(name) && reference[name].is_string();
    }
    Tensor tensor;
    int64_t count = 1;
    if (whole) {
        for (const json & size : reference["shape"]) {
            if (!size.is_number_integer() || size < 0 || size > (int64_t(1) << 40)) {
                whole = false;
                break;
            }
            tensor.shape.push_back(size);
            whole = !__builtin_mul_overflow(count, tensor.shape.back(), &count) && count < (int64_t(1) << 48);
            if (!whole) break;
        }
    }
    if (!whole) throw worker_error("not a tensor reference: " + shown(reference), "file, dtype, shape, sha256");
    const std::string file = reference["file"];
    tensor.dtype = reference["dtype"];
    int width = 0;
    for (const auto & [name, size] : DTYPES) width = name == tensor.dtype ? size : width;
    if (!width) throw worker_error("tensor " + file + ": unknown dtype " + tensor.dtype, "known: float32 … bool");
    if (file.find('/') != std::string::npos) throw bad_input("path " + shown(file) + " leaves its folder", "refused");
    const std::string path = join_safely(folder_, file);
    struct stat status;
    if (stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) {
        throw worker_error("tensor file " + file + " is missing", "write the file before the message that names it");
    }
    if (status.st_size != count * width) {
        throw worker_error("tensor " + file + ": " + std::to_string(status.st_size) + " bytes do not fit its shape",
                           "raw row-major values, nothing else");
    }
    tensor.bytes.resize(count * width);
    File stream = open_file(path, "rb");
    bool read = stream && std::fread(tensor.bytes.data(), 1, tensor.bytes.size(), stream.get()) == tensor.bytes.size();
    unlink(path.c_str());
    if (!read || sha256_of(tensor.bytes.data(), tensor.bytes.size()) != reference["sha256"].get<std::string>()) {
        throw worker_error("tensor " + file + " does not match its sha256", "it was damaged on the way");
    }
    return tensor;
}

json Exchange::put(const void * data, const char * dtype, const std::vector<int64_t> & shape) {
    size_t size = 1;
    for (int64_t length : shape) size *= length;
    for (const auto & [name, width] : DTYPES) size *= name == dtype ? width : 1;
    const std::string file = "w" + std::to_string(++count_) + ".bin", path = folder_ + "/" + file;
    File stream = open_file(path, "wb");
    bool written = stream && std::fwrite(data, 1, size, stream.get()) == size && std::fflush(stream.get()) == 0;
    if (!written) {
        const int reason = errno;
        unlink(path.c_str());
        if (!is_folder(folder_)) throw worker_error("the exchange folder is gone: the worker is closed", "start another");
        throw Error("ResourceExhausted", path + " can't be written: " + std::strerror(reason), "free some room");
    }
    return {{"file", file}, {"dtype", dtype}, {"shape", shape}, {"sha256", sha256_of(data, size)}};
}
