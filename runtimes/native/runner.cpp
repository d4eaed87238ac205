// The native worker: one artifact, JSON lines on standard input and output, for devices without Python. GGUF runs in
// this process; ONNX in a second one, which loads the ONNX Runtime that the user gave (ort_host.h). The protocol is
// docs/worker-protocol.md; the behaviour is that of runtimes/service.py and worker.py.
//
//     edgestill-runner [FOLDER] [--threads N] [--parent PID] [--onnxruntime LIBRARY --host PROGRAM]

#include "artifact.h"
#include "engine.h"
#include "errors.h"
#include "exchange.h"
#include "machine.h"
#include "scoring.h"
#include "sensors.h"
#include "timing.h"

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <poll.h>
#include <thread>
#include <unistd.h>

namespace {

constexpr int PROTOCOL = 1;
constexpr double GRACE_SECONDS = 10;

const char * kind_name(json::value_t type) {
    switch (type) {
        case json::value_t::string: return "str";
        case json::value_t::object: return "dict";
        case json::value_t::array: return "list";
        default: return "int";
    }
}

// request[name] of a type, or BadInput.
json field(const json & request, const char * name, json::value_t type) {
    const json value = request.value(name, json());
    const bool fits = type == json::value_t::number_integer ? value.is_number_integer()
                      : type == json::value_t::number_float ? value.is_number()
                                                            : value.type() == type;
    if (!fits) {
        throw bad_input(request.value("op", json("?")).get<std::string>() + ": " + name + " is " + shown(value),
                        std::string(name) + " must be of type " + kind_name(type));
    }
    return value;
}

int64_t integer(const json & request, const char * name) { return field(request, name, json::value_t::number_integer); }

template <typename T> json or_null(const std::optional<T> & value) { return value ? json(*value) : json(); }

json highest(const json & a, const json & b) { return a.is_null() ? b : b.is_null() ? a : std::max(a, b); }

// One worker's state: a method an operation.
class Service {
  public:
    Service(std::string folder, int threads, OnnxRuntime onnxruntime)
        : default_folder_(std::move(folder)), threads_(threads), onnxruntime_(std::move(onnxruntime)) {}

    json handle(const json & request) {
        const json op = request.value("op", json());
        const auto found = op.is_string() ? operations().find(op) : operations().end();
        if (found == operations().end()) {
            throw worker_error("unknown operation " + shown(op), "known: hello, open, …, see docs/worker-protocol.md");
        }
        return (this->*found->second)(request);
    }

    std::string exchange_folder() {
        std::lock_guard<std::mutex> hold(lock_);
        return exchange_ ? exchange_->folder() : "";
    }

  private:
    using Operation = json (Service::*)(const json &);
    static const std::map<std::string, Operation> & operations() {
        static const std::map<std::string, Operation> known = {
            {"hello", &Service::hello},   {"open", &Service::open},
            {"info", &Service::info},     {"forward", &Service::forward},
            {"decode", &Service::decode}, {"score", &Service::score},
            {"facts", &Service::facts},   {"time_forward", &Service::time_forward},
            {"memory", &Service::memory}, {"time_decode", &Service::time_decode},
            {"sensors", &Service::sensors}, {"close", &Service::close},
        };
        return known;
    }

    json hello(const json & request) {
        const int64_t version = integer(request, "protocol");
        if (version != PROTOCOL) {
            throw worker_error("the client speaks protocol " + std::to_string(version) + ", this worker 1",
                               "use the same edgestill on both sides");
        }
        const std::string folder = field(request, "exchange", json::value_t::string);
        if (!is_folder(folder)) throw bad_input("exchange folder " + folder + " does not exist", "make it before hello");
        std::lock_guard<std::mutex> hold(lock_);
        exchange_ = std::make_unique<Exchange>(folder);
        json names = json::array();
        for (const auto & item : operations()) names.push_back(item.first);
        return {{"protocol", PROTOCOL}, {"worker", "edgestill-native"}, {"version", RUNNER_VERSION},
                {"operations", names},  {"machine", machine()},         {"system", "linux"},
                {"level", LEVEL}};
    }

