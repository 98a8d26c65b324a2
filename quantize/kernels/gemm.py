# SPDX-License-Identifier: Apache-2.0
"""Many tokens times experts in whole numbers or a trellis: opened in registers, for tensor cores.

    forward    h = W1 x, W3 x;  u = silu(clamp(h1)) * clamp(h3) * weight;  y = W2 u
    backward   dx = dy W, before the activation and behind it

Rows, tiles, grid and transposed products are those of `modeling_dsv4/kernels/expert_gemm.py`.
CODES are a row's codes: columns of a grid, pairs of columns of a trellis. Those open as two tiles,
of even and of odd columns, so what meets them is *split*, even columns first; it was rotated before
that.

    grid       eight codes fill as many bytes as a code has bits: read once, spread over eight
               columns, (code - zero) * scale as in the reference, rounded to the products' dtype
    trellis    a window is put together from the last codes before the end of its own; the scale of
               a row meets the sums forward, and the row's gradient backward
"""

import triton
import triton.language as tl

from modeling_dsv4.kernels.expert_gemm import (
    columns_of,
    grad_rows,
    inputs_at,
    inputs_of,
    load_inside,
    place,
    rows_of,
    store_columns,
    store_inner,
    store_rows,
)

from .gemv import ONE, WINDOW_MASK, bf16, high_bf16

# Columns that share scale and zero at least, and codes that fill whole bytes.
LEAST_GROUP, PERIOD = tl.constexpr(16), tl.constexpr(8)


@triton.jit
def _beside(rows, columns, ROWS_FIRST: tl.constexpr):
    """Offsets of rows [N] and of columns [K] as [N, K], or [K, N] without ROWS_FIRST."""
    if ROWS_FIRST:
        return rows[:, None] + columns[None, :]
    else:
        return rows[None, :] + columns[:, None]


@triton.jit
def _where(columns, ROWS_FIRST: tl.constexpr):
    """What holds for columns [K], for every row."""
    if ROWS_FIRST:
        return columns[None, :]
    else:
        return columns[:, None]


@triton.jit
def _spread(x, ROWS_FIRST: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIMES: tl.constexpr):
    """Each column TIMES times: [N, K] to [N, K * TIMES], or [K, N] to [K * TIMES, N]."""
    if ROWS_FIRST:
        wide = tl.broadcast_to(x[:, :, None], (N, K, TIMES))
        return tl.reshape(wide, (N, K * TIMES))
    else:
        wide = tl.broadcast_to(x[:, None, :], (K, TIMES, N))
        return tl.reshape(wide, (K * TIMES, N))


@triton.jit
def _eight_codes(at, inside, BITS: tl.constexpr, EVEN: tl.constexpr):
    """The bytes of eight codes as one number, from pointers to the first."""
    if BITS == 4:
        word = load_inside(at.to(tl.pointer_type(tl.int32)), inside, EVEN)
    elif BITS == 2:
        word = load_inside(at.to(tl.pointer_type(tl.int16)), inside, EVEN)
    else:
        word = load_inside(at, inside, EVEN).to(tl.uint32)
        for byte in tl.static_range(1, BITS):
            word = word | (load_inside(at + byte, inside, EVEN).to(tl.uint32) << (8 * byte))
    return word.to(tl.uint32)


