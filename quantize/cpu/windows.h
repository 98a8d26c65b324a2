/* SPDX-License-Identifier: Apache-2.0
 *
 * Trellises 64 windows at a time, with the byte shuffles of AVX-512 VBMI. The table of pairs is
 * antisymmetric, entry 1023 - i the negative of entry i, and made of bytes: the half that is kept
 * fills eight registers for the first number of the pairs and eight for the second. Bytes are kept
 * without a sign, 128 more than the numbers, of which none is -128.
 */
#ifndef DSV4_WINDOWS_H
#define DSV4_WINDOWS_H

/* One number of 64 windows, plus 128, from a plane: `low` are seven bits of an index, `quarter` says
 * where the next two have which value. */
INLINE __m512i from_plane(const uint8_t *plane, __m512i low, const __mmask64 *quarter,
                          __mmask64 negative) {
    __m512i found = low;
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_loadu_si512(plane + 128 * i);
        const __m512i b = _mm512_loadu_si512(plane + 128 * i + 64);
        /* What is found stays, for it is no part of any other quarter. */
        found = _mm512_mask2_permutex2var_epi8(a, found, quarter[i], b);
    }
    return _mm512_mask_sub_epi8(found, negative, _mm512_setzero_si512(), found);
}

/* Pairs of 64 windows: eight low bits, and two masks of the bits above. First numbers and second
 * ones, each plus 128. */
INLINE void pairs_of(const uint8_t *planes, __m512i low, __mmask64 k8, __mmask64 k9, __m512i *w) {
    /* The second half read backwards: all bits of the index inverted. */
    low = _mm512_mask_sub_epi8(low, k9, _mm512_set1_epi8(-1), low);
    k8 ^= k9;
    const __mmask64 k7 = _mm512_movepi8_mask(low);
    const __mmask64 quarter[4] = {~(k7 | k8), k7 & ~k8, k8 & ~k7, k7 & k8};
    for (int second = 0; second < 2; ++second)
        w[second] = from_plane(planes + 512 * second, low, quarter, k9);
}

/* Codes of 4 bits: 64 bytes hold 128, of which the even and the odd ones go apart. */
INLINE void nibble_windows(const Matrix *a, const uint8_t *at, const int first, __m512i *w) {
    const __m512i now = _mm512_loadu_si512(at);
    const __m512i before =
        first ? _mm512_maskz_loadu_epi8(~UINT64_C(1), at - 1) : _mm512_loadu_si512(at - 1);
    const __m512i low_half = _mm512_set1_epi8(15);
    /* Even: its code, and the code before in the high half of the byte before. */
    const __m512i even = _mm512_ternarylogic_epi32(low_half, now, before, 0xca);
    pairs_of(a->planes, even, _mm512_test_epi8_mask(before, _mm512_set1_epi8(1)),
             _mm512_test_epi8_mask(before, _mm512_set1_epi8(2)), w);
    /* Odd: both codes lie in one byte, the other way round. */
    const __m512i odd = _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi16(now, 4),
                                                  _mm512_slli_epi16(now, 4), 0xca);
    pairs_of(a->planes, odd, _mm512_test_epi8_mask(before, _mm512_set1_epi8(16)),
             _mm512_test_epi8_mask(before, _mm512_set1_epi8(32)), w + 2);
}

/* Bytes g * bits - 1 to g * bits + 6 of a block, for g = 0 .. 7. */
#define GROUP_PLACES(B, G) B * G, B * G + 1, B * G + 2, B * G + 3, B * G + 4, B * G + 5, \
        B * G + 6, B * G + 7
#define PLACES(B) {GROUP_PLACES(B, 0), GROUP_PLACES(B, 1), GROUP_PLACES(B, 2), \
                   GROUP_PLACES(B, 3), GROUP_PLACES(B, 4), GROUP_PLACES(B, 5), \
                   GROUP_PLACES(B, 6), GROUP_PLACES(B, 7)}
static const uint8_t PLACES_OF[3][64] = {PLACES(5), PLACES(6), PLACES(7)};

/* Block `b` of a row as bytes, 128 more than the numbers; `first` where it is the row's first. */
INLINE void window_bytes(const Matrix *a, const Row *r, const int bits, int64_t b, const int first,
                         __m512i *w) {
    const uint8_t *at = r->codes + (bits == 4 ? 64 : 8 * bits) * b;
    if (bits == 4) {
        nibble_windows(a, at, first, w);
        return;
    }
    const __mmask64 known = first ? ~UINT64_C(1) : ~UINT64_C(0);
    __m512i code, before;
    if (bits == 8) {
        code = _mm512_loadu_si512(at);
        before = first ? _mm512_maskz_loadu_epi8(known, at - 1) : _mm512_loadu_si512(at - 1);
    } else {
        const __mmask64 mine = (UINT64_C(1) << (8 * bits + 1)) - 1;
        const __m512i stream = _mm512_maskz_loadu_epi8(mine & known, at - 1);
        const __m512i places = _mm512_loadu_si512(PLACES_OF[bits - 5]);
        const __m512i eight = _mm512_permutexvar_epi8(places, stream);
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
    pairs_of(a->planes, code, _mm512_test_epi8_mask(before, eighth),
             _mm512_test_epi8_mask(before, ninth), w);
}

/* Block `b` of a row, w in units of 2^-29. */
INLINE void unpack_trellis(const Matrix *a, const Row *r, const int bits, int64_t b, vec *w) {
    __m512i bytes[4];
    if (b) window_bytes(a, r, bits, b, 0, bytes);
    else window_bytes(a, r, bits, b, 1, bytes);
    for (int v = 0; v < (bits == 4 ? 4 : 2); ++v) {
        const uvec signs = (uvec)_mm512_xor_si512(bytes[v], _mm512_set1_epi8(-128));
        for (int j = 0; j < 4; ++j) {
            const ivec top = (ivec)(signs << (24 - 8 * j) & 0xff000000u);
            w[4 * v + j] = __builtin_convertvector(top, vec);
        }
    }
}

#endif
