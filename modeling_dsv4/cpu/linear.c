/* SPDX-License-Identifier: Apache-2.0
 *
 * Linear maps of few rows: y = x W^T, where all time goes into reading W once. Weights are float32,
 * bfloat16, or E4M3 in square blocks with one E8M0 scale each; products and sums are float32. Every
 * number is computed by one thread, in one order of additions that does not depend on the rows
 * beside it: neither the number of threads nor that of rows changes a bit.
 *
 *     x [m, G * K] --prepare--> rows of float32, in the order that `opened` gives weights in
 *                  --products of TILE_W rows of W with TILE_X of x--> y [m, G * O]
 *
 * A step is VECTORS(kind) vectors of a row of W: one or two loads.
 */
#include <stddef.h>
#include <string.h>

#include "pool.h"

/* Accumulators fill the registers. */
#if !defined(DSV4_PORTABLE) && defined(__AVX2__)
#include <immintrin.h>
#define HALF_WIDE
#endif
#if defined(HALF_WIDE) && defined(__AVX512F__)
#define WIDE
enum { LANES = 16, TILE_X = 4 };
#else
enum { LANES = 8, TILE_X = 2 };
#endif
#if defined(WIDE) && defined(__AVX512VBMI__)
#define BYTE_TABLES
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of bfloat16 are taken apart as they lie on little-endian machines"
#endif

#define INLINE static inline __attribute__((always_inline))
/* Loops over accumulators, which lie in registers only if none of them is left. */
#define UNROLL _Pragma("GCC unroll 4")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

enum { FLOAT32, BFLOAT16, E4M3 };
/* Rows of weights at once, where several rows of x share what is loaded; a single row of x reads
 * weights as they lie. Bytes that are fetched ahead; rows of weights that a thread takes at most. */
enum { TILE_W = 2, AHEAD = 4096, MOST_CHUNK = 128 };

typedef struct {
    int64_t kind, half_x, half_y;  /* of the weight; whether x, y are bfloat16, else float32 */
    int64_t rows, columns, groups; /* O, K, G */
    int64_t block, scale_columns, plus_stride;
    const void *x;
    const uint8_t *weight, *scale; /* [G * O, K], [G * O / block, scale_columns] */
    const float *plus;             /* [m or 1, G * O] or NULL */
    float *ready;
    void *y;
} Map;

typedef struct {
    const Map *map;
    int64_t m, chunk_rows, chunks;
} Call;

INLINE int64_t VECTORS(int kind) { return kind == E4M3 ? 4 : 2; }
INLINE int64_t SIZE(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }
INLINE int64_t STEP(int kind) { return VECTORS(kind) * LANES; }

/* Numbers of a prepared row; powers of two would put all rows in the same sets of a cache. */
INLINE int64_t stride_of(const Map *a) {
    const int64_t step = STEP((int)a->kind);
    return (a->columns + step - 1) / step * step + LANES;
}

/* Column of a step's weight in a vector's lane. */
INLINE int64_t column_of(int kind, int64_t vector, int64_t lane) {
    if (kind == BFLOAT16) return 2 * lane + vector;
#ifdef BYTE_TABLES
    if (kind == E4M3) return 16 * (lane / 4) + 8 * (vector / 2) + 2 * (lane % 4) + vector % 2;
#endif
    return vector * LANES + lane;
}

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* 2^(byte - 127); the least is subnormal, 255 is NaN. */
INLINE float power_of(uint8_t byte) {
    if (byte == 0) return 0x1p-127f;
    return bits_to_float(byte == 255 ? 0x7fc00000u : (uint32_t)byte << 23);
}

#ifdef BYTE_TABLES
/* The two bytes of a bfloat16 for each magnitude of E4M3. */
static uint8_t e4m3_low[128], e4m3_high[128];
#endif

