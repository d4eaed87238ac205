// The process of ONNX Runtime: loads the libonnxruntime.so that a user gave, opens one model and runs it, told what to
// do by the runner over descriptor 3 (wire.h).
//
//     edgestill-onnxruntime LIBRARY
//
// It is a process of its own because the library needs the device's own C library and dynamic loader, which the static
// runner has not. It knows tensors and names, nothing of language models: ort_engine.cpp does. Plain C without the
// headers of any C library (host_libc.h), so that it can be built for Android without an NDK.

#include "host_libc.h"
#include "ort_api.h"
#include "wire.h"

enum { CHANNEL = 3 };

typedef struct {
    const char *at, *end;
    int torn;
} Reader;

typedef struct {
    OrtValue * value;
    void * memory;  // of a tensor that FILL made: freed after it
} Slot;

static const OrtApi * api;
static const OrtEnv * env;
static OrtSession * session;
static OrtAllocator * allocator;
static OrtMemoryInfo * plain;
static Slot slots[WIRE_VALUES];

static char * out;  // the message that is being written
static size_t out_size, out_room;

// ---- messages

static void write_all(const void * from, size_t size) {
    for (const char * at = from; size > 0;) {
        const long wrote = write(CHANNEL, at, size);
        if (wrote <= 0) _exit(0);  // the runner is gone
        at += wrote;
        size -= wrote;
    }
}

// Whether all of it came; not, when the runner has closed its end.
static int read_all(void * to, size_t size) {
    for (char * at = to; size > 0;) {
        const long got = read(CHANNEL, at, size);
        if (got <= 0) return 0;
        at += got;
        size -= got;
    }
    return 1;
}

static char * grow(size_t size) {
    if (out_size + size > out_room) {
        out_room = 2 * (out_size + size);
        out = realloc(out, out_room);
        if (!out) _exit(70);
    }
    char * at = out + out_size;
    out_size += size;
    return at;
}

static void put_number(int64_t number) { memcpy(grow(sizeof number), &number, sizeof number); }

static void put_text(const char * text) {
    const size_t size = strlen(text), padded = WIRE_PADDED(size);
    put_number(size);
    char * at = grow(padded);
    memcpy(at, text, size);
    for (size_t i = size; i < padded; i++) at[i] = 0;
}

static void send_message(void) {
    const int64_t size = out_size;
    write_all(&size, sizeof size);
    write_all(out, out_size);
    out_size = 0;
}

// An answer that says why not. What had been written of another one is dropped.
static void refuse(const char * why) {
    out_size = 0;
    put_number(1);
    put_text(why && *why ? why : "it does not say why");
    send_message();
}

// Whether a call failed; then that is the answer.
static int failed(OrtStatus * status) {
    if (!status) return 0;
    refuse(api->GetErrorMessage(status));
    api->ReleaseStatus(status);
    return 1;
}

static int64_t number(Reader * in) {
    int64_t value = 0;
    if (in->end - in->at < (long) sizeof value) {
        in->torn = 1;
        return 0;
    }
    memcpy(&value, in->at, sizeof value);
    in->at += sizeof value;
    return value;
}

// A text, or data of `size` bytes; "" when the message ends before.
static const char * block(Reader * in, int64_t * size) {
    *size = number(in);
    if (in->torn || *size < 0 || *size > in->end - in->at || (int64_t) WIRE_PADDED(*size) > in->end - in->at) {
        in->torn = 1;
        *size = 0;
        return "";
    }
    const char * at = in->at;
    in->at += WIRE_PADDED(*size);
    return at;
}

static const char * text(Reader * in) {
    int64_t size;
    return block(in, &size);
}

// ---- tensors

static int64_t type_bytes(int64_t type) {
    return type >= 0 && type < (int64_t) (sizeof ORT_TYPE_BYTES / sizeof *ORT_TYPE_BYTES) ? ORT_TYPE_BYTES[type] : 0;
}

