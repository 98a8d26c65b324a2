# SPDX-License-Identifier: Apache-2.0
"""Routed experts straight from their storage: launches, and the gradient for their inputs.

    reference   moe.ExpertsBase.forward: out[t] = sum_k w[t, k] Expert_{e(t, k)}(x[t])
    decoding    up to DECODE_ROWS tokens: two kernels of expert_gemv.py
    else        rows sorted by expert on the device, two kernels of expert_gemm.py;
                backward two more, from the h = [gate | up] that the forward pass kept

Nothing here waits for the host, and no weight is written anywhere. Weights get no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import WeightFormat
from ..moe import Linear, StackedWeight
from . import expert_gemm, expert_gemv
from .unpack import FP4, FP8, PLAIN

# Up to so many tokens each pair is a matrix-vector product: experts are rarely shared then.
DECODE_ROWS = 16
# Rows and 16-code groups of a matrix-vector tile.
GEMV_TILES: dict[str, dict[str, int]] = {
    "gate_up": {"BLOCK_N": 8, "BLOCK_G": 32, "num_warps": 1},
    "down": {"BLOCK_N": 8, "BLOCK_G": 32, "num_warps": 1},
    "linear": {"BLOCK_N": 8, "BLOCK_G": 32, "num_warps": 1},
}
# Weight rows and codes of a matrix tile. Four warps by 64: more of either and wgmma's operand, or
# the sums, would change hands through shared memory.
GEMM_TILES: dict[str, dict[str, int]] = {
    "forward": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    "backward": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    "linear": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
}
# Most sorted rows of a matrix tile; fewer where experts have fewer.
MOST_ROWS = 128


class Weight(NamedTuple):
    """One projection as the kernels take it: pointers, strides, sizes, and what is fixed."""

    codes: torch.Tensor
    scale: torch.Tensor
    rows: int
    columns: int
    width: int
    scale_columns: int
    fixed: dict[str, Any]

    @property
    def split(self) -> bool:
        """Whether what meets its columns has to be split into even and odd ones."""
        return self.fixed["FORMAT"] == FP4.value

    @property
    def pieces(self) -> int:
        """Codes in a word of four bytes; one where numbers are not read as words."""
        return {FP4.value: 8, FP8.value: 4}.get(self.fixed["FORMAT"], 1)

    @property
    def strides(self) -> tuple[int, int]:
        """From expert to expert: of codes and of scales."""
        return self.codes.stride(0), self.scale.stride(0)


class Plan(NamedTuple):
    """Pairs sorted by expert: `order` [P] into the flat pairs, `tiles` [T, 3] of `rows` each."""

    order: torch.Tensor
    tiles: torch.Tensor
    rows: int

    def blocks(self, way: str, weight: Weight, run: int = 0) -> dict[str, int]:
        """Sizes of a kernel's tile, "forward" or "backward" over runs of so many rows."""
        tile = GEMM_TILES[way]
        even = weight.width % tile["BLOCK_K"] == 0 and run % tile["BLOCK_N"] == 0
        return {"BLOCK_M": self.rows, "EVEN": even, **tile}

    def grid(self, size: int, way: str, axis: str) -> tuple[int]:
        """Programs for `size` outputs."""
        return (len(self.tiles) * triton.cdiv(size, GEMM_TILES[way][axis]),)


class Part(NamedTuple):
    """Some of a pass's pairs: `order` [P] into the flat pairs, sorted by expert.

    `counts` of these belong to each expert, whose weights lie at `places`; the pass has `experts`
    in all and `top_k` a token, which decide the tiles.
    """

    order: torch.Tensor
    counts: list[int]
    places: list[int]
    experts: int
    top_k: int

    def plan(self, pairs: int) -> Plan:
        """Tiles as the whole pass of so many pairs has them."""
        block, first, tiles = tile_rows(pairs, self.experts), 0, []
        for place, count in zip(self.places, self.counts, strict=True):
            starts = range(first, first + count, block)
            tiles += [(place, start, first + count) for start in starts]
            first += count
        device = self.order.device
        return Plan(self.order, torch.tensor(tiles, dtype=torch.int32).to(device), block)


