# SPDX-License-Identifier: Apache-2.0
"""Routed experts with low ranks beside them, as one operation with a written gradient.

```
rows x of an expert ─┬─ W_e ───── + = h ─ SwiGLU * routing weight = u ─┬─ V_e ───── + = y
                     └─ A_e ─ B_e ┘                                    └─ A_e ─ B_e ┘
```

Kept for the backward pass: the layer's input, ids, h in the products' dtype and what the A gave
(r numbers a row). Gathered rows, u and y are made again from these, and a frozen weight that is
packed is opened again: nothing wide outlives the block of experts it was made for. Weights get no
gradient, and none is computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import low_rank
from .expert_rows import Branch, Pass, Share, Span


def run(
    todo: Pass, x: torch.Tensor, weights: torch.Tensor, banks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """All experts of all tokens, adapters included.

    Args:
        todo: what to compute with.
        x: [n, D].
        weights: [n, K] float32.
        banks: of each branch, in order: A and B of gate_up, A and B of down.

    Returns:
        [n, D] in float32 (float64 for that), differentiable in x, weights and banks.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Experts.apply(x, weights.to(wide), todo, *(bank.to(wide) for bank in banks))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, todo: Pass, *banks: torch.Tensor
    ) -> torch.Tensor:
        rows, keep = todo.rows, any(ctx.needs_input_grad)
        sorted_weights = weights.flatten()[rows.order]
        # [M, 2F], and what each A gave, [m, r].
        kept = len(rows.token) if keep and todo.keep else 0
        h = x.new_empty(kept, 2 * todo.inner, dtype=todo.frozen.dtype)
        lows = [
            sorted_weights.new_empty(branch.rows if keep else 0, bank.shape[1])
            for i, branch in enumerate(todo.branches)
            for bank in (banks[4 * i], banks[4 * i + 2])
        ]
        out = weights.new_zeros(x.shape)
        with torch.autocast(x.device.type, enabled=False):
            todo.prepare(todo.hit())
            for block in todo.blocks():
                token = rows.token[block.start : block.stop]
                y = _forward(todo, block, x[token], sorted_weights, banks, h, lows)
                out.index_add_(0, token, y)
        if keep:
            ctx.todo, ctx.pairs, ctx.lows = todo, weights.shape, len(lows)
            ctx.save_for_backward(x, sorted_weights, h, *lows, *banks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, h, *rest = ctx.saved_tensors
        todo, lows, banks = ctx.todo, rest[: ctx.lows], rest[ctx.lows :]
        wants = ctx.needs_input_grad
        dbanks = [torch.zeros_like(b) if w else None for b, w in zip(banks, wants[3:], strict=True)]
        dx = weights.new_zeros(x.shape) if wants[0] else None
        dweights = weights.new_zeros(ctx.pairs)
        with torch.autocast(x.device.type, enabled=False):
            # What was opened last going forward may still be at hand.
            todo.prepare(todo.hit()[::-1])
            for block in reversed(todo.blocks()):
                at = slice(block.start, block.stop)
                token = todo.rows.token[at]
                saved = _Saved(x[token], weights[at], h[at], lows, banks)
                drows, dw = _backward(todo, block, grad[token], saved, dbanks, dx is not None)
                dweights.view(-1)[todo.rows.order[at]] = dw
                if dx is not None:
                    dx.index_add_(0, token, drows)
        return None if dx is None else dx.to(x.dtype), dweights, None, *dbanks


class _Saved(NamedTuple):
    """A block's rows [m, D], their weights [m] and h [m, 2F]; everyone's A results and banks."""

    x: torch.Tensor
    weights: torch.Tensor
    h: torch.Tensor
    lows: list[torch.Tensor]
    banks: list[torch.Tensor]


def _forward(
    todo: Pass,
    block: Span,
    x: torch.Tensor,
    weights: torch.Tensor,
    banks: Sequence[torch.Tensor],
    h: torch.Tensor,
    lows: list[torch.Tensor],
) -> torch.Tensor:
    """A block's rows [m, D] -> [m, D]; h and lows of all rows are filled where they are kept."""
    frozen, weights = todo.frozen, weights[block.start : block.stop]
    first = weights.new_zeros(len(x), 2 * todo.inner)
    for branch, share, i in todo.shares(block):
        _add_low_rank(todo, first, x, branch, share, banks[i : i + 2], lows[i // 2])
    x = x.to(frozen.dtype)
    inner, y = weights.new_empty(len(x), todo.inner), weights.new_empty(x.shape)
    for unit, at in todo.units(block):
        part = first[at].add_(frozen.gate_up(x[at], unit.first, todo.counts(unit)))
        if len(h):
            h[unit.start : unit.stop] = part
        inner[at] = _activate(part, todo.limit).mul_(weights[at, None])
        y[at] = frozen.down(inner[at].to(frozen.dtype), unit.first, todo.counts(unit))
    del first
    for branch, share, i in todo.shares(block):
        _add_low_rank(todo, y, inner, branch, share, banks[i + 2 : i + 4], lows[i // 2 + 1])
    return y


def _add_low_rank(
    todo: Pass,
    y: torch.Tensor,
    x: torch.Tensor,
    branch: Branch,
    share: Share,
    pair: Sequence[torch.Tensor],
    kept: torch.Tensor,
) -> None:
    """`y += (s x A^T) B^T` for the rows of a share; the bracket is kept where there is room."""
    a, b = (bank[share.banks] for bank in pair)
    low = low_rank.narrow(x, a, share, branch.scale, kernels=todo.kernels)
    low_rank.widen(y, low, b, share, wide_first=True, kernels=todo.kernels)
    if len(kept):
        kept[share.rows] = low


def _backward(
    todo: Pass,
    block: Span,
    grad: torch.Tensor,
    saved: _Saved,
    dbanks: list[torch.Tensor | None],
    want_x: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's gradient [m, D] -> those of its rows [m, D] and weights [m]; fills `dbanks`."""
    frozen, shares = todo.frozen, todo.shares(block)
    du = saved.weights.new_zeros(len(grad), todo.inner)
    lows = {}
    for branch, share, i in shares:
        lows[i] = _back(todo, grad, branch, share, saved.banks[i + 2 : i + 4], du)
        _fill(todo, dbanks[i + 3], share, saved.lows[i // 2 + 1][share.rows], grad, True)
    dx = saved.weights.new_empty(grad.shape if want_x else (0, grad.shape[1]))
    dw, dh = torch.empty_like(saved.weights), grad.new_empty(len(grad), 2 * todo.inner)
    inner, x = torch.empty_like(du), saved.x.to(dh.dtype)
    again = None if todo.keep else _first(todo, shares, saved.lows, saved.banks, dh)
    for unit, at in reversed(todo.units(block)):
        counts, w = todo.counts(unit), saved.weights[at, None]
        du[at] += frozen.down_back(grad[at].to(frozen.dtype), unit.first, counts)
        h = saved.h[at].to(du.dtype)
        if again is not None:
            h = again[at].add_(frozen.gate_up(x[at].to(frozen.dtype), unit.first, counts))
        s = _activate(h, todo.limit)
        dw[at] = (du[at] * s).sum(-1)
        inner[at] = s.mul_(w)
        dh[at] = _activate_back(h, du[at].mul_(w), todo.limit)
        if want_x:
            dx[at] = frozen.gate_up_back(dh[at].to(frozen.dtype), unit.first, counts)
    del du, again
    for branch, share, i in shares:
        _fill(todo, dbanks[i + 2], share, lows[i], inner)
        low = _back(todo, dh, branch, share, saved.banks[i : i + 2], dx if want_x else None)
        _fill(todo, dbanks[i + 1], share, saved.lows[i // 2][share.rows], dh, True)
        _fill(todo, dbanks[i], share, low, x)
    return dx, dw


def _back(
    todo: Pass,
    grad: torch.Tensor,
    branch: Branch,
    share: Share,
    pair: Sequence[torch.Tensor],
    dx: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of what A gave, [m, r]; that of the rows is added to `dx`."""
    a, b = (bank[share.banks] for bank in pair)
    low = low_rank.narrow(grad, b, share, branch.scale, wide_first=True, kernels=todo.kernels)
    if dx is not None:
        low_rank.widen(dx, low, a, share, kernels=todo.kernels)
    return low


def _first(
    todo: Pass,
    shares: list[tuple[Branch, Share, int]],
    lows: Sequence[torch.Tensor],
    banks: Sequence[torch.Tensor],
    like: torch.Tensor,
) -> torch.Tensor:
    """What the adapters add to h [m, 2F], from what their A gave."""
    first = torch.zeros_like(like)
    for _, share, i in shares:
        low, b = lows[i // 2][share.rows], banks[i + 1][share.banks]
        low_rank.widen(first, low, b, share, wide_first=True, kernels=todo.kernels)
    return first


def _fill(
    todo: Pass,
    dbank: torch.Tensor | None,
    share: Share,
    low: torch.Tensor,
    x: torch.Tensor,
    wide_first: bool = False,
) -> None:
    if dbank is not None:
        low_rank.fill(dbank[share.banks], low, x, share, wide_first, todo.kernels)


def _activate(h: torch.Tensor, limit: float | None) -> torch.Tensor:
    """[m, 2F] -> [m, F]: SwiGLU with clamped halves, see `ops.swiglu`."""
    gate, up = h.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate).mul_(up)


def _activate_back(h: torch.Tensor, grad: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Its gradient: [m, F] -> [m, 2F], zero where a half was clamped."""
    gate, up = raw = h.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    dh = torch.empty_like(h)
    dgate, dup = dh.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    if limit is not None:
        dgate.masked_fill_(raw[0] > limit, 0)
        dup.masked_fill_(raw[1].abs() > limit, 0)
    return dh
