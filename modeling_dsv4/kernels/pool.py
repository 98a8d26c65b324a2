# SPDX-License-Identifier: Apache-2.0
"""The compressors' gated pooling: bias, overlap, softmax and sum in one pass each way.

Reference (`ops.pool_windows`), slots [M, SLOTS, 2, width] of values a and gates g:

    e_c = sum_w softmax_w(g_wc + bias_wc) a_wc
    d a = p de,   d g = p (a - e) de                          p the softmax

Without overlap SLOTS = W and width = C. With overlap SLOTS = 2W and width = 2C: the first W slots
are the window before, of which the first C channels count (none, where no window is before), the
others the window itself, of which the last C channels count. The loop begins behind absent slots.

Grid: (entries, channel blocks). Softmax is online, so no slot count is too large; backward walks
the slots twice. Masks: channels from C on load 0 and are not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def _slot(slots, bias, m, w, c, C: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
          BIASED: tl.constexpr):  # fmt: skip
    """Where the value of slot w stands, the value, and the gate with its bias."""
    W: tl.constexpr = SLOTS // 2 if OVERLAP else SLOTS
    WIDTH: tl.constexpr = 2 * C if OVERLAP else C
    if OVERLAP:
        channel = tl.where(w < W, c, C + c)
    else:
        channel = c
    at = (m * SLOTS + w) * 2 * WIDTH + channel
    a = tl.load(slots + at, mask=c < C, other=0.0).to(tl.float32)
    g = tl.load(slots + at + WIDTH, mask=c < C, other=0.0).to(tl.float32)
    if BIASED:
        g += tl.load(bias + (w % W) * WIDTH + channel, mask=c < C, other=0.0)
    return at, a, g


@triton.jit
def _pooled(slots, bias, m, first, c, C: tl.constexpr, SLOTS: tl.constexpr,
            OVERLAP: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    """The entry, and the largest gate and the sum of its softmax."""
    _, e, top = _slot(slots, bias, m, first, c, C, SLOTS, OVERLAP, BIASED)
    total = tl.zeros_like(e) + 1
    for w in range(first + 1, SLOTS):
        _, a, g = _slot(slots, bias, m, w, c, C, SLOTS, OVERLAP, BIASED)
        higher = tl.maximum(top, g)
        shrink, p = tl.exp(top - higher), tl.exp(g - higher)
        e, total, top = e * shrink + p * a, total * shrink + p, higher
    return e / total, top, total


@triton.jit
def pool_kernel(
    slots, bias, overlap, out,
    C: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr, BIASED: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = 0
    if OVERLAP:
        first = tl.where(tl.load(overlap + m) != 0, 0, SLOTS // 2)
    e, _, _ = _pooled(slots, bias, m, first, c, C, SLOTS, OVERLAP, BIASED)
    tl.store(out + m * C + c, e, mask=c < C)


@triton.jit
def pool_backward_kernel(
    slots, bias, overlap, grad, dslots,
    C: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr, BIASED: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    WIDTH: tl.constexpr = 2 * C if OVERLAP else C
    first = 0
    if OVERLAP:
        first = tl.where(tl.load(overlap + m) != 0, 0, SLOTS // 2)
    e, top, total = _pooled(slots, bias, m, first, c, C, SLOTS, OVERLAP, BIASED)
    de = tl.load(grad + m * C + c, mask=c < C, other=0.0).to(tl.float32)
    for w in range(first, SLOTS):
        at, a, g = _slot(slots, bias, m, w, c, C, SLOTS, OVERLAP, BIASED)
        p = tl.exp(g - top) / total * de
        tl.store(dslots + at, p, mask=c < C)
        tl.store(dslots + at + WIDTH, p * (a - e), mask=c < C)


class Pool(torch.autograd.Function):
    """`ops.pool_windows` on slots [M, SLOTS, 2, width] float32; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any, slots: torch.Tensor, bias: torch.Tensor | None, overlap: torch.Tensor | None
    ) -> torch.Tensor:
        m, count, _, width = slots.shape
        c = width if overlap is None else width // 2
        ctx.sizes = {
            "C": c,
            "SLOTS": count,
            "OVERLAP": overlap is not None,
            "BIASED": bias is not None,
            "BC": min(512, triton.next_power_of_2(c)),
        }
        ctx.grid = (m, triton.cdiv(c, ctx.sizes["BC"]))
        out = slots.new_empty(m, c)
        with torch.cuda.device_of(slots):
            pool_kernel[ctx.grid](
                slots, slots if bias is None else bias, slots if overlap is None else overlap,
                out, **ctx.sizes,
            )  # fmt: skip
        ctx.save_for_backward(slots, bias, overlap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots, bias, overlap = ctx.saved_tensors
        # With overlap half of the channels, and absent windows, are read by nobody.
        dslots = torch.empty_like(slots) if overlap is None else torch.zeros_like(slots)
        with torch.cuda.device_of(slots):
            pool_backward_kernel[ctx.grid](
                slots, slots if bias is None else bias, slots if overlap is None else overlap,
                grad.contiguous(), dslots, **ctx.sizes,
            )  # fmt: skip
        dbias = None
        if bias is not None:
            dbias = dslots[:, :, 1].sum(0).unflatten(0, (-1, bias.shape[0])).sum(0)
        return dslots, dbias, None


def pool_windows(
    slots: torch.Tensor, bias: torch.Tensor | None, overlap: torch.Tensor | None
) -> torch.Tensor:
    """Twin of `ops.pool_windows`; see there."""
    flat = slots.flatten(0, 1).contiguous()
    bias = None if bias is None else bias.contiguous()
    overlap = None if overlap is None else overlap.flatten().to(torch.int8)
    out = Pool.apply(flat, bias, overlap)
    return out.view(*slots.shape[:2], out.shape[1])
