# SPDX-License-Identifier: Apache-2.0
"""Products of rows, sorted by matrix, with a bank of small matrices W [n, out, in].

| function | rows | result |
|---|---|---|
| `times` | x [M, in] | `x W_e^T`, [M, out] |
| `times_back` | g [M, out] | `g W_e`, [M, in] |
| `outer` | g [M, out] and x [M, in] | `g_e^T x_e` of every matrix, [n, out, in] |

`counts` says how many rows each matrix has, in order; some may have none. There is no loop over
the bank: torch's grouped product takes what it can (sizes that are no whole 16 bytes are filled up
with zeros), everything else goes through one batched product over tiles of rows.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Rows of a tile: few enough that a matrix with one row wastes little.
_LEAST_ROWS, _MOST_ROWS = 8, 64
_ALIGNED = 16


def times(x: torch.Tensor, bank: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows [M, in] times each its matrix of [n, out, in] -> [M, out]."""
    if not _groups(x, bank):
        return _Tiles.of(counts, x.device).times(x, bank)
    return F.grouped_mm(_filled(x), _filled(bank).mT, offs=_ends(counts, x.device))


def times_back(g: torch.Tensor, bank: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows [M, out] times each its matrix of [n, out, in], not transposed -> [M, in]."""
    if not _groups(g, bank):
        return _Tiles.of(counts, g.device).times(g, bank.mT)
    matrices = _filled(bank)
    fill = -bank.shape[1] % _whole(bank)
    if fill:
        matrices = F.pad(matrices, (0, 0, 0, fill))
    y = F.grouped_mm(_filled(g), matrices, offs=_ends(counts, g.device))
    return y[:, : bank.shape[2]]


def outer(g: torch.Tensor, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Sum of each matrix's rows' products: [M, out] and [M, in] -> [n, out, in]."""
    if not _groups(g, x):
        return _Tiles.of(counts, g.device).outer(g, x)
    sums = F.grouped_mm(_filled(g).mT, _filled(x), offs=_ends(counts, g.device))
    return sums[:, : g.shape[1], : x.shape[1]]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bank: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, bank)
        ctx.counts = counts
        return times(x, bank, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bank = ctx.saved_tensors
        dx = times_back(grad, bank, ctx.counts) if ctx.needs_input_grad[0] else None
        dbank = outer(grad, x, ctx.counts) if ctx.needs_input_grad[1] else None
        return dx, dbank, None


def bank_linear(x: torch.Tensor, bank: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """`times`, differentiable in both."""
    return _Product.apply(x, bank, counts)


# --- torch's grouped product --------------------------------------------------------------------


def _groups(x: torch.Tensor, other: torch.Tensor) -> bool:
    # On a GPU it is there for bfloat16 alone, which adapters are not computed in.
    return x.device.type == "cpu" and x.dtype is other.dtype is torch.float32


def _ends(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _whole(x: torch.Tensor) -> int:
    return _ALIGNED // x.element_size()


def _filled(x: torch.Tensor) -> torch.Tensor:
    """[..., size] contiguous, its last axis filled up to whole 16 bytes with zeros."""
    fill = -x.shape[-1] % _whole(x)
    return F.pad(x, (0, fill)) if fill else x.contiguous()


# --- tiles --------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Rows cut into tiles that meet one matrix each.

    `places` [t, T] of rows, M where a tile has none; `matrix` [t]; `filled` [t * T] bool.
    """

    places: torch.Tensor
    matrix: torch.Tensor
    filled: torch.Tensor
    matrices: int

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> "_Tiles":
        total, size = sum(counts), _LEAST_ROWS
        while size < _MOST_ROWS and size * len(counts) < total:
            size *= 2
        starts: list[int] = []
        matrix: list[int] = []
        ends: list[int] = []
        for i, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            here = range(end - count, end, size)
            starts += here
            matrix += [i] * len(here)
            ends += [end] * len(here)
        places = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(size)
        filled = places < torch.tensor(ends, dtype=torch.long)[:, None]
        places = places.where(filled, torch.tensor(total))
        return cls(
            places.to(device),
            torch.tensor(matrix, dtype=torch.long, device=device),
            filled.flatten().nonzero()[:, 0].to(device),
            len(counts),
        )

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> [t, T, size], zeros where there is no row."""
        return torch.cat((x, x.new_zeros(1, x.shape[1])))[self.places]

    def times(self, x: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(self._cut(x), bank[self.matrix].mT)
        return y.flatten(0, 1)[self.filled]

    def outer(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = torch.bmm(self._cut(g).mT, self._cut(x))
        sums = parts.new_zeros(self.matrices, *parts.shape[1:])
        return sums.index_add_(0, self.matrix, parts)
