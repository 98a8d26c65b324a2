# SPDX-License-Identifier: Apache-2.0
"""Few tokens times experts in whole numbers or a trellis, straight from their streams of bits.

    u[p] = silu(clamp(W1[e] x[t])) * clamp(W3[e] x[t]) * weight[p]      p a pair (t, k), e its id
    y[p] = W2[e] u[p]

Grid: (pair, rows), pairs fastest, so that tokens that share an expert meet its rows in the L2
cache. A program is one warp: BLOCK_N rows by BLOCK_U *units* of 32 codes, which fill as many words
of four bytes as a code has bits. A lane walks the codes of whole units, so in which word a code
lies is known when the kernel is compiled, a trellis' window is shifted on from code to code, and
nothing changes hands before the last sum. Everything is float32 in registers.

    grid       code bits become the mantissa of 1 + code / 2^bits; a unit's sum of products is
               corrected once by its zero, times the sum of its inputs
    trellis    each window looks up a pair; x was rotated instead of the weights, since the rotation
               is symmetric: (R y) . x = y . (R x)

What meets the codes is stored in *pieces*: the numbers at place 0 of all units, then those at place
1, and so on; for whole numbers they may be E4M3 codes, with a scale for SPAN of them (0: numbers).
Rows and units beyond the end are masked to zero.
"""

import triton
import triton.language as tl

from modeling_dsv4.kernels.expert_gemv import numbers_at, scales_of, store_activated
from modeling_dsv4.kernels.unpack import e8m0

# Codes of a unit, and the ten bits of a window.
UNIT = tl.constexpr(32)
WINDOW_MASK = tl.constexpr(1023)
# float32 1.0, whose mantissa takes a code.
ONE = tl.constexpr(0x3F800000)


