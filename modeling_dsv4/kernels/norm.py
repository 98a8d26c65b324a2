# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with a weight, one pass over the rows each way.

Reference (`ops.rms_norm`), x [n, D]:

    y = w x r,   r = rsqrt(mean(x^2) + eps)                               float32, rounded once
    d x = r (w g - x r^2 mean(w g x)),   d w = sum over rows of g x r

Grid: forward one row a program; backward PROGRAMS programs that walk the rows and hold their part
of d w [D] in registers: parts [PROGRAMS, D], added afterwards.
Tile: whole rows of BD >= D channels; channels from D on load 0 and are not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of

# Two a core of the largest GPUs, all that run at once; more would only add parts to sum.
PROGRAMS = 264


@triton.jit
def norm_kernel(x, weight, y, D, eps, BD: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BD)
    a = tl.load(x + at + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, axis=0) / D + eps) * w
    tl.store(y + at + d, a.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def norm_backward_kernel(x, weight, grad, dx, dw, n, D, eps, BD: tl.constexpr):
    d = tl.arange(0, BD)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    acc = tl.zeros([BD], dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    # One row runs ahead: its loads are under way while the last one is summed.
    next_a = tl.load(x + row * D + d, mask=d < D, other=0.0)
    next_g = tl.load(grad + row * D + d, mask=d < D, other=0.0)
    for _ in range(tl.cdiv(n, tl.num_programs(0))):
        at = row * D + d
        inside = d < tl.where(row < n, D, 0)
        a, g = next_a.to(tl.float32), next_g.to(tl.float32)
        row += tl.num_programs(0)
        ahead = d < tl.where(row < n, D, 0)
        next_a = tl.load(x + row * D + d, mask=ahead, other=0.0)
        next_g = tl.load(grad + row * D + d, mask=ahead, other=0.0)
        r = tl.rsqrt(tl.sum(a * a, axis=0) / D + eps)
        a = a * r
        acc += g * a
        g = g * w
        g = r * (g - a * (tl.sum(g * a, axis=0) / D))
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * D + d, acc, mask=d < D)


def _launch(x: torch.Tensor) -> dict[str, int]:
    bd = triton.next_power_of_2(x.shape[1])
    return {"BD": bd, "num_warps": max(1, min(bd // 512, 16))}


class Norm(torch.autograd.Function):
    """`ops.rms_norm` on x [n, D] with a weight; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = torch.empty_like(x)
        with on_device_of(x):
            norm_kernel[(x.shape[0],)](x, weight, y, x.shape[1], eps, **_launch(x))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        programs = min(x.shape[0], PROGRAMS)
        dw = x.new_empty(programs, x.shape[1], dtype=torch.float32)
        with on_device_of(x):
            norm_backward_kernel[(programs,)](
                x, weight, grad.contiguous(), dx, dw, *x.shape, ctx.eps, **_launch(x)
            )
        return dx, dw.sum(0).to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Twin of `ops.rms_norm` for any leading axes; see there."""
    if x.numel() == 0:
        # Keeps x and the weight in the graph, as the reference does.
        return x * weight.to(x.dtype)
    return Norm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), eps).view(
        x.shape
    )
