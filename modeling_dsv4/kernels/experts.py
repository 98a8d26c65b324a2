# SPDX-License-Identifier: Apache-2.0
"""Routed experts straight from their storage: how the model's own formats meet their kernels.

    reference   moe.ExpertsBase.forward
    decoding    up to DECODE_ROWS tokens: two kernels of expert_gemv.py
    else        rows sorted by expert on the device, two kernels of expert_gemm.py;
                backward two more

`covers`, `run`, `run_part` and `grouped` are those of `expert_passes.Family`; `linear` is a dense
map of few rows by the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import WeightFormat
from ..moe import StackedWeight
from . import expert_gemm, expert_gemv
from .expert_passes import Family, clamp_limit, in_autocast, number_type, tile_for
from .expert_plan import DECODE_ROWS, Plan
from .launching import on_device_of
from .rounding import Rows, code_rows, plain_rows
from .unpack import FP4, FP8, PLAIN

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


class Weight(NamedTuple):
    """One projection as the kernels take it: pointers, strides, sizes, and what is fixed.

    An `expert_passes.Opened`. Scales of every `half_rows` rows were packed apart.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    rows: int
    columns: int
    width: int
    scale_columns: int
    half_rows: int
    fixed: dict[str, Any]

    @property
    def experts(self) -> int:
        """Experts in all."""
        return len(self.codes)

    @property
    def is_split(self) -> bool:
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

    def span(self, x: Rows) -> int:
        """Codes of a row that meet one scale of x; 0 where x has none."""
        return x.group // 2 if self.is_split else x.group

    def in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers of [..., columns] at place 0 of each word of codes, then those at place 1, ..."""
        return x.unflatten(-1, (-1, self.pieces)).mT.flatten(-2).contiguous()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Even columns of [n, columns], then odd ones, where the weight wants that."""
        return x.unflatten(-1, (-1, 2)).mT.flatten(-2) if self.is_split else x.contiguous()

    def unsplit(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `split`."""
        return x.unflatten(-1, (2, -1)).mT.flatten(-2) if self.is_split else x

    def blocks(self, way: str, plan: Plan, x: torch.Tensor | Rows, run: int = 0) -> dict[str, Any]:
        """What a kernel is compiled for, "forward" or "backward" over runs of so many rows."""
        tile = tile_for(GEMM_TILES[way], x, "BLOCK_K" if way == "forward" else "BLOCK_N")
        even = self.width % tile["BLOCK_K"] == 0 and run % tile["BLOCK_N"] == 0
        return {"BLOCK_M": plan.rows, "EVEN": even, **tile, **self.fixed, **_numbers(x)}

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
        u = x.new_empty(n * k, f)
        y = x.new_empty(n * k, d, dtype=torch.float32)
        (bound, clamp), pieces = clamp_limit(limit), (down.pieces, down.pieces)
        rows = code_rows(x, group, 1, self.pieces) if group else plain_rows(self.in_pieces(x))
        tile = GEMV_TILES["gate_up"]
        expert_gemv.gate_up_gemv[(n * k, triton.cdiv(f, tile["BLOCK_N"] // 2))](
            rows.data, rows.scale, index, routing, self.codes, self.scale, u,
            f, self.width, self.scale_columns, *self.strides, self.columns, bound,
            TOP_K=k, CLAMP=clamp, NARROW=group > 0, PIECES=down.pieces, SPAN=self.span(rows),
            **self.fixed, **tile,
        )  # fmt: skip
        inner = code_rows(u, group, *pieces) if group else plain_rows(u)
        tile = GEMV_TILES["down"]
        expert_gemv.down_gemv[(n * k, triton.cdiv(d, tile["BLOCK_N"]))](
            inner.data, inner.scale, index, down.codes, down.scale, y,
            d, f, down.width, down.scale_columns, *down.strides,
            SPAN=down.span(inner), **down.fixed, **tile,
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
        u, h = x.new_empty(count, f), x.new_empty(count if keep else 0, 2 * f)
        rows = code_rows(x, group, 1, 1 + self.is_split) if group else plain_rows(self.split(x))
        blocks = self.blocks("forward", plan, x)
        expert_gemm.gate_up_gemm[plan.grid(f, blocks["BLOCK_N"])](
            rows.data, rows.scale, routing, plan.order, plan.tiles, self.codes, self.scale, u, h,
            self.experts, f, self.width, self.scale_columns, *self.strides, self.columns, bound,
            TOP_K=top_k, CLAMP=clamp, SAVE=keep, NARROW=group > 0, SPLIT_ROWS=down.is_split,
            SPAN=self.span(rows), **blocks,
        )  # fmt: skip
        pieces = 1 + down.is_split
        return code_rows(u, group, pieces, pieces) if group else plain_rows(u), h

    def multiply(self, x: Rows, plan: Plan, y: torch.Tensor, scatter: bool) -> None:
        blocks = self.blocks("forward", plan, x)
        expert_gemm.linear_gemm[plan.grid(self.rows, blocks["BLOCK_N"])](
            x.data, x.scale, plan.order, plan.tiles, self.codes, self.scale, y,
            self.experts, self.rows, self.width, self.scale_columns, *self.strides,
            self.half_rows, self.columns, SCATTER=scatter, SPAN=self.span(x), **blocks,
        )  # fmt: skip

    def inner_grad(self, dy: torch.Tensor, plan: Plan, top_k: int) -> torch.Tensor:
        return self._multiply_back(dy, plan, self.rows, top_k=top_k)

    def input_grad(self, dh: torch.Tensor, plan: Plan, down: Weight) -> torch.Tensor:
        return self._multiply_back(
            dh, plan, self.rows // 2, halves=2, split_rows=down.is_split, scatter=True
        )

    def row_grad(self, dy: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self._multiply_back(dy, plan, self.rows)

    def _multiply_back(
        self,
        dy: torch.Tensor,
        plan: Plan,
        rows: int,
        *,
        top_k: int = 0,
        halves: int = 1,
        split_rows: bool = False,
        scatter: bool = False,
    ) -> torch.Tensor:
        """`dy W` of sorted rows over halves of so many rows, or of tokens of `top_k` pairs each."""
        dx = dy.new_empty(len(plan.order), self.columns)
        run = rows // 2 if split_rows else rows
        blocks = self.blocks("backward", plan, dy, run)
        expert_gemm.input_grad_gemm[plan.grid(self.width, blocks["BLOCK_K"])](
            dy, plan.order, plan.tiles, self.codes, self.scale, dx,
            self.experts, rows, self.width, self.scale_columns, *self.strides,
            self.half_rows, dy.shape[1], self.columns,
            TOP_K=top_k, HALVES=halves, SPLIT_ROWS=split_rows, SCATTER=scatter, **blocks,
        )  # fmt: skip
        return dx


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


def _open(weight: StackedWeight, halves: int = 1) -> Weight:
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
        weight.rows // halves,
        {"FORMAT": form.value, "SCALE_ROWS": rows, "SCALE_COLUMNS": columns},
    )


def _open_both(gate_up: StackedWeight, down: StackedWeight) -> tuple[Weight, Weight]:
    return _open(gate_up, 2), _open(down)


def _numbers(x: torch.Tensor | Rows) -> dict[str, Any]:
    number = number_type(x)
    return {**number, "ASM": number["DTYPE"] is tl.bfloat16}


FAMILY = Family(_covered, _open_both)
covers, run, run_part, grouped = FAMILY.covers, FAMILY.run, FAMILY.run_part, FAMILY.grouped


# --- dense maps of few rows ---------------------------------------------------------------------


def linear(x: torch.Tensor, parts: dict[str, torch.Tensor], fmt: WeightFormat) -> torch.Tensor:
    """`x W^T` of few rows [n, in], or of groups [n, G, in] with each its part of W's rows.

    Returns:
        [n, out], or [n, G, out / G], in x's dtype; no gradient.
    """
    weight = _open(StackedWeight({k: p[None] for k, p in parts.items()}, fmt))
    x = in_autocast(x)
    with on_device_of(x):
        many = x.dim() == 2 and len(x) > 2
        return _linear_gemm(x, weight) if many else _linear_gemv(x, weight)


def _linear_gemv(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    x = weight.in_pieces(x)
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
    rows, y = weight.split(x), x.new_empty(len(x), weight.rows)
    tile = tile_for(GEMM_TILES["linear"], x)
    expert_gemm.linear_gemm[(triton.cdiv(weight.rows, tile["BLOCK_N"]),)](
        rows, rows, tiles, tiles, weight.codes, weight.scale, y,
        1, weight.rows, weight.width, weight.scale_columns, *weight.strides,
        weight.half_rows, weight.columns,
        SCATTER=False, SPAN=0, BLOCK_M=DECODE_ROWS, EVEN=weight.width % tile["BLOCK_K"] == 0,
        **weight.fixed, **tile, **_numbers(x),
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
