# SPDX-License-Identifier: Apache-2.0
"""Few tokens times packed weights: every hit weight is read once, as it is stored.

    u[p] = silu(clamp(W1[e] x[t])) * clamp(W3[e] x[t]) * weight[p]      p a pair (t, k), e its id
    y[p] = W2[e] u[p]

Grid: (pair, rows), or (row of x, rows) of a plain linear map. The first axis runs fastest, so that
tokens that share an expert meet its rows in the L2 cache. A program is one warp: BLOCK_N rows by
BLOCK_G groups of 16 codes, a lane holding whole groups, so that nothing changes hands before the
last sum and x arrives where it is needed. Everything is float32 in registers; ids are read on the
device, so nothing waits for the host. Rows and codes beyond the end are masked to zero.

Packed codes are read as words of eight (FP4) or four (FP8). What meets them is stored in *pieces*:
the numbers at place 0 of all words, then those at place 1, and so on. Inputs are such numbers, or
E4M3 codes of them (`rounding.py`) with a scale for SPAN of a weight's codes; 0 for numbers.
"""

import triton
import triton.language as tl

from .unpack import E2M1_FACTOR, E4M3_FACTOR, FP4, GROUP, PLAIN, activation, e4m3, e8m0, scale_row

# Bits of codes are values over 2^126 or 2^120: activations are raised, so that no product is
# subnormal.
_RAISE = tl.constexpr(2.0**64)