def covers(x: torch.Tensor, *weights: StackedWeight) -> bool:
    """Whether the kernels compute this: dtypes, formats, layout, and no gradient for weights."""
    x = in_autocast(x)
    return x.dtype in (torch.bfloat16, torch.float32) and all(_covered(x, w) for w in weights)


def _covered(x: torch.Tensor, weight: StackedWeight) -> bool:
    codes, fmt = weight.parts[""], weight.format
    if any(p.device != x.device or not p[0].is_contiguous() for p in weight.parts.values()):
        return False
    if fmt is None:
        return codes.dtype is x.dtype and not (codes.requires_grad and torch.is_grad_enabled())
    # Codes are also read as words of four bytes.
    words = codes.shape[-1] % 4 == codes.stride(0) % 4 == codes.data_ptr() % 4 == 0
    known = fmt.name == "fp4" or (fmt.name.startswith("fp8") and fmt.group % 16 == 0)
    return words and known


def _open(weight: StackedWeight) -> Weight:
    codes, fmt = weight.parts[""], weight.format
    if fmt is None:
        form, rows, columns, scale = PLAIN, 1, 1, codes
    else:
        form = FP4 if fmt.name == "fp4" else FP8
        codes, scale = codes.view(torch.uint8), weight.parts["_scale"].view(torch.uint8)
        rows, columns = fmt.row_block, fmt.group // (2 if form == FP4 else 1)
    width = codes.shape[-1]
    return Weight(
        codes,
        scale,
        weight.rows,
        width * 2 if form == FP4 else width,
        width,
        scale.shape[-1],
        {"FORMAT": form.value, "SCALE_ROWS": rows, "SCALE_COLUMNS": columns},
    )


def number_type(x: torch.Tensor) -> dict[str, Any]:
    """What products are computed in: bfloat16 stays, but for the interpreter, which has none."""
    half = x.dtype is torch.bfloat16 and x.is_cuda
    return {"DTYPE": tl.bfloat16 if half else tl.float32, "ASM": half}


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that products work in: autocast's, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def clamp_limit(limit: float | None) -> tuple[float, bool]:
    return (0.0, False) if limit is None else (limit, True)


# --- few tokens ---------------------------------------------------------------------------------


