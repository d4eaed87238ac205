// Raw seconds of repeated calls after a warm-up, with the rules of runtimes/timing.py. No statistics.
#pragma once

#include "errors.h"
#include "exchange.h"

#include <algorithm>
#include <chrono>
#include <vector>

inline double now_seconds() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count() / 1e9;
}

struct Bounds {
    int64_t repeats, warmup;
    double max_seconds;
};

// Calls until the last five lie within 10 %, but at least `warmup` and at most 5 * warmup + 5 times or `max_seconds`;
// then `repeats` calls, fewer when `max_seconds` are over, but one. `call` gives a sample, `seconds` its length.
template <typename Call, typename Seconds> json time_calls(const Bounds & bounds, Call call, Seconds seconds) {
    if (bounds.repeats < 1 || bounds.warmup < 0 || !(bounds.max_seconds > 0)) {
        throw bad_input("can't time " + std::to_string(bounds.repeats) + " repeats, " + std::to_string(bounds.warmup) +
                            " warm-up calls in " + std::to_string(bounds.max_seconds) + " s",
                        "repeats >= 1");
    }
    constexpr size_t window = 5;
    std::vector<double> before;
    double spent = 0;
    bool stable = bounds.warmup == 0;
    while (!stable && spent < bounds.max_seconds && before.size() < size_t(bounds.warmup) * 5 + window) {
        before.push_back(seconds(call()));
        spent += before.back();
        if (before.size() >= std::max<size_t>(bounds.warmup, window)) {
            std::vector<double> last(before.end() - window, before.end());
            std::sort(last.begin(), last.end());
            stable = last.back() - last.front() <= 0.1 * last[window / 2];
        }
    }
    json samples = json::array();
    for (spent = 0; samples.size() < size_t(bounds.repeats) && (samples.empty() || spent < bounds.max_seconds);) {
        samples.push_back(call());
        spent += seconds(samples.back());
    }
    return {{"samples", samples}, {"warmup", before}, {"stable", stable}};
}
