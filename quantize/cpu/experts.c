/* SPDX-License-Identifier: Apache-2.0
 *
 * One routed expert from its packed record: down(silu(gate(x)) * up(x) * weight), both halves
 * clamped. All arithmetic is float32. Every number is computed by one thread, in one order of
 * additions, so that the number of threads changes no bit.
 *
 *     x [m, D] --prepare--> rotated, in the order of unpack.h
 *              --gate, up--> u [m, F] --prepare--> --down--> y [m, D]
 *
 * A few rows of x are multiplied by weights as they leave the registers that they are unpacked in.
 * Of more rows, at most MOST_ROWS at a time, panels of weights are unpacked for all.
 */
#include <math.h>
#include <stddef.h>

#include "digits.h"
#include "pool.h"

/* PANEL weights of TILE_W rows stay in the first cache. Accumulators fill the registers. */
#if defined(WIDE)
enum { TILE_X = 4, TILE_W = 6 };
#elif defined(HALF_WIDE)
enum { TILE_X = 2, TILE_W = 2 };
#else
enum { TILE_X = 2, TILE_W = 2 };
#endif
enum { PANEL = 1024, PANEL_STRIDE = PANEL + LANES, ROWS = 12, MOST_ROWS = 128 };
/* Rows of x that are few, and rows of weights that one thread then takes at once: what is fetched
 * ahead is its own. */
enum { FEW = 8, FEW_CHUNK = MOST_ROWS * ROWS / FEW };

typedef struct {
    Matrix gate, up, down;
    float limit; /* of both halves; infinity without one */
} Expert;

typedef struct {
    const Expert *expert;
    const uint8_t *record;
    const float *x, *weights; /* [m, D], [m] */
    float *ready, *u, *y;     /* [m, padded columns], [m, F], [m, D] */
    int64_t m, chunk_rows, threads;
} Call;

INLINE int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

INLINE int64_t padded(const Matrix *a) { return round_up(a->columns, LANES); }

/* A row is in the order of unpack.h; behind it are a grid's sums of blocks, lane by lane, the row as
 * digits, and a DigitRow. Of few rows the digits stand for all that comes in blocks, if they can.
 * Powers of two would put all rows in the same sets of a cache. */
INLINE int64_t digits_at(const Matrix *a) {
    return padded(a) + (is_grid(a->kind) ? padded(a) / BLOCK(a->kind) * LANES : 0);
}

INLINE int64_t stride_of(const Matrix *a) {
    const int64_t blocks = in_digits(a->kind) ? blocked(a, a->kind) / BLOCK(a->kind) : 0;
    return digits_at(a) + blocks * digit_bytes(a->kind) / 4 + LANES;
}

INLINE DigitRow *digit_row(const Matrix *a, const float *ready) {
    return (DigitRow *)(ready + stride_of(a) - LANES);
}

INLINE float total(vec v) {
#if defined(WIDE)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
#endif
}

/* --- the other factor --------------------------------------------------------------------------*/

/* Hadamard inside blocks, then a symmetric matrix across them: quantize/trellis.py, `rotate`. */
static void rotate(const Matrix *a, const float *row, float *out) {
    const int64_t k = a->columns, block = a->rotated, blocks = k / block;
    float inside[k];
    const float size = 1 / sqrtf((float)block);
    for (int64_t i = 0; i < k; ++i) inside[i] = row[i] * size;
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t start = 0; start < k; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float p = inside[i], q = inside[i + half];
                inside[i] = p + q;
                inside[i + half] = p - q;
            }
    memset(out, 0, k * sizeof *out);
    for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < blocks; ++j) {
            const float factor = a->across[i * blocks + j];
            for (int64_t c = 0; c < block; ++c) out[i * block + c] += factor * inside[j * block + c];
        }
}

