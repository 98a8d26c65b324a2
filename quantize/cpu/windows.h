/* SPDX-License-Identifier: Apache-2.0
 *
 * Trellises 64 windows at a time, with the byte shuffles of AVX-512 VBMI. The table of pairs is
 * antisymmetric, entry 1023 - i the negative of entry i, and made of bytes: the half that is kept
 * fills eight registers for the first number of the pairs and eight for the second.
 */
#ifndef DSV4_WINDOWS_H
#define DSV4_WINDOWS_H

/* Numbers of 64 windows from one plane. `low` are seven bits of an index, k7 and k8 the next. */
INLINE __m512i from_plane(const int8_t *plane, __m512i low, __mmask64 k7, __mmask64 k8,
                          __mmask64 negative) {
    __m512i found[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_loadu_si512(plane + 128 * i);
        found[i] = _mm512_permutex2var_epi8(a, low, _mm512_loadu_si512(plane + 128 * i + 64));
    }
    const __m512i first = _mm512_mask_blend_epi8(k7, found[0], found[1]);
    const __m512i last = _mm512_mask_blend_epi8(k7, found[2], found[3]);
    const __m512i all = _mm512_mask_blend_epi8(k8, first, last);
    return _mm512_mask_sub_epi8(all, negative, _mm512_setzero_si512(), all);
}

/* Pairs of windows: eight low bits, and two masks of the bits above; w in units of 2^-29. */
INLINE void pairs_of(const int8_t *planes, __m512i low, __mmask64 k8, __mmask64 k9, vec *w) {
    /* The second half read backwards: all bits of the index inverted. */
    low = _mm512_xor_si512(low, _mm512_movm_epi8(k9));
    k8 ^= k9;
    const __mmask64 k7 = _mm512_movepi8_mask(low);
    for (int second = 0; second < 2; ++second) {
        const uvec bytes = (uvec)from_plane(planes + 512 * second, low, k7, k8, k9);
        for (int j = 0; j < 4; ++j) {
            const ivec top = (ivec)(bytes << (24 - 8 * j) & 0xff000000u);
            w[4 * second + j] = __builtin_convertvector(top, vec);
        }
    }
}

/* Codes of 4 bits: 64 bytes hold 128, of which the even and the odd ones go apart. */
INLINE void unpack_nibbles(const Matrix *a, const Row *r, int64_t b, vec *w) {
    const uint8_t *at = r->codes + 64 * b;
    const __m512i now = _mm512_loadu_si512(at);
    const __m512i before = _mm512_maskz_loadu_epi8(b ? ~UINT64_C(0) : ~UINT64_C(1), at - 1);
    const __m512i low_half = _mm512_set1_epi8(15);
    /* Even: its code, and the code before in the high half of the byte before. */
    const __m512i even = _mm512_ternarylogic_epi32(low_half, now, before, 0xca);
    pairs_of(a->planes, even, _mm512_test_epi8_mask(before, _mm512_set1_epi8(1)),
             _mm512_test_epi8_mask(before, _mm512_set1_epi8(2)), w);
    /* Odd: both codes lie in one byte, the other way round. */
    const __m512i odd = _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi16(now, 4),
                                                  _mm512_slli_epi16(now, 4), 0xca);
    pairs_of(a->planes, odd, _mm512_test_epi8_mask(before, _mm512_set1_epi8(16)),
             _mm512_test_epi8_mask(before, _mm512_set1_epi8(32)), w + 8);
}

/* Bytes g * bits - 1 to g * bits + 6 of a block, for g = 0 .. 7. */
#define GROUP_PLACES(B, G) B * G, B * G + 1, B * G + 2, B * G + 3, B * G + 4, B * G + 5, \
        B * G + 6, B * G + 7
#define PLACES(B) {GROUP_PLACES(B, 0), GROUP_PLACES(B, 1), GROUP_PLACES(B, 2), \
                   GROUP_PLACES(B, 3), GROUP_PLACES(B, 4), GROUP_PLACES(B, 5), \
                   GROUP_PLACES(B, 6), GROUP_PLACES(B, 7)}
static const uint8_t PLACES_OF[3][64] = {PLACES(5), PLACES(6), PLACES(7)};

INLINE void unpack_trellis(const Matrix *a, const Row *r, const int bits, int64_t b, vec *w) {
    if (bits == 4) {
        unpack_nibbles(a, r, b, w);
        return;
    }
    const uint8_t *at = r->codes + 8 * bits * b;
    const __mmask64 first = b ? 0 : 1;
    __m512i code, before;
    if (bits == 8) {
        code = _mm512_loadu_si512(at);
        before = _mm512_maskz_loadu_epi8(~first, at - 1);
    } else {
        const __mmask64 mine = (UINT64_C(1) << (8 * bits + 1)) - 1;
        const __m512i stream = _mm512_maskz_loadu_epi8(mine & ~first, at - 1);
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
    pairs_of(a->planes, code, _mm512_test_epi8_mask(before, _mm512_set1_epi8((char)(1 << (8 - bits)))),
             _mm512_test_epi8_mask(before, _mm512_set1_epi8((char)(1 << (9 - bits)))), w);
}

#endif
