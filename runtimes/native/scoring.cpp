#include "scoring.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <regex>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr int64_t FORWARD_VALUES = int64_t(1) << 26;  // logits of one forward pass that are held at once

// A .npy file, memory-mapped: its own description, checked against its size.
class Array {
  public:
    Array(const std::string & path, const std::string & dtype, int width) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) throw bad_input(path + " does not exist", "make the reference again");
        struct stat status;
        fstat(file, &status);
        size_ = status.st_size;
        map_ = size_ >= 16 ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
        close(file);
        if (map_ == MAP_FAILED) throw bad_input(path + " is not a numpy array", "make the reference again");
        const char * bytes = static_cast<const char *>(map_);
        const bool old = bytes[6] == 1;  // the length of the header has two bytes in version 1, four later
        size_t length = 0, start = old ? 10 : 12;
        std::memcpy(&length, bytes + 8, old ? 2 : 4);
        const bool whole = std::memcmp(bytes, "\x93NUMPY", 6) == 0 && start + length <= size_;
        const std::string header = whole ? std::string(bytes + start, length) : "";
        std::smatch found;
        static const std::regex shape_pattern(R"('shape':\s*\(([\d,\s]*)\))"), type_pattern(R"('descr':\s*'([^']*)')");
        const bool plain = header.find("'fortran_order': False") != std::string::npos;
        if (!plain || !std::regex_search(header, found, type_pattern)) {
            throw bad_input(path + " is not a numpy array in row-major order", "make the reference again");
        }
        if (found[1] != dtype) throw bad_input(path + " holds " + found[1].str() + ", not " + dtype, "make it again");
        int64_t count = 1;
        if (std::regex_search(header, found, shape_pattern)) {
            const std::string text = found[1];
            static const std::regex number(R"(\d{1,15})");
            for (std::sregex_iterator next(text.begin(), text.end(), number), end; next != end; ++next) {
                shape.push_back(std::stoll(next->str()));
                if (__builtin_mul_overflow(count, shape.back(), &count)) count = -1;
            }
        }
        if (count < 0 || uint64_t(count) > size_ || start + length + count * width != size_) {
            throw bad_input(path + " is cut short", "make the reference again");
        }
        data_ = bytes + start + length;
    }
    ~Array() { munmap(map_, size_); }
    Array(const Array &) = delete;

    template <typename T> const T * at(int64_t index) const { return reinterpret_cast<const T *>(data_) + index; }
    std::vector<int64_t> shape;

  private:
    void * map_;
    size_t size_;
    const char * data_;
};

// Log-probabilities of one row, in float64.
void log_softmax(const float * row, int64_t size, std::vector<double> & out) {
    double top = -INFINITY, sum = 0;
    bool nan = false;
    for (int64_t i = 0; i < size; i++) {
        top = std::max<double>(top, row[i]);
        nan = nan || std::isnan(row[i]);
    }
    if (nan) top = NAN;
    const double shift = std::isfinite(top) ? top : 0;
    out.resize(size);
    for (int64_t i = 0; i < size; i++) {
        out[i] = row[i] - shift;
        sum += std::exp(out[i]);
    }
    const double log_sum = std::log(sum);
    for (int64_t i = 0; i < size; i++) out[i] -= log_sum;
}

double kl(const std::vector<double> & log_p, const std::vector<double> & log_q) {
    double sum = 0;
    for (size_t i = 0; i < log_p.size(); i++) {
        if (std::isnan(log_q[i])) return NAN;
        const double p = std::exp(log_p[i]);
        if (p > 0) sum += p * (log_p[i] - log_q[i]);  // 0 log 0 = 0
    }
    return sum;
}

int64_t argmax(const float * row, int64_t size) { return std::max_element(row, row + size) - row; }

bool clean(const float * row, int64_t size) {
    return std::none_of(row, row + size, [](float value) { return std::isnan(value); });
}

// How many entries stand before `index`: the greater ones, and equal ones with a lower id.
int64_t rank(const float * row, int64_t size, int64_t index) {
    int64_t before = 0;
    for (int64_t i = 0; i < size; i++) before += row[i] > row[index] || (row[i] == row[index] && i < index);
    return before;
}

struct Reduced {
    std::vector<double> kl, logprob, reference_logprob, confidence, cosine;
    std::vector<uint8_t> top1, top5, right;
    std::vector<int64_t> window;
    std::vector<float> values;