@triton.jit
def _open_grid(
    w, s, z, rows, start, CODES, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS_FIRST: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of some rows: [N, K], or [K, N] without ROWS_FIRST."""
    first = start // PERIOD + tl.arange(0, BLOCK_K // PERIOD)
    line = rows.to(tl.int64) * (CODES // PERIOD * BITS)
    inside = _where(first * PERIOD < CODES, ROWS_FIRST)
    word = _eight_codes(w + _beside(line, first * BITS, ROWS_FIRST), inside, BITS, EVEN)
    wide = _spread(word, ROWS_FIRST, BLOCK_N, BLOCK_K // PERIOD, PERIOD)
    shift = _where(tl.arange(0, BLOCK_K) % PERIOD * BITS, ROWS_FIRST)
    code = (wide >> shift.to(tl.uint32)) & ((1 << BITS) - 1)
    column = start + tl.arange(0, BLOCK_K // LEAST_GROUP) * LEAST_GROUP
    at = _beside(rows * groups, column // GROUP, ROWS_FIRST)
    inside = _where(column < CODES, ROWS_FIRST)
    scale = bf16(load_inside(s + at, inside, EVEN)) * (1 << BITS)
    zero = load_inside(z + at, inside, EVEN).to(tl.float32) * (1 / 256) + 1.0
    scale = _spread(scale, ROWS_FIRST, BLOCK_N, BLOCK_K // LEAST_GROUP, LEAST_GROUP)
    zero = _spread(zero, ROWS_FIRST, BLOCK_N, BLOCK_K // LEAST_GROUP, LEAST_GROUP)
    value = ((code << (23 - BITS)) | ONE).to(tl.float32, bitcast=True)
    return ((value - zero) * scale).to(DTYPE)


@triton.jit
def _open_trellis(
    w, table, rows, start, CODES,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, ROWS_FIRST: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of BLOCK_K pairs of some rows, without their scale."""
    t = start + tl.arange(0, BLOCK_K)
    # The last bit of a code; the 32 bits up to it hold its window.
    last = (t + 1) * BITS - 1
    line = rows.to(tl.int64) * (CODES * BITS // 32)
    at = w.to(tl.pointer_type(tl.int32)) + _beside(line, last // 32, ROWS_FIRST)
    inside = t < CODES
    word = load_inside(at, _where(inside, ROWS_FIRST), EVEN).to(tl.uint32, bitcast=True)
    reach = _where(inside & (last >= 32), ROWS_FIRST)
    before = tl.load(at - 1, mask=reach, other=0).to(tl.uint32, bitcast=True)
    place = _where((last % 32).to(tl.uint32), ROWS_FIRST)
    bits = (word << (31 - place)) | ((before >> place) >> 1)
    MASK: tl.constexpr = (1 << BITS) - 1
    window = (bits >> (32 - BITS)) | (((bits >> (32 - 2 * BITS)) & MASK) << BITS)
    if BITS < 5:
        window = window | (((bits >> (32 - 3 * BITS)) & MASK) << (2 * BITS))
    pair = tl.load(table + (window & WINDOW_MASK)).to(tl.uint32, bitcast=True)
    return bf16(pair).to(DTYPE), high_bf16(pair).to(DTYPE)


@triton.jit
def _add_product(
    acc, w, s, z, rows, start, CODES, groups, x_even, x_odd,
    BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`acc + W x^T` over BLOCK_K codes: [N, M]; a trellis without its rows' scales."""
    if TRELLIS:
        even, odd = _open_trellis(w, z, rows, start, CODES, BITS, BLOCK_K, True, EVEN, DTYPE)
        acc = tl.dot(even, x_even, acc, input_precision="ieee")
        acc = tl.dot(odd, x_odd, acc, input_precision="ieee")
    else:
        tile = _open_grid(
            w, s, z, rows, start, CODES, groups,
            BITS, GROUP, BLOCK_N, BLOCK_K, True, EVEN, DTYPE,
        )  # fmt: skip
        acc = tl.dot(tile, x_even, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_gemm(
    x, xs, weight, order, tiles, w, s, z, u, h,
    EXPERTS, F, CODES, groups, w_expert, s_expert, z_expert, x_row, limit,
    TOP_K: tl.constexpr, CLAMP: tl.constexpr, SAVE: tl.constexpr, NARROW: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows through gate, up and the activation: u [P, F] sorted, and h [P, 2F] to go back with."""
    expert, first, end, block = place(tiles, tl.cdiv(F, BLOCK_N))
    if expert >= EXPERTS:
        return
    row, here, pair = rows_of(order, first, end, BLOCK_M)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(j, F - 1)
    w += expert.to(tl.int64) * w_expert
    s += expert.to(tl.int64) * s_expert
    z += expert.to(tl.int64) * z_expert
    x_at, xs_at = inputs_at(x, xs, (pair // TOP_K).to(tl.int64), x_row, CODES, SPAN)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, CODES, BLOCK_K):
        x_even = inputs_of(x_at, xs_at, start, CODES, SPAN, BLOCK_K, EVEN, DTYPE)
        x_odd = x_even
        if TRELLIS:
            x_odd = columns_of(x_at + CODES, start, CODES, BLOCK_K, EVEN, DTYPE)
        gate = _add_product(
            gate, w, s, z, rows, start, CODES, groups, x_even, x_odd,
            BITS, GROUP, TRELLIS, BLOCK_N, BLOCK_K, EVEN, DTYPE,
        )  # fmt: skip
        up = _add_product(
            up, w, s, z, rows + F, start, CODES, groups, x_even, x_odd,
            BITS, GROUP, TRELLIS, BLOCK_N, BLOCK_K, EVEN, DTYPE,
        )  # fmt: skip
    if TRELLIS:
        gate *= bf16(tl.load(s + rows))[:, None]
        up *= bf16(tl.load(s + rows + F))[:, None]
    store_inner(gate, up, weight, pair, row, here, j, u, h, F, limit, CLAMP, SAVE, NARROW)


@triton.jit
def linear_gemm(
    x, xs, order, tiles, w, s, z, y,
    EXPERTS, OUT, CODES, groups, w_expert, s_expert, z_expert, x_row,
    SCATTER: tl.constexpr, SPAN: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Sorted rows through their expert's matrix: y [P, OUT], with SCATTER in the order of pairs."""
    expert, first, end, block = place(tiles, tl.cdiv(OUT, BLOCK_N))
    if expert >= EXPERTS:
        return
    row = first + tl.arange(0, BLOCK_M)
    here = row < end
    out = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(out, OUT - 1)
    w += expert.to(tl.int64) * w_expert
    s += expert.to(tl.int64) * s_expert
    z += expert.to(tl.int64) * z_expert
    x_at, xs_at = inputs_at(x, xs, tl.minimum(row, end - 1).to(tl.int64), x_row, CODES, SPAN)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, CODES, BLOCK_K):
        x_even = inputs_of(x_at, xs_at, start, CODES, SPAN, BLOCK_K, EVEN, DTYPE)
        x_odd = x_even
        if TRELLIS:
            x_odd = columns_of(x_at + CODES, start, CODES, BLOCK_K, EVEN, DTYPE)
        acc = _add_product(
            acc, w, s, z, rows, start, CODES, groups, x_even, x_odd,
            BITS, GROUP, TRELLIS, BLOCK_N, BLOCK_K, EVEN, DTYPE,
        )  # fmt: skip
    if TRELLIS:
        acc *= bf16(tl.load(s + rows))[:, None]
    store_rows(y, acc, order, row, here, out, OUT, SCATTER)


@triton.jit
def input_grad_gemm(
    dy, order, tiles, w, s, z, dx,
    EXPERTS, R, CODES, groups, w_expert, s_expert, z_expert, dy_row, dx_row,
    TOP_K: tl.constexpr, SCATTER: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TRELLIS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`dx = dy W` of sorted rows, W having R rows: dx [P, columns], split for a trellis.

    With TOP_K, dy has a row per token instead of one per sorted row; with SCATTER, dx is in the
    order of pairs.
    """
    expert, first, end, block = place(tiles, tl.cdiv(CODES, BLOCK_K))
    if expert >= EXPERTS:
        return
    row, here, pair, dy_at = grad_rows(dy, order, first, end, dy_row, TOP_K, BLOCK_M)
    w += expert.to(tl.int64) * w_expert
    s += expert.to(tl.int64) * s_expert
    z += expert.to(tl.int64) * z_expert
    even = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    odd = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(0, R, BLOCK_N):
        # Past the last row dy is zero, so that any row of W will do.
        rows = tl.minimum(start + tl.arange(0, BLOCK_N), R - 1)
        dy_tile = columns_of(dy_at, start, R, BLOCK_N, EVEN, tl.float32 if TRELLIS else DTYPE)
        if TRELLIS:
            dy_tile = (dy_tile * bf16(tl.load(s + rows))[:, None]).to(DTYPE)
            w_even, w_odd = _open_trellis(
                w, z, rows, block * BLOCK_K, CODES, BITS, BLOCK_K, False, EVEN, DTYPE
            )
            even = tl.dot(w_even, dy_tile, even, input_precision="ieee")
            odd = tl.dot(w_odd, dy_tile, odd, input_precision="ieee")
        else:
            tile = _open_grid(
                w, s, z, rows, block * BLOCK_K, CODES, groups,
                BITS, GROUP, BLOCK_N, BLOCK_K, False, EVEN, DTYPE,
            )  # fmt: skip
            even = tl.dot(tile, dy_tile, even, input_precision="ieee")
    store_columns(
        dx, even, odd, row, pair, here, block * BLOCK_K, dx_row, CODES, SCATTER, TRELLIS, BLOCK_K
    )
