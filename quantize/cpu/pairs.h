/* SPDX-License-Identifier: Apache-2.0
 *
 * Codes of 2 and 4 bits by products of bfloat16: 32 weights out of one shuffle of 16-bit entries,
 * which are bfloat16 without loss. A float32 is the sum of three bfloat16, exactly: of the other
 * factor there are three planes, of which two are zero if it came in bfloat16 and are left out.
 * Sums are float32, as everywhere; numbers below 2^-126 count as zero here.
 */
#ifndef DSV4_PAIRS_H
#define DSV4_PAIRS_H

#include "unpack.h"

#if defined(WIDE) && defined(__AVX512BF16__)
#define PAIRS 1
#endif

enum { PLANES = 3 };

INLINE int in_pairs(int kind) {
#ifdef PAIRS
    return kind == FP4 || kind == INT4 || kind == INT2;
#else
    (void)kind;
    return 0;
#endif
}

#ifdef PAIRS
INLINE int code_bits(int kind) { return kind == INT2 ? 2 : 4; }

/* Codes in 16 bits, and so many vectors of weights in a block. */
INLINE int in_word(int kind) { return 16 / code_bits(kind); }

/* bfloat16 of every code, twice and more: a shuffle looks at five bits. */
INLINE __m512i pair_table(int kind) {
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
        const float value = kind == FP4 ? E2M1[i & 15] : (float)(i & ((1 << code_bits(kind)) - 1));
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        table[i] = (uint16_t)(bits >> 16);
    }
    return _mm512_loadu_si512(table);
}

/* Planes of a row's blocks, plane by plane: lane l of vector j holds columns j and j + in_word of
 * the codes of dword l. Returns how many planes are not all zero. */
INLINE int split_pairs(const Matrix *a, const int kind, const float *row, float *planes) {
    const int n = in_word(kind);
    const int64_t end = blocked(a, kind), block = BLOCK(kind);
    const uvec high = same(0xffff0000u);
    int32_t first[LANES];
    for (int l = 0; l < LANES; ++l) first[l] = 2 * n * l;
    const __m512i at = _mm512_loadu_si512(first);
    uvec seen[PLANES] = {{0}};
    for (int64_t start = 0; start < end; start += block)
        for (int j = 0; j < n; ++j) {
            vec even = (vec)_mm512_i32gather_ps(at, row + start + j, 4);
            vec odd = (vec)_mm512_i32gather_ps(at, row + start + j + n, 4);
            for (int p = 0; p < PLANES; ++p) {
                const uvec e = (uvec)even & high, o = (uvec)odd & high;
                const uvec both = e >> 16 | o;
                memcpy(planes + p * end / 2 + start / 2 + j * LANES, &both, sizeof both);
                seen[p] |= both;
                even -= (vec)e;
                odd -= (vec)o;
            }
        }
    int count = 1;
    for (int p = 1; p < PLANES; ++p)
        if (_mm512_test_epi32_mask((__m512i)seen[p], (__m512i)seen[p])) count = p + 1;
    return count;
}

/* Vectors of a block's weights, lanes as in `unpack`, and its scale. */
INLINE vec unpack_pairs(const Row *r, const int kind, int64_t b, __m512i table, __m512i *w,
                        vec *zero) {
    const __m512i codes = _mm512_loadu_si512(r->codes + 64 * b);
    for (int j = 0; j < in_word(kind); ++j) {
        const __m512i index = _mm512_srli_epi16(codes, (unsigned)(j * code_bits(kind)));
        w[j] = _mm512_permutexvar_epi16(index, table);
    }
    if (kind == FP4) return spread(r->scale + 4 * b, 4);
    return grid_lanes(r, kind, b, zero);
}

/* A block's weights by so many planes of a row, lane by lane. */
INLINE vec pair_products(const int kind, const __m512i *w, const float *at, int64_t apart,
                         const int planes) {
    vec all = {0};
    for (int p = planes - 1; p >= 0; --p) { /* The small ones first. */
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < in_word(kind); ++j) {
            const __m512i x = _mm512_loadu_si512(at + p * apart + j * LANES);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w[j]);
        }
        all += (vec)sum;
    }
    return all;
}
#endif

#endif
