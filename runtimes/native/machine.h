// What the system tells about this process and its machine: memory, page cache, processor (Linux and Android).
#pragma once

#include "exchange.h"

#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

struct Reading {  // bytes that are resident now
    bool told = false;
    int64_t anonymous = 0, file_backed = 0, rss = 0, peak = 0;
};

// Of a process; 0: of this one.
Reading read_memory(int process = 0);
bool reset_peak(int process = 0);  // false where its clear_refs can't be written

// Highest anonymous and file-backed memory seen between start() and stop(), sampled every 10 ms.
class PeakSampler {
  public:
    void watch(int process) { process_ = process; }  // 0: this one
    void start();
    void stop();
    void sample();
    std::optional<int64_t> anonymous, file_backed;
    int samples = 0;

  private:
    std::mutex lock_;
    std::atomic<bool> running_{false};
    int process_ = 0;
    std::thread thread_;
};

// Drop a folder's files from the page cache, and look whether that worked.
json evict_page_cache(const std::string & folder);

std::string machine();  // uname -m
json machine_facts(const std::string & root);  // where `proc` and `sys` are looked for ("": this machine)
