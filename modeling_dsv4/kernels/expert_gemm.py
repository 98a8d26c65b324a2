# SPDX-License-Identifier: Apache-2.0
"""Many tokens times packed experts: rows sorted by expert, weights opened in registers.

    forward    h = W1 x, W3 x;  u = silu(clamp(h1)) * clamp(h3) * weight;  y = W2 u
    backward   du = dy W2;  dh, dweight through the activation;  dx = dh [W1; W3]

Grid: row tiles x column tiles, the latter fastest. A row tile is up to BLOCK_M sorted rows of one
expert; `tiles` [T, 3] (expert, first row, end) was made on the device, and tiles beyond the last
name an expert that does not exist. Products are computed transposed, [weights, tokens]: so the
opened weights are the operand that may stay in registers. bfloat16 or float32 in, float32 added up.
Inputs are numbers, or E4M3 codes (`rounding.py`) that open as weights do: exactly, into what
products work in. SPAN is how many of a weight's codes meet one of their scales, 0 for numbers.

FP4 opens as even and odd columns, so what meets its columns is stored *split*: the even columns,
then the odd ones. Where W2 is FP4, rows of W1 and W3 are walked in that order as well, so that u, h
and their gradients are split without anybody moving them. Past their end, columns are masked to
zero (with EVEN no block is partial), and rows are the last one again, which is not stored twice.
"""

import triton
import triton.language as tl

from .unpack import FP4, GROUP, PLAIN, activation, fp4_tiles, fp8_inputs, fp8_tile, scale_row


@triton.jit
def place(tiles, blocks):
    """Expert, first row, end and column tile of this program."""
    tile = tiles + tl.program_id(0) // blocks * 3
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.program_id(0) % blocks


@triton.jit
def rows_of(order, first, end, BLOCK_M: tl.constexpr):
    """Sorted rows of a tile, which of them exist, and their pairs; behind the end the last."""
    row = first + tl.arange(0, BLOCK_M)
    return row, row < end, tl.load(order + tl.minimum(row, end - 1))


