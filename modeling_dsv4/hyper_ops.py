# SPDX-License-Identifier: Apache-2.0
"""The mathematics of mHC (arXiv 2512.24880 §4): references, and twins with written-out gradients.

The streams are the widest tensor of the model, so a site costs what it reads and writes. Each twin
below passes over them once forward and at most twice backward, and saves its inputs only; left to
autograd the same equations run in layouts that are ten times slower on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .kernel_choice import use_cpu, use_triton
from .ops import fp32


def sinkhorn_ref(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Sinkhorn-Knopp on [..., N, N] in the release's order: the last step is columns.

    `M = softmax(L) + eps`, columns, then `iters - 1` times rows, columns.
    """
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def project_ref(streams: torch.Tensor, fn: torch.Tensor, rms_eps: float) -> torch.Tensor:
    """`(x fn^T) * rsqrt(mean(x^2) + eps)` over all N * D channels: [..., N, D] -> [..., rows]."""
    x = fp32(streams).flatten(-2)
    return F.linear(x, fn) * torch.rsqrt(x.square().mean(-1, keepdim=True) + rms_eps)


def collapse_ref(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """`y = sum_j pre_j h_j`: [..., N, D] -> [..., D], float32 inside, rounded once."""
    return torch.einsum("...n,...nd->...d", pre, fp32(streams)).to(streams.dtype)


def expand_ref(
    u: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """`h'_k = post_k u + sum_j comb_jk h_j`: the sum runs over the FIRST index of comb."""
    mixed = torch.einsum("...jk,...jd->...kd", comb, fp32(streams))
    return (mixed + post[..., None] * fp32(u)[..., None, :]).to(streams.dtype)


class _Sinkhorn(torch.autograd.Function):
    """`sinkhorn_ref` on [j, k, tokens]: the tokens lie where a CPU's vectors are.

    The backward pass recomputes every iteration and walks all of them: stopping early, or reusing
    the final matrix, gives wrong gradients.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.iters, ctx.eps = iters, eps
        m = logits.softmax(1).add_(eps)
        for axis in _axes(iters):
            m.div_(m.sum(axis, keepdim=True).add_(eps))
        return m

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        soft = logits.softmax(1)
        m, steps = soft + ctx.eps, []
        for axis in _axes(ctx.iters):
            inverse = (m.sum(axis, keepdim=True) + ctx.eps).reciprocal_()
            m = m * inverse
            steps.append((axis, m, inverse))
        g = grad
        for axis, y, inverse in reversed(steps):
            g = (g - (g * y).sum(axis, keepdim=True)) * inverse
        return soft * (g - (g * soft).sum(1, keepdim=True)), None, None


def _axes(iters: int) -> list[int]:
    """Normalised axes of [j, k, token] in order: columns (sum over j), then rows, columns, ..."""
    return [0] + [1, 0] * (iters - 1)


class _Project(torch.autograd.Function):
    """`project_ref` on x [n, N * D] float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        y = x @ fn.t()
        ctx.save_for_backward(x, fn, r, y)
        return y * r

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, fn, r, y = ctx.saved_tensors
        dy, dx, dfn = grad * r, None, None
        if ctx.needs_input_grad[0]:
            # d r / d x = -r^3 x / (N D)
            slope = (grad * y).sum(-1, keepdim=True) * r.pow(3) / -x.shape[-1]
            dx = (dy @ fn).addcmul_(slope, x)
        if ctx.needs_input_grad[1]:
            dfn = dy.t() @ x
        return dx, dfn, None


class _Collapse(torch.autograd.Function):
    """`collapse_ref` on streams [n, N, D], pre [n, N], float32."""

    @staticmethod
    def forward(ctx: Any, streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(streams, pre)
        return (streams.transpose(1, 2) @ pre[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        streams, pre = ctx.saved_tensors
        grad = grad.contiguous()
        return pre[..., None] * grad[:, None], (streams @ grad[..., None])[..., 0]


class _Expand(torch.autograd.Function):
    """`expand_ref` on u [n, D], streams [n, N, D], post [n, N], comb [n, N, N], float32."""

    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(u, streams, post, comb)
        return (comb.transpose(1, 2) @ streams).addcmul_(post[..., None], u[:, None])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, streams, post, comb = ctx.saved_tensors
        grad = grad.contiguous()
        du = (grad.transpose(1, 2) @ post[..., None])[..., 0]
        dpost = (grad @ u[..., None])[..., 0]
        return du, comb @ grad, dpost, streams @ grad.transpose(1, 2)


def sinkhorn(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Project [..., N, N] logits to (almost) doubly stochastic matrices; see `sinkhorn_ref`."""
    n = logits.shape[-1]
    tokens_last = logits.reshape(-1, n * n).t().contiguous().view(n, n, -1)
    m = _Sinkhorn.apply(tokens_last, iters, eps)
    return m.flatten(0, 1).t().reshape(logits.shape)


def project(streams: torch.Tensor, fn: torch.Tensor, rms_eps: float) -> torch.Tensor:
    """Raw coefficients of a site; see `project_ref`."""
    x = fp32(streams).flatten(-2)
    y = _Project.apply(x.reshape(-1, x.shape[-1]), fn, rms_eps)
    return y.view(*x.shape[:-1], fn.shape[0])


def collapse(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """N streams to one; see `collapse_ref`."""
    shape = streams.shape
    y = _Collapse.apply(fp32(streams).reshape(-1, *shape[-2:]), pre.reshape(-1, shape[-2]))
    return y.view(*shape[:-2], shape[-1]).to(streams.dtype)


def expand(
    u: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    kernels: str = "torch",
) -> torch.Tensor:
    """A block's output back to N streams, mixed with what they held; see `expand_ref`."""
    if use_triton(kernels, streams):
        from .kernels import expand as fused

        return fused.expand(u, streams, post, comb)
    # A compiler fuses this with its neighbours.
    fuses = torch.compiler.is_compiling() or u.dtype is not streams.dtype
    if not fuses and use_cpu(kernels, streams, u, post, comb):
        from .cpu import hyper

        return hyper.expand(u, streams, post, comb)
    n, d = streams.shape[-2:]
    out = _Expand.apply(
        fp32(u).reshape(-1, d),
        fp32(streams).reshape(-1, n, d),
        post.reshape(-1, n),
        comb.reshape(-1, n, n).contiguous(),
    )
    return out.view(streams.shape).to(streams.dtype)


def coefficients(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients of one hyper-connection site (mHC §4.2), all float32.

    Args:
        streams: [..., N, D].
        fn: [N^2 + 2N, N * D], rows in the order pre, post, comb (row-major).
        base: [N^2 + 2N]; added after `scale` multiplies.
        scale: [3].

    Returns:
        pre [..., N] (with + eps), post [..., N] (without), comb [..., N, N].
    """
    n = streams.shape[-2]
    pre, post, comb = project(streams, fn, rms_eps).split([n, n, n * n], dim=-1)
    pre_b, post_b, comb_b = base.split([n, n, n * n])
    pre = torch.sigmoid(scale[0] * pre + pre_b) + eps
    post = 2 * torch.sigmoid(scale[1] * post + post_b)
    comb = sinkhorn((scale[2] * comb + comb_b).unflatten(-1, (n, n)), iters, eps)
    return pre, post, comb


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
    kernels: str = "torch",
) -> tuple[torch.Tensor, ...]:
    """All that a site does before its block (mHC §4.2).

    Args:
        streams: [..., N, D].
        handed: [..., N] collapses instead of the site's own `pre` (single pass), or None.
        fn: as base and scale, of `coefficients`.
        kernels: see `kernel_choice.py`.

    Returns:
        the block's input [..., D], pre, post, comb of `coefficients`, and the streams for
        `expand`. These are the streams given; taken from here, what `expand` sends back to them
        is added where this function's gradients are made, not in a pass of its own.
    """
    if use_triton(kernels, streams):
        from .kernels import hyper

        return hyper.open_site(
            streams, handed, fn, base, scale, iters=iters, eps=eps, rms_eps=rms_eps
        )
    if use_cpu(kernels, streams, handed, fn, base, scale):
        from .cpu import hyper as in_c

        return in_c.open_site(
            streams, handed, fn, base, scale, iters=iters, eps=eps, rms_eps=rms_eps
        )
    pre, post, comb = coefficients(streams, fn, base, scale, iters=iters, eps=eps, rms_eps=rms_eps)
    return collapse(streams, pre if handed is None else handed), pre, post, comb, streams


def close_and_open(
    u: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    *opening: Any,
    kernels: str = "torch",
    **constants: Any,
) -> tuple[torch.Tensor, ...]:
    """Close a site and open the next, with nothing between: `open_site(expand(...))`.

    All that the next site wants of its streams can be summed up while they are made. A handed
    `pre` is known before them (single pass), so that the next block's input can be made too.

    Args:
        u, streams, post, comb: of `expand`.
        opening: handed, fn, base and scale of `open_site`.
        constants: iters, eps and rms_eps of `open_site`.

    Returns:
        what `open_site` returns; the streams are the new ones.
    """
    if use_triton(kernels, streams):
        from .kernels import close_open

        return close_open.close_and_open(u, streams, post, comb, *opening, **constants)
    streams = expand(u, streams, post, comb, kernels)
    return open_site(streams, *opening, **constants, kernels=kernels)