    void token(const float * said, const float * got, int64_t size, int64_t target, int64_t index) {
        log_softmax(said, size, log_p);
        log_softmax(got, size, log_q);
        const bool whole = clean(got, size);
        const int64_t best = argmax(said, size), own = argmax(got, size);
        kl.push_back(::kl(log_p, log_q));
        top1.push_back(whole && best == own);
        top5.push_back(whole && rank(got, size, best) < 5);
        logprob.push_back(log_q[target]);
        reference_logprob.push_back(log_p[target]);
        confidence.push_back(whole ? std::exp(*std::max_element(log_q.begin(), log_q.end())) : NAN);
        right.push_back(whole && own == target);
        window.push_back(index);
    }
    void likely(const float * got, int64_t size, int64_t target, int64_t index) {
        log_softmax(got, size, log_q);
        logprob.push_back(log_q[target]);
        right.push_back(clean(got, size) && argmax(got, size) == target);
        window.push_back(index);
    }
    void example(const float * said, const float * got, int64_t size) {
        log_softmax(said, size, log_p);
        log_softmax(got, size, log_q);
        kl.push_back(::kl(log_p, log_q));
        top1.push_back(clean(got, size) && argmax(said, size) == argmax(got, size));
        values.insert(values.end(), got, got + size);
    }
    void vector(const float * said, const float * got, int64_t size) {
        double dot = 0, a = 0, b = 0;
        for (int64_t i = 0; i < size; i++) {
            dot += double(said[i]) * got[i];
            a += double(said[i]) * said[i];
            b += double(got[i]) * got[i];
        }
        const double norms = std::sqrt(a) * std::sqrt(b);
        cosine.push_back(norms != 0 ? dot / norms : 0);
        values.insert(values.end(), got, got + size);
    }

  private:
    std::vector<double> log_p, log_q;
};

void same_width(const std::vector<int64_t> & got, const std::vector<int64_t> & wanted) {
    if (got != wanted) {
        throw bad_input("the model gives " + json(got).dump() + ", the reference has " + json(wanted).dump(),
                        "compare like with like");
    }
}

// Rows `first` … of a mapped matrix, each cut to its first `longest` values.
Tensor cut(const Array & from, int64_t first, int64_t count, int64_t longest) {
    Tensor tensor{"int64", {count, longest}, {}};
    for (int64_t row = first; row < first + count; row++) {
        const char * begin = reinterpret_cast<const char *>(from.at<int64_t>(row * from.shape[1]));
        tensor.bytes.insert(tensor.bytes.end(), begin, begin + longest * sizeof(int64_t));
    }
    return tensor;
}

std::vector<int64_t> real_lengths(const Array & mask) {
    std::vector<int64_t> lengths;
    for (int64_t row = 0; row < mask.shape[0]; row++) {
        const int64_t * real = mask.at<int64_t>(row * mask.shape[1]);
        lengths.push_back(std::count(real, real + mask.shape[1], 1));
    }
    return lengths;
}

int64_t rows_at_once(int64_t batch_size, int64_t values_a_row) {
    return std::min(batch_size, std::max<int64_t>(1, FORWARD_VALUES / std::max<int64_t>(1, values_a_row)));
}

// A folder that asks how likely given continuations are (edgestill/runtimes/likelihood.py).
json score_likelihood(Engine & model, Exchange & exchange, const std::string & folder, int64_t batch_size) {
    if (!model.generates()) {
        throw bad_input("likelihoods are asked of a " + model.task() + " model", "only text generation has them");
    }
    const Array ids(folder + "/ids.npy", "<i8", 8), mask(folder + "/mask.npy", "<i8", 8);
    const Array starts(folder + "/starts.npy", "<i8", 8);
    if (ids.shape.size() != 2 || mask.shape != ids.shape || ids.shape[0] == 0 ||
        starts.shape != std::vector<int64_t>{ids.shape[0]}) {
        throw bad_input(folder + ": shapes don't fit together", "int64 [N, T], [N, T] and [N], N at least 1");
    }
    const std::vector<int64_t> lengths = real_lengths(mask);
    const int64_t rows = ids.shape[0], length = ids.shape[1];
    for (int64_t row = 0; row < rows; row++) {
        const int64_t start = *starts.at<int64_t>(row);
        if (start < 1 || start >= lengths[row]) {
            throw bad_input(folder + ": a row has no continuation or no context", "at least one token of each");
        }
    }
    batch_size = rows_at_once(batch_size, length * model.vocab_size());
    Reduced found;
    for (int64_t first = 0; first < rows; first += batch_size) {
        const int64_t count = std::min(batch_size, rows - first);
        // The last real token of a row is only predicted, never fed.
        const int64_t longest = *std::max_element(&lengths[first], &lengths[first] + count) - 1;
        Tensor fed = cut(ids, first, count, longest), fed_mask = cut(mask, first, count, longest);
        int64_t * real = reinterpret_cast<int64_t *>(fed_mask.bytes.data());
        for (int64_t row = first; row < first + count; row++) {
            for (int64_t place = 0; place < longest; place++) *real++ = place < lengths[row] - 1;
        }
        const Output output = model.forward(model.check_batch(fed, fed_mask));
        const int64_t width = output.shape.back();
        for (int64_t row = 0; row < count; row++) {
            for (int64_t place = *starts.at<int64_t>(first + row); place < lengths[first + row]; place++) {
                const int64_t target = *ids.at<int64_t>((first + row) * length + place);
                if (target < 0 || target >= width) {
                    throw bad_input("token id " + std::to_string(target) + ", the vocabulary has " + std::to_string(width),
                                    "use the model's own tokenizer");
                }
                found.likely(output.values.data() + (row * longest + place - 1) * width, width, target, first + row);
            }
        }
    }
    return {{"logprob", exchange.put(found.logprob, "float64")},
            {"right", exchange.put(found.right, "bool")},
            {"window", exchange.put(found.window, "int64")}};
}

}  // namespace

