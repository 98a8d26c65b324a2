# SPDX-License-Identifier: Apache-2.0
"""Experts in whole numbers or a trellis: how the formats of packs meet their kernels.

    reference   moe.ExpertsBase.forward over `Grid.unpack` and `Trellis.unpack`
    decoding    up to DECODE_ROWS tokens: two kernels of gemv.py
    rotation    rotate.py, where a projection is a trellis
    else        rows sorted by expert, two kernels of gemm.py; backward two more

`covers`, `run`, `run_part` and `grouped` are those of `expert_passes.Family`. A trellis' weights
are rotated rows; here what they meet is rotated instead, a row of inputs once. Inputs rounded to
FP8 are read as codes by whole numbers; a trellis' are rounded, then rotated, and read as numbers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from modeling_dsv4.kernels.expert_passes import Family, clamp_limit, number_type, tile_for
from modeling_dsv4.kernels.expert_plan import Plan
from modeling_dsv4.kernels.rounding import Rows, code_rows, plain_rows, rounded
from modeling_dsv4.moe import StackedWeight

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

    An `expert_passes.Opened`. `zero` is the table of pairs of a trellis. `codes` are those of a
    row.
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

    def in_pieces(self, x: torch.Tensor, group: int, pieces: int = 1) -> Rows:
        """Inputs [n, columns] as `gemv` reads them: codes with a group, rotated for a trellis."""
        if self.trellis:
            return plain_rows(rotate(rounded(x, group) if group else x, 1, 2 * _UNIT))
        if group:
            return code_rows(x, group, pieces, _UNIT)
        if pieces == 1:
            x = x.unflatten(-1, (-1, _UNIT)).mT.flatten(-2).contiguous()
        return plain_rows(x)

    def split(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Inputs [n, columns] in the order of `gemm`: rotated and even columns first, or as is."""
        dtype = dtype or x.dtype
        return rotate(x, 1, 2, dtype) if self.trellis else x.to(dtype).contiguous()

    def in_rows(self, x: torch.Tensor, group: int, dtype: torch.dtype) -> Rows:
        """The same as `gemm` reads them: codes, or numbers of a dtype as `split` gives them."""
        if group and not self.trellis:
            return code_rows(x, group, 1, 1)
        return plain_rows(self.split(rounded(x, group) if group else x, dtype))

    def unsplit(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `split`, for gradients: the rotation is symmetric and its own inverse."""
        return rotate(x, 2, 1) if self.trellis else x

    def blocks(self, way: str, plan: Plan, x: torch.Tensor | Rows, run: int = 0) -> dict[str, Any]:
        """What a kernel is compiled for, "forward" or "backward" over a run of so many rows."""
        summed = "BLOCK_K" if way == "forward" else "BLOCK_N"
        tile = tile_for(GEMM_TILES[f"{self.kind} {way}"], x, summed)
        even = self.codes % tile["BLOCK_K"] == 0 and run % tile["BLOCK_N"] == 0
        return {"BLOCK_M": plan.rows, "EVEN": even, **tile, **self.fixed, **number_type(x)}

    def decode(
        self,
        x: torch.Tensor,
        routing: torch.Tensor,
        index: torch.Tensor,
        down: Weight,
        limit: float | None,
        group: int,
    ) -> torch.Tensor:
        """See `expert_passes.Opened`, as for all that follow."""
        (n, k), f, d = index.shape, self.rows // 2, down.rows
        u = x.new_empty(n * k, f, dtype=_inner_type(x, down, group))
        y = x.new_empty(n * k, d, dtype=torch.float32)
        (bound, clamp), pieces = clamp_limit(limit), 1 if down.trellis else _UNIT
        rows, tile = self.in_pieces(x, group), GEMV_TILES[self.kind]
        gemv.gate_up_gemv[(n * k, triton.cdiv(f, tile["BLOCK_N"] // 2))](
            rows.data, rows.scale, index, routing, *self.tensors, u,
            f, self.codes // _UNIT, self.groups, *self.strides, self.columns, bound,
            TOP_K=k, CLAMP=clamp, NARROW=group > 0, PIECES=pieces, SPAN=rows.group,
            **self.fixed, **tile,
        )  # fmt: skip
        inner, tile = down.in_pieces(u, group, pieces), GEMV_TILES[down.kind]
        gemv.down_gemv[(n * k, triton.cdiv(d, tile["BLOCK_N"]))](
            inner.data, inner.scale, index, *down.tensors, y,
            d, f, down.codes // _UNIT, down.groups, *down.strides,
            SPAN=inner.group, **down.fixed, **tile,
        )  # fmt: skip
        return y

    def inner(
        self,
        x: torch.Tensor,
        routing: torch.Tensor,
        plan: Plan,
        top_k: int,
        down: Weight,
        limit: float | None,
        keep: bool,
        group: int,
    ) -> tuple[Rows, torch.Tensor]:
        count, f, (bound, clamp) = len(plan.order), self.rows // 2, clamp_limit(limit)
        u = x.new_empty(count, f, dtype=_inner_type(x, down, group))
        h = x.new_empty(count if keep else 0, 2 * f)
        rows, blocks = self.in_rows(x, group, x.dtype), self.blocks("forward", plan, x)
        gemm.gate_up_gemm[plan.grid(f, blocks["BLOCK_N"])](
            rows.data, rows.scale, routing, plan.order, plan.tiles, *self.tensors, u, h,
            self.experts, f, self.codes, self.groups, *self.strides, self.columns, bound,
            TOP_K=top_k, CLAMP=clamp, SAVE=keep, NARROW=group > 0, SPAN=rows.group, **blocks,
        )  # fmt: skip
        return down.in_rows(u, group, x.dtype), h

    def multiply(self, x: Rows, plan: Plan, y: torch.Tensor, scatter: bool) -> None:
        blocks = self.blocks("forward", plan, x)
        gemm.linear_gemm[plan.grid(self.rows, blocks["BLOCK_N"])](
            x.data, x.scale, plan.order, plan.tiles, *self.tensors, y,
            self.experts, self.rows, self.codes, self.groups, *self.strides, self.columns,
            SCATTER=scatter, SPAN=x.group, **blocks,
        )  # fmt: skip

    def inner_grad(self, dy: torch.Tensor, plan: Plan, top_k: int) -> torch.Tensor:
        return self.unsplit(self._multiply_back(dy, plan, top_k, scatter=False))

    def input_grad(self, dh: torch.Tensor, plan: Plan, down: Weight) -> torch.Tensor:
        return self._multiply_back(dh, plan, 0, scatter=True)

    def row_grad(self, dy: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self._multiply_back(dy, plan, 0, scatter=False)

    def _multiply_back(
        self, dy: torch.Tensor, plan: Plan, top_k: int, scatter: bool
    ) -> torch.Tensor:
        """`dy W` of sorted rows, or of tokens of `top_k` pairs each: [P, columns] float32."""
        dx = dy.new_empty(len(plan.order), self.columns, dtype=torch.float32)
        blocks = self.blocks("backward", plan, dy, self.rows)
        gemm.input_grad_gemm[plan.grid(self.codes, blocks["BLOCK_K"])](
            dy, plan.order, plan.tiles, *self.tensors, dx,
            self.experts, self.rows, self.codes, self.groups, *self.strides,
            self.rows, self.columns, TOP_K=top_k, SCATTER=scatter, **blocks,
        )  # fmt: skip
        return dx


def _inner_type(x: torch.Tensor, down: Weight, group: int) -> torch.dtype:
    """In what u is stored: a trellis rotates it as it was summed, unless it is rounded anyway."""
    return torch.float32 if down.trellis and not group else x.dtype


@functools.cache
def _pairs(bits: int, device: torch.device) -> torch.Tensor:
    """Table of a trellis [1024] int32: two bfloat16 a word, which hold its numbers exactly."""
    table = TRELLISES[f"trellis{bits / 2:g}"].table(device)
    return table.bfloat16().contiguous().view(torch.int32).flatten()


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


def _open_both(gate_up: StackedWeight, down: StackedWeight) -> tuple[Weight, Weight]:
    return _open(gate_up), _open(down)


FAMILY = Family(_covered, _open_both)
covers, run, run_part, grouped = FAMILY.covers, FAMILY.run, FAMILY.run_part, FAMILY.grouped
