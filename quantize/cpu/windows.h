/* SPDX-License-Identifier: Apache-2.0
 *
 * Trellises 64 windows at a time, with the byte shuffles of AVX-512 VBMI. The table of pairs is
 * antisymmetric, entry 1023 - i the negative of entry i, and made of bytes: the half that is kept
 * fills eight registers for the first number of the pairs and eight for the second. Bytes are kept
 * without a sign, 128 more than the numbers, of which none is -128.
 */
#ifndef DSV4_WINDOWS_H
#define DSV4_WINDOWS_H

/* 64 windows as places in half a table. */
typedef struct {
    __m512i low;           /* seven bits and more */
    __mmask64 k7, k8;      /* the next two */
    __mmask64 negative;
} Windows;

/* Of eight low bits, and two masks of the bits above. */
INLINE Windows windows_of(__m512i low, __mmask64 k8, __mmask64 k9) {
    /* The second half read backwards: all bits of the index inverted. */
    low = _mm512_mask_sub_epi8(low, k9, _mm512_set1_epi8(-1), low);
    return (Windows){low, _mm512_movepi8_mask(low), k8 ^ k9, k9};
}

/* w[q][at] = one number of 64 windows each, plus 128, from a plane. */
INLINE void from_plane(const uint8_t *plane, const int rows, const Windows *windows,
                       __m512i (*w)[MOST_BYTES], const int at) {
    __m512i found[AT_ONCE][4];
    for (int i = 0; i < 4; ++i) {
        const __m512i a = held(_mm512_loadu_si512(plane + 128 * i));
        const __m512i b = held(_mm512_loadu_si512(plane + 128 * i + 64));
        for (int q = 0; q < rows; ++q)
            found[q][i] = _mm512_permutex2var_epi8(a, windows[q].low, b);
    }
    for (int q = 0; q < rows; ++q) {
        const Windows *k = windows + q;
        const __m512i first = _mm512_mask_blend_epi8(k->k7, found[q][0], found[q][1]);
        const __m512i last = _mm512_mask_blend_epi8(k->k7, found[q][2], found[q][3]);
        const __m512i all = _mm512_mask_blend_epi8(k->k8, first, last);
        w[q][at] = _mm512_mask_sub_epi8(all, k->negative, _mm512_setzero_si512(), all);
    }
}

/* 64 bytes from the one before a block on; zero before a row. */
INLINE __m512i with_byte_before(const uint8_t *at, const int first) {
    if (first) return _mm512_maskz_loadu_epi8(~UINT64_C(1), at - 1);
    return _mm512_loadu_si512(at - 1);
}

/* Codes of 4 bits: 64 bytes hold 128, of which the even and the odd ones go apart. */
INLINE void nibble_windows(const uint8_t *at, const int first, Windows *even, Windows *odd) {
    const __m512i now = _mm512_loadu_si512(at), before = with_byte_before(at, first);
    const __m512i low_half = _mm512_set1_epi8(15);
    /* Even: its code, and the code before in the high half of the byte before. */
    const __m512i code = _mm512_ternarylogic_epi32(low_half, now, before, 0xca);
    *even = windows_of(code, _mm512_test_epi8_mask(before, _mm512_set1_epi8(1)),
                       _mm512_test_epi8_mask(before, _mm512_set1_epi8(2)));
    /* Odd: both codes lie in one byte, the other way round. */
    const __m512i both = _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi16(now, 4),
                                                   _mm512_slli_epi16(now, 4), 0xca);
    *odd = windows_of(both, _mm512_test_epi8_mask(before, _mm512_set1_epi8(16)),
                      _mm512_test_epi8_mask(before, _mm512_set1_epi8(32)));
}

/* Bytes g * bits - 1 to g * bits + 6 of a block, for g = 0 .. 7. */
#define GROUP_PLACES(B, G) B * G, B * G + 1, B * G + 2, B * G + 3, B * G + 4, B * G + 5, \
        B * G + 6, B * G + 7
#define PLACES(B) {GROUP_PLACES(B, 0), GROUP_PLACES(B, 1), GROUP_PLACES(B, 2), \
                   GROUP_PLACES(B, 3), GROUP_PLACES(B, 4), GROUP_PLACES(B, 5), \
                   GROUP_PLACES(B, 6), GROUP_PLACES(B, 7)}
static const uint8_t PLACES_OF[3][64] IN_LINES = {PLACES(5), PLACES(6), PLACES(7)};

/* Codes of 5 to 8 bits, 64 of them. */
INLINE Windows code_windows(const uint8_t *at, const int bits, const int first) {
    __m512i code, before = with_byte_before(at, first);
    if (bits == 8) {
        code = _mm512_loadu_si512(at);
    } else {
        const __m512i places = _mm512_loadu_si512(PLACES_OF[bits - 5]);
        const __m512i eight = _mm512_permutexvar_epi8(places, before);
        uint64_t now = 0, past = 0;
        for (int i = 0; i < 8; ++i) {
            now |= (uint64_t)(8 + i * bits) << 8 * i;
            past |= (uint64_t)(8 + (i - 1) * bits) << 8 * i;
        }
        code = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)now), eight);
        before = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)past), eight);
        const __m512i mine_alone = _mm512_set1_epi8((char)((1 << bits) - 1));
        code = _mm512_ternarylogic_epi32(mine_alone, code,
                                         _mm512_slli_epi16(before, (unsigned)bits), 0xca);
    }
    const __m512i eighth = _mm512_set1_epi8((char)(1 << (8 - bits))),
                  ninth = _mm512_set1_epi8((char)(1 << (9 - bits)));
    return windows_of(code, _mm512_test_epi8_mask(before, eighth),
                      _mm512_test_epi8_mask(before, ninth));
}

/* Block `b` of one row or two as bytes, 128 more than the numbers; `first` where it is the rows'
 * first. */
INLINE void window_bytes(const Matrix *a, const Row *r, const int rows, const int bits, int64_t b,
                         const int first, __m512i (*w)[MOST_BYTES]) {
    Windows windows[2][AT_ONCE];
    for (int q = 0; q < rows; ++q) {
        const uint8_t *at = r[q].codes + block_bytes(TRELLIS + bits) * b;
        if (bits == 4) nibble_windows(at, first, windows[0] + q, windows[1] + q);
        else windows[0][q] = code_windows(at, bits, first);
    }
    for (int odd = 0; odd < (bits == 4 ? 2 : 1); ++odd)
        for (int second = 0; second < 2; ++second)
            from_plane(a->planes + 512 * second, rows, windows[odd], w, 2 * odd + second);
}

/* Block `b` of a row, w in units of 2^-29. */
INLINE void unpack_trellis(const Matrix *a, const Row *r, const int bits, int64_t b, vec *w) {
    __m512i bytes[1][MOST_BYTES];
    if (b) window_bytes(a, r, 1, bits, b, 0, bytes);
    else window_bytes(a, r, 1, bits, b, 1, bytes);
    for (int v = 0; v < (bits == 4 ? 4 : 2); ++v) {
        const uvec signs = (uvec)_mm512_xor_si512(bytes[0][v], _mm512_set1_epi8(-128));
        for (int j = 0; j < 4; ++j) {
            const ivec top = (ivec)(signs << (24 - 8 * j) & 0xff000000u);
            w[4 * v + j] = __builtin_convertvector(top, vec);
        }
    }
}

#endif
