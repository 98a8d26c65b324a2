# SPDX-License-Identifier: Apache-2.0
"""Opening an mHC site, backward: gradients of streams, handed coefficients and parameters.

Equations, masks and products: `hyper.py`. Three launches, all from streams, fn and the R
coefficients m with their r:

    dots      grid (tokens): <h_j, dy>, the gradient of w, where w = pre: slopes want it whole
    slopes    grid (token blocks): through sigmoids and Sinkhorn to dz [n, R], q = scale dz r and
              the slope of r
    spread    grid (channel blocks, token slices): d streams = d passed + w_j dy + q fn + slope x,
              and d fn = q^T x summed over the block's tokens; <h_j, dy> of the block's channels
              where w was handed on
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .hyper_tiles import Tiles, sizes_of
from .launching import on_device_of
from .sinkhorn import sinkhorn_backward


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


class Opened(NamedTuple):
    """What the backward pass of an open site wants: tensors, whether `w` is its own pre, sizes."""

    tensors: tuple[torch.Tensor, ...]
    own: bool
    constants: tuple[int, float, float]
    tiles: Tiles


def open_backward(
    opened: Opened, wants: tuple[bool, ...], grads: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of streams, handed, fn, base and scale; `wants` says which of the last four."""
    dy, dpre, dpost, dcomb, passed = (g.contiguous() for g in grads)
    streams, w, fn, base, scale, mixes, norm = opened.tensors
    n, N, D, rows, padded, bf16 = sizes_of(streams)
    (iters, eps, _), tiles = opened.constants, opened.tiles
    wants_w, wants_fn, wants_base, wants_scale = wants
    dw, dz, slope = (torch.empty_like(x) for x in (w, mixes, norm))
    q = streams.new_zeros(n, 2 * padded) if bf16 else torch.empty_like(mixes)
    dstreams = torch.empty_like(streams)
    dfn = fn.new_empty(tiles.spread_split if wants_fn else 1, *fn.shape)
    with on_device_of(streams):
        wide = 16 // streams.element_size()
        if opened.own:
            dots_kernel[(n,)](
                streams, dy, dw, D, N=N, LANES=32 * tiles.dots, WIDE=wide, num_warps=tiles.dots
            )
        bt = tiles.slopes
        slopes_kernel[(triton.cdiv(n, bt),)](
            mixes, norm, base, scale, dpre, dw, dpost, dcomb, dz, q, slope, n, D, eps,
            N=N, NP=triton.next_power_of_2(N), RP=padded, ITERS=iters, OWN=opened.own, BF16=bf16,
            BT=bt, num_warps=4,
        )  # fmt: skip
        bt, bd, warps, stages = tiles.spread
        blocks = triton.cdiv(D, bd)
        parts = fn.new_empty(blocks if wants_w else 1, n, N)
        spread_kernel[(N * blocks, tiles.spread_split)](
            streams, fn, passed, dy, w, q, slope, dstreams, dfn, parts, n, D,
            N=N, ROWS=rows, RP=padded, SPLIT=tiles.spread_split, FN=wants_fn, DW=wants_w,
            BF16=bf16, BT=bt, BD=bd, num_warps=warps, num_stages=stages,
            # Two programs a core hide each other's waiting.
            maxnreg=min(65536 // (64 * warps), 255),
        )  # fmt: skip
    sums = (dz * mixes).sum(0).split([N, N, N * N]) if wants_scale else ()
    dscale = torch.stack([part.sum() for part in sums]) if sums else None
    dbase = dz.sum(0) if wants_base else None
    return (
        dstreams,
        parts.sum(0) if wants_w else None,
        dfn.sum(0) if wants_fn else None,
        dbase,
        dscale,
    )
