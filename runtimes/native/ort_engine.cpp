#include "ort_engine.h"

#include "errors.h"
#include "timing.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

const std::map<std::string, int64_t> OPTIMISATION = {{"none", 0}, {"basic", 1}, {"extended", 2}, {"all", 99}};
const char * const CPU = "CPUExecutionProvider";
const std::string PAST = "past_key_values.", PRESENT = "present.";

bool begins(const std::string & text, const std::string & with) { return text.compare(0, with.size(), with) == 0; }

std::string as_text(const json & value) {
    if (value.is_string()) return value;
    return value.is_boolean() ? (value.get<bool>() ? "True" : "False") : value.dump();
}

float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                      : std::ldexp(float(mantissa), -24);
    return half & 0x8000 ? -size : size;
}

}  // namespace

OrtEngine::OrtEngine(Artifact artifact, Options options, const OnnxRuntime & where)
    : Engine(std::move(artifact), std::move(options)), host_(where.host, where.library) {
    if (!options_.backend.is_null() && options_.backend != CPU) {
        throw unsupported("onnxruntime has no backend " + shown(options_.backend) + " here",
                          std::string("available: ") + CPU);
    }
    if (!options_.extra.is_object()) {
        throw Error("UsageError", "options for onnxruntime: " + shown(options_.extra), "session config entries by name");
    }
    for (const auto & [key, value] : options_.extra.items()) {
        if (key != "graph_optimization") {
            entries_.emplace_back(key, as_text(value));
            continue;
        }
        const auto found = value.is_string() ? OPTIMISATION.find(value) : OPTIMISATION.end();
        if (found == OPTIMISATION.end()) {
            throw bad_input("graph_optimization " + shown(value), "known: all, extended, basic, none");
        }
        optimisation_ = found->second;
    }
}

void OrtEngine::load() {
    Request request(WIRE_LOAD);
    request.text(artifact_.entry).number(options_.threads).number(optimisation_).number(entries_.size());
    for (const auto & [key, value] : entries_) request.text(key).text(value);
    std::vector<Port> outputs;
    try {
        Reply reply = host_.ask(request);
        inputs_ = ports(reply);
        outputs = ports(reply);
    } catch (const Refusal & refusal) {
        throw bad_input(artifact_.entry + ": onnxruntime " + host_.version() + " can't load it: " + refusal.what(),
                        "export it again, or take a newer library; the artifact's minimum_runtime says what it needs");
    }
    if (outputs.empty()) throw bad_input(artifact_.entry + ": the graph has no output", "export it again");
    output_ = outputs[0].name;
    for (const Port & port : outputs) {
        if (port.name == artifact_.output) output_ = port.name;
    }
    for (const Port & port : inputs_) {
        if (!begins(port.name, PAST)) continue;
        if (port.sizes.size() != 4 || port.sizes[1] < 0 || port.sizes[3] < 0) {
            throw bad_input(artifact_.entry + ": " + port.name + " has no shape [batch, heads, length, width]",
                            "export it again");
        }
        past_.push_back(port);
    }
    // A graph of standard operators puts the new tokens behind the past; ONNX Runtime's own extends a buffer.
    const auto first = std::find_if(outputs.begin(), outputs.end(), [](const Port & port) { return begins(port.name, PRESENT); });
    const bool total = first != outputs.end() && first->symbols.size() > 2 && first->symbols[2] == "total";
    appends_ = artifact_.foreign || total;
}

json OrtEngine::info() const {
    return describe("onnxruntime", host_.version(), CPU, generates() && !past_.empty(), json::object());
}

std::vector<OrtEngine::Port> OrtEngine::ports(Reply & reply) {
    std::vector<Port> found(reply.number());
    for (Port & port : found) {
        port.name = reply.text();
        port.type = reply.number();
        const int64_t rank = reply.number();
        for (int64_t i = 0; i < rank; i++) {
            port.sizes.push_back(reply.number());
            port.symbols.push_back(reply.text());
        }
    }
    return found;
}

