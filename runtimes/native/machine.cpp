#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <map>
#include <sched.h>
#include <set>
#include <sstream>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

namespace fs = std::filesystem;

namespace {

// CPU features that decide which kernels a runtime picks: the same as in runtimes/machine.py.
const char * const FLAGS[] = {"avx2",     "fma",     "f16c",    "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
                              "amx_int8", "amx_bf16", "asimd",   "asimdhp", "asimddp",     "i8mm",        "bf16",
                              "sve",      "sve2",    "sme"};

std::string first_line(const std::string & path) {
    std::ifstream stream(path);
    std::string line;
    std::getline(stream, line);
    return line;
}

// From "0-3,6": musl's sysconf counts only those that this process may use.
long online_cores() {
    std::stringstream ranges(first_line("/sys/devices/system/cpu/online"));
    long count = 0;
    for (std::string range; std::getline(ranges, range, ',');) {
        const size_t dash = range.find('-');
        const long low = std::atol(range.c_str()), high = dash == std::string::npos ? low : std::atol(&range[dash + 1]);
        count += high - low + 1;
    }
    return count > 0 ? count : sysconf(_SC_NPROCESSORS_ONLN);
}

int64_t resident_bytes(int file, int64_t size) {
    if (size == 0) return 0;
    void * map = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) return -1;
    const int64_t page = sysconf(_SC_PAGESIZE);
    std::vector<unsigned char> flags((size + page - 1) / page);
    const bool told = mincore(map, size, flags.data()) == 0;
    munmap(map, size);
    const int64_t pages = std::count_if(flags.begin(), flags.end(), [](unsigned char flag) { return flag & 1; });
    return told ? std::min(size, pages * page) : -1;
}

std::string process_file(int process, const char * name) {
    return "/proc/" + (process ? std::to_string(process) : "self") + "/" + name;
}

}  // namespace

Reading read_memory(int process) {
    Reading reading;
    char text[1 << 14];
    const int file = open(process_file(process, "status").c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return reading;
    const ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    if (size <= 0) return reading;
    text[size] = 0;
    auto field = [&](const char * name) -> int64_t {
        const char * found = std::strstr(text, name);
        return found ? std::atoll(found + std::strlen(name)) * 1024 : -1;
    };
    reading.anonymous = field("RssAnon:");
    reading.file_backed = field("RssFile:");
    reading.rss = field("VmRSS:");
    reading.peak = field("VmHWM:");
    reading.told = reading.anonymous >= 0 && reading.file_backed >= 0 && reading.peak >= 0;
    return reading;
}

bool reset_peak(int process) {
    const int file = open(process_file(process, "clear_refs").c_str(), O_WRONLY | O_CLOEXEC);
    if (file < 0) return false;
    const bool done = write(file, "5", 1) == 1;
    close(file);
    return done;
}

void PeakSampler::sample() {
    const Reading now = read_memory(process_);
    if (!now.told) return;
    std::lock_guard<std::mutex> hold(lock_);
    anonymous = std::max(anonymous.value_or(0), now.anonymous);
    file_backed = std::max(file_backed.value_or(0), now.file_backed);
    samples++;
}

void PeakSampler::start() {
    sample();
    running_ = true;
    thread_ = std::thread([this] {
        while (running_) {
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
            sample();
        }
    });
}

void PeakSampler::stop() {
    running_ = false;
    thread_.join();
    sample();
}

json evict_page_cache(const std::string & folder) {
    int64_t total = 0, resident = 0;
    for (const auto & item : fs::recursive_directory_iterator(folder)) {
        if (item.is_regular_file()) total += item.file_size();
    }
    auto answer = [&](bool worked, json bytes, json reason) -> json {
        return {{"worked", worked}, {"total_bytes", total}, {"resident_bytes", bytes}, {"reason", reason}};
    };
    for (const auto & item : fs::recursive_directory_iterator(folder)) {
        if (!item.is_regular_file()) continue;
        const int file = open(item.path().c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) return answer(false, nullptr, item.path().string() + " can't be read");
        fsync(file);
        posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
        const int64_t pages = resident_bytes(file, item.file_size());
        close(file);
        if (pages < 0) return answer(false, nullptr, "mincore does not tell whether pages are cached");
        resident += pages;
    }
    if (resident > total / 100) {
        return answer(false, resident,
                      std::to_string(resident) + " of " + std::to_string(total) + " bytes stayed in the page cache");
    }
    return answer(true, resident, nullptr);
}

std::string machine() {
    struct utsname name;
    return uname(&name) == 0 ? name.machine : "";
}

json machine_facts(const std::string & root) {
    struct utsname name = {};
    uname(&name);
    std::map<std::string, std::string> cpu;
    std::ifstream stream(root + "/proc/cpuinfo");
    for (std::string line; std::getline(stream, line);) {
        const size_t colon = line.find(':');
        if (colon == std::string::npos) continue;
        std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
        std::transform(key.begin(), key.end(), key.begin(), ::tolower);
        cpu.emplace(key, line.substr(std::min(line.size(), colon + 2)));
    }
    json label = cpu.count("model name") ? json(cpu["model name"]) : cpu.count("hardware") ? json(cpu["hardware"]) : json();
    if (label.is_null() && cpu.count("cpu part")) {
        const std::string maker = cpu.count("cpu implementer") ? cpu["cpu implementer"] : "?";
        label = "ARM implementer " + maker + " part " + cpu["cpu part"];
    }
    std::istringstream words(cpu.count("flags") ? cpu["flags"] : cpu["features"]);
    std::set<std::string> present;
    for (std::string word; words >> word;) present.insert(word);
    json flags = json::array();
    for (const char * flag : FLAGS) {
        if (present.count(flag)) flags.push_back(flag);
    }
    std::set<std::string> cores, governors;
    const long logical = online_cores();
    for (long core = 0; core < 1024; core++) {
        const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(core);
        if (!is_folder(folder)) break;
        const std::string place = first_line(folder + "/topology/core_id");
        if (!place.empty()) cores.insert(first_line(folder + "/topology/physical_package_id") + ":" + place);
        const std::string governor = first_line(folder + "/cpufreq/scaling_governor");
        if (!governor.empty()) governors.insert(governor);
    }
    std::string governor;
    for (const std::string & one : governors) governor += (governor.empty() ? "" : ", ") + one;
    cpu_set_t usable;
    CPU_ZERO(&usable);
    struct sysinfo memory = {};
    sysinfo(&memory);
    return {{"system", name.sysname},
            {"release", name.release},
            {"machine", name.machine},
            {"cpu", label},
            {"cpu_flags", flags},
            {"cores_physical", cores.empty() ? json() : json(cores.size())},
            {"cores_logical", logical},
            {"cores_usable", sched_getaffinity(0, sizeof usable, &usable) == 0 ? json(CPU_COUNT(&usable)) : json(logical)},
            {"memory_bytes", int64_t(memory.totalram) * memory.mem_unit},
            {"governor", governor.empty() ? json() : json(governor)},
            {"governor_reason", governor.empty() ? json("no cpufreq interface (a virtual machine, or not Linux)") : json()}};
}
