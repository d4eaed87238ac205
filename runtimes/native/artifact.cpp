#include "artifact.h"

#include "errors.h"
#include "exchange.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <sys/stat.h>

namespace fs = std::filesystem;

namespace {

const char * const AGAIN = "export it again; an artifact is never edited in place";

void check_payload(const std::string & folder, const json & manifest) {
    const std::string name = fs::path(folder).filename();
    std::set<std::string> known = {"artifact.json", "verdicts.jsonl"};
    std::vector<std::pair<std::string, std::string>> digests;
    for (const json & file : manifest.at("files")) {
        const std::string path = file.at("path"), wanted = file.at("sha256"), full = join_safely(folder, path);
        struct stat status;
        if (stat(full.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) {
            throw bad_input(name + ": payload file " + path + " is missing", AGAIN);
        }
        if (status.st_size != file.at("size_bytes").get<int64_t>() || sha256_of_file(full) != wanted) {
            throw bad_input(name + ": payload file " + path + " does not match its sha256", AGAIN);
        }
        known.insert(path);
        digests.emplace_back(path, wanted);
    }
    std::sort(digests.begin(), digests.end());
    json rows = json::array();
    for (const auto & [path, digest] : digests) rows.push_back({path, digest});
    const std::string text = rows.dump();
    if (sha256_of(text.data(), text.size()) != manifest.at("artifact_id").get<std::string>()) {
        throw bad_input(name + ": artifact_id does not match its files", AGAIN);
    }
    for (const auto & item : fs::recursive_directory_iterator(folder)) {
        const std::string path = fs::relative(item.path(), folder).generic_string();
        if (item.is_symlink()) throw bad_input(path + " is a symbolic link", "replace it with the file it points to");
        if (item.is_regular_file() && !known.count(path)) {
            throw bad_input(name + ": file " + path + " is not listed in artifact.json", "remove it");
        }
    }
}

}  // namespace

Artifact open_artifact(const std::string & folder) {
    if (!is_folder(folder)) {
        throw bad_input(folder + " is not an artifact folder", "pass a folder that holds artifact.json");
    }
    const std::string path = folder + "/artifact.json";
    const json manifest = read_json(path);
    try {
        if (manifest.at("schema_version") != 1) {
            throw bad_input(path + " has schema_version " + shown(manifest.at("schema_version")) + ", not 1",
                            "export it again with this version");
        }
        check_payload(folder, manifest);
        Artifact artifact;
        artifact.folder = folder;
        artifact.entry = join_safely(folder, manifest.at("entry"));
        artifact.format = manifest.at("format");
        artifact.task = manifest.at("task");
        artifact.max_length = manifest.at("max_length");
        artifact.vocab_size = manifest.at("vocab_size");
        artifact.normalize = manifest.value("normalize", false);
        artifact.pooling_in_graph = manifest.value("pooling_in_graph", false);
        const json pooling = manifest.value("pooling", json()), outputs = manifest.value("outputs", json::array());
        if (pooling.is_string()) artifact.pooling = pooling;
        if (!outputs.empty()) artifact.output = outputs.at(0).at("name");
        artifact.foreign = manifest.value("lineage", json::object()).contains("foreign");
        return artifact;
    } catch (const json::exception & error) {
        throw bad_input(path + " is not an artifact description: " + error.what(), "export it again");
    }
}