def _decode(
    x: torch.Tensor,
    routing: torch.Tensor,
    index: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    limit: float | None,
) -> torch.Tensor:
    """[n, D] -> [n, D] float32, pair by pair."""
    (n, k), f, d = index.shape, gate_up.rows // 2, down.rows
    u = x.new_empty(n * k, f)
    y = x.new_empty(n * k, d, dtype=torch.float32)
    bound, clamp = clamp_limit(limit)
    tile = GEMV_TILES["gate_up"]
    expert_gemv.gate_up_gemv[(n * k, triton.cdiv(f, tile["BLOCK_N"] // 2))](
        _in_pieces(x, gate_up), index, routing, gate_up.codes, gate_up.scale, u,
        f, gate_up.width, gate_up.scale_columns, *gate_up.strides, gate_up.columns, bound,
        TOP_K=k, CLAMP=clamp, PIECES=down.pieces, **gate_up.fixed, **tile,
    )  # fmt: skip
    tile = GEMV_TILES["down"]
    expert_gemv.down_gemv[(n * k, triton.cdiv(d, tile["BLOCK_N"]))](
        u, index, down.codes, down.scale, y,
        d, f, down.width, down.scale_columns, *down.strides, **down.fixed, **tile,
    )  # fmt: skip
    return y.view(n, k, d).sum(1)


def _in_pieces(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Numbers of [..., columns] at place 0 of each word of codes, then those at place 1, ..."""
    return x.unflatten(-1, (-1, weight.pieces)).mT.flatten(-2).contiguous()


def linear(x: torch.Tensor, parts: dict[str, torch.Tensor], fmt: WeightFormat) -> torch.Tensor:
    """`x W^T` of few rows [n, in], or of groups [n, G, in] with each its part of W's rows.

    Returns:
        [n, out], or [n, G, out / G], in x's dtype; no gradient.
    """
    weight = _open(StackedWeight({k: p[None] for k, p in parts.items()}, fmt))
    x = in_autocast(x)
    if x.dim() == 2 and len(x) > 2:
        return _linear_gemm(x, weight)
    x = _in_pieces(x, weight)
    groups = x.shape[1] if x.dim() == 3 else 1
    y = x.new_empty(x.shape[0], weight.rows)
    tile = GEMV_TILES["linear"]
    expert_gemv.linear_gemv[(x.shape[0], triton.cdiv(weight.rows, tile["BLOCK_N"]))](
        x, weight.codes, weight.scale, y,
        weight.rows, weight.rows // groups, weight.width, weight.scale_columns,
        **weight.fixed, **tile,
    )  # fmt: skip
    return y.view(*x.shape[:-1], -1)


def _linear_gemm(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The same for rows enough to open each weight once for all of them: one tile of rows."""
    tiles = torch.zeros(1, 3, dtype=torch.int32, device=x.device)
    tiles[:, 2].fill_(len(x))
    y = x.new_empty(len(x), weight.rows)
    tile = GEMM_TILES["linear"]
    expert_gemm.linear_gemm[(triton.cdiv(weight.rows, tile["BLOCK_N"]),)](
        _split(x, weight), tiles, tiles, weight.codes, weight.scale, y,
        1, weight.rows, weight.width, weight.scale_columns, *weight.strides, weight.rows,
        weight.columns,
        SCATTER=False, BLOCK_M=DECODE_ROWS, EVEN=weight.width % tile["BLOCK_K"] == 0,
        **weight.fixed, **tile, **number_type(x),
    )  # fmt: skip
    return y


def covers_linear(
    x: torch.Tensor, parts: dict[str, torch.Tensor], fmt: WeightFormat, groups: int = 1
) -> bool:
    """Whether `linear` computes this: few rows, no gradient, no tile across two groups."""
    rows = x.numel() // (x.shape[-1] * groups) if x.numel() else 0
    whole = groups == 1 or parts[""].shape[0] // groups % GEMV_TILES["linear"]["BLOCK_N"] == 0
    few = 0 < rows <= DECODE_ROWS and whole and not (x.requires_grad and torch.is_grad_enabled())
    return few and covers(x, StackedWeight({k: p[None] for k, p in parts.items()}, fmt))


# --- many tokens --------------------------------------------------------------------------------


def make_plan(index: torch.Tensor, experts: int) -> Plan:
    """Sort the pairs of [n, K] ids and cut them into tiles, without asking how many there are."""
    flat = index.flatten()
    block = tile_rows(flat.numel(), experts)
    ids, order = flat.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    count = (ends - starts + block - 1) // block
    last = count.cumsum(0)
    # The most tiles there can be: full ones, and one that is not full per expert.
    tile = torch.arange(flat.numel() // block + min(experts, flat.numel()), device=ids.device)
    expert = torch.searchsorted(last, tile, right=True)
    e = expert.clamp(max=experts - 1)
    first = starts[e] + (tile - last[e] + count[e]) * block
    tiles = torch.stack((expert, first, ends[e]), dim=1).to(torch.int32)
    return Plan(order, tiles, block)


def tile_rows(pairs: int, experts: int) -> int:
    block = 16
    while block < MOST_ROWS and block * experts < pairs:
        block *= 2
    return block


def _split(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Even columns of [n, columns], then odd ones, where the weight wants that."""
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2) if weight.split else x.contiguous()


def _unsplit(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).mT.flatten(-2) if weight.split else x


class _Experts(torch.autograd.Function):
    """All experts of all tokens; differentiable in x [n, D] and in the routing weights [n, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        routing: torch.Tensor,
        index: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        limit: float | None,
    ) -> torch.Tensor:
        (n, k), f, d = index.shape, gate_up.rows // 2, down.rows
        experts, keep = len(gate_up.codes), any(ctx.needs_input_grad)
        plan, number, (bound, clamp) = make_plan(index, experts), number_type(x), clamp_limit(limit)
        u = x.new_empty(n * k, f)
        h = x.new_empty(n * k if keep else 0, 2 * f)
        expert_gemm.gate_up_gemm[plan.grid(f, "forward", "BLOCK_N")](
            _split(x, gate_up), routing, plan.order, plan.tiles, gate_up.codes, gate_up.scale,
            u, h, experts, f, gate_up.width, gate_up.scale_columns, *gate_up.strides, d, bound,
            TOP_K=k, CLAMP=clamp, SAVE=keep, SPLIT_ROWS=down.split,
            **gate_up.fixed, **plan.blocks("forward", gate_up), **number,
        )  # fmt: skip
        y = x.new_empty(n * k, d)
        expert_gemm.linear_gemm[plan.grid(d, "forward", "BLOCK_N")](
            u, plan.order, plan.tiles, down.codes, down.scale, y,
            experts, d, down.width, down.scale_columns, *down.strides, d, f,
            SCATTER=True, **down.fixed, **plan.blocks("forward", down), **number,
        )  # fmt: skip
        ctx.save_for_backward(h, routing)
        ctx.plan, ctx.gate_up, ctx.down, ctx.limit, ctx.dtype = plan, gate_up, down, limit, x.dtype
        return y.view(n, k, d).sum(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (h, routing), plan = ctx.saved_tensors, ctx.plan
        gate_up, down, (bound, clamp) = ctx.gate_up, ctx.down, clamp_limit(ctx.limit)
        (n, k), f, d, experts = routing.shape, gate_up.rows // 2, down.rows, len(down.codes)
        number, run = number_type(h), f // 2 if down.split else f
        du = h.new_empty(n * k, f)
        expert_gemm.input_grad_gemm[plan.grid(down.width, "backward", "BLOCK_K")](
            grad.to(ctx.dtype).contiguous(), plan.order, plan.tiles, down.codes, down.scale, du,
            experts, d, down.width, down.scale_columns, *down.strides, d, d, f,
            TOP_K=k, HALVES=1, SPLIT_ROWS=False, SCATTER=False,
            **down.fixed, **plan.blocks("backward", down, d), **number,
        )  # fmt: skip
        dh = torch.empty_like(h)
        dweight = torch.empty_like(routing)
        expert_gemm.activation_grad[(n * k,)](
            du, h, routing, plan.order, dh, dweight, f, bound, CLAMP=clamp, BLOCK=1024
        )
        if not ctx.needs_input_grad[0]:
            return None, dweight, None, None, None, None
        dx = h.new_empty(n * k, d)
        expert_gemm.input_grad_gemm[plan.grid(gate_up.width, "backward", "BLOCK_K")](
            dh, plan.order, plan.tiles, gate_up.codes, gate_up.scale, dx,
            experts, f, gate_up.width, gate_up.scale_columns, *gate_up.strides, f, 2 * f, d,
            TOP_K=0, HALVES=2, SPLIT_ROWS=down.split, SCATTER=True,
            **gate_up.fixed, **plan.blocks("backward", gate_up, run), **number,
        )  # fmt: skip
        dx = _unsplit(dx.view(n, k, d).sum(1, dtype=torch.float32), gate_up).to(ctx.dtype)
        return dx, dweight, None, None, None, None


class _Grouped(torch.autograd.Function):
    """Sorted rows [M, in] through their expert's matrix: [M, out], differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan, weight: Weight, half: int) -> torch.Tensor:
        y = x.new_empty(len(x), weight.rows)
        expert_gemm.linear_gemm[plan.grid(weight.rows, "forward", "BLOCK_N")](
            _split(x, weight), plan.order, plan.tiles, weight.codes, weight.scale, y,
            len(weight.codes), weight.rows, weight.width, weight.scale_columns, *weight.strides,
            half, weight.columns,
            SCATTER=False, **weight.fixed, **plan.blocks("forward", weight), **number_type(x),
        )  # fmt: skip
        ctx.plan, ctx.weight, ctx.half = plan, weight, half
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        plan, weight = ctx.plan, ctx.weight
        dx = grad.new_empty(len(grad), weight.columns)
        expert_gemm.input_grad_gemm[plan.grid(weight.width, "backward", "BLOCK_K")](
            grad.contiguous(), plan.order, plan.tiles, weight.codes, weight.scale, dx,
            len(weight.codes), weight.rows, weight.width, weight.scale_columns, *weight.strides,
            ctx.half, weight.rows, weight.columns,
            TOP_K=0, HALVES=1, SPLIT_ROWS=False, SCATTER=False,
            **weight.fixed, **plan.blocks("backward", weight, weight.rows), **number_type(grad),
        )  # fmt: skip
        return _unsplit(dx, weight), None, None, None


def grouped(
    index: torch.Tensor, gate_up: StackedWeight, down: StackedWeight
) -> tuple[Linear, Linear]:
    """The two projections of rows sorted by expert: [M, D] -> [M, 2F] and [M, F] -> [M, D].

    Args:
        index: [n, K] ids that the rows were sorted by, not empty.
        gate_up: [E, 2F, D], w1 then w3.
        down: [E, D, F].
    """
    plan = make_plan(index, len(gate_up.parts[""]))
    first, second = _open(gate_up), _open(down)
    return (
        lambda x: _Grouped.apply(in_autocast(x), plan, first, first.rows // 2),
        lambda x: _Grouped.apply(in_autocast(x), plan, second, second.rows),
    )


def run(
    x: torch.Tensor,
    index: torch.Tensor,
    routing: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    limit: float | None,
) -> torch.Tensor:
    """Sum the chosen experts of every token; see `moe.ExpertsBase.forward`.

    Args:
        x: [n, D] bfloat16 or float32.
        index: [n, K].
        routing: [n, K] float32.
        gate_up: [E, 2F, D], w1 then w3.
        down: [E, D, F].

    Returns:
        [n, D] float32.
    """
    x, index, routing = in_autocast(x), index.contiguous(), routing.float().contiguous()
    learns = torch.is_grad_enabled() and (x.requires_grad or routing.requires_grad)
    first, second = _open(gate_up), _open(down)
    if len(x) <= DECODE_ROWS and not learns:
        return _decode(x, routing, index, first, second, limit)
    return _Experts.apply(x, routing, index, first, second, limit)


def run_part(
    x: torch.Tensor,
    routing: torch.Tensor,
    part: Part,
    gate_up: StackedWeight,
    down: StackedWeight,
    limit: float | None,
    y: torch.Tensor,
) -> None:
    """Write the rows of some pairs, each its expert's output; their sums are left to the caller.

    A pair's row does not depend on which others are computed with it. No gradient.

    Args:
        x: [n, D] bfloat16 or float32.
        routing: [n * K] float32, by pair.
        part: the pairs, not empty.
        gate_up: [E, 2F, D], w1 then w3.
        down: [E, D, F].
        y: [n * K, D] float32, written at the pairs.
    """
    x, first, second = in_autocast(x), _open(gate_up), _open(down)
    pairs, f = y.shape[0], first.rows // 2
    if len(x) <= DECODE_ROWS:
        places = [p for p, n in zip(part.places, part.counts, strict=True) for _ in range(n)]
        index = torch.tensor(places)[:, None].to(x.device, non_blocking=True)
        rows, weights = x[part.order // part.top_k], routing[part.order][:, None]
        y[part.order] = _decode(rows, weights, index, first, second, limit)
        return
    plan, number, (bound, clamp) = part.plan(pairs), number_type(x), clamp_limit(limit)
    u, none = x.new_empty(len(part.order), f), x.new_empty(0, 2 * f)
    expert_gemm.gate_up_gemm[plan.grid(f, "forward", "BLOCK_N")](
        _split(x, first), routing, plan.order, plan.tiles, first.codes, first.scale,
        u, none, len(first.codes), f, first.width, first.scale_columns, *first.strides,
        second.rows, bound,
        TOP_K=part.top_k, CLAMP=clamp, SAVE=False, SPLIT_ROWS=second.split,
        **first.fixed, **plan.blocks("forward", first), **number,
    )  # fmt: skip
    expert_gemm.linear_gemm[plan.grid(second.rows, "forward", "BLOCK_N")](
        u, plan.order, plan.tiles, second.codes, second.scale, y,
        len(second.codes), second.rows, second.width, second.scale_columns, *second.strides,
        second.rows, f,
        SCATTER=True, **second.fixed, **plan.blocks("forward", second), **number,
    )  # fmt: skip
