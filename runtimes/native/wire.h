// What the runner and the process of ONNX Runtime (host.c) say to each other over a socket pair. C and C++ read it.
//
// Both run on one machine, so a number is an int64 as it lies in memory. A text or a block of data is its length and
// its bytes, filled up with zeros to a multiple of eight and at least one: texts end with a zero, data is aligned.
// A message is its length and that many bytes. The host speaks first (it has started, or why not) and answers each
// request once; the runner closes its end to end it.
//
//     start              -> status, version
//     LOAD path, threads, optimisation, count, (key, value)…
//                        -> status, inputs, outputs: each count, (name, type, rank, (size or -1, symbol)…)…
//     FILL slot, type, rank, sizes…             a tensor of zeros that stays in the host
//                        -> status
//     RUN  count, (name, FROM_MESSAGE, type, rank, sizes…, data | name, FROM_SLOT, slot)…,
//          count, (name, what, slot)…
//                        -> status, nanoseconds, (type, rank, sizes…, bytes)… of what is sent, in the order asked for;
//                           behind the message the bytes themselves, as they lie in the tensors
//
// A status other than 0 is followed by one text that says why, and by nothing else.
#pragma once

#include <stdint.h>

enum { WIRE_LOAD = 1, WIRE_FILL = 2, WIRE_RUN = 3 };

// Where an input of RUN comes from.
enum { WIRE_FROM_MESSAGE = 0, WIRE_FROM_SLOT = 1 };

// What becomes of an output: sent whole, or only its last row (of [1, rows, width]); kept in a slot, as a new tensor or
// in the memory of the one that is there (which may be an input as well); dropped.
enum { WIRE_SEND = 0, WIRE_SEND_LAST = 1, WIRE_KEEP = 2, WIRE_INTO = 3, WIRE_DROP = 4 };

enum { WIRE_VALUES = 1024, WIRE_RANK = 8 };  // most inputs, outputs or slots; most dimensions

#define WIRE_PADDED(bytes) (((bytes) + 8) & ~(uint64_t) 7)
