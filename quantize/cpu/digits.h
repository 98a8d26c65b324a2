/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of whole numbers. Weights are bytes without a sign, straight from a shuffle: codes of
 * whole numbers themselves, fp4 twice and 12 more, a trellis' numbers of bytes and 128 more. The
 * other factor is fixed point with three signed digits of base 256, under one power of two for a
 * block of columns (for the row, where the weights have one scale too). Sums of such products are
 * exact; a block's are rounded once, to float32. What a block's numbers lose is at most 2^-22.9 of
 * the largest among them.
 *
 * Rows with an infinity or a NaN have no fixed point and are multiplied as float32.
 */
#ifndef DSV4_DIGITS_H
#define DSV4_DIGITS_H

#include "unpack.h"

#if defined(BYTE_SHUFFLES) && defined(__AVX512VNNI__)
#define DIGITS 1
#endif

enum { NUM_DIGITS = 3, MOST_SHIFT = 120 };

INLINE int in_digits(int kind) {
#ifdef DIGITS
    return kind != FP8;
#else
    (void)kind;
    return 0;
#endif
}

/* Bytes of a block of the other factor: digits by vector, most significant first; but for trellises
 * behind them a vector of sums, lane by lane, and what a unit of the digits is worth. */
INLINE int64_t digit_bytes(int kind) {
    return NUM_DIGITS * BLOCK(kind) + (is_trellis(kind) ? 0 : 2 * 64);
}

/* A row of the other factor as digits, and behind all of them what it is worth. */
typedef struct {
    int64_t sum; /* of a trellis' row, in units */
    float unit;  /* of a trellis' row */
    int32_t valid;
} DigitRow;

#ifdef DIGITS
/* Column of a block's byte `place`, vector by vector. */
INLINE int64_t byte_column(int kind, int64_t place) {
    const int64_t vector = place / 64, byte = place % 64;
    if (kind == INT3) return byte / 4 * 8 + vector * 4 + byte % 4;
    return byte * (BLOCK(kind) / 64) + vector;
}

/* sums[q] = 256^2 w[q] d0 + 256 w[q] d1 + w[q] d2, four columns a lane; these fit, and what wraps on
 * the way does not matter. Digits apart: a sum waits for the one before. */
INLINE void digit_products(int kind, const int rows, const __m512i (*w)[MOST_BYTES],
                           const uint8_t *digits, __m512i *sums) {
    const int vectors = (int)BLOCK(kind) / 64;
    __m512i part[AT_ONCE][NUM_DIGITS];
    for (int q = 0; q < rows; ++q)
        for (int d = 0; d < NUM_DIGITS; ++d) part[q][d] = _mm512_setzero_si512();
    for (int d = 0; d < NUM_DIGITS; ++d)
        for (int j = 0; j < vectors; ++j) {
            const __m512i x = held(_mm512_loadu_si512(digits + 64 * (d * vectors + j)));
            for (int q = 0; q < rows; ++q)
                part[q][d] = _mm512_dpbusd_epi32(part[q][d], w[q][j], x);
        }
    for (int q = 0; q < rows; ++q) {
        const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(part[q][0], 8), part[q][1]);
        sums[q] = _mm512_add_epi32(_mm512_slli_epi32(high, 8), part[q][2]);
    }
}

/* --- the other factor --------------------------------------------------------------------------*/

/* Bits of the largest magnitude of n numbers, a multiple of LANES; from 0x7f800000 on not finite. */
INLINE uint32_t largest_bits(const float *row, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t c = 0; c < n; c += LANES) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(row + c), magnitude);
        most = _mm512_max_epi32(most, bits);
    }
    return (uint32_t)_mm512_reduce_max_epi32(most);
}

/* The power of two that brings numbers up to `largest` below what the digits hold, which is not
 * quite 2^23: 127 (256^2 + 256 + 1). With its inverse, it stays inside float32. */
INLINE int digit_shift(uint32_t largest) {
    const float more = bits_to_float(largest) * 1.005f;
    uint32_t bits;
    memcpy(&bits, &more, sizeof bits);
    const int shift = 23 + 126 - (int)(bits >> 23);
    return shift < MOST_SHIFT ? shift : MOST_SHIFT;
}