// Type and sizes, as RUN and FILL name them; the bytes that they take, or -1.
static int64_t shape(Reader * in, int64_t * type, int64_t * rank, int64_t * sizes) {
    *type = number(in);
    *rank = number(in);
    int64_t bytes = type_bytes(*type);
    if (!bytes || *rank < 0 || *rank > WIRE_RANK) return -1;
    for (int64_t i = 0; i < *rank; i++) {
        sizes[i] = number(in);
        if (sizes[i] < 0 || __builtin_mul_overflow(bytes, sizes[i], &bytes)) return -1;
    }
    return in->torn ? -1 : bytes;
}

static void empty_slot(Slot * slot) {
    if (slot->value) api->ReleaseValue(slot->value);
    free(slot->memory);
    slot->value = NULL;
    slot->memory = NULL;
}

static Slot * slot_of(Reader * in) {
    const int64_t index = number(in);
    return index >= 0 && index < WIRE_VALUES ? &slots[index] : NULL;
}

// ---- requests

static int put_tensor_info(const OrtTypeInfo * info) {
    const OrtTensorInfo * tensor = NULL;
    int64_t sizes[WIRE_RANK];
    const char * symbols[WIRE_RANK];
    size_t rank = 0;
    int type = 0;
    if (failed(api->CastTypeInfoToTensorInfo(info, &tensor))) return 0;
    if (tensor) {
        if (failed(api->GetTensorElementType(tensor, &type)) || failed(api->GetDimensionsCount(tensor, &rank))) return 0;
        if (rank > WIRE_RANK) {
            refuse("a tensor of the model has more than 8 dimensions");
            return 0;
        }
        if (failed(api->GetDimensions(tensor, sizes, rank)) || failed(api->GetSymbolicDimensions(tensor, symbols, rank))) {
            return 0;
        }
    }
    put_number(type);
    put_number(rank);
    for (size_t i = 0; i < rank; i++) {
        put_number(sizes[i]);
        put_text(symbols[i] ? symbols[i] : "");
    }
    return 1;
}

// Names, types and shapes of the model's inputs or outputs; 0 when an answer was sent that says why not.
static int put_values(int outputs) {
    size_t count = 0;
    if (failed(outputs ? api->SessionGetOutputCount(session, &count) : api->SessionGetInputCount(session, &count))) {
        return 0;
    }
    if (count > WIRE_VALUES) {
        refuse("the model has more than 1024 inputs or outputs");
        return 0;
    }
    put_number(count);
    for (size_t i = 0; i < count; i++) {
        char * name = NULL;
        OrtTypeInfo * info = NULL;
        if (failed(outputs ? api->SessionGetOutputName(session, i, allocator, &name)
                           : api->SessionGetInputName(session, i, allocator, &name)) ||
            failed(outputs ? api->SessionGetOutputTypeInfo(session, i, &info)
                           : api->SessionGetInputTypeInfo(session, i, &info))) {
            return 0;
        }
        put_text(name);
        const int told = put_tensor_info(info);
        api->ReleaseTypeInfo(info);
        OrtStatus * status = api->AllocatorFree(allocator, name);
        if (status) api->ReleaseStatus(status);
        if (!told) return 0;
    }
    return 1;
}

static void load(Reader * in) {
    OrtSessionOptions * options = NULL;
    if (session) {
        refuse("a model is open already");
        return;
    }
    const char * path = text(in);
    const int64_t threads = number(in), optimisation = number(in), count = number(in);
    if (failed(api->CreateSessionOptions(&options)) || failed(api->SetSessionLogSeverityLevel(options, ORT_LOG_ERROR)) ||
        failed(api->SetIntraOpNumThreads(options, threads)) || failed(api->SetInterOpNumThreads(options, 1)) ||
        failed(api->SetSessionGraphOptimizationLevel(options, optimisation))) {
        return;
    }
    for (int64_t i = 0; i < count && !in->torn; i++) {
        const char *key = text(in), *value = text(in);
        if (failed(api->AddSessionConfigEntry(options, key, value))) return;
    }
    if (in->torn) {
        refuse("a torn request");
        return;
    }
    if (failed(api->CreateSession(env, path, options, &session))) return;
    api->ReleaseSessionOptions(options);
    put_number(0);
    if (put_values(0) && put_values(1)) send_message();
}