INLINE void order(const Matrix *a, int kind, const float *row, int few, float *ready) {
    const int64_t end = blocked(a, kind), block = BLOCK(kind);
    for (int64_t c = end; c < padded(a); ++c) ready[c] = c < a->columns ? row[c] : 0;
    DigitRow digits = {0};
#ifdef DIGITS
    uint8_t *const at = (uint8_t *)(ready + digits_at(a));
    if (few && in_digits(kind))
        digits = is_trellis(kind) ? split_trellis(a, kind, row, at) : split_blocks(a, kind, row, at);
#endif
    *digit_row(a, ready) = digits;
    if (digits.valid) return;
    for (int64_t start = 0; start < end; start += block)
        for (int64_t i = 0; i < block; ++i) ready[start + i] = row[start + column_of(kind, i)];
    if (!is_grid(kind)) return;
    for (int64_t start = 0; start < end; start += block) {
        vec sum = {0};
        for (int64_t i = 0; i < block; i += LANES) sum += *(const vec *)(ready + start + i);
        *(vec *)(ready + padded(a) + start / block * LANES) = sum;
    }
}

/* Calls `do_it` with the kind of the matrix as a constant, so that it is compiled for each. */
#define WITH_KIND(kind, do_it)                                                                  \
    switch (kind) {                                                                             \
        case FP4: do_it(FP4); break;                                                            \
        case FP8: do_it(FP8); break;                                                            \
        case INT2: do_it(INT2); break;                                                          \
        case INT3: do_it(INT3); break;                                                          \
        case INT4: do_it(INT4); break;                                                          \
        case T4: do_it(T4); break;                                                              \
        case T5: do_it(T5); break;                                                              \
        case T6: do_it(T6); break;                                                              \
        case T7: do_it(T7); break;                                                              \
        case T8: do_it(T8); break;                                                              \
    }

static void prepare(const Matrix *a, const float *row, int few, float *ready) {
    float rotated[a->rotated ? a->columns : 1];
    if (a->rotated) rotate(a, row, rotated), row = rotated;
#define ORDER(KIND) order(a, KIND, row, few, ready)
    WITH_KIND(a->kind, ORDER)
#undef ORDER
}

static void prepare_x(void *argument, int64_t row) {
    const Call *c = argument;
    const Matrix *a = &c->expert->gate;
    prepare(a, c->x + row * a->columns, c->m <= FEW, c->ready + row * stride_of(a));
}

static void prepare_u(void *argument, int64_t row) {
    const Call *c = argument;
    const Matrix *a = &c->expert->down;
    prepare(a, c->u + row * a->columns, c->m <= FEW, c->ready + row * stride_of(a));
}

/* --- few rows: products of weights in registers ------------------------------------------------*/

INLINE void add_spelled(const float *w, const float *x, int64_t stride, int64_t n, int m, vec *sum) {
    for (int i = 0; i < m; ++i)
        for (int64_t c = 0; c < n; c += LANES)
            sum[i] += *(const vec *)(w + c) * *(const vec *)(x + i * stride + c);
}

/* sum[i] += blocks of a row times row i of x. */
INLINE void add_floats(const Matrix *a, const Row *r, const int kind, const float *x,
                       int64_t stride, const int m, vec *sum) {
    const int64_t block = BLOCK(kind), end = blocked(a, kind);
    const int vectors = (int)(block / LANES);
    for (int64_t b = 0; b < end / block; ++b) {
        vec w[MOST_VECTORS], zero;
        __builtin_prefetch(r->codes + b * block_bytes(kind) + bytes_ahead(kind));
        const vec scale = unpack(a, r, kind, b, w, &zero);
        for (int i = 0; i < m; ++i) {
            const vec *at = (const vec *)(x + i * stride + b * block);
            vec product = w[0] * at[0];
            for (int j = 1; j < vectors; ++j) product += w[j] * at[j];
            if (unit_of(kind) != 1) product *= unit_of(kind);
            if (is_grid(kind)) /* Off the sum, not off every weight. */
                product -= zero * *(const vec *)(x + i * stride + padded(a) + b * LANES);
            sum[i] += scale * product;
        }
    }
}

/* sum[q * m + i], of row q of the matrix, for rows of x that are digits. */
INLINE void add_digits(const Matrix *a, const Row *r, const int rows, const int kind,
                       const float *x, int64_t stride, const int m, vec *sum) {
#ifdef DIGITS
    const uint8_t *digits = (const uint8_t *)(x + digits_at(a));
    if (!is_trellis(kind)) {
        add_blocks(a, r, rows, kind, digits, 4 * stride, m, sum);
        return;
    }
    DigitRow *of[AT_ONCE];
    for (int i = 0; i < m; ++i) of[i] = digit_row(a, x + i * stride);
    add_windows(a, r, rows, kind, digits, 4 * stride, m, of, sum);
#endif
}