/* Whether digits hold numbers up to `largest` as float32 does: not if they are infinite, or so
 * small that no power of two inside float32 brings them up. */
INLINE int digits_hold(uint32_t largest) {
    return largest < 0x7f800000u && (!largest || digit_shift(largest) < MOST_SHIFT);
}

/* Sum of all lanes; of a long row it does not fit one of them. */
INLINE int64_t wide_total(__m512i v) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

INLINE float power_of_two(int exponent) { return bits_to_float((uint32_t)(exponent + 127) << 23); }

/* A block of a row as digits under 2^-shift. */
INLINE void split_block(int kind, const float *row, int shift, uint8_t *digits) {
    const int64_t block = BLOCK(kind);
    const __m512 factor = _mm512_set1_ps(power_of_two(shift));
    /* The bytes of a number plus this are its digits, each plus 128. */
    const __m512i middle = _mm512_set1_epi32(0x808080);
    float ordered[256];
    for (int64_t i = 0; i < block; ++i) ordered[i] = row[byte_column(kind, i)];
    for (int64_t i = 0; i < block; i += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(ordered + i), factor);
        __m512i all = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), middle);
        all = _mm512_xor_si512(all, middle);
        for (int d = NUM_DIGITS - 1; d >= 0; --d) {
            _mm_storeu_si128((__m128i *)(digits + d * block + i), _mm512_cvtepi32_epi8(all));
            all = _mm512_srli_epi32(all, 8);
        }
    }
}

/* Sums of a block's numbers, lane by lane, in units. */
INLINE __m512i digit_sums(int kind, const uint8_t *digits) {
    __m512i ones[1][MOST_BYTES], sums;
    for (int j = 0; j < MOST_BYTES; ++j) ones[0][j] = _mm512_set1_epi8(1);
    digit_products(kind, 1, ones, digits, &sums);
    return sums;
}

INLINE DigitRow split_trellis(const Matrix *a, int kind, const float *row, uint8_t *digits) {
    const int64_t end = blocked(a, kind), block = BLOCK(kind);
    const uint32_t largest = largest_bits(row, end);
    const int shift = digit_shift(largest);
    /* Numbers of a trellis are whole 32nds. */
    DigitRow out = {0, power_of_two(-shift) * 0x1p-5f, digits_hold(largest)};
    for (int64_t start = 0; start < end; start += block, digits += digit_bytes(kind)) {
        split_block(kind, row + start, shift, digits);
        const ivec sums = (ivec)digit_sums(kind, digits);
        for (int l = 0; l < LANES; ++l) out.sum += sums[l];
    }
    return out;
}

INLINE DigitRow split_blocks(const Matrix *a, int kind, const float *row, uint8_t *digits) {
    const int64_t end = blocked(a, kind), block = BLOCK(kind);
    DigitRow out = {0, 0, 1};
    uint32_t most = 0;
    for (int64_t start = 0; start < end; start += block, digits += digit_bytes(kind)) {
        const uint32_t largest = largest_bits(row + start, block);
        const int shift = digit_shift(largest);
        if (largest > most) most = largest;
        split_block(kind, row + start, shift, digits);
        const __m512i sums = digit_sums(kind, digits);
        uint8_t *const behind = digits + NUM_DIGITS * block;
        float unit = power_of_two(-shift);
        if (kind == FP4) { /* Weights are twice as large, and 12 too many. */
            const __m512i less = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-12));
            _mm512_storeu_si512(behind, less);
            unit *= .5f;
        } else { /* Zeros count 2^-8 of the range of codes. */
            const float part = 1.f / (float)(1 << (8 - kind));
            const vec zeros = __builtin_convertvector((ivec)sums, vec) * part;
            memcpy(behind, &zeros, sizeof zeros);
        }
        memcpy(behind + 64, &unit, sizeof unit);
    }
    /* A small block of a row of larger ones is lost in their rounding. */
    out.valid = digits_hold(most);
    return out;
}