@triton.jit
def numbers_at(x, inside, SPAN: tl.constexpr):
    """Inputs as float32, those of codes before their scale."""
    if SPAN > 0:
        value = e4m3(tl.load(x, mask=inside, other=0)) * E4M3_FACTOR
    else:
        value = tl.load(x, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def _word_products(
    w, line, keep, x, start, WIDTH,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Sums of the products of four words, before their scales: [BLOCK_N, BLOCK_G]."""
    PAIRS: tl.constexpr = 4 if FORMAT == FP4 else 2
    BITS: tl.constexpr = 16 // PAIRS
    words = WIDTH // 4
    at = start // 4 + tl.arange(0, BLOCK_G)[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = at < words
    word = tl.load(
        w.to(tl.pointer_type(tl.int32)) + line[:, None, None] // 4 + at[None],
        mask=keep[:, None, None] & inside[None], other=0,
    ).to(tl.uint32, bitcast=True)  # fmt: skip
    total = tl.zeros(word.shape, tl.float32)
    for place in tl.static_range(PAIRS):
        # The codes at this place of either half of a word, moved to end at bits 15 and 31: with
        # exponent and mantissa where bfloat16 has them, the upper halves of two float32.
        moved = word << (16 - BITS - BITS * place)
        if FORMAT == FP4:
            bits = (moved & 0x80008000) | ((moved >> 6) & 0x01C001C0)
        else:
            bits = (moved & 0x80008000) | ((moved >> 4) & 0x07F007F0)
        low = numbers_at(x + place * words + at, inside, SPAN) * _RAISE
        high = numbers_at(x + (place + PAIRS) * words + at, inside, SPAN) * _RAISE
        total += (bits << 16).to(tl.float32, bitcast=True) * low[None]
        total += (bits & 0xFFFF0000).to(tl.float32, bitcast=True) * high[None]
    factor: tl.constexpr = E2M1_FACTOR if FORMAT == FP4 else E4M3_FACTOR
    return tl.sum(total, axis=2) * (factor / _RAISE)


@triton.jit
def _plain_products(
    w, line, keep, x, start, WIDTH, SPAN: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """Sums of 16 products, before their scale: [BLOCK_N, BLOCK_G]."""
    at = start + tl.arange(0, BLOCK_G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = at < WIDTH
    weight = tl.load(
        w + line[:, None, None] + at[None], mask=keep[:, None, None] & inside[None], other=0
    )
    return tl.sum(weight.to(tl.float32) * numbers_at(x + at, inside, SPAN)[None], axis=2)


@triton.jit
def scales_of(s, row, WIDTH, SPAN: tl.constexpr):
    """Pointer to the scales of a row of inputs, where those are codes."""
    if SPAN > 0:
        s += row * (WIDTH // SPAN)
    return s


@triton.jit
def _row_products(
    w,
    s,
    rows,
    keep,
    half_rows,
    x,
    xs,
    WIDTH,
    scale_columns,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """`W[rows] . x`: [BLOCK_N] float32, from rows of WIDTH codes."""
    line = rows.to(tl.int64) * WIDTH
    s_line = scale_row(rows, half_rows, SCALE_ROWS) * scale_columns
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for start in range(0, WIDTH, BLOCK_G * GROUP):
        first = start + tl.arange(0, BLOCK_G) * GROUP
        if FORMAT == PLAIN:
            part = _plain_products(w, line, keep, x, start, WIDTH, SPAN, BLOCK_G)
        else:
            part = _word_products(w, line, keep, x, start, WIDTH, FORMAT, SPAN, BLOCK_G)
            byte = tl.load(
                s + s_line[:, None] + (first // SCALE_COLUMNS)[None, :],
                mask=keep[:, None] & (first < WIDTH)[None, :],
                other=0,
            )
            part *= e8m0(byte)
        if SPAN > 0:
            part *= e8m0(tl.load(xs + first // SPAN, mask=first < WIDTH, other=0))[None, :]
        acc += part
    return tl.sum(acc, axis=1)


@triton.jit
def store_activated(
    both, u, weight, pair, F, limit,
    CLAMP: tl.constexpr, NARROW: tl.constexpr, PIECES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HALF gates and as many ups of a pair to u [P, F], in the pieces that meet W2's codes."""
    gate, up = tl.split(tl.trans(tl.reshape(both, (2, HALF))))
    routing = tl.load(weight + pair)
    value = activation(gate, up, routing, limit, u.dtype.element_ty, CLAMP, NARROW)
    f = tl.program_id(1) * HALF + tl.arange(0, HALF)
    at = f % PIECES * (F // PIECES) + f // PIECES
    tl.store(u + pair * F + at, value, mask=f < F)


@triton.jit
def gate_up_gemv(
    x,
    xs,
    index,
    weight,
    w,
    s,
    u,
    F,
    WIDTH,
    scale_columns,
    w_expert,
    s_expert,
    x_row,
    limit,
    TOP_K: tl.constexpr,
    CLAMP: tl.constexpr,
    NARROW: tl.constexpr,
    PIECES: tl.constexpr,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Pairs through gate, up and the activation: u [P, F]; a tile is half gate and half up."""
    HALF: tl.constexpr = BLOCK_N // 2
    pair = tl.program_id(0)
    place = tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * HALF + place % HALF
    expert = tl.load(index + pair).to(tl.int64)
    token = pair // TOP_K
    both = _row_products(
        w + expert * w_expert, s + expert * s_expert, f + place // HALF * F, f < F, F,
        x + token * x_row, scales_of(xs, token, WIDTH, SPAN), WIDTH, scale_columns,
        SPAN, FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    store_activated(both, u, weight, pair, F, limit, CLAMP, NARROW, PIECES, HALF)


@triton.jit
def down_gemv(
    u,
    us,
    index,
    w,
    s,
    y,
    D,
    F,
    WIDTH,
    scale_columns,
    w_expert,
    s_expert,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Down projections of pairs: y [P, D] float32."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(index + pair).to(tl.int64)
    value = _row_products(
        w + expert * w_expert, s + expert * s_expert, rows, rows < D, D, u + pair * F,
        scales_of(us, pair, WIDTH, SPAN), WIDTH, scale_columns,
        SPAN, FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    tl.store(y + pair * D + rows, value, mask=rows < D)


@triton.jit
def linear_gemv(
    x,
    w,
    s,
    y,
    OUT,
    GROUP_ROWS,
    WIDTH,
    scale_columns,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Few rows x [n, G, in] through a linear map whose rows belong to G groups: y [n, OUT]."""
    token = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    keep = rows < OUT
    columns = WIDTH * 2 if FORMAT == FP4 else WIDTH
    x += (token * (OUT // GROUP_ROWS) + first // GROUP_ROWS) * columns
    value = _row_products(
        w, s, rows, keep, OUT, x, x, WIDTH, scale_columns,
        0, FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    tl.store(y + token * OUT + rows, value, mask=keep)