    json open(const json & request) {
        if (!exchange_) throw worker_error("open before hello", "shake hands first");
        if (model_) throw worker_error("a model is open already", "one worker, one model: start another");
        std::string folder = default_folder_;
        if (request.contains("folder")) folder = field(request, "folder", json::value_t::string).get<std::string>();
        if (folder.empty()) throw worker_error("open without a folder", "name it in the message or on the command line");
        while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
        const Options options = read_options(request.value("options", json{{"threads", threads_}}));
        const double started = now_seconds();
        std::unique_ptr<Engine> engine = make_engine(open_artifact(folder), options, onnxruntime_);
        const int process = engine->process();
        loading_.watch(process);
        running_.watch(process);
        if (process) note_process(process);
        const double prepared = now_seconds();
        const json eviction = request.value("cold", json(false)) == json(true) ? evict_page_cache(folder) : json();
        const Reading baseline = read_memory(process);
        resets_ = reset_peak(process);
        loading_.start();
        const double begin = now_seconds();
        try {
            engine->load();
        } catch (...) {
            loading_.stop();
            throw;
        }
        const double seconds = now_seconds() - begin;
        loading_.stop();
        const Reading loaded = read_memory(process);
        model_ = std::move(engine);
        auto told = [](const Reading & reading, int64_t value) { return reading.told ? json(value) : json(); };
        memory_ = {{"baseline_anonymous", told(baseline, baseline.anonymous)},
                   {"baseline_file_backed", told(baseline, baseline.file_backed)},
                   {"baseline_rss", told(baseline, baseline.rss)},
                   {"loaded_anonymous", told(loaded, loaded.anonymous)},
                   {"load_peak_rss", resets_ ? told(loaded, loaded.peak) : json()}};
        reset_peak(process);
        running_.sample();
        return {{"info", model_->info()},
                {"load_seconds", seconds},
                {"prepare_seconds", prepared - started},
                {"cold", eviction}};
    }

    json info(const json &) { return {{"info", model().info()}}; }

    json forward(const json & request) {
        const Batch batch = batch_of(request);
        const Output output = sampled([&] { return model_->forward(batch); });
        return {{"output", exchange_->put(output.values.data(), "float32", output.shape)}};
    }

    json decode(const json & request) {
        const auto [prompt, count] = prompt_of(request);
        const bool wanted = request.value("logits", json(false)) == json(true);
        std::vector<float> logits;
        json ids = json::array(), seconds = json::array();
        sampled([&] {
            model_->decode(prompt, count, [&](Token id, const float * row, double took) {
                ids.push_back(id);
                seconds.push_back(took);
                if (wanted) logits.insert(logits.end(), row, row + model_->vocab_size());
            });
            return 0;
        });
        const std::vector<int64_t> shape = {int64_t(ids.size()), model_->vocab_size()};
        return {{"ids", ids},
                {"seconds", seconds},
                {"logits", wanted ? exchange_->put(logits.data(), "float32", shape) : json()}};
    }

    json score(const json & request) {
        model();
        const std::string folder = field(request, "reference", json::value_t::string);
        const int64_t size = request.contains("batch_size") ? integer(request, "batch_size") : 8;
        return {{"arrays", sampled([&] { return ::score(*model_, *exchange_, folder, size); })}};
    }

    json time_forward(const json & request) {
        const Batch batch = batch_of(request);
        auto call = [&] { return model_->time_forward(batch); };
        return sampled([&] { return time_calls(bounds_of(request), call, [](const json & one) -> double { return one; }); });
    }

    json time_decode(const json & request) {
        const auto [prompt, count] = prompt_of(request);
        auto call = [&, prompt = prompt, count = count]() -> json {
            std::vector<double> steps;
            model_->decode(prompt, count, [&](Token, const float *, double took) { steps.push_back(took); });
            return {{"first_s", steps[0]}, {"tokens_s", std::vector<double>(steps.begin() + 1, steps.end())}};
        };
        auto length = [](const json & run) {
            double sum = run.at("first_s");
            for (const json & step : run.at("tokens_s")) sum += step.get<double>();
            return sum;
        };
        return sampled([&] { return time_calls(bounds_of(request), call, length); });
    }