@triton.jit
def bf16(word):
    """Sixteen bits in any integer -> the bfloat16 they are, as float32."""
    return (word.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_bf16(word):
    """The upper half of uint32 as bfloat16, in float32."""
    return (word & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _bits_at(word, before, FIRST: tl.constexpr, COUNT: tl.constexpr, TO: tl.constexpr):
    """COUNT bits that begin at bit FIRST of a word, or of the one before where negative.

    They begin at bit TO of what is returned, and nothing else is set there.
    """
    if FIRST < 0:
        both = (before >> (32 + FIRST)) | (word << -FIRST)
        moved = both << TO
    elif FIRST > TO:
        moved = word >> (FIRST - TO)
    else:
        moved = word << (TO - FIRST)
    return moved & (((1 << COUNT) - 1) << TO)


@triton.jit
def _grid_unit(
    at, here, x, inside, UNITS,
    BITS: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Sums over units of x times 1 + code / 2^bits [N, U], and of x [U]."""
    total = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    x_sum = tl.zeros((BLOCK_U,), tl.float32)
    before = tl.zeros((BLOCK_N, BLOCK_U), tl.uint32)
    for j in tl.static_range(BITS):
        word = tl.load(at + j, mask=here, other=0).to(tl.uint32, bitcast=True)
        # The codes that end in this word.
        for place in tl.static_range(j * 32 // BITS, (j + 1) * 32 // BITS):
            code = _bits_at(word, before, place * BITS - j * 32, BITS, 23 - BITS)
            value = (code | ONE).to(tl.float32, bitcast=True)
            number = numbers_at(x + place * UNITS, inside, SPAN)
            total += value * number[None, :]
            x_sum += number
        before = word
    return total, x_sum


@triton.jit
def _trellis_unit(
    at, here, first, table, x, inside, UNITS,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Sums over units of x times the pairs of 32 windows [N, U]; the row's first unit is told."""
    total = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    # A window of ten bits reaches back into one code before it, or two of four bits.
    before = tl.load(at - 1, mask=here & ~first[None, :], other=0).to(tl.uint32, bitcast=True)
    state = _bits_at(before, before, 32 - 2 * BITS, BITS, 0) << BITS
    state = state | _bits_at(before, before, 32 - BITS, BITS, 0)
    for j in tl.static_range(BITS):
        word = tl.load(at + j, mask=here, other=0).to(tl.uint32, bitcast=True)
        for place in tl.static_range(j * 32 // BITS, (j + 1) * 32 // BITS):
            code = _bits_at(word, before, place * BITS - j * 32, BITS, 0)
            state = (state << BITS) | code
            pair = tl.load(table + (state & WINDOW_MASK)).to(tl.uint32, bitcast=True)
            even = tl.load(x + 2 * place * UNITS, mask=inside, other=0).to(tl.float32)
            odd = tl.load(x + (2 * place + 1) * UNITS, mask=inside, other=0).to(tl.float32)
            total += bf16(pair) * even[None, :]
            total += high_bf16(pair) * odd[None, :]
        before = word
    return total


@triton.jit
def _row_products(
    w, s, z, rows, keep, x, xs, UNITS, groups,
    SPAN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """`W[rows] . x`: [BLOCK_N] float32, from rows of so many units."""
    line = w.to(tl.pointer_type(tl.int32)) + (rows.to(tl.int64) * (UNITS * BITS))[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    for start in range(0, UNITS, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        inside = unit < UNITS
        here = keep[:, None] & inside[None, :]
        at = line + (unit * BITS)[None, :]
        if TRELLIS:
            acc += _trellis_unit(
                at, here, unit == 0, z, x + unit, inside, UNITS, BITS, BLOCK_N, BLOCK_U
            )
        else:
            total, x_sum = _grid_unit(
                at, here, x + unit, inside, UNITS, BITS, SPAN, BLOCK_N, BLOCK_U
            )
            group = rows[:, None] * groups + (unit * UNIT // GROUP)[None, :]
            scale = bf16(tl.load(s + group, mask=here, other=0)) * (1 << BITS)
            zero = tl.load(z + group, mask=here, other=0).to(tl.float32) * (1 / 256) + 1.0
            part = (total - x_sum[None, :] * zero) * scale
            if SPAN > 0:
                byte = tl.load(xs + unit * UNIT // SPAN, mask=inside, other=0)
                part *= e8m0(byte)[None, :]
            acc += part
    value = tl.sum(acc, axis=1)
    if TRELLIS:
        value *= bf16(tl.load(s + rows, mask=keep, other=0))
    return value


@triton.jit
def gate_up_gemv(
    x, xs, index, weight, w, s, z, u,
    F, UNITS, groups, w_expert, s_expert, z_expert, x_row, limit,
    TOP_K: tl.constexpr, CLAMP: tl.constexpr, NARROW: tl.constexpr, PIECES: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Pairs through gate, up and the activation: u [P, F]; a tile is half gate and half up."""
    HALF: tl.constexpr = BLOCK_N // 2
    pair = tl.program_id(0)
    place = tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * HALF + place % HALF
    expert, token = tl.load(index + pair).to(tl.int64), pair // TOP_K
    both = _row_products(
        w + expert * w_expert, s + expert * s_expert, z + expert * z_expert,
        f + place // HALF * F, f < F, x + token * x_row,
        scales_of(xs, token, UNITS * UNIT, SPAN), UNITS, groups,
        SPAN, BITS, GROUP, TRELLIS, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    store_activated(both, u, weight, pair, F, limit, CLAMP, NARROW, PIECES, HALF)


@triton.jit
def down_gemv(
    u, us, index, w, s, z, y,
    D, F, UNITS, groups, w_expert, s_expert, z_expert,
    SPAN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Down projections of pairs: y [P, D] float32."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(index + pair).to(tl.int64)
    value = _row_products(
        w + expert * w_expert, s + expert * s_expert, z + expert * z_expert, rows, rows < D,
        u + pair * F, scales_of(us, pair, UNITS * UNIT, SPAN), UNITS, groups,
        SPAN, BITS, GROUP, TRELLIS, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    tl.store(y + pair * D + rows, value, mask=rows < D)
