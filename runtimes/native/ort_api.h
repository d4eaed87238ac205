// The few entries of ONNX Runtime's C API that the host calls, declared by their places in its table.
//
// `OrtGetApiBase` is the library's one export. The table that it leads to (`OrtApi`) only ever grows at its end, so an
// entry keeps its place in every later version: places 0 to 101 came with API version 1, 102 to 118 with 2, to 124
// with 3, to 126 with 4, to 149 with 5. Those that we need end with 130, so version 5 is asked for (ONNX Runtime 1.4
// and later have it). Counted in the table of onnxruntime_c_api.cc, checked there at compile time by the same numbers
// (its assertions on ReleaseCustomOpDomain 101, ReleaseModelMetadata 118, …), and here by tests that call a real
// library. Enumerations travel as int.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { ORT_NEEDED_VERSION = 5 };
enum { ORT_LOG_ERROR = 3 };
enum { ORT_TYPE_FLOAT = 1, ORT_TYPE_INT32 = 6, ORT_TYPE_INT64 = 7, ORT_TYPE_FLOAT16 = 10, ORT_TYPE_DOUBLE = 11 };

#ifndef __cplusplus  // the runner knows the types' numbers only

// Bytes of an element by its type's number (ONNX's own numbering); 0: not one of plain numbers.
static const int ORT_TYPE_BYTES[17] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};

typedef struct OrtStatus OrtStatus;  // NULL: it worked
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorInfo OrtTensorInfo;  // OrtTensorTypeAndShapeInfo
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;

typedef struct {
    void * places_0[2];
    const char * (*GetErrorMessage)(const OrtStatus *);                                        // 2
    OrtStatus * (*CreateEnv)(int severity, const char * name, OrtEnv ** out);                  // 3
    void * places_4[2];
    OrtStatus * (*DisableTelemetryEvents)(const OrtEnv *);                                     // 6
    OrtStatus * (*CreateSession)(const OrtEnv *, const char * path, const OrtSessionOptions *, OrtSession ** out);  // 7
    void * places_8[1];
    OrtStatus * (*Run)(OrtSession *, const OrtRunOptions *, const char * const * input_names,
                       const OrtValue * const * inputs, size_t input_count, const char * const * output_names,
                       size_t output_count, OrtValue ** outputs);                              // 9
    OrtStatus * (*CreateSessionOptions)(OrtSessionOptions ** out);                             // 10
    void * places_11[11];
    OrtStatus * (*SetSessionLogSeverityLevel)(OrtSessionOptions *, int);                       // 22
    OrtStatus * (*SetSessionGraphOptimizationLevel)(OrtSessionOptions *, int);                 // 23
    OrtStatus * (*SetIntraOpNumThreads)(OrtSessionOptions *, int);                             // 24
    OrtStatus * (*SetInterOpNumThreads)(OrtSessionOptions *, int);                             // 25
    void * places_26[4];
    OrtStatus * (*SessionGetInputCount)(const OrtSession *, size_t * out);                     // 30
    OrtStatus * (*SessionGetOutputCount)(const OrtSession *, size_t * out);                    // 31
    void * places_32[1];
    OrtStatus * (*SessionGetInputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo ** out);    // 33
    OrtStatus * (*SessionGetOutputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo ** out);   // 34
    void * places_35[1];
    OrtStatus * (*SessionGetInputName)(const OrtSession *, size_t, OrtAllocator *, char ** out);   // 36
    OrtStatus * (*SessionGetOutputName)(const OrtSession *, size_t, OrtAllocator *, char ** out);  // 37
    void * places_38[11];
    OrtStatus * (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void * data, size_t bytes,
                                                  const int64_t * sizes, size_t rank, int type,
                                                  OrtValue ** out);                            // 49
    void * places_50[1];
    OrtStatus * (*GetTensorMutableData)(OrtValue *, void ** out);                              // 51
    void * places_52[3];
    OrtStatus * (*CastTypeInfoToTensorInfo)(const OrtTypeInfo *, const OrtTensorInfo ** out);  // 55, NULL: no tensor
    void * places_56[4];
    OrtStatus * (*GetTensorElementType)(const OrtTensorInfo *, int * out);                     // 60
    OrtStatus * (*GetDimensionsCount)(const OrtTensorInfo *, size_t * out);                    // 61
    OrtStatus * (*GetDimensions)(const OrtTensorInfo *, int64_t * out, size_t rank);           // 62, -1: free
    OrtStatus * (*GetSymbolicDimensions)(const OrtTensorInfo *, const char ** out, size_t rank);  // 63, "": no name
    void * places_64[1];
    OrtStatus * (*GetTensorTypeAndShape)(const OrtValue *, OrtTensorInfo ** out);              // 65
    void * places_66[3];
    OrtStatus * (*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo ** out);       // 69, 0 and 0: plain
    void * places_70[6];
    OrtStatus * (*AllocatorFree)(OrtAllocator *, void *);                                      // 76
    void * places_77[1];
    OrtStatus * (*GetAllocatorWithDefaultOptions)(OrtAllocator ** out);                        // 78
    void * places_79[14];
    void (*ReleaseStatus)(OrtStatus *);                                                        // 93
    void * places_94[2];
    void (*ReleaseValue)(OrtValue *);                                                          // 96
    void * places_97[1];
    void (*ReleaseTypeInfo)(OrtTypeInfo *);                                                    // 98
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorInfo *);                                    // 99
    void (*ReleaseSessionOptions)(OrtSessionOptions *);                                        // 100
    void * places_101[29];
    OrtStatus * (*AddSessionConfigEntry)(OrtSessionOptions *, const char * key, const char * value);  // 130
} OrtApi;

typedef struct {
    const OrtApi * (*GetApi)(uint32_t version);  // NULL: the library is older
    const char * (*GetVersionString)(void);
} OrtApiBase;

#define ORT_PLACE(entry, place) _Static_assert(offsetof(OrtApi, entry) == (place) * sizeof(void *), #entry)
ORT_PLACE(GetErrorMessage, 2);
ORT_PLACE(CreateEnv, 3);
ORT_PLACE(DisableTelemetryEvents, 6);
ORT_PLACE(CreateSession, 7);
ORT_PLACE(Run, 9);
ORT_PLACE(CreateSessionOptions, 10);
ORT_PLACE(SetSessionLogSeverityLevel, 22);
ORT_PLACE(SessionGetInputCount, 30);
ORT_PLACE(SessionGetInputTypeInfo, 33);
ORT_PLACE(SessionGetInputName, 36);
ORT_PLACE(CreateTensorWithDataAsOrtValue, 49);
ORT_PLACE(GetTensorMutableData, 51);
ORT_PLACE(CastTypeInfoToTensorInfo, 55);
ORT_PLACE(GetTensorElementType, 60);
ORT_PLACE(GetTensorTypeAndShape, 65);
ORT_PLACE(CreateCpuMemoryInfo, 69);
ORT_PLACE(AllocatorFree, 76);
ORT_PLACE(GetAllocatorWithDefaultOptions, 78);
ORT_PLACE(ReleaseStatus, 93);
ORT_PLACE(ReleaseValue, 96);
ORT_PLACE(ReleaseTypeInfo, 98);
ORT_PLACE(ReleaseSessionOptions, 100);
ORT_PLACE(AddSessionConfigEntry, 130);
#undef ORT_PLACE

#endif