/* out[i * apart + q] = row q of one or two of the matrix times row i of x, of one or two. */
INLINE void dots(const Matrix *a, const uint8_t *record, const int kind, int64_t row,
                 const int rows, const float *x, int64_t stride, const int m, const int digits,
                 float *out, int64_t apart) {
    const int64_t room = row_scratch(a);
    float scratch[rows * room];
    Row r[AT_ONCE];
    vec sum[AT_ONCE * AT_ONCE] = {0};
    for (int q = 0; q < rows; ++q) r[q] = row_of(a, record, kind, row + q, scratch + q * room);
    if (digits) add_digits(a, r, rows, kind, x, stride, m, sum);
    else add_floats(a, r, kind, x, stride, m, sum);
    for (int q = 0; q < rows; ++q) {
        vec rest[AT_ONCE] = {0};
        for (int64_t from = blocked(a, kind); from < a->columns; from += 256) {
            float w[256] = {0};
            const int64_t n = a->columns - from < 256 ? a->columns - from : 256;
            spell(a, r + q, kind, from, n, w);
            add_spelled(w, x + from, stride, round_up(n, LANES), m, rest);
        }
        for (int i = 0; i < m; ++i)
            out[i * apart + q] = total(sum[q * m + i] + rest[i] * r[q].factor);
    }
}

/* Two rows of x lie in the first cache, and for the next two the weights do. As digits they take two
 * rows of the matrix at a time, so that each reads the other's numbers along. A row is multiplied in
 * one way, whichever lie beside it. */
APART void few(const Matrix *a, const uint8_t *record, int64_t first, int64_t n, const float *x,
               int64_t m, float *out, int64_t apart) {
    const int64_t stride = stride_of(a);
#define ROWS_OF(KIND, ROWS, AT, M, DIGITAL)                                                     \
    for (row = done; row + ROWS <= n; row += ROWS)                                              \
        dots(a, record, KIND, first + row, ROWS, x + (AT) * stride, stride, M, DIGITAL,         \
             out + (AT) * apart + row, apart)
#define FEW_ROWS(KIND)                                                                          \
    if (digits && in_digits(KIND)) {                                                            \
        if (some == 2) {                                                                        \
            ROWS_OF(KIND, 2, 0, 2, 1);                                                          \
        } else {                                                                                \
            ROWS_OF(KIND, 2, 0, 1, 1);                                                          \
        }                                                                                       \
        done = row;                                                                             \
        for (int i = 0; i < some; ++i) ROWS_OF(KIND, 1, i, 1, 1);                               \
    } else if (some == 2 && !in_digits(KIND)) {                                                 \
        ROWS_OF(KIND, 1, 0, 2, 0);                                                              \
    } else {                                                                                    \
        ROWS_OF(KIND, 1, 0, 1, 0);                                                              \
    }
    for (int64_t some; m > 0; m -= some, x += some * stride, out += some * apart) {
        const int digits = digit_row(a, x)->valid;
        int64_t row, done = 0;
        /* Rows that are no digits, where others are, come one by one. */
        const int together = digits || !in_digits(a->kind);
        some = m > 1 && together && digit_row(a, x + stride)->valid == digits ? 2 : 1;
        WITH_KIND(a->kind, FEW_ROWS)
    }
#undef FEW_ROWS
#undef ROWS_OF
}

/* --- many rows: panels of weights --------------------------------------------------------------*/

/* Places [from, from + n) of a row, scaled, both multiples of 256 unless it is the end. */
INLINE void unpack_panel(const Matrix *a, const Row *r, const int kind, int64_t from, int64_t n,
                         float *out) {
    const int64_t block = BLOCK(kind), end = blocked(a, kind);
    const int vectors = (int)(block / LANES);
    int64_t at = from;
    for (; at < end && at < from + n; at += block) {
        vec w[MOST_VECTORS], zero;
        const vec scale = unpack(a, r, kind, at / block, w, &zero);
        for (int j = 0; j < vectors; ++j) {
            if (is_grid(kind)) w[j] -= zero;
            ((vec *)(out + at - from))[j] = w[j] * unit_of(kind) * scale;
        }
    }
    const int64_t left = (from + n < a->columns ? from + n : a->columns) - at;
    if (left > 0) {
        spell(a, r, kind, at, left, out + at - from);
        for (int64_t c = 0; c < left; ++c) out[at - from + c] *= r->factor;
        at += left;
    }
    for (; at < from + n; ++at) out[at - from] = 0;
}