/* E4M3 is m * 2^e with m below 16; magnitude 127 is NaN. */
__attribute__((constructor)) static void fill_tables(void) {
#ifdef BYTE_TABLES
    for (uint32_t code = 0; code < 128; ++code) {
        const uint32_t field = code >> 3, mantissa = (code & 7) | (field ? 8 : 0);
        const float value = (float)mantissa * bits_to_float((field ? field : 1) + 117 << 23);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (code == 127) bits = 0x7fc00000u;
        e4m3_low[code] = (uint8_t)(bits >> 16);
        e4m3_high[code] = (uint8_t)(bits >> 24);
    }
#endif
}

#ifndef BYTE_TABLES
INLINE uvec bytes_of(const uint8_t *at) {
#if defined(WIDE)
    return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(HALF_WIDE)
    return (uvec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
    uvec code;
    for (int l = 0; l < LANES; ++l) code[l] = at[l];
    return code;
#endif
}

INLINE vec e4m3_lanes(uvec code) {
    const uvec field = code >> 3 & 15, normal = (uvec)(field != 0) & 1;
    const uvec mantissa = (code & 7) | normal << 3;
    const vec value = __builtin_convertvector((ivec)mantissa, vec);
    const vec power = (vec)((field + (1 - normal) + 117) << 23);
    const uvec nan = (uvec)((code & 127) == 127) & 0x7fc00000u;
    return (vec)((uvec)(value * power) | (code & 128) << 24 | nan);
}
#endif

/* One step of weights as float32, in the order of `column_of`. */
INLINE void opened(int kind, const uint8_t *at, vec *w) {
    if (kind == FLOAT32) {
        memcpy(w, at, 2 * sizeof *w);
    } else if (kind == BFLOAT16) {
        uvec pairs;
        memcpy(&pairs, at, sizeof pairs);
        w[0] = (vec)(pairs << 16);
        w[1] = (vec)(pairs & 0xffff0000u);
    } else {
#ifdef BYTE_TABLES
        const __m512i code = _mm512_loadu_si512(at);
        const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(e4m3_low), code,
                                                     _mm512_loadu_si512(e4m3_low + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(e4m3_high), code,
                                                _mm512_loadu_si512(e4m3_high + 64));
        /* high | (code & 0x80) */
        high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8((char)128), 0xf8);
        for (int i = 0; i < 2; ++i) {
            const uvec pairs = (uvec)(i ? _mm512_unpackhi_epi8(low, high)
                                        : _mm512_unpacklo_epi8(low, high));
            w[2 * i] = (vec)(pairs << 16);
            w[2 * i + 1] = (vec)(pairs & 0xffff0000u);
        }
#else
        for (int v = 0; v < 4; ++v) {
            w[v] = e4m3_lanes(bytes_of(at + v * LANES));
        }
#endif
    }
}

