# SPDX-License-Identifier: Apache-2.0
"""Engram's gate and addition: streams and keys are read once each way.

Reference (`ops.engram_add`), per token and stream, w = q_weight k_weight [N, D]:

    dot = (sum_D h w k) rsqrt(mean h^2 + eps) rsqrt(mean k^2 + eps) D^-1/2
    gate = sigmoid(copysign(sqrt(max(|dot|, 1e-6)), dot)),    h' = h + live gate v

    d gate = live <g, v>,  d v = sum_n live gate g
    d dot = d gate gate (1 - gate) / (2 sqrt|dot|)  where |dot| >= 1e-6, else 0
    d h = g + d dot (c w k - dot rh^2 h / D),  d k = d dot (c w h - dot rk^2 k / D)
    d w = sum over tokens of d dot c h k                     with c = rh rk D^-1/2

Grid: forward (tokens x streams); backward (tokens), which adds d v over its streams; weights'
gradient (slices of tokens, streams x channel blocks): parts [SLICES, N, D], added afterwards.
Tile: whole rows of BD >= D channels; channels from D on load 0 and are not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

SLICES = 64


@triton.jit
def _gate(h, k, w, D, eps):
    """The two inverse RMS, dot, sqrt of its clamped size, gate."""
    rh = tl.rsqrt(tl.sum(h * h, axis=0) / D + eps)
    rk = tl.rsqrt(tl.sum(k * k, axis=0) / D + eps)
    dot = tl.sum(h * w * k, axis=0) * rh * rk / tl.sqrt(D.to(tl.float32))
    root = tl.sqrt(tl.maximum(tl.abs(dot), 1e-6))
    # By the sign's bit: -0 counts as negative.
    signed = tl.where(dot.to(tl.int32, bitcast=True) < 0, -root, root)
    return rh, rk, dot, root, tl.sigmoid(signed)


@triton.jit
def engram_kernel(
    streams, key, value, q_weight, k_weight, live, gate, out, D, eps,
    N: tl.constexpr, LIVE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, j = row // N, row % N
    d = tl.arange(0, BD)
    h = tl.load(streams + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    k = tl.load(key + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.load(q_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    w *= tl.load(k_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    _, _, _, _, g = _gate(h, k, w, D, eps)
    tl.store(gate + row, g)
    if LIVE:
        g = tl.where(tl.load(live + t) != 0, g, 0.0)
    h += g * tl.load(value + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, h.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def engram_backward_kernel(
    streams, key, value, q_weight, k_weight, live, dgate, grad,
    dstreams, dkey, dvalue, slope, D, eps,
    N: tl.constexpr, LIVE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    v = tl.load(value + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    dv = tl.zeros([BD], dtype=tl.float32)
    alive = 1.0
    if LIVE:
        alive = tl.where(tl.load(live + t) != 0, 1.0, 0.0)
    for j in range(N):
        row = t * N + j
        h = tl.load(streams + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(key + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(q_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        w *= tl.load(k_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        g = tl.load(grad + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        rh, rk, dot, root, opened = _gate(h, k, w, D, eps)
        dv += alive * opened * g
        ddot = (tl.load(dgate + row) + alive * tl.sum(g * v, axis=0)) * opened * (1 - opened)
        ddot = tl.where(tl.abs(dot) >= 1e-6, ddot / (2 * root), 0.0)
        c = rh * rk / tl.sqrt(D.to(tl.float32))
        tl.store(slope + row, ddot * c)
        g += ddot * (c * w * k - dot * rh * rh * h / D)
        tl.store(dstreams + row * D + d, g.to(dstreams.dtype.element_ty), mask=d < D)
        g = ddot * (c * w * h - dot * rk * rk * k / D)
        tl.store(dkey + row * D + d, g.to(dkey.dtype.element_ty), mask=d < D)
    tl.store(dvalue + t * D + d, dv.to(dvalue.dtype.element_ty), mask=d < D)


@triton.jit
def engram_weight_kernel(streams, key, slope, dweight, n, D, N: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    j = tl.program_id(1) // blocks
    d = (tl.program_id(1) % blocks) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD], dtype=tl.float32)
    for step in range(tl.cdiv(n, tl.num_programs(0))):
        t = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        row = t * N + j
        inside = d < tl.where(t < n, D, 0)
        h = tl.load(streams + row * D + d, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(key + row * D + d, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(slope + row, mask=t < n, other=0.0) * h * k
    tl.store(dweight + (tl.program_id(0) * N + j) * D + d, acc, mask=d < D)


class EngramAdd(torch.autograd.Function):
    """`ops.engram_add` on streams and key [n, N, D], value [n, D]; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        live: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, N, D = streams.shape
        gate, out = streams.new_empty(n, N, dtype=torch.float32), torch.empty_like(streams)
        bd = triton.next_power_of_2(D)
        ctx.sizes = {"N": N, "LIVE": live is not None, "BD": bd,
                     "num_warps": max(1, min(bd // 512, 16))}  # fmt: skip
        with torch.cuda.device_of(streams):
            engram_kernel[(n * N,)](
                streams, key, value, q_weight, k_weight, streams if live is None else live,
                gate, out, D, eps, **ctx.sizes,
            )  # fmt: skip
        ctx.save_for_backward(streams, key, value, q_weight, k_weight, live)
        ctx.eps = eps
        return gate, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dgate: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        streams, key, value, q_weight, k_weight, live = ctx.saved_tensors
        n, N, D = streams.shape
        grads = [torch.empty_like(x) for x in (streams, key, value)]
        slope = streams.new_empty(n, N, dtype=torch.float32)
        dq = dk = None
        with torch.cuda.device_of(streams):
            engram_backward_kernel[(n,)](
                streams, key, value, q_weight, k_weight, streams if live is None else live,
                dgate.contiguous(), grad.contiguous(), *grads, slope, D, ctx.eps, **ctx.sizes,
            )  # fmt: skip
            if any(ctx.needs_input_grad[3:5]):
                slices, bd = min(n, SLICES), min(1024, ctx.sizes["BD"])
                parts = streams.new_empty(slices, N, D, dtype=torch.float32)
                engram_weight_kernel[(slices, N * triton.cdiv(D, bd))](
                    streams, key, slope, parts, n, D, N=N, BD=bd
                )
                dw = parts.sum(0)
                dq = (dw * k_weight.float()).to(q_weight.dtype)
                dk = (dw * q_weight.float()).to(k_weight.dtype)
        return *grads, dq, dk, None, None


def engram_add(
    streams: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    live: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `ops.engram_add` for any leading axes; see there."""
    N, D = streams.shape[-2:]
    gate, out = EngramAdd.apply(
        streams.reshape(-1, N, D).contiguous(), key.reshape(-1, N, D).contiguous(),
        value.reshape(-1, D).contiguous(), q_weight.contiguous(), k_weight.contiguous(),
        None if live is None else live.flatten().to(torch.int8), eps,
    )  # fmt: skip
    return gate.view(streams.shape[:-1]), out.view(streams.shape)
