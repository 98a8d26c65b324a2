/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of packed weights as vectors of float32, `BLOCK(kind)` weights at a time. Weights come out
 * in the order that is cheapest to make, not in that of the row: `column_of` says which is where,
 * and the other factor of a product is put in the same order. What does not fill a block, and
 * sizes with other groups of scales than the usual ones, come out one by one (`spell`).
 *
 * With DSV4_PORTABLE nothing but C is used.
 */
#ifndef DSV4_UNPACK_H
#define DSV4_UNPACK_H

#include <stdint.h>
#include <string.h>

#if !defined(DSV4_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 1
#include <immintrin.h>
#if defined(__AVX512VBMI__) && defined(__AVX512VL__)
#define BYTE_SHUFFLES 1
#endif
#elif !defined(DSV4_PORTABLE) && defined(__AVX2__)
#define HALF_WIDE 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
/* A register's load that begins in a line of the cache touches no other. */
#define IN_LINES __attribute__((aligned(64)))

/* Vectors of a block, as numbers and as bytes; rows of weights, and of the other
 * factor, at once. */
enum { LANES = 16, MOST_VECTORS = 16, MOST_BYTES = 4, AT_ONCE = 2 };

/* A compiler makes of it what the processor has: one register, or several. */
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(1), may_alias));

/* As quantize/cpu_experts.py numbers them; trellises by the bits of a code. */
enum { FP4 = 0, FP8 = 1, INT2 = 2, INT3 = 3, INT4 = 4, TRELLIS = 16, T4 = 20, T5, T6, T7, T8 };

/* One projection of an expert. Offsets count from the first byte of its record. */
typedef struct {
    int64_t kind, rows, columns;
    int64_t codes, scales, zeros;
    int64_t row_bytes, scale_bytes, zero_bytes; /* of one row; scales of one row of blocks */
    int64_t group, row_block;                   /* columns and rows that share a scale */
    int64_t rotated;                            /* columns of a rotated block, 0 without rotation */
    const float *across;                        /* [blocks, blocks], the rotation across blocks */
    const float *pairs;                         /* [1024, 2], the table of a trellis */
    const uint8_t *planes;                      /* [2, 512], half of it plus 128, by place */
} Matrix;

typedef struct {
    const uint8_t *codes, *scales, *zeros, *end;
    const float *scale; /* of every group in blocks, in E8M0 formats */
    float factor;       /* of the whole row */
} Row;

#ifdef WIDE
/* In a register. A compiler would rather load again at every use, and loads are what is scarce. */
INLINE __m512i held(__m512i v) {
    __asm__("" : "+v"(v));
    return v;
}
#endif

INLINE int is_trellis(int kind) { return kind >= TRELLIS; }

INLINE int is_grid(int kind) { return kind == INT2 || kind == INT3 || kind == INT4; }

/* Weights of a block. */
INLINE int64_t BLOCK(int kind) {
    return kind == FP8 ? 64 : kind == INT2 || kind == T4 ? 256 : 128;
}

/* Bytes of its codes. */
INLINE int64_t block_bytes(int kind) {
    return is_trellis(kind) ? BLOCK(kind) * (kind - TRELLIS) / 16 : kind == INT3 ? 48 : 64;
}

/* Bytes of codes between what is fetched and what is computed with; measured, of 4 to 32 KiB. */
INLINE int64_t bytes_ahead(int kind) { return is_trellis(kind) ? 4096 : 8192; }

INLINE int64_t usual_group(int kind) { return kind == FP4 ? 32 : 64; }

/* Columns that come in blocks; the rest is spelled. */
INLINE int64_t blocked(const Matrix *a, int kind) {
    const int64_t whole = a->columns / BLOCK(kind) * BLOCK(kind);
    if (is_trellis(kind)) return whole;
    if (kind == FP8) return a->group == 32 || a->group % 64 == 0 ? whole : 0;
    return a->group == usual_group(kind) ? whole : 0;
}