const OrtEngine::Port * OrtEngine::input(const std::string & name) const {
    for (const Port & port : inputs_) {
        if (port.name == name) return &port;
    }
    return nullptr;
}

// The inputs that the graph has of ids, mask, types and positions, in its number type; `past` tokens came before the
// rows. Returns how many.
int64_t OrtEngine::feed(Request & request, const std::vector<std::vector<Token>> & rows, int64_t length,
                        int64_t past) const {
    const int64_t count = rows.size();
    int64_t fed = 0;
    auto add = [&](const char * name, int64_t width, auto value) {
        const Port * port = input(name);
        if (!port) return;
        request.text(name).number(WIRE_FROM_MESSAGE);
        const bool narrow = port->type == ORT_TYPE_INT32, real = port->type == ORT_TYPE_FLOAT;
        request.shape(narrow || real ? port->type : int(ORT_TYPE_INT64), {count, width});
        std::vector<int64_t> wide;
        std::vector<int32_t> ints;
        std::vector<float> floats;
        for (int64_t row = 0; row < count; row++) {
            for (int64_t place = 0; place < width; place++) {
                const int64_t one = value(row, place);
                if (narrow) ints.push_back(one);
                else if (real) floats.push_back(one);
                else wide.push_back(one);
            }
        }
        if (narrow) request.data(ints.data(), ints.size() * sizeof(int32_t));
        else if (real) request.data(floats.data(), floats.size() * sizeof(float));
        else request.data(wide.data(), wide.size() * sizeof(int64_t));
        fed++;
    };
    auto real = [&](int64_t row, int64_t place) { return place < int64_t(rows[row].size()); };
    add("input_ids", length, [&](int64_t row, int64_t place) -> int64_t { return real(row, place) ? rows[row][place] : 0; });
    add("attention_mask", past + length,
        [&](int64_t row, int64_t place) -> int64_t { return place < past || real(row, place - past); });
    add("token_type_ids", length, [](int64_t, int64_t) -> int64_t { return 0; });
    add("position_ids", length, [&](int64_t, int64_t place) -> int64_t { return past + place; });
    return fed;
}

Reply OrtEngine::ask(const Request & request) {
    try {
        return host_.ask(request);
    } catch (const Refusal & refusal) {
        throw bad_input("onnxruntime " + host_.version() + " can't run it: " + refusal.what(),
                        "export it again; are ids and mask what the artifact takes?");
    }
}

// An output that follows the reply, as float32.
Output OrtEngine::taken(Reply & reply) {
    const int64_t type = reply.number(), rank = reply.number();
    Output output;
    int64_t count = 1;
    for (int64_t i = 0; i < rank; i++) {
        output.shape.push_back(reply.number());
        count *= output.shape.back();
    }
    const int64_t bytes = reply.number();
    output.values.resize(count);
    if (type == ORT_TYPE_FLOAT) {
        host_.take(output.values.data(), bytes);
        return output;
    }
    std::vector<char> raw(bytes);
    host_.take(raw.data(), bytes);
    if (type == ORT_TYPE_FLOAT16) {
        const uint16_t * from = reinterpret_cast<const uint16_t *>(raw.data());
        std::transform(from, from + count, output.values.begin(), from_half);
    } else if (type == ORT_TYPE_DOUBLE) {
        const double * from = reinterpret_cast<const double *>(raw.data());
        std::copy(from, from + count, output.values.begin());
    } else {
        throw bad_input(output_ + " is of ONNX's type " + std::to_string(type), "float, float16 or double is expected");
    }
    return output;
}

