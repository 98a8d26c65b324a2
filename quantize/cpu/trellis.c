/* SPDX-License-Identifier: Apache-2.0
 *
 * The Viterbi search of quantize/trellis.py, `viterbi`, for one row after the other. Costs of all
 * windows and steps stay in scratch, so that the way back can ask again which window came before.
 */
#include <stdint.h>

enum { STATES = 1024, LANES = 16, VECTORS = STATES / LANES, MOST_HEADS = 64 };

/* A compiler makes of it what the processor has: one register, or several. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vector smaller(vector a, vector b) {
    const mask less = a < b;
    return (vector)((less & (mask)a) | (~less & (mask)b));
}

/* best[head] = least cost of the windows choice * heads + head, over all choices. */
static inline void least(const vector *cost, float *best, const int heads) {
    const int wide = heads < LANES ? 1 : heads / LANES;
    vector some[MOST_HEADS / LANES];
    for (int k = 0; k < wide; ++k) some[k] = cost[k];
    for (int v = wide; v < VECTORS; v += wide)
        for (int k = 0; k < wide; ++k) some[k] = smaller(some[k], cost[v + k]);
    for (int k = 0; k < wide; ++k) ((vector *)best)[k] = some[k];
    /* Fewer heads than lanes took turns in them. */
    for (int l = heads; l < LANES; ++l)
        if (best[l] < best[l % heads]) best[l % heads] = best[l];
}

/* One row. Inlined for each number of bits, so that all loops have lengths known beforehand. */
static inline __attribute__((always_inline)) void search(
    const float *pair, const float *own, const float *first, const float *second, int64_t state,
    float *costs, float *bests, int64_t *path, int64_t stride, int64_t steps, const int bits) {
    const int choices = 1 << bits, heads = STATES >> bits;
    for (int w = 0; w < STATES; ++w) costs[w] = 1e9f;
    costs[state] = 0;
    for (int64_t t = 0; t < steps; ++t) {
        const float y0 = pair[2 * t], y1 = pair[2 * t + 1];
        const vector *cost = (const vector *)(costs + t * STATES);
        vector *next = (vector *)(costs + (t + 1) * STATES);
        float *best = bests + t * MOST_HEADS;
        least(cost, best, heads);
        for (int v = 0; v < VECTORS; ++v) {
            const vector here = ((const vector *)first)[v] * y0 + ((const vector *)second)[v] * y1;
            next[v] = here + ((const vector *)own)[v] + best[v * LANES >> bits];
        }
    }
    const float *last = costs + steps * STATES;
    int window = 0;
    for (int w = 1; w < STATES; ++w)
        if (last[w] < last[window]) window = w;
    for (int64_t t = steps - 1; t >= 0; --t) {
        path[t * stride] = window;
        const int head = window >> bits;
        const float *cost = costs + t * STATES + head, best = bests[t * MOST_HEADS + head];
        int from = 0;
        while (from < choices - 1 && cost[from * heads] != best) ++from;
        window = from * heads + head;
    }
}

/* y [rows, 2 steps]; own, first, second [STATES], so that a window w costs
 * own[w] + first[w] y0 + second[w] y1 at a pair; state [rows], windows before the first pair;
 * bits 4 to 8; scratch [(steps + 1) * STATES + steps * MOST_HEADS] -> path [steps, rows]. */
void dsv4_viterbi(const float *y, const float *own, const float *first, const float *second,
                  const int64_t *state, float *scratch, int64_t *path, int64_t rows, int64_t steps,
                  int64_t bits) {
    float *bests = scratch + (steps + 1) * STATES;
    for (int64_t r = 0; r < rows; ++r, y += 2 * steps) {
#define WITH(BITS)                                                                             \
    case BITS:                                                                                 \
        search(y, own, first, second, state[r], scratch, bests, path + r, rows, steps, BITS);  \
        break;
        switch (bits) { WITH(4) WITH(5) WITH(6) WITH(7) WITH(8) }
#undef WITH
    }
}