    json memory(const json &) {
        model();
        const Reading now = read_memory(model_->process());
        const json peak = now.told ? json(now.peak) : json();
        json reason;
        if (!running_.anonymous) reason = "/proc/self/status does not tell anonymous from file-backed memory";
        else if (!resets_) reason = "/proc/self/clear_refs can't be written: one peak_rss for loading and running";
        json told = memory_;
        told.update({{"load_anonymous", or_null(loading_.anonymous)},
                     {"run_anonymous", or_null(running_.anonymous)},
                     {"peak_anonymous", highest(or_null(loading_.anonymous), or_null(running_.anonymous))},
                     {"peak_file_backed", highest(or_null(loading_.file_backed), or_null(running_.file_backed))},
                     {"run_peak_rss", resets_ ? peak : json()},
                     {"peak_rss", highest(memory_["load_peak_rss"], peak)},
                     {"samples", loading_.samples + running_.samples},
                     {"reason", reason}});
        return told;
    }

    json facts(const json & request) { return machine_facts(root_of(request)); }

    json sensors(const json & request) { return read_sensors(root_of(request)); }

    json close(const json &) {
        model_.reset();
        return json::object();
    }

    // The second process is ours as well: whoever counts what a worker uses of a device finds it here.
    void note_process(int process) const {
        const std::string path = exchange_->folder() + "/host.pid";
        if (FILE * file = std::fopen(path.c_str(), "w")) {
            std::fprintf(file, "%d\n", process);
            std::fclose(file);
        }
    }

    Engine & model() {
        if (!model_) throw worker_error("no model is open", "send open first");
        return *model_;
    }

    Batch batch_of(const json & request) {
        model();
        const json ids = field(request, "ids", json::value_t::object), mask = field(request, "mask", json::value_t::object);
        const Tensor taken = exchange_->take(ids);
        return model_->check_batch(taken, exchange_->take(mask));
    }

    std::pair<std::vector<Token>, int64_t> prompt_of(const json & request) {
        model();
        const json ids = field(request, "prompt_ids", json::value_t::array);
        const int64_t count = integer(request, "max_new_tokens");
        return {model_->check_prompt(ids, count, request["op"]), count};
    }

    // Where `proc` and `sys` are looked for: a test has copies of a board's.
    static std::string root_of(const json & request) {
        const json root = request.value("root", json());
        return root.is_string() ? root.get<std::string>() : "";
    }

    static Bounds bounds_of(const json & request) {
        return {integer(request, "repeats"), integer(request, "warmup"),
                field(request, "max_seconds", json::value_t::number_float)};
    }

    // Do `work` while memory is sampled.
    template <typename Work> auto sampled(Work work) -> decltype(work()) {
        running_.start();
        try {
            auto result = work();
            running_.stop();
            return result;
        } catch (...) {
            running_.stop();
            throw;
        }
    }

    std::string default_folder_;
    int threads_;
    OnnxRuntime onnxruntime_;
    std::mutex lock_;
    std::unique_ptr<Exchange> exchange_;
    std::unique_ptr<Engine> model_;
    PeakSampler loading_, running_;
    json memory_;
    bool resets_ = false;
};

// Lines of requests, read by a thread of its own, so that a vanished client is noticed while a request is worked on.
class Requests {
  public:
    Requests(int input, int parent, Service & service) : input_(input), parent_(parent), service_(service) {
        std::thread([this] { read_all(); }).detach();
    }

    std::string next() {
        std::unique_lock<std::mutex> hold(lock_);
        ready_.wait(hold, [this] { return !lines_.empty(); });
        std::string line = std::move(lines_.front());
        lines_.pop_front();
        return line;
    }

    // End the process when a request is not done by then: its client has given up by now.
    void set_deadline(double seconds) { deadline_ = now_seconds() + std::max(seconds, 0.0); }
    void clear_deadline() { deadline_ = 0; }

  private:
    [[noreturn]] void read_all() {
        std::string buffer;
        std::vector<char> chunk(1 << 16);
        while (true) {
            pollfd waiting = {input_, POLLIN, 0};
            const int ready = poll(&waiting, 1, 200);
            const double deadline = deadline_;
            if (deadline > 0 && now_seconds() > deadline) {
                std::fprintf(stderr, "edgestill-runner: a request is not done in its time\n");
                abandon(1);
            }
            if (ready == 0) {
                if (parent_ && getppid() != parent_) abandon(0);
                continue;
            }
            const ssize_t got = ready > 0 ? read(input_, chunk.data(), chunk.size()) : -1;
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) abandon(0);
            buffer.append(chunk.data(), got);
            for (size_t end; (end = buffer.find('\n')) != std::string::npos; buffer.erase(0, end + 1)) {
                std::lock_guard<std::mutex> hold(lock_);
                lines_.push_back(buffer.substr(0, end));
                ready_.notify_one();
            }
        }
    }