static void fill(Reader * in) {
    int64_t type, rank, sizes[WIRE_RANK];
    Slot * slot = slot_of(in);
    const int64_t bytes = shape(in, &type, &rank, sizes);
    if (!slot || bytes < 0) {
        refuse("no such tensor can be made");
        return;
    }
    empty_slot(slot);
    slot->memory = calloc(bytes ? bytes : 1, 1);  // zeros that take no memory before they are written to
    if (!slot->memory) {
        refuse("out of memory");
        return;
    }
    if (failed(api->CreateTensorWithDataAsOrtValue(plain, slot->memory, bytes, sizes, rank, type, &slot->value))) return;
    put_number(0);
    send_message();
}

static int64_t now(void) {
    HostTime time = {0, 0};
    clock_gettime(HOST_MONOTONIC, &time);
    return time.seconds * 1000000000L + time.nanoseconds;
}

// What an output holds: written to the answer; where its bytes lie and how many are to follow, or 0 and a refusal.
static int describe(OrtValue * value, int last, const char ** from, int64_t * bytes) {
    OrtTensorInfo * info = NULL;
    int64_t sizes[WIRE_RANK];
    size_t rank = 0, first = 0;
    int type = 0;
    void * data = NULL;
    if (failed(api->GetTensorTypeAndShape(value, &info)) || failed(api->GetTensorElementType(info, &type)) ||
        failed(api->GetDimensionsCount(info, &rank))) {
        return 0;
    }
    if (rank > WIRE_RANK || !type_bytes(type)) {
        refuse("an output is no tensor of numbers");
        return 0;
    }
    if (failed(api->GetDimensions(info, sizes, rank)) || failed(api->GetTensorMutableData(value, &data))) return 0;
    api->ReleaseTensorTypeAndShapeInfo(info);
    int64_t whole = type_bytes(type);
    for (size_t i = 0; i < rank; i++) whole *= sizes[i];
    *bytes = whole;
    if (last && rank > 1) {
        first = rank - 1;
        *bytes = whole ? type_bytes(type) * sizes[first] : 0;
    }
    *from = (const char *) data + (whole - *bytes);
    put_number(type);
    put_number(rank - first);
    for (size_t i = first; i < rank; i++) put_number(sizes[i]);
    put_number(*bytes);
    return 1;
}

static const char *input_names[WIRE_VALUES], *output_names[WIRE_VALUES];
static OrtValue *inputs[WIRE_VALUES], *made[WIRE_VALUES], *outputs[WIRE_VALUES];
static int64_t verbs[WIRE_VALUES];
static Slot * places[WIRE_VALUES];

// The tensors and names of a RUN; 0 when an answer was sent that says why not.
static int read_run(Reader * in, int64_t * input_count, int64_t * output_count, int64_t * made_count) {
    *input_count = number(in);
    for (int64_t i = 0; i < *input_count && i < WIRE_VALUES && !in->torn; i++) {
        input_names[i] = text(in);
        if (number(in) == WIRE_FROM_SLOT) {
            Slot * slot = slot_of(in);
            inputs[i] = slot ? slot->value : NULL;
        } else {
            int64_t type, rank, size, sizes[WIRE_RANK];
            const int64_t bytes = shape(in, &type, &rank, sizes);
            const char * data = block(in, &size);
            if (bytes != size || in->torn) {
                in->torn = 1;
                break;
            }
            OrtValue * value = NULL;
            if (failed(api->CreateTensorWithDataAsOrtValue(plain, (void *) data, bytes, sizes, rank, type, &value))) {
                return 0;
            }
            inputs[i] = made[(*made_count)++] = value;
        }
        if (!inputs[i]) in->torn = 1;
    }
    *output_count = number(in);
    for (int64_t i = 0; i < *output_count && i < WIRE_VALUES && !in->torn; i++) {
        output_names[i] = text(in);
        verbs[i] = number(in);
        places[i] = slot_of(in);
        outputs[i] = verbs[i] == WIRE_INTO && places[i] ? places[i]->value : NULL;
        if (!places[i] || (verbs[i] == WIRE_INTO && !outputs[i])) in->torn = 1;
    }
    if (in->torn || *input_count < 0 || *input_count > WIRE_VALUES || *output_count < 0 || *output_count > WIRE_VALUES) {
        refuse("a torn request");
        return 0;
    }
    return 1;
}

