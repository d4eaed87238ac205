// The few functions of the C library that the host calls, declared by ourselves: their types are the same in every
// 64-bit Linux C library (glibc, Android's bionic), so one object is linked for each of them without its headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct {
    long seconds, nanoseconds;
} HostTime;

enum { HOST_MONOTONIC = 1, HOST_RTLD_NOW = 2 };  // of the kernel, and of both libraries on 64 bits

void * dlopen(const char * path, int mode);
void * dlsym(void * library, const char * name);
char * dlerror(void);
void * calloc(size_t count, size_t size);
void * realloc(void * memory, size_t size);
void free(void * memory);
void * memcpy(void * to, const void * from, size_t size);
size_t strlen(const char * text);
long read(int file, void * to, size_t size);
long write(int file, const void * from, size_t size);
int clock_gettime(int clock, HostTime * out);
__attribute__((noreturn)) void _exit(int status);