/* --- weights -----------------------------------------------------------------------------------*/

/* Bytes of a block, in the order of `byte_column`. */
INLINE void unpack_bytes(const Row *r, const int kind, int64_t b, __m512i *w) {
    if (kind == INT3) {
        static const uint8_t six[64] IN_LINES = {
            0,  1,  2,  3,  4,  5,  0, 0, 6,  7,  8,  9,  10, 11, 0, 0, 12, 13, 14, 15, 16, 17,
            0,  0,  18, 19, 20, 21, 22, 23, 0, 0, 24, 25, 26, 27, 28, 29, 0, 0, 30, 31, 32, 33,
            34, 35, 0,  0,  36, 37, 38, 39, 40, 41, 0, 0, 42, 43, 44, 45, 46, 47, 0, 0};
        /* Places of the bits of codes 0 to 3 and 8 to 11, of those behind each. */
        const __m512i first = _mm512_set1_epi64(0x211e1b1809060300),
                      second = _mm512_set1_epi64(0x2d2a272415120f0c);
        const __m512i bytes = _mm512_loadu_si512(r->codes + 48 * b);
        const __m512i words = _mm512_permutexvar_epi8(_mm512_loadu_si512(six), bytes);
        const __m512i low = _mm512_set1_epi8(7);
        w[0] = _mm512_and_si512(_mm512_multishift_epi64_epi8(first, words), low);
        w[1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(second, words), low);
        return;
    }
    const __m512i codes = held(_mm512_loadu_si512(r->codes + 64 * b));
    if (kind == FP4) {
        const __m512i table = _mm512_broadcast_i32x4(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        w[0] = _mm512_permutexvar_epi8(codes, table);
        w[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table);
        return;
    }
    const __m512i low = _mm512_set1_epi8((char)((1 << kind) - 1));
    for (int j = 0; j < 8 / kind; ++j)
        w[j] = _mm512_and_si512(_mm512_srli_epi16(codes, (unsigned)(kind * j)), low);
}

/* Bytes of four lanes: a bfloat16 as a float32, a byte as a whole number. */
#define FLOAT_FROM(AT) 128, 128, AT, AT + 1
#define WHOLE_FROM(AT) AT, 128, 128, 128
#define FOUR_LANES(FROM, AT) FROM(AT), FROM(AT), FROM(AT), FROM(AT)
/* Two groups a block, and four. */
#define LANES_OF(FROM, A, B, C, D) \
    {FOUR_LANES(FROM, A), FOUR_LANES(FROM, B), FOUR_LANES(FROM, C), FOUR_LANES(FROM, D)}
static const uint8_t SCALES_AT[2][64] IN_LINES = {LANES_OF(FLOAT_FROM, 0, 0, 2, 2),
                                                  LANES_OF(FLOAT_FROM, 0, 2, 4, 6)};
static const uint8_t ZEROS_AT[2][64] IN_LINES = {LANES_OF(WHOLE_FROM, 0, 0, 1, 1),
                                                 LANES_OF(WHOLE_FROM, 0, 1, 2, 3)};

/* Scales of a block's lanes, and zeros in their own steps. */
INLINE vec byte_lanes(const Row *r, const int kind, int64_t b, vec *zero) {
    if (kind == FP4) return spread(r->scale + 4 * b, 4);
    __m512i scales, zeros;
    if (kind == INT2) {
        int64_t many;
        memcpy(&many, r->scales + 8 * b, sizeof many);
        scales = _mm512_set1_epi64(many);
        zeros = _mm512_set1_epi32((int)word(r->zeros + 4 * b));
    } else {
        scales = _mm512_set1_epi32((int)word(r->scales + 4 * b));
        zeros = _mm512_set1_epi16((short)half_word(r->zeros + 2 * b));
    }
    const __m512i at = _mm512_loadu_si512(SCALES_AT[kind == INT2]);
    const __m512i zeros_at = _mm512_loadu_si512(ZEROS_AT[kind == INT2]);
    *zero = (vec)_mm512_cvtepi32_ps(_mm512_shuffle_epi8(zeros, zeros_at));
    return (vec)_mm512_shuffle_epi8(scales, at);
}

/* sum[q * m + i] += blocks of row q times row i of x, whose digits lie `apart` bytes apart. */
INLINE void add_blocks(const Matrix *a, const Row *r, const int rows, const int kind,
                       const uint8_t *digits, int64_t apart, const int m, vec *sum) {
    const int64_t blocks = blocked(a, kind) / BLOCK(kind);
    for (int64_t b = 0; b < blocks; ++b) {
        __m512i w[AT_ONCE][MOST_BYTES], whole[AT_ONCE];
        vec zero[AT_ONCE], scale[AT_ONCE];
        for (int q = 0; q < rows; ++q) {
            __builtin_prefetch(r[q].codes + b * block_bytes(kind) + bytes_ahead(kind));
            unpack_bytes(r + q, kind, b, w[q]);
            scale[q] = byte_lanes(r + q, kind, b, zero + q);
        }
        for (int i = 0; i < m; ++i) {
            const uint8_t *at = digits + i * apart + b * digit_bytes(kind);
            const uint8_t *behind = at + NUM_DIGITS * BLOCK(kind);
            const __m512i sums = held(_mm512_loadu_si512(behind));
            const __m512 unit = (__m512)held((__m512i)splat(*(const float *)(behind + 64)));
            digit_products(kind, rows, w, at, whole);
            for (int q = 0; q < rows; ++q) {
                if (kind == FP4) whole[q] = _mm512_add_epi32(whole[q], sums);
                __m512 product = _mm512_cvtepi32_ps(whole[q]);
                if (kind != FP4)
                    product = _mm512_fnmadd_ps((__m512)zero[q], (__m512)sums, product);
                product = _mm512_mul_ps(product, unit);
                vec *const to = sum + q * m + i;
                *to = (vec)_mm512_fmadd_ps((__m512)scale[q], product, (__m512)*to);
            }
        }
    }
}

/* sum[q * m + i], of which one lane alone is not zero, is row q of a trellis times row i of x. */
INLINE void add_windows(const Matrix *a, const Row *r, const int rows, const int kind,
                        const uint8_t *digits, int64_t apart, const int m, DigitRow **of,
                        vec *sum) {
    const int64_t blocks = blocked(a, kind) / BLOCK(kind);
    const int vectors = (int)BLOCK(kind) / 64;
    __m512i sums[AT_ONCE * AT_ONCE][NUM_DIGITS], w[AT_ONCE][MOST_BYTES];
    for (int i = 0; i < rows * m; ++i)
        for (int d = 0; d < NUM_DIGITS; ++d) sums[i][d] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
        for (int q = 0; q < rows; ++q)
            __builtin_prefetch(r[q].codes + b * block_bytes(kind) + bytes_ahead(kind));
        if (b) window_bytes(a, r, rows, kind - TRELLIS, b, 0, w);
        else window_bytes(a, r, rows, kind - TRELLIS, b, 1, w);
        for (int i = 0; i < m; ++i) {
            const uint8_t *at = digits + i * apart + b * digit_bytes(kind);
            for (int j = 0; j < vectors; ++j)
                for (int d = 0; d < NUM_DIGITS; ++d) {
                    const __m512i x = held(_mm512_loadu_si512(at + 64 * (d * vectors + j)));
                    for (int q = 0; q < rows; ++q) {
                        __m512i *const to = &sums[q * m + i][d];
                        *to = _mm512_dpbusd_epi32(*to, w[q][j], x);
                    }
                }
        }
    }
    for (int q = 0; q < rows; ++q)
        for (int i = 0; i < m; ++i) {
            int64_t whole = -128 * of[i]->sum;
            for (int d = 0; d < NUM_DIGITS; ++d)
                whole += wide_total(sums[q * m + i][d]) *
                         (1 << 8 * (NUM_DIGITS - 1 - d));
            sum[q * m + i] = (vec){(float)whole * of[i]->unit * r[q].factor};
        }
}
#endif

#endif