json score(Engine & model, Exchange & exchange, const std::string & reference, int64_t batch_size) {
    if (batch_size < 1) throw bad_input("batch size " + std::to_string(batch_size), "at least 1");
    const json described = read_json(reference + "/reference.json");
    const std::string task = described.is_object() ? described.value("task", "") : "";
    const bool tokens = task == "text-generation", embeds = task == "feature-extraction";
    const bool labels = task == "token-classification";
    if (described.is_object() && described.value("likelihood", json(false)) == json(true)) {
        return score_likelihood(model, exchange, reference, batch_size);
    }
    if (!tokens && !embeds && !labels && task != "text-classification") {
        throw bad_input(reference + "/reference.json: unknown task " + shown(task), "known: those of the model");
    }
    const Array ids(reference + "/ids.npy", "<i8", 8), mask(reference + "/mask.npy", "<i8", 8);
    const Array said(reference + (embeds ? "/embeddings.npy" : "/logits.npy"), "<f4", 4);
    const bool each = tokens || labels;  // it answers at every token
    if (ids.shape.size() != 2 || mask.shape != ids.shape || said.shape.size() != (each ? 3u : 2u) ||
        said.shape[0] != ids.shape[0] || (each && said.shape[1] != ids.shape[1])) {
        throw bad_input(reference + ": shapes don't fit together", "make the reference again");
    }
    if (model.task() != task) {
        throw bad_input("the reference is for " + task + ", the model does " + model.task(), "make one for this task");
    }
    const int64_t rows = ids.shape[0], length = ids.shape[1], width = said.shape.back();
    const std::vector<int64_t> lengths = real_lengths(mask);
    if (each) batch_size = rows_at_once(batch_size, length * width);
    Reduced found;
    for (int64_t first = 0; first < rows; first += batch_size) {
        const int64_t count = std::min(batch_size, rows - first);
        // A batch is cut to its longest row.
        const int64_t longest = std::max<int64_t>(1, *std::max_element(&lengths[first], &lengths[first] + count));
        const Batch batch = model.check_batch(cut(ids, first, count, longest), cut(mask, first, count, longest));
        const Output output = model.forward(batch);
        same_width(output.shape, each ? std::vector<int64_t>{count, longest, width} : std::vector<int64_t>{count, width});
        for (int64_t row = 0; row < count; row++) {
            if (!each) {
                const float * theirs = said.at<float>((first + row) * width), * ours = output.values.data() + row * width;
                embeds ? found.vector(theirs, ours, width) : found.example(theirs, ours, width);
                continue;
            }
            const std::vector<Token> & real = batch.tokens[row];
            for (size_t place = 0; place + tokens < real.size(); place++) {
                const float * theirs = said.at<float>(((first + row) * length + place) * width);
                const float * ours = output.values.data() + (row * longest + place) * width;
                if (tokens) {
                    found.token(theirs, ours, width, real[place + 1], first + row);
                } else {
                    found.example(theirs, ours, width);
                    found.window.push_back(first + row);
                }
            }
        }
    }
    if (embeds) return {{"cosine", exchange.put(found.cosine, "float64")},
                        {"embeddings", exchange.put(found.values.data(), "float32", {rows, width})}};
    if (each && found.kl.empty()) {
        throw bad_input(tokens ? "the reference has no token to predict" : "the reference has no token",
                        tokens ? "windows need at least two real tokens" : "make it again");
    }
    json arrays = {{"kl", exchange.put(found.kl, "float64")}, {"top1", exchange.put(found.top1, "bool")}};
    if (!tokens) {
        const int64_t entries = found.kl.size();
        arrays["logits"] = exchange.put(found.values.data(), "float32", {entries, width});
        if (labels) arrays["window"] = exchange.put(found.window, "int64");
        return arrays;
    }
    arrays["top5"] = exchange.put(found.top5, "bool");
    arrays["right"] = exchange.put(found.right, "bool");
    arrays["logprob"] = exchange.put(found.logprob, "float64");
    arrays["reference_logprob"] = exchange.put(found.reference_logprob, "float64");
    arrays["confidence"] = exchange.put(found.confidence, "float64");
    arrays["window"] = exchange.put(found.window, "int64");
    return arrays;
}
