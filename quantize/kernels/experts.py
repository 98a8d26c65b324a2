# SPDX-License-Identifier: Apache-2.0
"""Experts in whole numbers or a trellis: launches, and the gradient for their inputs.

    reference   moe.ExpertsBase.forward over `Grid.unpack` and `Trellis.unpack`
    decoding    up to DECODE_ROWS tokens: two kernels of gemv.py
    rotation    rotate.py, where a projection is a trellis
    else        rows sorted by expert, two kernels of gemm.py; backward two more

The same three functions as `modeling_dsv4/kernels/experts.py` has for the model's own formats. A
trellis' weights are rotated rows; here what they meet is rotated instead, a row of inputs once.
Weights get no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from modeling_dsv4.kernels import expert_gemm
from modeling_dsv4.kernels.experts import (
    DECODE_ROWS,
    Part,
    Plan,
    clamp_limit,
    in_autocast,
    make_plan,
    number_type,
)
from modeling_dsv4.moe import Linear, StackedWeight

from ..grids import GRIDS, group_size
from ..trellis import TRELLISES
from . import gemm, gemv
from .rotate import rotate

# Rows and 32-code units of a matrix-vector tile.
GEMV_TILES: dict[str, dict[str, int]] = {
    "grid": {"BLOCK_N": 8, "BLOCK_U": 32, "num_warps": 1},
    "trellis": {"BLOCK_N": 8, "BLOCK_U": 32, "num_warps": 1},
}
# Weight rows and codes of a matrix tile.
GEMM_TILES: dict[str, dict[str, int]] = {
    f"{kind} {way}": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    for kind in ("grid", "trellis")
    for way in ("forward", "backward")
}
_UNIT = 32


class Weight(NamedTuple):
    """One projection as the kernels take it: tensors, sizes, and what is fixed.

    `zero` is the table of pairs of a trellis. `codes` are those of a row.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    rows: int
    columns: int
    codes: int
    fixed: dict[str, Any]

    @property
    def trellis(self) -> bool:
        """Whether rows are rotated, and a code is a pair of columns."""
        return self.fixed["TRELLIS"]

    @property
    def kind(self) -> str:
        """Which tiles it takes."""
        return "trellis" if self.trellis else "grid"

    @property
    def experts(self) -> int:
        """Experts in all."""
        return len(self.packed)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What kernels point to."""
        return self.packed, self.scale, self.zero

    @property
    def strides(self) -> tuple[int, int, int]:
        """From expert to expert: of codes, scales and zeros; there is one table for all."""
        zero = 0 if self.trellis else self.zero.stride(0)
        return self.packed.stride(0), self.scale.stride(0), zero

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.scale.shape[-1]

    def in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [..., columns], rotated for a trellis, in the order of `gemv`."""
        if self.trellis:
            return rotate(x, 1, 2 * _UNIT)
        return x.unflatten(-1, (-1, _UNIT)).mT.flatten(-2).contiguous()

    def split(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Inputs [n, columns] in the order of `gemm`: rotated and even columns first, or as is."""
        return rotate(x, 1, 2, dtype) if self.trellis else x.to(dtype).contiguous()

    def unsplit(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `split`, for gradients: the rotation is symmetric and its own inverse."""
        return rotate(x, 2, 1) if self.trellis else x

    def blocks(self, way: str, rows: int, run: int = 0) -> dict[str, Any]:
        """Sizes of a kernel's tile, "forward" or "backward" over a run of so many rows."""
        tile = GEMM_TILES[f"{self.kind} {way}"]
        even = self.codes % tile["BLOCK_K"] == 0 and run % tile["BLOCK_N"] == 0
        return {"BLOCK_M": rows, "EVEN": even, **tile, **self.fixed}


@functools.cache
def _pairs(bits: int, device: torch.device) -> torch.Tensor:
    """Table of a trellis [1024] int32: two bfloat16 a word, which hold its numbers exactly."""
    table = TRELLISES[f"trellis{bits / 2:g}"].table(device)
    return table.bfloat16().contiguous().view(torch.int32).flatten()


def covers(x: torch.Tensor, *weights: StackedWeight) -> bool:
    """Whether the kernels compute this: dtypes, formats, layout, whole units of 32 codes."""
    x = in_autocast(x)
    return x.dtype in (torch.bfloat16, torch.float32) and all(_covered(x, w) for w in weights)


def _covered(x: torch.Tensor, weight: StackedWeight) -> bool:
    if weight.format is None or weight.format.name not in GRIDS | TRELLISES:
        return False
    if any(p.device != x.device or not p[0].is_contiguous() for p in weight.parts.values()):
        return False
    packed = weight.parts[""]
    # Codes are read as words of four bytes, of which a unit fills as many as a code has bits.
    words = packed.stride(0) % 4 == packed.data_ptr() % 4 == 0
    return words and packed.shape[-1] % (4 * _bits(weight)) == 0


def _bits(weight: StackedWeight) -> int:
    assert weight.format is not None
    name = weight.format.name
    return GRIDS[name].bits if name in GRIDS else TRELLISES[name].bits


def _open(weight: StackedWeight) -> Weight:
    parts, bits = weight.parts, _bits(weight)
    packed, scale = parts[""], parts["_scale"].view(torch.int16)
    codes = packed.shape[-1] * 8 // bits
    trellis = "_zero" not in parts
    columns = codes * 2 if trellis else codes
    return Weight(
        packed,
        scale,
        _pairs(bits, packed.device) if trellis else parts["_zero"],
        weight.rows,
        columns,
        codes,
        {"BITS": bits, "GROUP": columns if trellis else group_size(columns), "TRELLIS": trellis},
    )


def _grid(plan: Plan, size: int, blocks: dict[str, Any], axis: str) -> tuple[int]:
    """Programs for `size` outputs."""
    return (len(plan.tiles) * triton.cdiv(size, blocks[axis]),)


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
    u = x.new_empty(n * k, f, dtype=torch.float32 if down.trellis else x.dtype)
    y = x.new_empty(n * k, d, dtype=torch.float32)
    bound, clamp = clamp_limit(limit)
    tile = GEMV_TILES[gate_up.kind]
    gemv.gate_up_gemv[(n * k, triton.cdiv(f, tile["BLOCK_N"] // 2))](
        gate_up.in_pieces(x), index, routing, *gate_up.tensors, u,
        f, gate_up.codes // _UNIT, gate_up.groups, *gate_up.strides, gate_up.columns, bound,
        TOP_K=k, CLAMP=clamp, PIECES=1 if down.trellis else _UNIT, **gate_up.fixed, **tile,
    )  # fmt: skip
    if down.trellis:
        u = down.in_pieces(u)
    tile = GEMV_TILES[down.kind]
    gemv.down_gemv[(n * k, triton.cdiv(d, tile["BLOCK_N"]))](
        u, index, *down.tensors, y,
        d, f, down.codes // _UNIT, down.groups, *down.strides, **down.fixed, **tile,
    )  # fmt: skip
    return y.view(n, k, d).sum(1)


# --- many tokens --------------------------------------------------------------------------------


def _inner(
    x: torch.Tensor,
    routing: torch.Tensor,
    plan: Plan,
    top_k: int,
    gate_up: Weight,
    down: Weight,
    limit: float | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u [P, F] sorted, as `down` takes it, and h [P, 2F] sorted, empty unless it is to be kept."""
    count, f, (bound, clamp) = len(plan.order), gate_up.rows // 2, clamp_limit(limit)
    u = x.new_empty(count, f, dtype=torch.float32 if down.trellis else x.dtype)
    h = x.new_empty(count if keep else 0, 2 * f)
    blocks = gate_up.blocks("forward", plan.rows)
    gemm.gate_up_gemm[_grid(plan, f, blocks, "BLOCK_N")](
        gate_up.split(x, x.dtype), routing, plan.order, plan.tiles, *gate_up.tensors, u, h,
        gate_up.experts, f, gate_up.codes, gate_up.groups, *gate_up.strides, gate_up.columns,
        bound, TOP_K=top_k, CLAMP=clamp, SAVE=keep,
        **blocks, **_number(x),
    )  # fmt: skip
    return down.split(u, x.dtype), h


def _multiply(
    x: torch.Tensor, plan: Plan, weight: Weight, y: torch.Tensor, number: dict[str, Any]
) -> None:
    """Sorted rows as `split` gives them through a matrix, to y: [P, rows] sorted, or by pair."""
    blocks = weight.blocks("forward", plan.rows)
    gemm.linear_gemm[_grid(plan, weight.rows, blocks, "BLOCK_N")](
        x, plan.order, plan.tiles, *weight.tensors, y,
        weight.experts, weight.rows, weight.codes, weight.groups, *weight.strides, weight.columns,
        **blocks, **number,
    )  # fmt: skip


def _multiply_back(
    dy: torch.Tensor, plan: Plan, weight: Weight, top_k: int, number: dict[str, Any]
) -> torch.Tensor:
    """`dy W` of sorted rows, or of tokens of `top_k` pairs each: [P, columns] float32."""
    dx = dy.new_empty(len(plan.order), weight.columns, dtype=torch.float32)
    blocks = weight.blocks("backward", plan.rows, weight.rows)
    gemm.input_grad_gemm[_grid(plan, weight.codes, blocks, "BLOCK_K")](
        dy, plan.order, plan.tiles, *weight.tensors, dx,
        weight.experts, weight.rows, weight.codes, weight.groups, *weight.strides,
        weight.rows, weight.columns,
        TOP_K=top_k, **blocks, **number,
    )  # fmt: skip
    return dx


def _number(x: torch.Tensor) -> dict[str, Any]:
    return {"DTYPE": number_type(x)["DTYPE"]}


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
        (n, k), plan = index.shape, make_plan(index, gate_up.experts)
        keep = any(ctx.needs_input_grad)
        u, h = _inner(x, routing, plan, k, gate_up, down, limit, keep)
        y = x.new_empty(n * k, down.rows)
        _multiply(u, plan, down, y, {"SCATTER": True, **_number(x)})
        ctx.save_for_backward(h, routing)
        ctx.plan, ctx.gate_up, ctx.down, ctx.limit, ctx.dtype = plan, gate_up, down, limit, x.dtype
        return y.view(n, k, -1).sum(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (h, routing), plan, (bound, clamp) = ctx.saved_tensors, ctx.plan, clamp_limit(ctx.limit)
        (n, k), gate_up, down, number = routing.shape, ctx.gate_up, ctx.down, _number(h)
        dy = grad.to(ctx.dtype).contiguous()
        du = down.unsplit(_multiply_back(dy, plan, down, k, {"SCATTER": False, **number}))
        dh, dweight = torch.empty_like(h), torch.empty_like(routing)
        expert_gemm.activation_grad[(n * k,)](
            du.contiguous(), h, routing, plan.order, dh, dweight, down.columns, bound,
            CLAMP=clamp, BLOCK=1024,
        )  # fmt: skip
        if not ctx.needs_input_grad[0]:
            return None, dweight, None, None, None, None
        dx = _multiply_back(dh, plan, gate_up, 0, {"SCATTER": True, **number})
        dx = gate_up.unsplit(dx.view(n, k, -1).sum(1)).to(ctx.dtype)
        return dx, dweight, None, None, None, None


class _Grouped(torch.autograd.Function):
    """Sorted rows [M, in] through their expert's matrix: [M, out], differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan, weight: Weight) -> torch.Tensor:
        y = x.new_empty(len(x), weight.rows)
        _multiply(weight.split(x, x.dtype), plan, weight, y, {"SCATTER": False, **_number(x)})
        ctx.plan, ctx.weight = plan, weight
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        number = {"SCATTER": False, **_number(grad)}
        dx = _multiply_back(grad.contiguous(), ctx.plan, ctx.weight, 0, number)
        return ctx.weight.unsplit(dx).to(grad.dtype), None, None


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
        lambda x: _Grouped.apply(in_autocast(x), plan, first),
        lambda x: _Grouped.apply(in_autocast(x), plan, second),
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
    if len(x) <= DECODE_ROWS:
        places = torch.tensor(part.places).repeat_interleave(torch.tensor(part.counts))
        index = places.to(x.device)[:, None]
        rows, weights = x[part.order // part.top_k], routing[part.order][:, None]
        y[part.order] = _decode(rows, weights.contiguous(), index, first, second, limit)
        return
    plan = part.plan(len(y))
    u, _ = _inner(x, routing, plan, part.top_k, first, second, limit, keep=False)
    _multiply(u, plan, second, y, {"SCATTER": True, **_number(x)})