INLINE float total(vec v) {
#if defined(WIDE)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += v[l];
    return sum;
#endif
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Columns [first, first + n) of x, as many as a step has or fewer, in the order of the weights. */
INLINE void order(const Map *a, const int kind, int64_t first, int64_t n, float *ready) {
    float step[4 * LANES] = {0};
    if (a->half_x)
        for (int64_t c = 0; c < n; ++c)
            step[c] = bits_to_float((uint32_t)((const uint16_t *)a->x)[first + c] << 16);
    else
        memcpy(step, (const float *)a->x + first, (size_t)n * sizeof *step);
    for (int64_t v = 0; v < VECTORS(kind); ++v)
        for (int64_t l = 0; l < LANES; ++l) ready[v * LANES + l] = step[column_of(kind, v, l)];
}

/* x's row and group `at`. */
INLINE void prepare(const Map *a, const int kind, int64_t at) {
    float *ready = a->ready + at * stride_of(a);
    const int64_t step = STEP(kind);
    int64_t c = 0;
    for (; c + step <= a->columns; c += step)
        order(a, kind, at * a->columns + c, step, ready + c);
    if (c < a->columns) order(a, kind, at * a->columns + c, a->columns - c, ready + c);
}

/* sums[j][i] += a step of rows j of W times rows i of x, even and odd vectors apart. */
INLINE void add_step(const int kind, const uint8_t *w, int64_t row_bytes, const float *x,
                     int64_t stride, const int r, const int m, vec (*sums)[TILE_X][2]) {
    UNROLL
    for (int j = 0; j < r; ++j) {
        vec row[4];
        opened(kind, w + j * row_bytes, row);
        UNROLL
        for (int i = 0; i < m; ++i)
            UNROLL
            for (int v = 0; v < VECTORS(kind); ++v)
                sums[j][i][v % 2] += row[v] * *(const vec *)(x + i * stride + v * LANES);
    }
}

/* Columns [from, to) of r rows; those that fill no step are copied beside zeros. */
INLINE void add_columns(const Map *a, const int kind, const uint8_t *w, const float *x,
                        int64_t stride, int64_t from, int64_t to, const int r, const int m,
                        vec (*sums)[TILE_X][2]) {
    const int64_t row_bytes = a->columns * SIZE(kind), step = STEP(kind);
    int64_t c = from;
    for (; c + step <= to; c += step) {
        for (int j = 0; j < r; ++j)
            for (int64_t b = 0; b < step * SIZE(kind); b += 64)
                __builtin_prefetch(w + j * row_bytes + c * SIZE(kind) + b + AHEAD);
        add_step(kind, w + c * SIZE(kind), row_bytes, x + c, stride, r, m, sums);
    }
    if (c == to) return;
    uint8_t rest[TILE_W][8 * LANES] = {0};
    for (int j = 0; j < r; ++j)
        memcpy(rest[j], w + j * row_bytes + c * SIZE(kind), (size_t)((to - c) * SIZE(kind)));
    add_step(kind, rest[0], sizeof rest[0], x + c, stride, r, m, sums);
}

/* out[j][i] = rows j of W from `row` on times rows i of x. */
INLINE void tile(const Map *a, const int kind, int64_t row, const float *x, int64_t stride,
                 const int r, const int m, float (*out)[TILE_X]) {
    const uint8_t *w = a->weight + row * a->columns * SIZE(kind);
    vec sums[TILE_W][TILE_X][2] = {0};
    if (kind != E4M3) {
        add_columns(a, kind, w, x, stride, 0, a->columns, r, m, sums);
    } else {
        const uint8_t *scale = a->scale + row / a->block * a->scale_columns;
        for (int64_t from = 0; from < a->columns; from += a->block, ++scale) {
            vec parts[TILE_W][TILE_X][2] = {0};
            const int64_t to = from + a->block < a->columns ? from + a->block : a->columns;
            add_columns(a, kind, w, x, stride, from, to, r, m, parts);
            const float by = power_of(*scale);
            UNROLL
            for (int j = 0; j < r; ++j)
                UNROLL
                for (int i = 0; i < m; ++i)
                    sums[j][i][0] += (parts[j][i][0] + parts[j][i][1]) * by;
        }
    }
    UNROLL
    for (int j = 0; j < r; ++j)
        UNROLL
        for (int i = 0; i < m; ++i) out[j][i] = total(sums[j][i][0] + sums[j][i][1]);
}

/* Rows `row` to `row + r` of W times rows `from` to `from + m` of x; all are of one group. */
INLINE void products(const Map *a, int kind, int64_t row, const int r, int64_t from, const int m) {
    const int64_t stride = stride_of(a), width = a->groups * a->rows;
    const float *x = a->ready + (from * a->groups + row / a->rows) * stride;
    float out[TILE_W][TILE_X];
    tile(a, kind, row, x, a->groups * stride, r, m, out);
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < r; ++j) {
            const int64_t at = (from + i) * width + row + j;
            float value = out[j][i];
            if (a->plus) value += a->plus[(from + i) * a->plus_stride + row + j];
            if (a->half_y) ((uint16_t *)a->y)[at] = rounded(value);
            else ((float *)a->y)[at] = value;
        }
}

