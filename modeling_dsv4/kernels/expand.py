# SPDX-License-Identifier: Apache-2.0
"""Closing an mHC site: a block's output back to N streams, and its gradients.

Reference (`hyper_ops.expand_ref`), u [n, D], h [n, N, D], post [n, N], comb [n, N, N]:

    h'_k = post_k u + sum_j comb_jk h_j                    the sum runs over the FIRST index
    d u = sum_k post_k g_k        d h_j = sum_k comb_jk g_k
    d post_k = <g_k, u>           d comb_jk = <h_j, g_k>

Forward: grid (tokens x channel blocks); the coefficients of one token are scalars.
Backward: grid (tokens); the program walks its token's channels once, and holds the N^2 + N inner
products as vectors [LANES]: a tile is [LANES, WIDE], WIDE what a thread loads at once, so that
adding over WIDE stays inside a thread and the one sum across threads comes at the end.
Masks: channels from D on load 0 and are not stored.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launching import on_device_of


class Tiles(NamedTuple):
    """Channels and warps of a forward program; warps of a backward program."""

    forward: tuple[int, int] = (1024, 4)
    backward: int = 4


@triton.jit
def expand_kernel(u, streams, post, comb, out, D, N: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    inside = d < D
    added = tl.load(u + t * D + d, mask=inside, other=0.0).to(tl.float32)
    held = ()
    for j in tl.static_range(N):
        x = tl.load(streams + (t * N + j) * D + d, mask=inside, other=0.0).to(tl.float32)
        held = held + (x,)  # noqa: RUF005
    for k in tl.static_range(N):
        y = tl.load(post + t * N + k) * added
        for j in tl.static_range(N):
            y += tl.load(comb + (t * N + j) * N + k) * held[j]
        tl.store(out + (t * N + k) * D + d, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expand_backward_kernel(
    u, streams, post, comb, grad, du, dstreams, dpost, dcomb, D,
    N: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    nothing = tl.zeros([LANES], dtype=tl.float32)
    posts = (nothing,) * N
    combs = (nothing,) * (N * N)
    for start in range(0, D, LANES * WIDE):
        d = start + at
        inside = d < D
        x = tl.load(u + t * D + d, mask=inside, other=0.0).to(tl.float32)
        g = ()
        y = tl.zeros([LANES, WIDE], dtype=tl.float32)
        more_posts = ()
        for k in tl.static_range(N):
            gk = tl.load(grad + (t * N + k) * D + d, mask=inside, other=0.0).to(tl.float32)
            g = g + (gk,)  # noqa: RUF005
            y += tl.load(post + t * N + k) * gk
            more_posts = more_posts + (posts[k] + tl.sum(gk * x, axis=1),)  # noqa: RUF005
        tl.store(du + t * D + d, y.to(du.dtype.element_ty), mask=inside)
        more_combs = ()
        for j in tl.static_range(N):
            h = tl.load(streams + (t * N + j) * D + d, mask=inside, other=0.0).to(tl.float32)
            y = tl.zeros([LANES, WIDE], dtype=tl.float32)
            for k in tl.static_range(N):
                y += tl.load(comb + (t * N + j) * N + k) * g[k]
                more = combs[j * N + k] + tl.sum(h * g[k], axis=1)
                more_combs = more_combs + (more,)  # noqa: RUF005
            to = dstreams + (t * N + j) * D + d
            tl.store(to, y.to(dstreams.dtype.element_ty), mask=inside)
        posts = more_posts
        combs = more_combs
    for k in tl.static_range(N):
        tl.store(dpost + t * N + k, tl.sum(posts[k], axis=0))
        for j in tl.static_range(N):
            tl.store(dcomb + (t * N + j) * N + k, tl.sum(combs[j * N + k], axis=0))


def expand_backward(
    given: tuple[torch.Tensor, ...], grad: torch.Tensor, warps: int
) -> list[torch.Tensor]:
    """Gradients of u, streams, post and comb, all contiguous as `grad` [n, N, D]."""
    streams = given[1]
    n, N, D = streams.shape
    grads = [torch.empty_like(x) for x in given]
    with on_device_of(streams):
        expand_backward_kernel[(n,)](
            *given, grad, *grads, D,
            N=N, LANES=32 * warps, WIDE=16 // streams.element_size(), num_warps=warps,
        )  # fmt: skip
    return grads


class Expand(torch.autograd.Function):
    """`hyper_ops.expand` on contiguous tensors; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        streams: torch.Tensor,
        post: torch.Tensor,
        comb: torch.Tensor,
        tiles: Tiles,
    ) -> torch.Tensor:
        n, N, D = streams.shape
        out = torch.empty_like(streams)
        most, warps = tiles.forward
        bd = min(most, triton.next_power_of_2(D))
        with on_device_of(streams):
            expand_kernel[(n * triton.cdiv(D, bd),)](
                u, streams, post, comb, out, D, N=N, BD=bd, num_warps=warps
            )
        ctx.save_for_backward(u, streams, post, comb)
        ctx.warps = tiles.backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *expand_backward(ctx.saved_tensors, grad.contiguous(), ctx.warps), None


def expand(
    u: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Twin of `hyper_ops.expand` for any leading axes; see there."""
    N, D = streams.shape[-2:]
    out = Expand.apply(
        u.reshape(-1, D).contiguous(), streams.reshape(-1, N, D).contiguous(),
        post.reshape(-1, N).contiguous(), comb.reshape(-1, N, N).contiguous(), tiles or Tiles(),
    )  # fmt: skip
    return out.view(streams.shape)
