/* SPDX-License-Identifier: Apache-2.0
 *
 * mHC (arXiv 2512.24880, section 4) for few tokens on a CPU: one pass over a token's streams does
 * what hyper_ops.open_site and hyper_ops.expand say in tensors. All arithmetic is float32; streams
 * and blocks are float32 or bfloat16 (`half`), rounded once when written. Arrays are contiguous.
 * Sums run in LANES independent parts, which is what a vector unit wants and what
 * makes them the same on every call.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 32 };

/* n numbers from x[at] on as float32: where they lie, or in `scratch` if they are bfloat16. */
static const float *widen(const void *x, size_t at, size_t n, float *scratch, int half) {
    if (!half) return (const float *)x + at;
    const uint16_t *from = (const uint16_t *)x + at;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(scratch + i, &bits, sizeof bits);
    }
    return scratch;
}

/* n float32 numbers to x[at] on, as bfloat16: to the nearest, ties to even, a NaN stays one.
 * Without `half` they are there already. */
static void narrow(void *x, size_t at, size_t n, const float *from, int half) {
    if (!half) return;
    uint16_t *to = (uint16_t *)x + at;
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded);
    }
}

static inline float total(const float *lanes) {
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += lanes[l];
    return sum;
}

static float dot(const float *restrict a, const float *restrict b, size_t n) {
    float lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; ++l) lanes[l] += a[i + l] * b[i + l];
    for (int l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
    return total(lanes);
}

/* M = softmax(rows of m) + eps; columns; then rows and columns, iters - 1 times. m: [N, N]. */
static void sinkhorn(float *m, int n, int iters, float eps) {
    for (int j = 0; j < n; ++j) {
        float *row = m + j * n, most = row[0], sum = 0;
        for (int k = 1; k < n; ++k) most = fmaxf(most, row[k]);
        for (int k = 0; k < n; ++k) sum += row[k] = expf(row[k] - most);
        for (int k = 0; k < n; ++k) row[k] = row[k] / sum + eps;
    }
    for (int step = 0; step < 2 * iters - 1; ++step) {
        /* Even steps divide by the sum over j, odd ones by the sum over k. */
        const int along = step % 2 ? 1 : n, across = step % 2 ? n : 1;
        for (int a = 0; a < n; ++a) {
            float *line = m + a * across, sum = eps;
            for (int b = 0; b < n; ++b) sum += line[b * along];
            const float by = 1 / sum;
            for (int b = 0; b < n; ++b) line[b * along] *= by;
        }
    }
}

/* streams [tokens, N, D]; handed [tokens, N] or NULL; fn [N*N + 2N, N*D]; base [N*N + 2N];
 * scale [3]; scratch [N*D + D] -> x [tokens, D], pre, post [tokens, N], comb [tokens, N, N]. */
void dsv4_open_site(const void *streams, const float *handed, const float *fn, const float *base,
                    const float *scale, float *scratch, void *x, float *pre, float *post,
                    float *comb, int64_t tokens, int64_t n, int64_t d, int64_t iters, int64_t half,
                    float eps, float rms_eps) {
    const size_t size = (size_t)(n * d);
    for (int64_t t = 0; t < tokens; ++t, pre += n, post += n, comb += n * n) {
        const float *h = widen(streams, (size_t)t * size, size, scratch, half);
        const float r = 1 / sqrtf(dot(h, h, size) / (float)size + rms_eps);
        for (int64_t row = 0; row < n * n + 2 * n; ++row) {
            const float y = dot(h, fn + row * size, size) * r;
            if (row < n)
                pre[row] = 1 / (1 + expf(-(scale[0] * y + base[row]))) + eps;
            else if (row < 2 * n)
                post[row - n] = 2 / (1 + expf(-(scale[1] * y + base[row])));
            else
                comb[row - 2 * n] = scale[2] * y + base[row];
        }
        sinkhorn(comb, (int)n, (int)iters, eps);
        const float *by = handed ? handed + t * n : pre;
        float *restrict sum = half ? scratch + size : (float *)x + t * d;
        for (int64_t c = 0; c < d; ++c) sum[c] = by[0] * h[c];
        for (int64_t j = 1; j < n; ++j)
            for (int64_t c = 0; c < d; ++c) sum[c] += by[j] * h[j * d + c];
        narrow(x, (size_t)t * d, d, sum, half);
    }
}

/* u [tokens, D], streams [tokens, N, D], post [tokens, N], comb [tokens, N, N], scratch [2 D]
 * -> out [tokens, N, D], which may not be the streams. */
void dsv4_expand(const void *u, const void *streams, const float *post, const float *comb,
                 float *scratch, void *out, int64_t tokens, int64_t n, int64_t d, int64_t half) {
    for (int64_t t = 0; t < tokens; ++t, post += n, comb += n * n)
        for (int64_t k = 0; k < n; ++k) {
            const size_t at = (size_t)(t * n + k) * d;
            float *restrict sum = half ? scratch : (float *)out + at;
            const float *from = widen(u, (size_t)t * d, d, scratch + d, half);
            for (int64_t c = 0; c < d; ++c) sum[c] = post[k] * from[c];
            for (int64_t j = 0; j < n; ++j) {
                from = widen(streams, (size_t)(t * n + j) * d, d, scratch + d, half);
                const float by = comb[j * n + k];
                for (int64_t c = 0; c < d; ++c) sum[c] += by * from[c];
            }
            narrow(out, at, d, sum, half);
        }
}
