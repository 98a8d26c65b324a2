# SPDX-License-Identifier: Apache-2.0
"""Clamped SwiGLU with a routing weight, one pass each way.

Reference (`ops.swiglu`), [M, 2F] = [a | b], routing weight v [M] or none:

    u = silu(min(a, limit)) clamp(b, -limit, limit) v                     float32, rounded once
    d a = g v b' s (1 + a' (1 - s)) [a <= limit],   d b = g v silu(a') [|b| <= limit]
    d v = sum_F g silu(a') b'             with a', b' clamped and s = sigmoid(a')

Grid: forward (rows x blocks of BF), backward one row a program, walked in blocks of BF.
Masks: columns from F on load 0 and are not stored. Without a limit it is infinite.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of


@triton.jit
def clamped(a, b, limit):
    """a from above, b on both sides. What is no number stays none."""
    a = tl.minimum(a, limit, propagate_nan=tl.PropagateNan.ALL)
    b = tl.maximum(b, -limit, propagate_nan=tl.PropagateNan.ALL)
    return a, tl.minimum(b, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def swiglu_kernel(x, weight, out, F, limit, WEIGHTED: tl.constexpr, BF: tl.constexpr):
    blocks = tl.cdiv(F, BF)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks) * BF + tl.arange(0, BF)
    a = tl.load(x + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    a, b = clamped(a, b, limit)
    u = a * tl.sigmoid(a) * b
    if WEIGHTED:
        u = u * tl.load(weight + row)
    tl.store(out + row * F + f, u.to(out.dtype.element_ty), mask=f < F)


@triton.jit
def swiglu_backward_kernel(
    x, weight, grad, dx, dweight, F, limit, WEIGHTED: tl.constexpr, BF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BF], dtype=tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        a = tl.load(x + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
        b = tl.load(x + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
        g = tl.load(grad + row * F + f, mask=f < F, other=0.0).to(tl.float32)
        free_a, free_b = a <= limit, tl.abs(b) <= limit
        a, b = clamped(a, b, limit)
        s = tl.sigmoid(a)
        if WEIGHTED:
            acc += g * a * s * b
            g = g * tl.load(weight + row)
        da = tl.where(free_a, g * b * s * (1 + a * (1 - s)), 0.0)
        db = tl.where(free_b, g * a * s, 0.0)
        tl.store(dx + row * 2 * F + f, da.to(dx.dtype.element_ty), mask=f < F)
        tl.store(dx + row * 2 * F + F + f, db.to(dx.dtype.element_ty), mask=f < F)
    if WEIGHTED:
        tl.store(dweight + row, tl.sum(acc, axis=0))


class Swiglu(torch.autograd.Function):
    """`ops.swiglu` on x [M, 2F], weight [M] float32 or None; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, limit: float
    ) -> torch.Tensor:
        m, f = x.shape[0], x.shape[1] // 2
        out = x.new_empty(m, f)
        bf = min(1024, triton.next_power_of_2(f))
        with on_device_of(x):
            swiglu_kernel[(m * triton.cdiv(f, bf),)](
                x, x if weight is None else weight, out, f, limit,
                WEIGHTED=weight is not None, BF=bf,
            )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.limit, ctx.bf = limit, bf
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        with on_device_of(x):
            swiglu_backward_kernel[(x.shape[0],)](
                x, x if weight is None else weight, grad.contiguous(), dx,
                x if dweight is None else dweight, x.shape[1] // 2, ctx.limit,
                WEIGHTED=weight is not None, BF=ctx.bf,
            )  # fmt: skip
        return dx, dweight, None


def swiglu(
    gate_up: torch.Tensor, limit: float | None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of `ops.swiglu` for any leading axes; see there."""
    x = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    weight = None if weight is None else weight.reshape(-1).float().contiguous()
    out = Swiglu.apply(x, weight, float("inf") if limit is None else float(limit))
    return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
