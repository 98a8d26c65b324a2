# SPDX-License-Identifier: Apache-2.0
"""Few tokens times packed weights: every hit weight is read once, as it is stored.

    u[p] = silu(clamp(W1[e] x[t])) * clamp(W3[e] x[t]) * weight[p]      p a pair (t, k), e its id
    y[t] = sum_k W2[e] u[p]

Grid: (pair, rows) for u, (token, rows) for y and for a plain linear map. The first axis runs
fastest, so that tokens that share an expert meet its rows in the L2 cache. Tile: BLOCK_N rows by
BLOCK_G groups of 16 codes, summed inside a thread before the scale multiplies. Everything is
float32 in registers; ids are read on the device, so nothing waits for the host. Rows and codes
beyond the end are masked to zero.
"""

import triton
import triton.language as tl

from .unpack import E2M1_FACTOR, E4M3_FACTOR, FP4, FP8, GROUP, PLAIN, e4m3, e8m0, scale_row

# Bits of codes are values over 2^126: activations are raised, so that no product is subnormal.
_RAISE = tl.constexpr(2.0**64)


@triton.jit
def _fp4_products(w, line, keep, x, start, WIDTH, BLOCK_G: tl.constexpr):
    """Sums of a group's 32 products, before its scale: [BLOCK_N, BLOCK_G]."""
    group = tl.arange(0, BLOCK_G)[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = start // 4 + group  # [G, 4] words of eight codes
    inside = at < WIDTH // 4
    word = tl.load(
        w.to(tl.pointer_type(tl.int32)) + line[:, None, None] // 4 + at[None],
        mask=keep[:, None, None] & inside[None], other=0,
    )  # fmt: skip
    column = tl.arange(0, 8)[None, None, :]
    xs = tl.load(x + at[:, :, None] * 8 + column, mask=inside[:, :, None], other=0)
    xs = tl.reshape(xs.to(tl.float32) * _RAISE, (BLOCK_G, 4, 2, 2, 2))
    even, odd = tl.split(xs)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    word = word.to(tl.uint32, bitcast=True)
    total = tl.zeros(word.shape, tl.float32)
    total = _two_products(total, word << 12, x04)
    total = _two_products(total, word << 8, x15)
    total = _two_products(total, word << 4, x26)
    total = _two_products(total, word, x37)
    return tl.sum(total, axis=2) * (E2M1_FACTOR / _RAISE)


@triton.jit
def _two_products(total, word, x):
    """Add the codes that end at bits 15 and 31 of words [N, G, 4], times x [G, 4, 2]."""
    low, high = tl.split(x)
    # Two bfloat16, which are the upper halves of two float32.
    bits = (word & 0x80008000) | ((word >> 6) & 0x01C001C0)
    first = (bits << 16).to(tl.float32, bitcast=True)
    second = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    total += first * low[None]
    return total + second * high[None]


@triton.jit
def _byte_products(w, line, keep, x, start, WIDTH, FORMAT: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sums of 16 products, before their scale: [BLOCK_N, BLOCK_G]."""
    at = start + tl.arange(0, BLOCK_G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = at < WIDTH
    code = tl.load(
        w + line[:, None, None] + at[None], mask=keep[:, None, None] & inside[None], other=0
    )
    xs = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if FORMAT == FP8:
        part = tl.sum(e4m3(code) * (xs * _RAISE)[None], axis=2) * (E4M3_FACTOR / _RAISE)
    else:
        part = tl.sum(code.to(tl.float32) * xs[None], axis=2)
    return part


@triton.jit
def _row_products(
    w,
    s,
    rows,
    keep,
    half_rows,
    x,
    WIDTH,
    scale_columns,
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
        if FORMAT == FP4:
            part = _fp4_products(w, line, keep, x, start, WIDTH, BLOCK_G)
        else:
            part = _byte_products(w, line, keep, x, start, WIDTH, FORMAT, BLOCK_G)
        if FORMAT != PLAIN:
            first = start + tl.arange(0, BLOCK_G) * GROUP
            byte = tl.load(
                s + s_line[:, None] + (first // SCALE_COLUMNS)[None, :],
                mask=keep[:, None] & (first < WIDTH)[None, :],
                other=0,
            )
            part *= e8m0(byte)
        acc += part
    return tl.sum(acc, axis=1)


@triton.jit
def gate_up_gemv(
    x,
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
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Pairs through gate, up and the activation: u [P, F]."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < F
    expert = tl.load(index + pair).to(tl.int64)
    w += expert * w_expert
    s += expert * s_expert
    x += (pair // TOP_K) * x_row
    gate = _row_products(
        w, s, rows, keep, F, x, WIDTH, scale_columns,
        FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    up = _row_products(
        w, s, rows + F, keep, F, x, WIDTH, scale_columns,
        FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    if CLAMP:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate * tl.sigmoid(gate) * up * tl.load(weight + pair)
    tl.store(u + pair * F + rows, value, mask=keep)


@triton.jit
def down_gemv(
    u,
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
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Down projections of a token's K experts, summed in the order of its ids: y [n, D]."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < D
    total = tl.zeros((BLOCK_N,), tl.float32)
    # Unrolled: the loads of all K experts can be in flight together.
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(index + pair).to(tl.int64)
        total += _row_products(
            w + expert * w_expert, s + expert * s_expert, rows, keep, D, u + pair * F,
            WIDTH, scale_columns,
            FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
        )  # fmt: skip
    tl.store(y + token * D + rows, total, mask=keep)


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
        w, s, rows, keep, OUT, x, WIDTH, scale_columns,
        FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    tl.store(y + token * OUT + rows, value, mask=keep)