@triton.jit
def grad_rows(
    dy, order, first, end, dy_row, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """`rows_of`, and pointers [1, M] to their dy: a row per token with TOP_K, else per row."""
    row, here, pair = rows_of(order, first, end, BLOCK_M)
    pair = pair.to(tl.int64)
    source = tl.minimum(row, end - 1).to(tl.int64)
    if TOP_K > 0:
        source = pair // TOP_K
    return row, here, pair, dy + (source * dy_row)[None, :]


@triton.jit
def store_inner(
    gate, up, weight, pair, row, here, j, u, h, F, limit,
    CLAMP: tl.constexpr, SAVE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """`activation` of sorted rows to u [P, F], and h [P, 2F] before that with SAVE."""
    inside = (j < F)[:, None] & here[None, :]
    wide = row.to(tl.int64)[None, :] * F + j[:, None]
    if SAVE:
        h_at = h + wide + row.to(tl.int64)[None, :] * F
        tl.store(h_at, gate, mask=inside)
        tl.store(h_at + F, up, mask=inside)
    routing = tl.load(weight + pair)[None, :]
    value = activation(gate, up, routing, limit, u.dtype.element_ty, CLAMP, NARROW)
    tl.store(u + wide, value, mask=inside)


@triton.jit
def store_rows(y, acc, order, row, here, out, OUT, SCATTER: tl.constexpr):
    """Outputs [N, M] to y [P, OUT]: sorted, or with SCATTER in the order of pairs."""
    target = row.to(tl.int64)
    if SCATTER:
        target = tl.load(order + row, mask=here, other=0).to(tl.int64)
    at = target[None, :] * OUT + out[:, None]
    tl.store(y + at, acc, mask=(out < OUT)[:, None] & here[None, :])


@triton.jit
def store_columns(
    dx, even, odd, row, pair, here, first, dx_row, WIDTH,
    SCATTER: tl.constexpr, TWO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns [K, M] of dx from the first on, sorted or by pair; with TWO odd ones behind even."""
    target = pair if SCATTER else row.to(tl.int64)
    column = (first + tl.arange(0, BLOCK_K))[:, None]
    at = dx + (target * dx_row)[None, :] + column
    inside = (column < WIDTH) & here[None, :]
    tl.store(at, even, mask=inside)
    if TWO:
        tl.store(at + WIDTH, odd, mask=inside)


@triton.jit
def _weight_row(j, ROWS, SPLIT: tl.constexpr):
    """Row of a weight for place j of a split (or plain) axis of ROWS."""
    if SPLIT:
        row = j % (ROWS // 2) * 2 + j // (ROWS // 2)
    else:
        row = j
    return row


@triton.jit
def load_inside(at, inside, EVEN: tl.constexpr):
    """Numbers at pointers; zero where not inside, unless no block is partial anyway."""
    if EVEN:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=inside, other=0)
    return value


@triton.jit
def _open(
    w, s, rows, half_rows, start, WIDTH, scale_columns,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS_FIRST: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of BLOCK_K codes of some rows: [N, K], or [K, N] without ROWS_FIRST.

    Formats of one column a code give that one tile twice.
    """
    column = start + tl.arange(0, BLOCK_K)
    line = rows.to(tl.int64) * WIDTH
    if ROWS_FIRST:
        code = load_inside(w + line[:, None] + column[None, :], (column < WIDTH)[None, :], EVEN)
    else:
        code = load_inside(w + line[None, :] + column[:, None], (column < WIDTH)[:, None], EVEN)
    if FORMAT == PLAIN:
        even = code.to(DTYPE)
        odd = even
    else:
        first = start + tl.arange(0, BLOCK_K // GROUP) * GROUP
        s_line = scale_row(rows, half_rows, SCALE_ROWS) * scale_columns
        group = first // SCALE_COLUMNS
        if ROWS_FIRST:
            byte = load_inside(s + s_line[:, None] + group[None, :], (first < WIDTH)[None, :], EVEN)
            wide = tl.broadcast_to(byte[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP))
            scale = tl.reshape(wide, (BLOCK_N, BLOCK_K))
        else:
            byte = load_inside(s + s_line[None, :] + group[:, None], (first < WIDTH)[:, None], EVEN)
            wide = tl.broadcast_to(byte[:, None, :], (BLOCK_K // GROUP, GROUP, BLOCK_N))
            scale = tl.reshape(wide, (BLOCK_K, BLOCK_N))
        if FORMAT == FP4:
            even, odd = fp4_tiles(code, scale, DTYPE, ASM)
        else:
            even = fp8_tile(code, scale, DTYPE)
            odd = even
    return even, odd


@triton.jit
def columns_of(x, start, WIDTH, BLOCK: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Columns of rows [1, M] of pointers, transposed: [BLOCK, M]."""
    column = (start + tl.arange(0, BLOCK))[:, None]
    return load_inside(x + column, column < WIDTH, EVEN).to(DTYPE)


@triton.jit
def inputs_at(x, s, row, x_row, WIDTH, SPAN: tl.constexpr):
    """Pointers [1, M] to rows of inputs, and to their scales; those are x again without SPAN."""
    x += (row * x_row)[None, :]
    if SPAN > 0:
        scale = s + (row * (WIDTH // SPAN))[None, :]
    else:
        scale = x
    return x, scale


@triton.jit
def inputs_of(
    x, s, start, WIDTH, SPAN: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`columns_of` rows at `inputs_at`, opened where they are codes."""
    if SPAN == 0:
        return columns_of(x, start, WIDTH, BLOCK, EVEN, DTYPE)
    else:
        column = (start + tl.arange(0, BLOCK))[:, None]
        code = load_inside(x + column, column < WIDTH, EVEN)
        STEP: tl.constexpr = SPAN if SPAN < BLOCK else BLOCK
        first = (start + tl.arange(0, BLOCK // STEP) * STEP)[:, None]
        byte = load_inside(s + first // SPAN, first < WIDTH, EVEN)
        if STEP == BLOCK:
            scale = tl.broadcast_to(byte, code.shape)
        else:
            wide = tl.broadcast_to(byte[:, None, :], (BLOCK // STEP, STEP, code.shape[1]))
            scale = tl.reshape(wide, code.shape)
        return fp8_inputs(code, scale, DTYPE)


@triton.jit
def _add_product(
    acc, w, s, rows, half_rows, start, WIDTH, scale_columns, x_even, x_odd,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`acc + W x^T` over BLOCK_K codes: [N, M]."""
    even, odd = _open(
        w, s, rows, half_rows, start, WIDTH, scale_columns,
        FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_K, True, EVEN, DTYPE, ASM,
    )  # fmt: skip
    acc = tl.dot(even, x_even, acc, input_precision="ieee")
    if FORMAT == FP4:
        acc = tl.dot(odd, x_odd, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_gemm(
    x, xs, weight, order, tiles, w, s, u, h,
    EXPERTS, F, WIDTH, scale_columns, w_expert, s_expert, x_row, limit,
    TOP_K: tl.constexpr, CLAMP: tl.constexpr, SAVE: tl.constexpr, NARROW: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows through gate, up and the activation: u [P, F] sorted, and h [P, 2F] to go back with."""
    expert, first, end, block = place(tiles, tl.cdiv(F, BLOCK_N))
    if expert >= EXPERTS:
        return
    row, here, pair = rows_of(order, first, end, BLOCK_M)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = _weight_row(tl.minimum(j, F - 1), F, SPLIT_ROWS)
    w += expert.to(tl.int64) * w_expert
    s += expert.to(tl.int64) * s_expert
    x_at, xs_at = inputs_at(x, xs, (pair // TOP_K).to(tl.int64), x_row, WIDTH, SPAN)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x_even = inputs_of(x_at, xs_at, start, WIDTH, SPAN, BLOCK_K, EVEN, DTYPE)
        x_odd = x_even
        if FORMAT == FP4:
            x_odd = inputs_of(x_at + WIDTH, xs_at, start, WIDTH, SPAN, BLOCK_K, EVEN, DTYPE)
        gate = _add_product(
            gate, w, s, rows, F, start, WIDTH, scale_columns, x_even, x_odd,
            FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_K, EVEN, DTYPE, ASM,
        )  # fmt: skip
        up = _add_product(
            up, w, s, rows + F, F, start, WIDTH, scale_columns, x_even, x_odd,
            FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_K, EVEN, DTYPE, ASM,
        )  # fmt: skip
    store_inner(gate, up, weight, pair, row, here, j, u, h, F, limit, CLAMP, SAVE, NARROW)


@triton.jit
def linear_gemm(
    x, xs, order, tiles, w, s, y,
    EXPERTS, OUT, WIDTH, scale_columns, w_expert, s_expert, half_rows, x_row,
    SCATTER: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
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
    x_at, xs_at = inputs_at(x, xs, tl.minimum(row, end - 1).to(tl.int64), x_row, WIDTH, SPAN)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x_even = inputs_of(x_at, xs_at, start, WIDTH, SPAN, BLOCK_K, EVEN, DTYPE)
        x_odd = x_even
        if FORMAT == FP4:
            x_odd = inputs_of(x_at + WIDTH, xs_at, start, WIDTH, SPAN, BLOCK_K, EVEN, DTYPE)
        acc = _add_product(
            acc, w, s, rows, half_rows, start, WIDTH, scale_columns,
            x_even, x_odd,
            FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_K, EVEN, DTYPE, ASM,
        )  # fmt: skip
    store_rows(y, acc, order, row, here, out, OUT, SCATTER)


@triton.jit
def input_grad_gemm(
    dy, order, tiles, w, s, dx,
    EXPERTS, R, WIDTH, scale_columns, w_expert, s_expert, half_rows, dy_row, dx_row,
    TOP_K: tl.constexpr, HALVES: tl.constexpr, SPLIT_ROWS: tl.constexpr, SCATTER: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`dx = dy W` of sorted rows, W having HALVES * R rows: dx [P, columns], split for FP4.

    With TOP_K, dy has a row per token instead of one per sorted row; with SCATTER, dx is in the
    order of pairs.
    """
    expert, first, end, block = place(tiles, tl.cdiv(WIDTH, BLOCK_K))
    if expert >= EXPERTS:
        return
    row, here, pair, dy_at = grad_rows(dy, order, first, end, dy_row, TOP_K, BLOCK_M)
    w += expert.to(tl.int64) * w_expert
    s += expert.to(tl.int64) * s_expert
    even = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    odd = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    # Each run of dy meets every row of one half, or the even or the odd ones where it is split.
    STEP: tl.constexpr = 2 if SPLIT_ROWS else 1
    for run in range(HALVES * STEP):
        for start in range(0, R // STEP, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            if not EVEN:
                # Past the last row dy is zero, so that any row of W will do.
                j = tl.minimum(j, R // STEP - 1)
            rows = run // STEP * R + run % STEP + j * STEP
            dy_tile = columns_of(dy_at + run * (R // STEP), start, R // STEP, BLOCK_N, EVEN, DTYPE)
            w_even, w_odd = _open(
                w, s, rows, half_rows, block * BLOCK_K, WIDTH, scale_columns,
                FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_N, BLOCK_K, False, EVEN, DTYPE, ASM,
            )  # fmt: skip
            even = tl.dot(w_even, dy_tile, even, input_precision="ieee")
            if FORMAT == FP4:
                odd = tl.dot(w_odd, dy_tile, odd, input_precision="ieee")
    store_columns(
        dx,
        even,
        odd,
        row,
        pair,
        here,
        block * BLOCK_K,
        dx_row,
        WIDTH,
        SCATTER,
        FORMAT == FP4,
        BLOCK_K,
    )


@triton.jit
def activation_grad(
    du, h, weight, order, dh, dweight, F, limit,
    CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through `silu(clamp(gate)) * clamp(up) * weight`, a sorted row a program.

    du [P, F] and h [P, 2F] are sorted, and so is dh [P, 2F]; dweight [P] is in the order of pairs.
    """
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    routing = tl.load(weight + pair)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keep = j < F
        wide = row * 2 * F + j
        d = tl.load(du + row * F + j, mask=keep, other=0).to(tl.float32)
        gate = tl.load(h + wide, mask=keep, other=0).to(tl.float32)
        up = tl.load(h + wide + F, mask=keep, other=0).to(tl.float32)
        c, v = gate, up
        if CLAMP:
            c = tl.minimum(gate, limit)
            v = tl.minimum(tl.maximum(up, -limit), limit)
        sigmoid = tl.sigmoid(c)
        silu = c * sigmoid
        dgate = d * routing * v * sigmoid * (1 + c - silu)
        dup = d * routing * silu
        if CLAMP:
            dgate = tl.where(gate <= limit, dgate, 0.0)
            dup = tl.where(tl.abs(up) <= limit, dup, 0.0)
        tl.store(dh + wide, dgate, mask=keep)
        tl.store(dh + wide + F, dup, mask=keep)
        total += d * silu * v
    tl.store(dweight + pair, tl.sum(total, axis=0))