/* sums[i][j] += row i of x times row j of w, both n long. */
INLINE void tile(const float *w, const float *x, int64_t stride, int64_t n, const int m,
                 vec (*sums)[ROWS]) {
    vec sum[TILE_X][TILE_W];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_W; ++j) sum[i][j] = sums[i][j];
    for (int64_t c = 0; c < n; c += LANES) {
        vec row[TILE_W];
#pragma GCC unroll 8
        for (int j = 0; j < TILE_W; ++j) row[j] = *(const vec *)(w + j * PANEL_STRIDE + c);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) {
            const vec at = *(const vec *)(x + i * stride + c);
#pragma GCC unroll 8
            for (int j = 0; j < TILE_W; ++j) sum[i][j] += row[j] * at;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_W; ++j) sums[i][j] = sum[i][j];
}

APART void tiles(const float *w, const float *x, int64_t stride,
                                            int64_t n, int64_t m, vec (*sums)[ROWS]) {
    int64_t i = 0;
    for (; i + TILE_X <= m; i += TILE_X) tile(w, x + i * stride, stride, n, TILE_X, sums + i);
    switch (m - i) {
        case 1: tile(w, x + i * stride, stride, n, 1, sums + i); break;
#if defined(WIDE)
        case 2: tile(w, x + i * stride, stride, n, 2, sums + i); break;
        case 3: tile(w, x + i * stride, stride, n, 3, sums + i); break;
#endif
    }
}

/* At most ROWS rows of a matrix by all of x. */
static void many(const Matrix *a, const uint8_t *record, int64_t first, int64_t n, const float *x,
                 int64_t m, float *out, int64_t apart) {
    const int64_t stride = stride_of(a);
    float w[ROWS * PANEL_STRIDE], scratch[row_scratch(a)];
    vec sums[MOST_ROWS][ROWS];
    const int64_t end = padded(a);
    memset(sums, 0, m * sizeof *sums);
    /* Rows that fill up a tile count for nothing, but are multiplied. */
    memset(w + n * PANEL_STRIDE, 0, (ROWS - n) * PANEL_STRIDE * sizeof *w);
    for (int64_t from = 0; from < end; from += PANEL) {
        const int64_t wide = end - from < PANEL ? end - from : PANEL;
#define UNPACK(KIND)                                                                            \
    for (int64_t row = 0; row < n; ++row) {                                                     \
        const Row r = row_of(a, record, KIND, first + row, scratch);                            \
        unpack_panel(a, &r, KIND, from, wide, w + row * PANEL_STRIDE);                                 \
    }
        WITH_KIND(a->kind, UNPACK)
#undef UNPACK
        for (int64_t row = 0; row < n; row += TILE_W)
            tiles(w + row * PANEL_STRIDE, x + from, stride, wide, m, (vec(*)[ROWS])(&sums[0][row]));
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t row = 0; row < n; ++row) out[i * apart + row] = total(sums[i][row]);
}

/* out[i * apart + row] = row `first + row` of a matrix times row i of x. */
static void multiply(const Matrix *a, const uint8_t *record, int64_t first, int64_t n,
                     const float *x, int64_t m, float *out, int64_t apart) {
    if (m <= FEW) few(a, record, first, n, x, m, out, apart);
    else many(a, record, first, n, x, m, out, apart);
}

/* --- one expert --------------------------------------------------------------------------------*/

/* e^v to two units in the last place; below 2^-126 zero, above all numbers infinity. */
INLINE vec exponential(vec v) {
    const vec steps = v * 1.44269504f;
    const vec magic = splat(12582912.f); /* 1.5 * 2^23: what is added to it is rounded */
    /* Clamped where the result is 0 or infinite anyhow; a NaN goes through `v`. */
    const ivec low = steps < -127.f, high = steps > 128.f;
    const vec n = (steps + magic) - magic;
    vec f = v - n * 0.693359375f;
    f -= n * -2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1;
    const ivec whole = __builtin_convertvector(n, ivec);
    /* In two factors: 2^128 has no representation, and 2^127 times p may be a number. */
    const ivec half = whole >> 1;
    p = p * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
    const vec edge = (vec)(high & 0x7f800000);
    const ivec inside = ~(low | high);
    return (vec)((inside & (ivec)p) | (ivec)edge);
}