Output OrtEngine::pooled(const Output & hidden, const Batch & batch) const {
    if (hidden.shape.size() != 3 || hidden.shape[0] != batch.rows || hidden.shape[1] != batch.length) {
        throw bad_input(output_ + " has shape " + json(hidden.shape).dump(), "expected [batch, length, width]");
    }
    const int64_t width = hidden.shape[2];
    Output output{{batch.rows, width}, std::vector<float>(batch.rows * width)};
    for (int64_t row = 0; row < batch.rows; row++) {
        const float * states = hidden.values.data() + row * batch.length * width;
        const int64_t real = batch.tokens[row].size();
        float * out = output.values.data() + row * width;
        const bool first = artifact_.pooling == "cls", last = artifact_.pooling == "last";
        for (int64_t i = 0; i < width; i++) {
            double sum = first ? states[i] : last ? states[(real - 1) * width + i] : 0;
            for (int64_t place = 0; place < real && !first && !last; place++) sum += states[place * width + i];
            out[i] = first || last ? sum : sum / real;
        }
        if (artifact_.normalize) normalize(out, width);
    }
    return output;
}

Output OrtEngine::run(const Batch & batch, double & seconds, bool wanted) {
    const bool pools = task() == "feature-extraction" && !artifact_.pooling_in_graph;
    Request inputs, request(WIRE_RUN);
    int64_t count = feed(inputs, batch.tokens, batch.length, 0);
    for (const Port & port : past_) {
        inputs.text(port.name).number(WIRE_FROM_MESSAGE);
        inputs.shape(port.type, {batch.rows, port.sizes[1], 0, port.sizes[3]}).data(nullptr, 0);
        count++;
    }
    request.number(count).append(inputs);
    request.number(1).text(output_).number(wanted || pools ? WIRE_SEND : WIRE_DROP).number(0);
    Reply reply = ask(request);
    seconds = reply.number() / 1e9;
    if (!wanted && !pools) return {};
    Output output = taken(reply);
    if (!pools) return output;
    const double begin = now_seconds();
    output = pooled(output, batch);
    seconds += now_seconds() - begin;
    return output;
}

Output OrtEngine::forward(const Batch & batch) {
    double seconds;
    return run(batch, seconds, true);
}

// What the process of the runtime needs, on its own clock: the way of the values to this process is not the model's.
double OrtEngine::time_forward(const Batch & batch) {
    double seconds;
    run(batch, seconds, false);
    return seconds;
}

// Keys and values stay in the host: in one buffer that each step extends, or as what the last step gave.
void OrtEngine::decode(const std::vector<Token> & prompt, int64_t new_tokens, const Told & told) {
    if (past_.empty()) throw unsupported("a " + task() + " artifact without a cache does not decode", "use forward");
    const int64_t total = prompt.size() + new_tokens;
    for (size_t slot = 0; slot < past_.size(); slot++) {
        const Port & port = past_[slot];
        Request request(WIRE_FILL);
        ask(request.number(slot).shape(port.type, {1, port.sizes[1], appends_ ? 0 : total, port.sizes[3]}));
    }
    std::vector<Token> fed = prompt;
    int64_t used = 0;
    for (int64_t step = 0; step < new_tokens; step++) {
        Request inputs, request(WIRE_RUN);
        const int64_t count = feed(inputs, {fed}, fed.size(), used);
        request.number(count + past_.size()).append(inputs);
        for (size_t slot = 0; slot < past_.size(); slot++) {
            request.text(past_[slot].name).number(WIRE_FROM_SLOT).number(slot);
        }
        request.number(1 + past_.size()).text(output_).number(WIRE_SEND_LAST).number(0);
        for (size_t slot = 0; slot < past_.size(); slot++) {
            request.text(PRESENT + past_[slot].name.substr(PAST.size()));
            request.number(appends_ ? WIRE_KEEP : WIRE_INTO).number(slot);
        }
        Reply reply = ask(request);
        double seconds = reply.number() / 1e9;
        const Output last = taken(reply);
        if (int64_t(last.values.size()) != vocab_size()) {
            throw bad_input(output_ + " has " + std::to_string(last.values.size()) + " values a token, the vocabulary " +
                                std::to_string(vocab_size()),
                            "export it again");
        }
        const double begin = now_seconds();
        const Token chosen = std::max_element(last.values.begin(), last.values.end()) - last.values.begin();
        seconds += now_seconds() - begin;
        used += fed.size();
        told(chosen, last.values.data(), seconds);
        fed = {chosen};
    }
}