    // Nobody is left to read the answer: remove the exchange folder, which the client can't any more, and end.
    [[noreturn]] void abandon(int status) {
        const std::string folder = service_.exchange_folder();
        std::error_code ignored;
        if (!folder.empty()) std::filesystem::remove_all(folder, ignored);
        _exit(status);
    }

    int input_, parent_;
    Service & service_;
    std::atomic<double> deadline_{0};
    std::mutex lock_;
    std::condition_variable ready_;
    std::deque<std::string> lines_;
};

json failure(const std::string & kind, const std::string & message, const std::string & hint) {
    return {{"ok", false}, {"error", {{"kind", kind}, {"message", message}, {"hint", hint}}}};
}

// The reply to one line. No error of a request ends the worker.
json answer(Service & service, Requests & requests, const std::string & line, bool & last) {
    const json request = json::parse(line, nullptr, /* allow_exceptions */ false);
    json reply, id;
    try {
        if (!request.is_object()) {
            throw worker_error("not a protocol message: " + shown(line), "one JSON object a line is expected");
        }
        id = request.value("id", json());
        const json timeout = request.value("timeout_s", json());
        if (timeout.is_number() && timeout != 0) requests.set_deadline(timeout.get<double>() + GRACE_SECONDS);
        reply = {{"ok", true}, {"result", service.handle(request)}};
        last = request["op"] == "close";
    } catch (const Error & error) {
        reply = failure(error.kind, error.what(), error.hint);
    } catch (const std::bad_alloc &) {
        reply = failure("ResourceExhausted", "the worker ran out of memory", "use a smaller batch or length");
    } catch (const std::exception & error) {
        reply = failure("WorkerError", error.what(), "a bug, please report it");
    }
    requests.clear_deadline();
    reply["id"] = id;
    return reply;
}

void write_line(int output, const std::string & line) {
    for (size_t done = 0; done < line.size();) {
        const ssize_t wrote = write(output, line.data() + done, line.size() - done);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) _exit(0);
        done += wrote;
    }
}

int usage(const char * wrong) {
    std::fprintf(stderr, "edgestill-runner: %s\nusage: edgestill-runner [FOLDER] [--threads N] [--parent PID] "
                 "[--onnxruntime LIBRARY --host PROGRAM]\n", wrong);
    return 2;
}

}  // namespace

int main(int argc, char ** argv) {
    std::string folder;
    OnnxRuntime onnxruntime;
    int threads = 2, parent = 0;
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i];
        if (word == "--threads" || word == "--parent") {
            const int value = i + 1 < argc ? std::atoi(argv[++i]) : 0;
            if (value < 1) return usage((word + " needs a number").c_str());
            (word == "--threads" ? threads : parent) = value;
        } else if (word == "--onnxruntime" || word == "--host") {
            if (i + 1 == argc) return usage((word + " needs a path").c_str());
            (word == "--host" ? onnxruntime.host : onnxruntime.library) = argv[++i];
        } else if (word.rfind("--", 0) == 0 || !folder.empty()) {
            return usage(("unknown argument " + word).c_str());
        } else {
            folder = word;
        }
    }
    if (onnxruntime.host.empty() != onnxruntime.library.empty()) return usage("--onnxruntime and --host go together");
    // Both ends move to descriptors that no library knows: nothing but messages may reach the client.
    const int input = fcntl(0, F_DUPFD_CLOEXEC, 3), output = fcntl(1, F_DUPFD_CLOEXEC, 3);
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    close(null);
    dup2(2, 1);
    std::signal(SIGPIPE, SIG_IGN);
    Service service(folder, threads, onnxruntime);
    Requests requests(input, parent, service);
    for (bool last = false; !last;) {
        const json reply = answer(service, requests, requests.next(), last);
        write_line(output, reply.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
    }
    _exit(0);  // the reader waits for input still
}
