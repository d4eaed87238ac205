#include "sensors.h"

#include "timing.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>

namespace fs = std::filesystem;

namespace {

std::optional<std::string> text_of(const fs::path & path) {  // a file of one value; some sensors answer with an error
    std::ifstream stream(path);
    std::string text((std::istreambuf_iterator<char>(stream)), {});
    if (!stream.is_open() || stream.bad()) return std::nullopt;
    const size_t end = text.find_last_not_of(" \t\r\n");
    return end == std::string::npos ? "" : text.substr(0, end + 1);
}

std::optional<double> number_of(const fs::path & path) {
    const std::optional<std::string> text = text_of(path);
    if (!text || text->empty()) return std::nullopt;
    const size_t digits = (*text)[0] == '-' ? 1 : 0;
    if (digits == text->size() || text->find_first_not_of("0123456789", digits) != std::string::npos) return std::nullopt;
    return std::stod(*text);
}

std::vector<fs::path> entries(const fs::path & folder) {
    std::vector<fs::path> found;
    std::error_code missing;
    for (const auto & item : fs::directory_iterator(folder, missing)) found.push_back(item.path());
    std::sort(found.begin(), found.end());
    return found;
}

// prefix0, prefix1 … in the order of their numbers.
std::vector<fs::path> numbered(const fs::path & folder, const std::string & prefix) {
    std::vector<std::pair<long, fs::path>> found;
    for (const fs::path & path : entries(folder)) {
        const std::string name = path.filename();
        const std::string rest = name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
        if (rest.empty() || rest.size() > 9 || rest.find_first_not_of("0123456789") != std::string::npos) continue;
        found.emplace_back(std::stol(rest), path);
    }
    std::sort(found.begin(), found.end());
    std::vector<fs::path> paths;
    for (auto & item : found) paths.push_back(item.second);
    return paths;
}

json or_null(const json & object) { return object.empty() ? json() : object; }

// Powercap's domains, the ranges at which their counters start anew, and why there are none.
std::string energy(const fs::path & root, json & joules, json & ranges) {
    std::string refused;
    for (const fs::path & zone : entries(root / "sys/class/powercap")) {
        const std::string folder = zone.filename();
        if (folder.find("-rapl:") == std::string::npos || folder.find("mmio") != std::string::npos) continue;
        if (refused.empty()) refused = folder;
        const auto value = number_of(zone / "energy_uj");
        std::string name = text_of(zone / "name").value_or("");
        if (!value || name.empty()) continue;
        if (joules.contains(name)) name += " (" + folder.substr(folder.find(':') + 1) + ")";
        joules[name] = *value / 1e6;
        const auto limit = number_of(zone / "max_energy_range_uj");
        if (limit && *limit != 0) ranges[name] = *limit / 1e6;
    }
    if (!refused.empty()) return refused + "/energy_uj can't be read: since 2020 Linux lets only root";
    return "no energy counter (powercap): a virtual machine, or a board without one";
}

json throttling(const fs::path & root) {
    json found = json::object();
    for (const fs::path & core : numbered(root / "sys/devices/system/cpu", "cpu")) {
        if (const auto count = number_of(core / "thermal_throttle/core_throttle_count")) {
            found["core_throttle_count"] = found.value("core_throttle_count", 0.0) + *count;
        }
        if (const auto count = number_of(core / "thermal_throttle/package_throttle_count")) {
            found["package_throttle_count"] = std::max(found.value("package_throttle_count", 0.0), *count);
        }
    }
    for (const fs::path & device : numbered(root / "sys/class/thermal", "cooling_device")) {
        const std::string name = text_of(device / "type").value_or("");
        std::string lower = name;
        std::transform(lower.begin(), lower.end(), lower.begin(), ::tolower);
        bool cools = false;
        for (const char * start : {"processor", "cpufreq", "thermal-cpufreq", "cpu"}) cools |= lower.rfind(start, 0) == 0;
        const auto state = number_of(device / "cur_state");
        if (cools && state) found[name + " (" + device.filename().string() + ")"] = *state;
    }
    return found;
}

}  // namespace

json read_sensors(const std::string & base) {
    const fs::path root = base.empty() ? "/" : base;
    json joules = json::object(), ranges = json::object(), degrees = json::object(), megahertz = json::object();
    const std::string no_energy = energy(root, joules, ranges);
    for (const fs::path & zone : numbered(root / "sys/class/thermal", "thermal_zone")) {
        const auto value = number_of(zone / "temp");
        if (!value || *value <= -100000 || *value >= 300000) continue;  // a zone that is off says -274000
        std::string name = text_of(zone / "type").value_or("");
        if (name.empty()) name = zone.filename();
        if (degrees.contains(name)) name += " (" + zone.filename().string() + ")";
        degrees[name] = *value / 1000;
    }
    for (const fs::path & core : numbered(root / "sys/devices/system/cpu", "cpu")) {
        if (const auto value = number_of(core / "cpufreq/scaling_cur_freq")) megahertz[core.filename()] = *value / 1000;
    }
    json battery, percent;
    for (const fs::path & supply : entries(root / "sys/class/power_supply")) {
        std::string type = text_of(supply / "type").value_or("");
        std::transform(type.begin(), type.end(), type.begin(), ::tolower);
        if (type != "battery") continue;
        if (const auto tenths = number_of(supply / "temp")) battery = *tenths / 10;
        if (const auto charge = number_of(supply / "capacity")) percent = int64_t(*charge);
        break;
    }
    json reading = {{"energy_j", or_null(joules)},         {"temperature_c", or_null(degrees)},
                    {"frequency_mhz", or_null(megahertz)}, {"throttling", or_null(throttling(root))},
                    {"battery_c", battery},                {"battery_percent", percent},
                    {"thermal_status", nullptr}};
    const json why = {{"energy_j", no_energy},
                      {"temperature_c", "no thermal zone that can be read"},
                      {"frequency_mhz", "no cpufreq interface"},
                      {"throttling", "no throttle counter and no cooling device of the processor"},
                      {"battery_c", "no battery"},
                      {"battery_percent", "no battery"},
                      {"thermal_status", "only Android tells it"}};
    json reasons = json::object();
    for (const auto & [name, value] : reading.items()) {
        if (value.is_null()) reasons[name] = why[name];
    }
    reading["reasons"] = reasons;
    reading["energy_range_j"] = joules.empty() ? json() : ranges;
    reading["time_s"] = now_seconds();
    return reading;
}
