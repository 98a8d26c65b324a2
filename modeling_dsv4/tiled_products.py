# SPDX-License-Identifier: Apache-2.0
"""Products with frozen weights that are opened on demand, a tile of rows at a time, never kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .formats import Parts, WeightFormat

if TYPE_CHECKING:
    from .moe import Tiles

# Bytes of weight that are wide at a time. On a CPU a tile has to be small enough for the allocator
# to reuse its memory: fresh pages cost more than the arithmetic (41 ms against 8 for a
# matrix-vector product of 4096 x 4096 from FP4).
_TILE_BYTES = {"cpu": 4 << 20}
_DEVICE_TILE_BYTES = 256 << 20


class _FrozenLinear(torch.autograd.Function):
    """`y = x W^T` where W [out, in] comes in tiles of rows, asked for once in each direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tiles: Tiles, plus: torch.Tensor | None) -> torch.Tensor:
        ctx.tiles = tiles
        return tiled_product(x, tiles, plus)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = tiled_product_back(grad, ctx.tiles) if ctx.needs_input_grad[0] else None
        return back, None, grad if ctx.needs_input_grad[2] else None


def tiled_product(x: torch.Tensor, tiles: Tiles, plus: torch.Tensor | None = None) -> torch.Tensor:
    """[..., in] times the rows of all tiles: [..., out], without a gradient; see `linear_plus`."""
    if plus is None:
        y = [F.linear(x, w) for w in tiles(x.dtype)]
    else:
        y, start = [], 0
        for w in tiles(x.dtype):
            y.append(linear_plus(x, w, plus[..., start : start + w.shape[0]]))
            start += w.shape[0]
    return y[0] if len(y) == 1 else torch.cat(y, dim=-1)


def linear_plus(x: torch.Tensor, weight: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    """`x W^T + plus`: [..., in], [out, in], [..., out] -> [..., out].

    In half precision the product adds `plus` in float32, before its one rounding: what is smaller
    than a step of the sum is not lost, as it is where two rounded numbers are added.
    """
    flat = torch.addmm(plus.to(x.dtype).flatten(0, -2), x.flatten(0, -2), weight.t())
    return flat.view(plus.shape)


def tiled_product_back(grad: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Its way back to the input: [..., out] -> [..., in]."""
    # Sums over many tiles: in half precision each addition would round.
    half = grad.dtype in (torch.bfloat16, torch.float16)
    total, start = None, 0
    for w in tiles(grad.dtype):
        part = grad[..., start : start + w.shape[0]] @ w
        part = part.float() if half else part
        total = part if total is None else total.add_(part)
        start += w.shape[0]
    assert total is not None, "a weight has at least one tile"
    return total.to(grad.dtype)


def frozen_linear(x: torch.Tensor, tiles: Tiles, plus: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply [..., in] by a frozen weight: [..., out], differentiable in x and plus.

    Args:
        x: [..., in]; the product works in its dtype, or autocast's.
        tiles: gives the weight in a dtype as consecutive tiles [rows, in]. Called once in the
            forward pass and again in the backward pass, so it may read from disk.
        plus: [..., out], added before the result is rounded.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _FrozenLinear.apply(x, tiles, None if plus is None else plus.to(x.dtype))


def weight_tiles(parts: Parts, fmt: WeightFormat, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Dequantize a weight, or several stacked ones, tile by tile: [rows, in] in `dtype`."""
    codes = parts[""]
    if codes.dim() > 2:
        for i in range(codes.shape[0]):
            yield from weight_tiles({k: part[i] for k, part in parts.items()}, fmt, dtype)
        return
    rows = codes.shape[0]
    row_bytes = codes.nbytes / rows * 8 / fmt.bits * dtype.itemsize
    budget = _TILE_BYTES.get(codes.device.type, _DEVICE_TILE_BYTES)
    step = max(int(budget / row_bytes) // fmt.row_block, 1) * fmt.row_block
    for start in range(0, rows, step):
        yield fmt.unpack_rows(parts, start, min(start + step, rows), dtype)


def packed_linear(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """`x W^T` of [..., in] with a packed weight (or stacked ones: their outputs in a row)."""
    return frozen_linear(x, lambda dtype: weight_tiles(parts, fmt, dtype), plus)
