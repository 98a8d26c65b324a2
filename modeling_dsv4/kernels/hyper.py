# SPDX-License-Identifier: Apache-2.0
"""Opening an mHC site: statistic, projection, coefficients and collapse, and their gradients.

Reference (`hyper_ops.open_site`), x = streams [n, N * D], R = N^2 + 2N rows of fn:

    r = rsqrt(mean(x^2) + rms_eps);   m = (x fn^T) r                  [n, R]
    pre = sigmoid(scale0 m + base) + eps;  post = 2 sigmoid(scale1 m + base)
    comb = sinkhorn(scale2 m + base)
    y = sum_j w_j h_j,   w = what was handed on (single pass), else pre

Forward, two launches:
    project   grid (token blocks, SPLIT slices of the channels); partial sums [SPLIT, n, RP], whose
              column R is the sum of squares. Single-pass sites collapse here: one read of streams.
    finish    grid (token blocks[, channel blocks]); adds the slices, makes the coefficients; where
              w = pre it collapses too, and reads the streams a second time: pre wants the whole
              row first, and N * D channels of the 16 tokens that a matrix product takes at least
              are 512 KiB, more than a chip's core holds. Tokens run backward, so that the part
              of the streams that `project` left in the L2 cache is met first.

Backward, three launches, all from streams, fn and the R coefficients m with their r:
    dots      grid (tokens): <h_j, dy>, the gradient of w, where w = pre: slopes want it whole
    slopes    grid (token blocks): through sigmoids and Sinkhorn to dz [n, R], q = scale dz r and
              the slope of r
    spread    grid (channel blocks, token slices): d streams = d passed + w_j dy + q fn + slope x,
              and d fn = q^T x summed over the block's tokens; <h_j, dy> of the block's channels
              where w was handed on

The site hands its streams through, so that the gradient which `expand` sends back arrives here
and is added in `spread` instead of in a pass of its own.

Masks: tokens from n on and channels from D on load 0 and are not stored. Products: bfloat16
streams are multiplied as they are, with fn split in two bfloat16 parts of together 17 bits that
lie one below the other in a table [2 RP, N * D]; all other dtypes in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of
from .sinkhorn import sinkhorn_backward, sinkhorn_forward


class Tiles(NamedTuple):
    """Sizes of the programs: tokens, channels, warps, stages of each launch; slices."""

    project: tuple[int, int, int, int] = (64, 64, 4, 3)
    project_handed: tuple[int, int, int, int] = (64, 64, 4, 3)
    split: int = 2
    finish: tuple[int, int, int] = (4, 1024, 4)
    dots: int = 8
    slopes: int = 32
    spread: tuple[int, int, int, int] = (64, 64, 4, 2)
    spread_split: int = 2


@triton.jit
def _sum_slices(partial, t, n, column, RP: tl.constexpr, SPLIT: tl.constexpr):
    """Add the slices of `column` (any shape that broadcasts with t) of partial [SPLIT, n, RP]."""
    total = tl.load(partial + t * RP + column, mask=t < n, other=0.0)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(partial + (s * n + t) * RP + column, mask=t < n, other=0.0)
    return total


@triton.jit
def split_kernel(fn, table, size, ROWS: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr):
    """Write fn [ROWS, size] as its bfloat16 parts: [2 RP, size], 0 where fn has no row."""
    row = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < size
    f = tl.load(fn + row * size + d, mask=inside & (d < tl.where(row < ROWS, size, 0)), other=0.0)
    high = f.to(tl.bfloat16)
    low = (f - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(table + row * size + d, high, mask=inside)
    tl.store(table + (RP + row) * size + d, low, mask=inside)


@triton.jit
def project_kernel(
    streams, fn, handed, partial, y, n, D,
    N: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, SPLIT: tl.constexpr,
    HANDED: tl.constexpr, BF16: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Without HANDED the streams are one of N * D channels: called with N = 1.

    `fn` is the table of `split_kernel` where BF16. The streams of a channel block come one after
    the other in one loop, so that their loads run ahead.
    """
    LINES: tl.constexpr = 2 * RP if BF16 else RP
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < n
    line = tl.arange(0, LINES)
    acc = tl.zeros([BT, LINES], dtype=tl.float32)
    square = tl.zeros([BT, BD], dtype=tl.float32)
    mixed = tl.zeros([BT, BD], dtype=tl.float32)
    per = tl.cdiv(tl.cdiv(D, BD), SPLIT)
    first = tl.program_id(1) * per
    last = min(first + per, tl.cdiv(D, BD))
    for step in range(first * N, last * N):
        j = step % N
        d = (step // N) * BD + tl.arange(0, BD)
        inside = live[:, None] & (d < D)[None, :]
        x = tl.load(streams + (t[:, None] * N + j) * D + d[None, :], mask=inside, other=0.0)
        wanted = (d < D)[:, None] & (line < (LINES if BF16 else ROWS))[None, :]
        f = tl.load(fn + line[None, :] * (N * D) + j * D + d[:, None], mask=wanted, other=0.0)
        wide = x.to(tl.float32)
        if BF16:
            acc = tl.dot(x, f, acc)
        else:
            acc = tl.dot(wide, f, acc, input_precision="ieee")
        square += wide * wide
        if HANDED:
            w = tl.load(handed + t * N + j, mask=live, other=0.0)
            mixed = tl.where(j == 0, 0.0, mixed) + w[:, None] * wide
            done = d < tl.where(j == N - 1, D, 0)
            to = y + t[:, None] * D + d[None, :]
            tl.store(to, mixed.to(y.dtype.element_ty), mask=live[:, None] & done[None, :])
    if BF16:
        acc = tl.sum(tl.reshape(acc, [BT, 2, RP]), axis=1)
    row = tl.arange(0, RP)
    found = tl.where((row == ROWS)[None, :], tl.sum(square, axis=1)[:, None], acc)
    to = partial + (tl.program_id(1) * n + t)[:, None] * RP + row[None, :]
    tl.store(to, found, mask=live[:, None] & (row <= ROWS)[None, :])


@triton.jit
def _coefficients(
    partial, base, scale, pre, post, comb, mixes, t, r, n, eps,
    N: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, SPLIT: tl.constexpr,
    ITERS: tl.constexpr,
):  # fmt: skip
    """Make and store the coefficients of tokens t, and m for the backward pass."""
    ROWS: tl.constexpr = N * N + 2 * N
    k = tl.arange(0, NP)
    column = tl.minimum(k, N - 1)[None, :]
    line = t[:, None]
    some = (line < n) & (k < N)[None, :]
    m = _sum_slices(partial, line, n, column, RP, SPLIT) * r[:, None]
    tl.store(mixes + line * ROWS + column, m, mask=some)
    w = tl.sigmoid(tl.load(scale) * m + tl.load(base + column)) + eps
    tl.store(pre + line * N + column, w, mask=some)
    m = _sum_slices(partial, line, n, N + column, RP, SPLIT) * r[:, None]
    tl.store(mixes + line * ROWS + N + column, m, mask=some)
    w = 2 * tl.sigmoid(tl.load(scale + 1) * m + tl.load(base + N + column))
    tl.store(post + line * N + column, w, mask=some)

    keep = ((k < N)[:, None] & (k < N)[None, :])[None, :, :]
    line3 = t[:, None, None]
    cell = (tl.minimum(k, N - 1)[:, None] * N + column)[None, :, :]
    m3 = _sum_slices(partial, line3, n, 2 * N + cell, RP, SPLIT) * r[:, None, None]
    tl.store(mixes + line3 * ROWS + 2 * N + cell, m3, mask=(line3 < n) & keep)
    z = tl.load(scale + 2) * m3 + tl.load(base + 2 * N + cell)
    pad = tl.where(k < N, 0.0, 1.0)[None, :]
    c = sinkhorn_forward(z, keep, pad, eps, ITERS)
    tl.store(comb + line3 * (N * N) + cell, c, mask=(line3 < n) & keep)


@triton.jit
def finish_kernel(
    partial, base, scale, streams, y, pre, post, comb, mixes, norm, n, D, rms_eps, eps,
    N: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, SPLIT: tl.constexpr,
    ITERS: tl.constexpr, COLLAPSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    t = (block * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < n
    r = tl.rsqrt(_sum_slices(partial, t, n, N * N + 2 * N, RP, SPLIT) / (N * D) + rms_eps)
    scale0 = tl.load(scale)
    if COLLAPSE:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = live[:, None] & (d < D)[None, :]
        mixed = tl.zeros([BT, BD], dtype=tl.float32)
        for j in tl.static_range(N):
            m = _sum_slices(partial, t, n, j, RP, SPLIT) * r
            w = tl.sigmoid(scale0 * m + tl.load(base + j)) + eps
            x = tl.load(streams + (t[:, None] * N + j) * D + d[None, :], mask=inside, other=0.0)
            mixed += w[:, None] * x.to(tl.float32)
        tl.store(y + t[:, None] * D + d[None, :], mixed.to(y.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(norm + t, r, mask=live)
        _coefficients(partial, base, scale, pre, post, comb, mixes, t, r, n, eps,
                      N, NP, RP, SPLIT, ITERS)  # fmt: skip


@triton.jit
def dots_kernel(
    streams, dy, out, D, N: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """<h_j, dy> of one token; a tile is [LANES, WIDE] so that each thread adds its own."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    sums = (tl.zeros([LANES], dtype=tl.float32),) * N
    for start in range(0, D, LANES * WIDE):
        d = start + at
        g = tl.load(dy + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        added = ()
        for j in tl.static_range(N):
            x = tl.load(streams + (t * N + j) * D + d, mask=d < D, other=0.0).to(tl.float32)
            added = added + (sums[j] + tl.sum(x * g, axis=1),)  # noqa: RUF005
        sums = added
    for j in tl.static_range(N):
        tl.store(out + t * N + j, tl.sum(sums[j], axis=0))


@triton.jit
def _store_q(
    q, t, column, found, mask, ROWS: tl.constexpr, RP: tl.constexpr, BF16: tl.constexpr
):  # fmt: skip
    """Store q [n, ROWS], where BF16 as its two parts side by side [n, 2 RP]."""
    if BF16:
        high = found.to(tl.bfloat16)
        tl.store(q + t * 2 * RP + column, high, mask=mask)
        tl.store(q + t * 2 * RP + RP + column, (found - high.to(tl.float32)).to(tl.bfloat16), mask)
    else:
        tl.store(q + t * ROWS + column, found, mask=mask)


@triton.jit
def slopes_kernel(
    mixes, norm, base, scale, dpre, dw, dpost, dcomb, dz, q, slope, n, D, eps,
    N: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, ITERS: tl.constexpr,
    OWN: tl.constexpr, BF16: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """OWN: the site collapsed with its own pre, whose gradient gains `dw`."""
    ROWS: tl.constexpr = N * N + 2 * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < n
    k = tl.arange(0, NP)
    column = tl.minimum(k, N - 1)[None, :]
    some = live[:, None] & (k < N)[None, :]
    r = tl.load(norm + t, mask=live, other=0.0)
    scale0, scale1, scale2 = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)

    at = t[:, None] * ROWS + k[None, :]
    m = tl.load(mixes + at, mask=some, other=0.0)
    g = tl.load(dpre + t[:, None] * N + k[None, :], mask=some, other=0.0)
    if OWN:
        g += tl.load(dw + t[:, None] * N + k[None, :], mask=some, other=0.0)
    s = tl.sigmoid(scale0 * m + tl.load(base + column))
    g = g * s * (1 - s)
    tl.store(dz + at, g, mask=some)
    _store_q(q, t[:, None], column, scale0 * g * r[:, None], some, ROWS, RP, BF16)
    total = tl.sum(scale0 * g * m, axis=1)

    m = tl.load(mixes + at + N, mask=some, other=0.0)
    g = tl.load(dpost + t[:, None] * N + k[None, :], mask=some, other=0.0)
    s = tl.sigmoid(scale1 * m + tl.load(base + N + column))
    g = 2 * g * s * (1 - s)
    tl.store(dz + at + N, g, mask=some)
    _store_q(q, t[:, None], N + column, scale1 * g * r[:, None], some, ROWS, RP, BF16)
    total += tl.sum(scale1 * g * m, axis=1)

    keep = ((k < N)[:, None] & (k < N)[None, :])[None, :, :]
    some3 = live[:, None, None] & keep
    cell = (tl.minimum(k, N - 1)[:, None] * N + column)[None, :, :]
    at3 = t[:, None, None] * ROWS + 2 * N + cell
    m3 = tl.load(mixes + at3, mask=some3, other=0.0)
    g3 = tl.load(dcomb + t[:, None, None] * (N * N) + cell, mask=some3, other=0.0)
    pad = tl.where(k < N, 0.0, 1.0)[None, :]
    g3 = sinkhorn_backward(scale2 * m3 + tl.load(base + 2 * N + cell), g3, keep, pad, eps, ITERS)
    tl.store(dz + at3, g3, mask=some3)
    found = scale2 * g3 * r[:, None, None]
    _store_q(q, t[:, None, None], 2 * N + cell, found, some3, ROWS, RP, BF16)
    total += tl.sum(tl.sum(scale2 * g3 * m3, axis=2), axis=1)
    # d r / d x = -r^3 x / (N D), and m holds one r already.
    tl.store(slope + t, -total * r * r / (N * D), mask=live)


@triton.jit
def _sent_back(passed, dy, block, last, j, d, n, D, N: tl.constexpr, BT: tl.constexpr):
    """Tiles of the two gradients that reach a token block; 0 from block `last` on."""
    t = (block * BT + tl.arange(0, BT)).to(tl.int64)
    inside = (t < tl.where(block < last, n, 0))[:, None] & (d < D)[None, :]
    g = tl.load(passed + (t[:, None] * N + j) * D + d[None, :], mask=inside, other=0.0)
    gy = tl.load(dy + t[:, None] * D + d[None, :], mask=inside, other=0.0)
    return g, gy


@triton.jit
def spread_kernel(
    streams, fn, passed, dy, w, q, slope, dstreams, dfn, dw, n, D,
    N: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, SPLIT: tl.constexpr,
    FN: tl.constexpr, DW: tl.constexpr, BF16: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One block of channels of one stream, over a slice of the tokens."""
    blocks = tl.cdiv(D, BD)
    j = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    LINES: tl.constexpr = 2 * RP if BF16 else RP
    line = tl.arange(0, LINES)
    row = line % RP
    wanted = (row < ROWS)[:, None] & (d < D)[None, :]
    at_fn = row[:, None] * (N * D) + j * D + d[None, :]
    f = tl.load(fn + at_fn, mask=wanted, other=0.0)
    if BF16:
        # Both parts of q meet the high part of fn, and the high part its low part.
        high = f.to(tl.bfloat16)
        low = tl.where((line < RP)[:, None], f - high.to(tl.float32), 0.0).to(tl.bfloat16)
    acc = tl.zeros([LINES, BD], dtype=tl.float32)
    per = tl.cdiv(tl.cdiv(n, BT), SPLIT)
    first = tl.program_id(1) * per
    last = min(first + per, tl.cdiv(n, BT))
    # Loads that feed no product are not made to run ahead by the compiler; these do by hand.
    next_g, next_gy = _sent_back(passed, dy, first, last, j, d, n, D, N, BT)
    for block in range(first, last):
        g, gy = next_g.to(tl.float32), next_gy.to(tl.float32)
        next_g, next_gy = _sent_back(passed, dy, block + 1, last, j, d, n, D, N, BT)
        t = (block * BT + tl.arange(0, BT)).to(tl.int64)
        live = t < n
        inside = live[:, None] & (d < D)[None, :]
        at = (t[:, None] * N + j) * D + d[None, :]
        x = tl.load(streams + at, mask=inside, other=0.0)
        g += tl.load(w + t * N + j, mask=live, other=0.0)[:, None] * gy
        wide = x.to(tl.float32)
        g += tl.load(slope + t, mask=live, other=0.0)[:, None] * wide
        if DW:
            part = tl.program_id(0) % blocks
            tl.store(dw + (part * n + t) * N + j, tl.sum(wide * gy, axis=1), mask=live)
        if BF16:
            c = tl.load(q + t[:, None] * LINES + line[None, :], mask=live[:, None], other=0.0)
            g += tl.dot(c, low, tl.dot(c, high))
            if FN:
                acc = tl.dot(tl.trans(c), x, acc)
        else:
            some = live[:, None] & (row < ROWS)[None, :]
            c = tl.load(q + t[:, None] * ROWS + row[None, :], mask=some, other=0.0)
            g = tl.dot(c, f, g, input_precision="ieee")
            if FN:
                acc = tl.dot(tl.trans(c), wide, acc, input_precision="ieee")
        tl.store(dstreams + at, g.to(dstreams.dtype.element_ty), mask=inside)
    if FN:
        if BF16:
            acc = tl.sum(tl.reshape(acc, [2, RP, BD]), axis=0)
        row = tl.arange(0, RP)
        to = dfn + (tl.program_id(1) * ROWS + row)[:, None] * (N * D) + j * D + d[None, :]
        tl.store(to, acc, mask=(row < ROWS)[:, None] & (d < D)[None, :])


def tiles_for(n: int) -> Tiles:
    """Few tokens make few blocks: then the channels are cut finer, to employ the whole GPU."""
    return Tiles() if n > 1024 else Tiles(split=16)


def _sizes(streams: torch.Tensor) -> tuple[int, int, int, int, int, bool]:
    """n, N, D, rows of fn, their padded number with one more column, whether to split fn."""
    n, N, D = streams.shape
    rows = N * N + 2 * N
    padded = max(16, triton.next_power_of_2(rows + 1))
    # The interpreter has no arithmetic in bfloat16.
    return n, N, D, rows, padded, streams.dtype is torch.bfloat16 and streams.is_cuda


def _project(
    streams: torch.Tensor, handed: torch.Tensor | None, fn: torch.Tensor, y: torch.Tensor, t: Tiles
) -> torch.Tensor:
    n, N, D, rows, padded, bf16 = _sizes(streams)
    partial = fn.new_empty(t.split, n, padded)
    if bf16:
        table = streams.new_empty(2 * padded, N * D)
        split_kernel[(triton.cdiv(N * D, 1024), padded)](
            fn, table, N * D, ROWS=rows, RP=padded, BD=1024
        )
        fn = table
    bt, bd, warps, stages = t.project if handed is None else t.project_handed
    N, D = (1, N * D) if handed is None else (N, D)
    project_kernel[(triton.cdiv(n, bt), t.split)](
        streams, fn, fn if handed is None else handed, partial, y, n, D,
        N=N, ROWS=rows, RP=padded, SPLIT=t.split, HANDED=handed is not None, BF16=bf16,
        BT=bt, BD=bd, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial


class OpenSite(torch.autograd.Function):
    """`hyper_ops.open_site` on contiguous streams [n, N, D]; saves inputs, m and r."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: torch.Tensor,
        handed: torch.Tensor | None,
        fn: torch.Tensor,
        base: torch.Tensor,
        scale: torch.Tensor,
        constants: tuple[int, float, float],
        tiles: Tiles,
    ) -> tuple[torch.Tensor, ...]:
        n, N, D, rows, padded, _ = _sizes(streams)
        iters, eps, rms_eps = constants
        y = streams.new_empty(n, D)
        pre, post, comb, mixes, norm = (
            fn.new_empty(n, *shape) for shape in ((N,), (N,), (N, N), (rows,), ())
        )
        with on_device_of(streams):
            partial = _project(streams, handed, fn, y, tiles)
            bt, bd, warps = tiles.finish
            blocks = triton.cdiv(D, bd) if handed is None else 1
            finish_kernel[(triton.cdiv(n, bt), blocks)](
                partial, base, scale, streams, y, pre, post, comb, mixes, norm, n, D, rms_eps, eps,
                N=N, NP=triton.next_power_of_2(N), RP=padded, SPLIT=tiles.split, ITERS=iters,
                COLLAPSE=handed is None, BT=bt, BD=bd, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(streams, pre if handed is None else handed, fn, base, scale,
                              mixes, norm)  # fmt: skip
        ctx.own, ctx.constants, ctx.tiles = handed is None, constants, tiles
        return y, pre, post, comb, streams

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy, dpre, dpost, dcomb, passed = (g.contiguous() for g in grads)
        streams, w, fn, base, scale, mixes, norm = ctx.saved_tensors
        n, N, D, rows, padded, bf16 = _sizes(streams)
        (iters, eps, _), tiles = ctx.constants, ctx.tiles
        dw, dz, slope = (torch.empty_like(x) for x in (w, mixes, norm))
        q = streams.new_zeros(n, 2 * padded) if bf16 else torch.empty_like(mixes)
        dstreams = torch.empty_like(streams)
        wants_fn = ctx.needs_input_grad[2]
        dfn = fn.new_empty(tiles.spread_split if wants_fn else 1, *fn.shape)
        with on_device_of(streams):
            wide = 16 // streams.element_size()
            if ctx.own:
                dots_kernel[(n,)](
                    streams, dy, dw, D, N=N, LANES=32 * tiles.dots, WIDE=wide,
                    num_warps=tiles.dots,
                )  # fmt: skip
            bt = tiles.slopes
            slopes_kernel[(triton.cdiv(n, bt),)](
                mixes, norm, base, scale, dpre, dw, dpost, dcomb, dz, q, slope, n, D, eps,
                N=N, NP=triton.next_power_of_2(N), RP=padded, ITERS=iters, OWN=ctx.own, BF16=bf16,
                BT=bt, num_warps=4,
            )  # fmt: skip
            bt, bd, warps, stages = tiles.spread
            blocks = triton.cdiv(D, bd)
            wants_w = ctx.needs_input_grad[1]
            parts = fn.new_empty(blocks if wants_w else 1, n, N)
            spread_kernel[(N * blocks, tiles.spread_split)](
                streams, fn, passed, dy, w, q, slope, dstreams, dfn, parts, n, D,
                N=N, ROWS=rows, RP=padded, SPLIT=tiles.spread_split, FN=wants_fn, DW=wants_w,
                BF16=bf16, BT=bt, BD=bd, num_warps=warps, num_stages=stages,
                # Two programs a core hide each other's waiting.
                maxnreg=min(65536 // (64 * warps), 255),
            )  # fmt: skip
        sums = (dz * mixes).sum(0).split([N, N, N * N]) if ctx.needs_input_grad[4] else ()
        dscale = torch.stack([part.sum() for part in sums]) if sums else None
        dbase = dz.sum(0) if ctx.needs_input_grad[3] else None
        dhanded = parts.sum(0) if wants_w else None
        dfn = dfn.sum(0) if wants_fn else None
        return dstreams, dhanded, dfn, dbase, dscale, None, None


def open_site(
    streams: torch.Tensor,
    handed: torch.Tensor | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    iters: int,
    eps: float,
    rms_eps: float,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, ...]:
    """Twin of `hyper_ops.open_site` for any leading axes; see there."""
    batch, (N, D) = streams.shape[:-2], streams.shape[-2:]
    handed = None if handed is None else handed.reshape(-1, N).contiguous()
    y, pre, post, comb, passed = OpenSite.apply(
        streams.reshape(-1, N, D).contiguous(), handed, fn.contiguous(), base.contiguous(),
        scale.contiguous(), (iters, eps, rms_eps), tiles or tiles_for(batch.numel()),
    )  # fmt: skip
    return (
        y.view(*batch, D), pre.view(*batch, N), post.view(*batch, N), comb.view(*batch, N, N),
        passed.view(streams.shape),
    )  # fmt: skip
