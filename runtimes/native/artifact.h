// An artifact folder: what artifact.json says, and whether the payload is what it says (edgestill/artifact.py).
#pragma once

#include <cstdint>
#include <string>

struct Artifact {
    std::string folder, entry;  // entry: absolute path of what the runtime opens
    std::string format, task;
    std::string output;  // the one that is asked for, where a graph has several
    std::string pooling;  // "mean", "cls", "last"; who does it says the next
    int64_t max_length = 0, vocab_size = 0;
    bool normalize = false, pooling_in_graph = false;
    bool foreign = false;  // exported by another tool
};

// Read artifact.json and compare every payload file with its sha256; BadInput names what differs.
Artifact open_artifact(const std::string & folder);