/* Column of a block's weight at `place`, vector by vector. */
INLINE int64_t column_of(int kind, int64_t place) {
    const int64_t vector = place / LANES, lane = place % LANES;
#ifdef WIDE
    /* Two groups of 32 columns, half a vector each; even and odd bytes go apart. */
    if (kind == FP8) return lane / 8 * 32 + vector / 2 * 16 + lane % 8 * 2 + vector % 2;
#endif
    if (!is_trellis(kind)) return lane * (BLOCK(kind) / LANES) + vector;
#ifdef BYTE_SHUFFLES
    /* Vectors: first numbers of 64 pairs, then the second ones; with codes of 4 bits twice. */
    const int64_t byte = 4 * lane + vector % 4, second = vector / 4 % 2, odd = vector / 8;
    return kind == T4 ? 4 * byte + 2 * odd + second : 2 * byte + second;
#else
    return place;
#endif
}

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE uint32_t half_word(const uint8_t *at) {
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static const float E2M1[16] = {0,    .5f,  1,  1.5f,  2,  3,  4,  6,
                               -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

/* E8M0: 2^(byte - 127); the least is subnormal, 255 is NaN. */
INLINE float e8m0(uint32_t byte) {
    return bits_to_float(byte << 23 | (byte == 0 || byte == 255 ? 0x400000u : 0));
}

INLINE float e4m3(uint32_t byte) {
    const uint32_t magnitude = byte & 127, sign = (byte & 128) << 24;
    if (magnitude == 127) return bits_to_float(0x7fc00000u);
    const float value = magnitude < 8 ? (float)magnitude * 0x1p-9f
                                      : bits_to_float((magnitude << 20) + (120u << 23));
    return sign ? -value : value;
}

/* Numbers of scratch that `row_of` wants. */
INLINE int64_t row_scratch(const Matrix *a) {
    const int64_t scales = a->columns / 32, codes = a->row_bytes / 4;
    return (scales > codes ? scales : codes) + 2 * LANES;
}

/* Whether whole registers are loaded that reach up to 63 bytes beyond a block. */
INLINE int reaches_far(int kind) {
#ifdef BYTE_SHUFFLES
    return kind == INT3 || (is_trellis(kind) && kind != T8 && kind != T4);
#else
    (void)kind;
    return 0;
#endif
}

INLINE Row row_of(const Matrix *a, const uint8_t *record, int kind, int64_t row, float *scratch) {
    const int64_t scales = kind == FP8 ? row / a->row_block : row;
    Row r = {record + a->codes + row * a->row_bytes, record + a->scales + scales * a->scale_bytes,
             record + a->zeros + row * a->zero_bytes, NULL, NULL, 1};
    /* Behind the last row the memory may end. */
    if (reaches_far(kind) && row == a->rows - 1)
        r.codes = memcpy(scratch, r.codes, a->row_bytes);
    r.end = r.codes + a->row_bytes;
    if (is_trellis(kind)) {
        r.factor = bits_to_float(half_word(r.scales) << 16);
        return r;
    }
    if (kind == FP4 || kind == FP8) {
        const int64_t group = kind == FP4 ? usual_group(kind) : a->group;
        const int64_t groups = (blocked(a, kind) + group - 1) / group;
        for (int64_t g = 0; g < groups; ++g) scratch[g] = e8m0(r.scales[g]);
        r.scale = scratch;
    }
    return r;
}

/* Code of `bits` bits, number `at` of its row; zero before the first. */
INLINE uint32_t code_of(const Row *r, int bits, int64_t at) {
    if (at < 0) return 0;
    const uint8_t *byte = r->codes + (at * bits >> 3);
    const uint32_t low = byte[0], high = byte + 1 < r->end ? byte[1] : 0;
    return (low | high << 8) >> (at * bits & 7) & ((1u << bits) - 1);
}

/* Columns [from, from + n) of a trellis, both even, in their own order and without the factor. */
APART void spell_trellis(const Matrix *a, const Row *r, int bits, int64_t from, int64_t n,
                          float *out) {
    const int64_t first = from / 2;
    uint32_t window = 0;
    for (int64_t t = first - 3; t < first; ++t) window = window << bits | code_of(r, bits, t);
    for (int64_t t = first; t < first + n / 2; ++t, out += 2) {
        window = (window << bits | code_of(r, bits, t)) & 1023;
        memcpy(out, a->pairs + 2 * window, 2 * sizeof *out);
    }
}

/* Columns [from, from + n) of a row in their own order; a trellis without the row's factor. */
APART void spell(const Matrix *a, const Row *r, int kind, int64_t from, int64_t n, float *out) {
    if (is_trellis(kind)) {
        spell_trellis(a, r, kind - TRELLIS, from, n, out);
        return;
    }
    for (int64_t c = from; c < from + n; ++c) {
        const int64_t group = c / a->group;
        if (kind == FP4) {
            *out++ = E2M1[r->codes[c >> 1] >> 4 * (c & 1) & 15] * e8m0(r->scales[group]);
        } else if (kind == FP8) {
            *out++ = e4m3(r->codes[c]) * e8m0(r->scales[group]);
        } else {
            const float zero = (float)r->zeros[group] / (float)(1 << (8 - kind));
            const float scale = bits_to_float(half_word(r->scales + 2 * group) << 16);
            *out++ = ((float)code_of(r, kind, c) - zero) * scale;
        }
    }
}

/* table[index & 15] of every lane. */
INLINE vec look_up(const float *table, uvec index) {
#if defined(WIDE)
    return (vec)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#else
    index &= 15;
    vec out;
    for (int l = 0; l < LANES; ++l) out[l] = table[index[l]];
    return out;
#endif
}

INLINE vec e2m1_lanes(uvec code) {
#if defined(HALF_WIDE)
    /* Eight magnitudes fit a register; the sign is bit 3. */
    const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    union { uvec u; __m256i i[2]; } index = {code};
    union { vec v; __m256 f[2]; } found;
    for (int i = 0; i < 2; ++i) found.f[i] = _mm256_permutevar8x32_ps(table, index.i[i]);
    return (vec)((uvec)found.v ^ (code << 28 & 0x80000000u));
#else
    return look_up(E2M1, code);
#endif
}

/* Whole numbers below 2^bits. */
INLINE vec whole_lanes(uvec code, int bits) {
#if defined(WIDE)
    static const float two[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3},
                       three[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7},
                       four[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return look_up(bits == 2 ? two : bits == 3 ? three : four, code);
#else
    return __builtin_convertvector((ivec)(code & ((1u << bits) - 1)), vec);
#endif
}

#if defined(WIDE)
/* 64 codes as numbers 2^-8 of theirs: the bits of a float16 with the same fields, subnormals too. */
INLINE void e4m3_vectors(const uint8_t *at, vec *w) {
    const __m512i codes = _mm512_loadu_si512(at);
    const __m512i mixed = _mm512_shuffle_i64x2(codes, codes, 0xd8);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(mixed, 8), 1);
    const __m512i fields = _mm512_set1_epi16((short)0xbf80);
    const __m512i half[2] = {_mm512_and_si512(even, fields),
                             _mm512_and_si512(_mm512_srai_epi16(mixed, 1), fields)};
    for (int i = 0; i < 2; ++i) {
        w[i] = (vec)_mm512_cvtph_ps(_mm512_castsi512_si256(half[i]));
        w[2 + i] = (vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half[i], 1));
    }
    const __m512i magnitude = _mm512_set1_epi8(127);
    const __mmask64 odd_ones =
        _mm512_cmpeq_epi8_mask(_mm512_and_si512(mixed, magnitude), magnitude);
    if (__builtin_expect(odd_ones != 0, 0)) /* NaN, which float16 writes otherwise */
        for (int i = 0; i < 64; ++i)
            if (odd_ones >> i & 1) w[i / 32 * 2 + i % 2][i % 32 / 2] = bits_to_float(0x7fc00000u);
}
#else
INLINE vec e4m3_lanes(uvec code) {
    const uvec magnitude = code & 127, small = (uvec)(magnitude < 8);
    /* Subnormals: as if there were a leading one, which is then taken off. */
    vec value = (vec)((magnitude << 20) + (120u << 23) + (small & 1u << 23));
    value -= (vec)(small & 0x3c800000u);
    const uvec nan = (uvec)(magnitude == 127) & 0x7fc00000u;
    return (vec)((uvec)value | (code & 128) << 24 | nan);
}
#endif

/* What a weight of `unpack` is to be multiplied by before its scale. */
INLINE float unit_of(int kind) {
#if defined(WIDE)
    return kind == FP8 ? 256.f : 1.f;
#else
    (void)kind;
    return 1.f;
#endif
}

/* Lane l gets at[l / lanes], of four numbers or two. */
INLINE vec spread(const float *at, int lanes) {
#if defined(WIDE)
    static const int32_t four[16] IN_LINES = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
                         eight[16] IN_LINES = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    if (lanes == 4) {
        const __m512 all = _mm512_broadcast_f32x4(_mm_loadu_ps(at));
        return (vec)_mm512_permutevar_ps(all, _mm512_loadu_si512(four));
    }
    double both;
    memcpy(&both, at, sizeof both);
    const __m512 all = _mm512_castpd_ps(_mm512_set1_pd(both));
    return (vec)_mm512_permutevar_ps(all, _mm512_loadu_si512(eight));
#else
    vec out;
    for (int l = 0; l < LANES; ++l) out[l] = at[l / lanes];
    return out;
#endif
}

INLINE vec splat(float value) { return (vec){0} + value; }

static const uvec FOUR_BYTES = {0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24};
static const uvec TWO_BYTES = {0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8};
static const uvec TWO_HALVES = {16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};
static const uvec FOUR_HALVES = {16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0};
static const uvec FIRST_LANES = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};