/* All of x by r rows of W: tiles of x of TILE_X rows, and what is left. */
INLINE void all_products(const Map *a, const int kind, int64_t row, const int r, int64_t m) {
    int64_t i = 0;
    for (; i + TILE_X <= m; i += TILE_X) products(a, kind, row, r, i, TILE_X);
    switch (m - i) {
        case 1: products(a, kind, row, r, i, 1); break;
#if defined(WIDE)
        case 2: products(a, kind, row, r, i, 2); break;
        case 3: products(a, kind, row, r, i, 3); break;
#endif
    }
}

/* A thread's rows of one group. A tile of rows has one scale a block. */
INLINE void chunk_of(const Call *c, const int kind, int64_t chunk) {
    const Map *a = c->map;
    const int64_t group = chunk / c->chunks, first = chunk % c->chunks * c->chunk_rows;
    const int64_t end = first + c->chunk_rows < a->rows ? first + c->chunk_rows : a->rows;
    const int64_t stop = group * a->rows + end;
    for (int64_t row = group * a->rows + first; row < stop;) {
        const int whole = kind != E4M3 || row % a->block + TILE_W <= a->block;
        if (c->m == 1 || !whole || row + TILE_W > stop) {
            all_products(a, kind, row++, 1, c->m);
        } else {
            all_products(a, kind, row, TILE_W, c->m);
            row += TILE_W;
        }
    }
}

/* Calls `do_it` with the kind of weights as a constant, so that it is compiled for each. */
#define WITH_KIND(kind, do_it)                                                                  \
    switch (kind) {                                                                             \
        case FLOAT32: do_it(FLOAT32); break;                                                    \
        case BFLOAT16: do_it(BFLOAT16); break;                                                  \
        case E4M3: do_it(E4M3); break;                                                          \
    }

static void run_chunk(void *argument, int64_t chunk) {
    const Call *c = argument;
#define CHUNK(KIND) chunk_of(c, KIND, chunk)
    WITH_KIND(c->map->kind, CHUNK)
#undef CHUNK
}

/* Numbers of scratch for m rows of x. */
int64_t dsv4_linear_scratch(int64_t kind, int64_t columns, int64_t groups, int64_t m) {
    const Map a = {.kind = kind, .columns = columns};
    return m * groups * stride_of(&a);
}

/* x [m, G * K] contiguous, scratch of the size above -> y [m, G * O]; see `Map`. */
void dsv4_linear(const void *x, const uint8_t *weight, const uint8_t *scale, const float *plus,
                 float *scratch, void *y, int64_t kind, int64_t half_x, int64_t half_y,
                 int64_t rows, int64_t columns, int64_t groups, int64_t block, int64_t plus_stride,
                 int64_t m, int64_t threads) {
    const int64_t scale_columns = block ? (columns + block - 1) / block : 0;
    const Map a = {kind,        half_x, half_y, rows,  columns, groups,  block, scale_columns,
                   plus_stride, x,      weight, scale, plus,    scratch, y};
#define PREPARE(KIND) \
    for (int64_t at = 0; at < m * groups; ++at) prepare(&a, KIND, at)
    WITH_KIND(kind, PREPARE)
#undef PREPARE
    /* As many rows as leave every thread a few turns. */
    const int64_t turns = 16 * (threads > 1 ? threads : 1);
    const int64_t fair = groups * rows / turns / TILE_W * TILE_W;
    const int64_t wide = fair < TILE_W ? TILE_W : fair < MOST_CHUNK ? fair : MOST_CHUNK;
    const int64_t chunks = (rows + wide - 1) / wide;
    Call c = {&a, m, wide, chunks};
    dsv4_share(run_chunk, &c, groups * chunks, threads);
}