/* u = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, n numbers; a NaN stays one. */
static void swiglu(const float *gate, const float *up, float limit, float weight, int64_t n,
                   float *u) {
    for (int64_t at = 0; at < n; at += LANES) {
        const size_t bytes = (n - at < LANES ? n - at : LANES) * sizeof *u;
        vec g = {0}, v = {0};
        memcpy(&g, gate + at, bytes);
        memcpy(&v, up + at, bytes);
        const ivec g_over = g > limit, v_over = v > limit, v_under = v < -limit;
        const ivec top = (ivec)splat(limit), bottom = (ivec)splat(-limit);
        g = (vec)((g_over & top) | (~g_over & (ivec)g));
        v = (vec)((v_over & top) | (v_under & bottom) | (~(v_over | v_under) & (ivec)v));
        const vec product = g / (1 + exponential(-g)) * v * weight;
        memcpy(u + at, &product, bytes);
    }
}

static void gate_up(void *argument, int64_t chunk) {
    const Call *c = argument;
    const Expert *e = c->expert;
    const int64_t rows = e->gate.rows, first = chunk * c->chunk_rows;
    const int64_t n = rows - first < c->chunk_rows ? rows - first : c->chunk_rows;
    float gate[MOST_ROWS * ROWS], up[MOST_ROWS * ROWS];
    const int64_t apart = c->chunk_rows;
    multiply(&e->gate, c->record, first, n, c->ready, c->m, gate, apart);
    multiply(&e->up, c->record, first, n, c->ready, c->m, up, apart);
    for (int64_t i = 0; i < c->m; ++i)
        swiglu(gate + i * apart, up + i * apart, e->limit, c->weights[i], n,
               c->u + i * rows + first);
}

static void down(void *argument, int64_t chunk) {
    const Call *c = argument;
    const Matrix *a = &c->expert->down;
    const int64_t first = chunk * c->chunk_rows;
    const int64_t n = a->rows - first < c->chunk_rows ? a->rows - first : c->chunk_rows;
    multiply(a, c->record, first, n, c->ready, c->m, c->y + first, a->rows);
}

static void share_rows(Call *c, Task task, int64_t rows) {
    c->chunk_rows = ROWS;
    if (c->m <= FEW) { /* As many as leave every thread a few turns. */
        const int64_t fair = rows / (8 * c->threads);
        c->chunk_rows = fair < ROWS ? ROWS : fair < FEW_CHUNK ? fair : FEW_CHUNK;
    }
    dsv4_share(task, c, (rows + c->chunk_rows - 1) / c->chunk_rows, c->threads);
}

/* Numbers of scratch for m rows. */
int64_t dsv4_expert_scratch(const Expert *e, int64_t m) {
    const int64_t rows = m < MOST_ROWS ? m : MOST_ROWS;
    const int64_t wide = stride_of(&e->gate), narrow = stride_of(&e->down);
    return rows * (wide > narrow ? wide : narrow) + round_up(rows * e->gate.rows, LANES);
}

/* x [m, D] contiguous, weights [m], scratch of the size above -> y [m, D]; m at least 1. */
void dsv4_expert(const Expert *expert, const uint8_t *record, const float *x, const float *weights,
                 float *scratch, float *y, int64_t m, int64_t threads) {
    const int64_t width = expert->gate.columns, wide = expert->gate.rows;
    for (int64_t at = 0; at < m; at += MOST_ROWS) {
        const int64_t rows = m - at < MOST_ROWS ? m - at : MOST_ROWS;
        Call c = {expert, record, x + at * width, weights + at,
                  scratch + round_up(rows * wide, LANES), scratch,
                  y + at * width, rows, ROWS, threads > 1 ? threads : 1};
        dsv4_share(prepare_x, &c, rows, threads);
        share_rows(&c, gate_up, wide);
        dsv4_share(prepare_u, &c, rows, threads);
        share_rows(&c, down, expert->down.rows);
    }
}
