// An artifact folder: what artifact.json says, and whether the payload is what it says (edgestill/artifact.py).
#pragma once

#include <cstdint>
#include <string>

struct Artifact {
    std::string folder, entry;  // entry: absolute path of what the runtime opens
    std::string task;
    int64_t max_length = 0, vocab_size = 0;
    bool normalize = false;
};

// Read artifact.json and compare every payload file with its sha256; BadInput names what differs.
Artifact open_artifact(const std::string & folder);