static void run(Reader * in) {
    static const char * from[WIRE_VALUES];
    static int64_t bytes[WIRE_VALUES];
    int64_t input_count = 0, output_count = 0, made_count = 0, sent = 0;
    if (!session) {
        refuse("no model is open");
        return;
    }
    const int64_t begin = now();
    if (read_run(in, &input_count, &output_count, &made_count)) {
        OrtStatus * status = api->Run(session, NULL, input_names, (const OrtValue * const *) inputs, input_count,
                                      output_names, output_count, outputs);
        const int64_t end = now();
        int whole = !failed(status);
        if (whole) {
            put_number(0);
            put_number(end - begin);
        }
        for (int64_t i = 0; i < output_count && whole; i++) {
            if (verbs[i] == WIRE_SEND || verbs[i] == WIRE_SEND_LAST) {
                whole = describe(outputs[i], verbs[i] == WIRE_SEND_LAST, &from[sent], &bytes[sent]);
                sent++;
            } else if (verbs[i] == WIRE_KEEP) {
                empty_slot(places[i]);
                places[i]->value = outputs[i];
                outputs[i] = NULL;
            }
        }
        if (whole) {
            send_message();
            for (int64_t i = 0; i < sent; i++) write_all(from[i], bytes[i]);
        }
        for (int64_t i = 0; i < output_count; i++) {
            if (verbs[i] != WIRE_INTO && outputs[i]) api->ReleaseValue(outputs[i]);
        }
    }
    for (int64_t i = 0; i < made_count; i++) api->ReleaseValue(made[i]);
}

// ---- start

// Load the library and say which version it is; 0 when it was said why not.
static int start(const char * path) {
    void * library = dlopen(path, HOST_RTLD_NOW);
    if (!library) {
        refuse(dlerror());
        return 0;
    }
    const OrtApiBase * (*get_base)(void) = (const OrtApiBase * (*) (void) ) dlsym(library, "OrtGetApiBase");
    if (!get_base) {
        refuse("it exports no OrtGetApiBase: it is no ONNX Runtime");
        return 0;
    }
    const OrtApiBase * base = get_base();
    api = base->GetApi(ORT_NEEDED_VERSION);
    if (!api) {
        const char *before = "it is version ", *version = base->GetVersionString(), *after = ": 1.4 or newer is needed";
        static char message[128];
        size_t size = 0;
        for (const char * at = before; *at && size < 100; at++) message[size++] = *at;
        for (const char * at = version; *at && size < 60; at++) message[size++] = *at;
        for (const char * at = after; *at && size < 120; at++) message[size++] = *at;
        refuse(message);
        return 0;
    }
    OrtEnv * made_env = NULL;
    if (failed(api->CreateEnv(ORT_LOG_ERROR, "edgestill", &made_env)) ||
        failed(api->DisableTelemetryEvents(made_env)) ||
        failed(api->GetAllocatorWithDefaultOptions(&allocator)) || failed(api->CreateCpuMemoryInfo(0, 0, &plain))) {
        return 0;
    }
    env = made_env;
    put_number(0);
    put_text(base->GetVersionString());
    send_message();
    return 1;
}

int main(int argc, char ** argv) {
    if (argc != 2) return 2;
    if (!start(argv[1])) return 1;
    int64_t size;
    while (read_all(&size, sizeof size) && size >= 0) {
        char * message = realloc(NULL, size + 1);
        if (!message || !read_all(message, size)) break;
        Reader in = {message, message + size, 0};
        const int64_t verb = number(&in);
        if (verb == WIRE_LOAD) load(&in);
        else if (verb == WIRE_FILL) fill(&in);
        else if (verb == WIRE_RUN) run(&in);
        else refuse("an unknown request");
        free(message);
    }
    _exit(0);  // without the library's own farewells: nobody waits for them
}
