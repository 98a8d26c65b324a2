# SPDX-License-Identifier: Apache-2.0
"""Heads normed and turned in one pass over them, forward and backward.

Reference (`rotary.norm_rotate`), x [..., C], turn = cos + i sin of R/2 pairs, the last R of C:

    y = x rsqrt(mean(x^2) + eps)                       where NORM, rounded to x's dtype
    z_c = y_c cos - y_c+1 sin,   z_c+1 = y_c+1 cos + y_c sin        c even, inside the last R

The other member of a pair has its sine count negative where c is the first; outside the
last R cosine is 1 and sine 0. So every channel is one expression, and turning back is the
negative sine.

Grid: blocks of BH heads (rows), whole rows of BC >= C channels. `per` rows share a token's turn.
Masks: rows from `rows` on and channels from C on load 0 and are not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of


@triton.jit
def _turned(x, other, turn, row, c, per, inside, sign, C: tl.constexpr, R: tl.constexpr):
    """x cos + s other sin, s the negative sign at the first of a pair."""
    turning = inside & (c >= C - R)[None, :]
    at = turn + (row // per)[:, None] * R + ((c - (C - R)) // 2 * 2)[None, :]
    cos = tl.load(at, mask=turning, other=1.0)
    sin = tl.load(at + 1, mask=turning, other=0.0)
    return x * cos + other * sin * tl.where((c - (C - R)) % 2 == 0, -sign, sign)[None, :]


@triton.jit
def rotate_kernel(
    x, turn, out, rows, per, sign, eps,
    C: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BH + tl.arange(0, BH)).to(tl.int64)
    c = tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    turning = inside & (c >= C - R)[None, :]
    # Pairs are counted from the end, so that C may be odd.
    pair = tl.where((c - (C - R)) % 2 == 0, c + 1, c - 1)
    at = x + row[:, None] * C
    y = tl.load(at + c[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + pair[None, :], mask=turning, other=0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt(tl.sum(y * y, axis=1) / C + eps)[:, None]
        y = (y * r).to(out.dtype.element_ty).to(tl.float32)
        other = (other * r).to(out.dtype.element_ty).to(tl.float32)
    z = _turned(y, other, turn, row, c, per, inside, sign, C, R)
    tl.store(out + row[:, None] * C + c[None, :], z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_backward_kernel(
    x, turn, grad, dx, rows, per, sign, eps,
    C: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BH + tl.arange(0, BH)).to(tl.int64)
    c = tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    turning = inside & (c >= C - R)[None, :]
    pair = tl.where((c - (C - R)) % 2 == 0, c + 1, c - 1)
    at = row[:, None] * C + c[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(grad + row[:, None] * C + pair[None, :], mask=turning, other=0.0)
    g = _turned(g, other.to(tl.float32), turn, row, c, per, inside, -sign, C, R)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(y * y, axis=1) / C + eps)[:, None]
    y = y * r
    g = r * (g - y * (tl.sum(g * y, axis=1) / C)[:, None])
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)


def _launch(x: torch.Tensor, turn: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and the sizes of the tile: about 4096 numbers."""
    c = x.shape[-1]
    bc = triton.next_power_of_2(c)
    bh = max(1, min(4096 // bc, 16))
    sizes = {"C": c, "R": turn.shape[-2] * 2, "BH": bh, "BC": bc}
    return (triton.cdiv(x.shape[0], bh),), sizes


class Rotate(torch.autograd.Function):
    """x [rows, C], turn [rows / per, R/2, 2] float32; saves its inputs, x only where normed."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, turn: torch.Tensor, per: int, sign: float, eps: float | None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        grid, sizes = _launch(x, turn)
        with on_device_of(x):
            rotate_kernel[grid](
                x, turn, out, x.shape[0], per, sign, eps or 0.0, NORM=eps is not None, **sizes
            )
        ctx.save_for_backward(*((turn,) if eps is None else (turn, x)))
        ctx.per, ctx.sign, ctx.eps = per, sign, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        turn, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(grad)
        grid, sizes = _launch(grad, turn)
        with on_device_of(grad):
            if ctx.eps is None:
                rotate_kernel[grid](
                    grad, turn, dx, grad.shape[0], ctx.per, -ctx.sign, 0.0, NORM=False, **sizes
                )
            else:
                rotate_backward_kernel[grid](
                    kept[0], turn, grad, dx, grad.shape[0], ctx.per, ctx.sign, ctx.eps, **sizes
                )
        return dx, None, None, None, None


def rotate(
    x: torch.Tensor, turn: torch.Tensor, inverse: bool = False, eps: float | None = None
) -> torch.Tensor:
    """Twin of `rotary.rotate`, and with `eps` of `rotary.norm_rotate`; see there.

    Args:
        x: [..., C].
        turn: [..., R/2, 2] float32, of x's leading axes, but for the last of them perhaps 1.
    """
    if x.numel() == 0:
        return x.clone()
    per = x.shape[-2] if turn.dim() == x.dim() + 1 and turn.shape[-3] == 1 else 1
    lead = (*x.shape[:-2], 1) if per > 1 else x.shape[:-1]
    pairs = turn.expand(*lead, -1, 2)
    pairs = pairs.reshape(-1, *pairs.shape[-2:]).contiguous()
    sign = -1.0 if inverse else 1.0
    return Rotate.apply(x.reshape(-1, x.shape[-1]).contiguous(), pairs, per, sign, eps).view(
        x.shape
    )