INLINE uvec same(uint32_t bits) { return (uvec){0} + bits; }

/* Scales and zeros of block `b` of a grid: two groups, or four of 2-bit codes. */
INLINE vec grid_lanes(const Row *r, int bits, int64_t b, vec *zero) {
    uvec scale, place;
    if (bits == 2) {
        const uvec low = same(word(r->scales + 8 * b)), high = same(word(r->scales + 8 * b + 4));
        scale = ((low & FIRST_LANES) | (high & ~FIRST_LANES)) << FOUR_HALVES;
        place = same(word(r->zeros + 4 * b)) >> FOUR_BYTES;
    } else {
        scale = same(word(r->scales + 4 * b)) << TWO_HALVES;
        place = same(half_word(r->zeros + 2 * b)) >> TWO_BYTES;
    }
    *zero = __builtin_convertvector((ivec)(place & 255), vec) * (1.f / (float)(1 << (8 - bits)));
    return (vec)(scale & 0xffff0000u);
}

/* Dwords of three bytes each: 48 bytes from `at` on, of which 64 are readable. */
INLINE uvec three_bytes(const uint8_t *at) {
#if defined(BYTE_SHUFFLES)
    static const uint8_t place[64] = {
        0,  1,  2,  0, 3,  4,  5,  0, 6,  7,  8,  0, 9,  10, 11, 0, 12, 13, 14, 0, 15, 16,
        17, 0,  18, 19, 20, 0, 21, 22, 23, 0, 24, 25, 26, 0, 27, 28, 29, 0, 30, 31, 32, 0,
        33, 34, 35, 0,  36, 37, 38, 0, 39, 40, 41, 0, 42, 43, 44, 0, 45, 46, 47, 0};
    const __m512i bytes = _mm512_loadu_si512(at);
    return (uvec)_mm512_permutexvar_epi8(_mm512_loadu_si512(place), bytes);
#else
    uvec out;
    for (int l = 0; l < LANES; ++l)
        out[l] = half_word(at + 3 * l) | (uint32_t)at[3 * l + 2] << 16;
    return out;
#endif
}

