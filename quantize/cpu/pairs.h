/* SPDX-License-Identifier: Apache-2.0
 *
 * Codes of 2 and 4 bits by products of bfloat16: 32 weights out of one shuffle of 16-bit entries,
 * which are bfloat16 without loss. For rows of the other factor that are bfloat16 as well; three
 * such planes would make a float32, and more instructions than its own products. Sums are float32,
 * as everywhere; numbers below 2^-126 count as zero here.
 */
#ifndef DSV4_PAIRS_H
#define DSV4_PAIRS_H

#include "unpack.h"

#if defined(WIDE) && defined(__AVX512BF16__)
#define PAIRS 1
#endif

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
    static const uint16_t e2m1[32] = {
        0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
        0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
        0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
        0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    static const uint16_t four[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    static const uint16_t two[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x0000, 0x3f80, 0x4000, 0x4040,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x0000, 0x3f80, 0x4000, 0x4040,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x0000, 0x3f80, 0x4000, 0x4040,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x0000, 0x3f80, 0x4000, 0x4040};
    return _mm512_loadu_si512(kind == FP4 ? e2m1 : kind == INT4 ? four : two);
}

/* A row's blocks in bfloat16: lane l of vector j holds columns j and j + in_word of the codes of
 * dword l. Returns whether nothing was lost. */
INLINE int split_pairs(const Matrix *a, const int kind, const float *row, float *plane) {
    const int n = in_word(kind);
    const int64_t end = blocked(a, kind), block = BLOCK(kind);
    int32_t first[LANES];
    for (int l = 0; l < LANES; ++l) first[l] = 2 * n * l;
    const __m512i at = _mm512_loadu_si512(first);
    uvec lost = {0};
    for (int64_t start = 0; start < end; start += block)
        for (int j = 0; j < n; ++j) {
            const uvec even = (uvec)_mm512_i32gather_ps(at, row + start + j, 4);
            const uvec odd = (uvec)_mm512_i32gather_ps(at, row + start + j + n, 4);
            const uvec both = even >> 16 | (odd & 0xffff0000u);
            memcpy(plane + start / 2 + j * LANES, &both, sizeof both);
            lost |= (even | odd) & 0xffffu;
        }
    return !_mm512_test_epi32_mask((__m512i)lost, (__m512i)lost);
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

/* A block's weights by a row's, lane by lane. */
INLINE vec pair_products(const int kind, const __m512i *w, const float *at) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < in_word(kind); ++j) {
        const __m512i x = _mm512_loadu_si512(at + j * LANES);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w[j]);
    }
    return (vec)sum;
}
#endif

#endif
