// The errors that a worker reports: a class of edgestill.errors, one line, and what to do next.
#pragma once

#include <stdexcept>
#include <string>

struct Error : std::runtime_error {
    Error(std::string kind, const std::string & message, std::string hint)
        : std::runtime_error(message), kind(std::move(kind)), hint(std::move(hint)) {}
    std::string kind, hint;
};

inline Error bad_input(const std::string & message, const std::string & hint) { return {"BadInput", message, hint}; }
inline Error unsupported(const std::string & message, const std::string & hint) {
    return {"Unsupported", message, hint};
}
inline Error worker_error(const std::string & message, const std::string & hint) {
    return {"WorkerError", message, hint};
}
