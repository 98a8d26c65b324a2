/* SPDX-License-Identifier: Apache-2.0
 *
 * Threads that sleep between products, for every library of C in this process. */
#ifndef DSV4_POOL_H
#define DSV4_POOL_H

#include <stdint.h>

typedef void (*Task)(void *argument, int64_t chunk);

/* The largest number of chunks of one call. */
enum { MOST_CHUNKS = (1 << 18) - 1 };

/* Calls task(argument, 0 .. chunks - 1), each once, on up to `threads` threads, this one among
 * them; returns when all are done. While another thread is in here, this one works alone. */
void dsv4_share(Task task, void *argument, int64_t chunks, int64_t threads);

#endif