#ifdef BYTE_SHUFFLES
#include "windows.h"
#endif

/* Block `b` of a row: weights w, each to be multiplied by `unit_of` and its lane of the result; of
 * grids `zero` is to be taken off before. */
INLINE vec unpack(const Matrix *a, const Row *r, int kind, int64_t b, vec *w, vec *zero) {
    const int vectors = (int)(BLOCK(kind) / LANES);
    if (is_trellis(kind)) {
#ifdef BYTE_SHUFFLES
        unpack_trellis(a, r, kind - TRELLIS, b, w);
        return splat(r->factor * 0x1p-29f);
#else
        spell_trellis(a, r, kind - TRELLIS, b * BLOCK(kind), BLOCK(kind), (float *)w);
        return splat(r->factor);
#endif
    }
    if (is_grid(kind)) {
        const vec scale = grid_lanes(r, kind, b, zero);
        uvec codes;
        if (kind == INT3) codes = three_bytes(r->codes + 48 * b);
        else codes = *(const uvec *)(r->codes + 64 * b);
        for (int j = 0; j < vectors; ++j) w[j] = whole_lanes(codes >> kind * j, kind);
        return scale;
    }
    if (kind == FP4) {
        const uvec codes = *(const uvec *)(r->codes + 64 * b);
        for (int j = 0; j < vectors; ++j) w[j] = e2m1_lanes(codes >> 4 * j);
        return spread(r->scale + 4 * b, 4);
    }
#if defined(WIDE)
    e4m3_vectors(r->codes + 64 * b, w);
#else
    const uvec codes = *(const uvec *)(r->codes + 64 * b);
    for (int j = 0; j < vectors; ++j) w[j] = e4m3_lanes(codes >> 8 * j & 255);
#endif
    return a->group == 32 ? spread(r->scale + 2 * b, 8) : splat(r->scale[64 * b / a->group]);
}

#endif
