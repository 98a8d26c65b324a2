/* SPDX-License-Identifier: Apache-2.0
 *
 * Many small reads of one file in one call: a loop in Python costs more than the reads, and holds
 * the interpreter's lock. Twin and description: rows.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

/* Takes out of `left` [count] the spans that need no wait; gives how many stay in it. */
int64_t dsv4_read_ready(int64_t file, uint8_t *out, const int64_t *start, const int64_t *size,
                        const int64_t *place, int64_t *left, int64_t count) {
    int64_t stay = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t span = left[i];
#ifdef RWF_NOWAIT
        const struct iovec into = {out + place[span], (size_t)size[span]};
        if (preadv2((int)file, &into, 1, start[span], RWF_NOWAIT) == size[span]) continue;
#endif
        left[stay++] = span;
    }
    return stay;
}

/* Spans that the disk is asked for at once. */
enum { AHEAD = 256 };

/* Reads all spans of `left` [count]. Gives -1, or the span that failed, with its error number in
 * `error`, 0 where the file ended. */
int64_t dsv4_read_spans(int64_t file, uint8_t *out, const int64_t *start, const int64_t *size,
                        const int64_t *place, const int64_t *left, int64_t count,
                        int64_t *error) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t span = left[i];
#ifdef POSIX_FADV_WILLNEED
        /* The disk works on all of them at once while the first is waited for. */
        if (i % AHEAD == 0 && count > 1)
            for (int64_t j = i; j < count && j < i + AHEAD; ++j)
                posix_fadvise((int)file, start[left[j]], size[left[j]], POSIX_FADV_WILLNEED);
#endif
        for (int64_t done = 0; done < size[span];) {
            const ssize_t got = pread((int)file, out + place[span] + done,
                                      (size_t)(size[span] - done), start[span] + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                *error = got < 0 ? errno : 0;
                return span;
            }
            done += got;
        }
    }
    return -1;
}
