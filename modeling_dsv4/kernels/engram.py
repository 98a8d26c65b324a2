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
Tile: forward whole rows of BD >= D channels; backward [LANES, WIDE], WIDE what a thread loads at
once, so that sums over WIDE stay inside a thread; channels from D on load 0 and are not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of

SLICES = 64


@triton.jit
def _open(dot):
    """The root of dot's clamped size, and the gate."""
    root = tl.sqrt(tl.maximum(tl.abs(dot), 1e-6))
    # By the sign's bit: -0 counts as negative.
    return root, tl.sigmoid(tl.where(dot.to(tl.int32, bitcast=True) < 0, -root, root))


@triton.jit
def _sides(streams, key, q_weight, k_weight, grad, row, j, d, D):
    """h, k, w and g of one stream of a token."""
    h = tl.load(streams + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    k = tl.load(key + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.load(q_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    w *= tl.load(k_weight + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    g = tl.load(grad + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    return h, k, w, g


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
    r = tl.rsqrt(tl.sum(h * h, axis=0) / D + eps) * tl.rsqrt(tl.sum(k * k, axis=0) / D + eps)
    _, g = _open(tl.sum(h * w * k, axis=0) * r / tl.sqrt(D.to(tl.float32)))
    tl.store(gate + row, g)
    if LIVE:
        g = tl.where(tl.load(live + t) != 0, g, 0.0)
    h += g * tl.load(value + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, h.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def engram_backward_kernel(
    streams, key, value, q_weight, k_weight, live, dgate, grad,
    dstreams, dkey, dvalue, slope, D, eps,
    N: tl.constexpr, LIVE: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token: its inner products in a first walk over D, its gradients in a second."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    sums = (tl.zeros([LANES], dtype=tl.float32),) * (4 * N)
    for start in range(0, D, LANES * WIDE):
        d = start + at
        v = tl.load(value + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        added = ()
        for j in tl.static_range(N):
            h, k, w, g = _sides(streams, key, q_weight, k_weight, grad, t * N + j, j, d, D)
            added = added + (  # noqa: RUF005
                sums[4 * j] + tl.sum(h * h, axis=1),
                sums[4 * j + 1] + tl.sum(k * k, axis=1),
                sums[4 * j + 2] + tl.sum(h * w * k, axis=1),
                sums[4 * j + 3] + tl.sum(g * v, axis=1),
            )
        sums = added
    width = D.to(tl.float32)
    alive = 1.0
    if LIVE:
        alive = tl.where(tl.load(live + t) != 0, 1.0, 0.0)
    factors = ()
    for j in tl.static_range(N):
        rh = tl.rsqrt(tl.sum(sums[4 * j], axis=0) / width + eps)
        rk = tl.rsqrt(tl.sum(sums[4 * j + 1], axis=0) / width + eps)
        c = rh * rk / tl.sqrt(width)
        dot = tl.sum(sums[4 * j + 2], axis=0) * c
        root, gate = _open(dot)
        ddot = tl.load(dgate + t * N + j) + alive * tl.sum(sums[4 * j + 3], axis=0)
        ddot = ddot * gate * (1 - gate)
        ddot = tl.where(tl.abs(dot) >= 1e-6, ddot / (2 * root), 0.0)
        tl.store(slope + t * N + j, ddot * c)
        bend = ddot * dot / width
        factors = factors + (ddot * c, bend * rh * rh, bend * rk * rk, alive * gate)  # noqa: RUF005
    for start in range(0, D, LANES * WIDE):
        d = start + at
        dv = tl.zeros([LANES, WIDE], dtype=tl.float32)
        for j in tl.static_range(N):
            row = t * N + j
            h, k, w, g = _sides(streams, key, q_weight, k_weight, grad, row, j, d, D)
            dv += factors[4 * j + 3] * g
            dh = g + factors[4 * j] * w * k - factors[4 * j + 1] * h
            tl.store(dstreams + row * D + d, dh.to(dstreams.dtype.element_ty), mask=d < D)
            dk = factors[4 * j] * w * h - factors[4 * j + 2] * k
            tl.store(dkey + row * D + d, dk.to(dkey.dtype.element_ty), mask=d < D)
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
        ctx.flags = {"N": N, "LIVE": live is not None}
        with on_device_of(streams):
            engram_kernel[(n * N,)](
                streams, key, value, q_weight, k_weight, streams if live is None else live,
                gate, out, D, eps, **ctx.flags, BD=bd,
                num_warps=max(1, min(bd // 512, 16)),
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
        with on_device_of(streams):
            engram_backward_kernel[(n,)](
                streams, key, value, q_weight, k_weight, streams if live is None else live,
                dgate.contiguous(), grad.contiguous(), *grads, slope, D, ctx.eps, **ctx.flags,
                LANES=128, WIDE=16 // streams.element_size(), num_warps=4,
            )  # fmt: skip
            if any(ctx.needs_input_grad[3:5]):
                slices, bd = min(n, SLICES), min(1024, triton.next_power_of_2(D))
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
