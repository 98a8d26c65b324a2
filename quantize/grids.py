# SPDX-License-Identifier: Apache-2.0
"""Whole-number formats of 4, 3 and 2 bits: `w = (code - zero) * scale` in groups of a row.

A group is 64 weights, or the largest power of two from 16 on that divides the row. Codes lie
without a bit between them; a scale is bfloat16, and a zero a byte that counts 2^-8 of the codes'
range. Scale and zero are chosen for the least squared error, not for the extremes to fit.
"""

import math
from dataclasses import dataclass

import torch

from modeling_dsv4.formats import Parts, Shape, WeightFormat, register_format

from .bits import pack_bits, unpack_bits

GROUP = 64
_LEAST_GROUP = 16
# How much of a group's range the first guess covers, and how often it is refined.
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_REFINEMENTS = 3
_TINY = 2.0**-126


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of whole groups, and codes under them."""

    bits: int

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes of x [..., g] as float32, under scale and zero [..., 1]."""
        return (x / scale + zero).round_().clamp_(0, self.top)

    def round_zero(self, zero: torch.Tensor) -> torch.Tensor:
        """Zeros that a byte can hold."""
        step = 2.0 ** (self.bits - 8)
        return (zero / step).round().clamp(0, 255) * step

    def fit(
        self, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose scale and zero [..., 1] float32, as stored, for groups x [..., g].

        From several ranges, codes and the line through them are found in turn; the least
        squared error stays, each weight counting `weight` (broadcast to x).
        """
        count = torch.ones_like(x) if weight is None else weight.expand_as(x)
        count = count / count.mean(-1, keepdim=True).clamp(min=_TINY)
        # A zero is one of the codes or between two, so the range has to hold 0.
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = self._round_scale((high - low) / self.top)
        zero = self.round_zero(-low / scale)
        error = self._error(x, scale, zero, count)
        for shrink in _SHRINKS:
            s = self._round_scale((high - low) * shrink / self.top)
            z = self.round_zero(self.top / 2 - (low + high) / (2 * s))
            for _ in range(_REFINEMENTS):
                s, z = self._line(x, self.codes(x, s, z), count, s)
            e = self._error(x, s, z, count)
            better = e < error
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
            error = torch.where(better, e, error)
        return scale, zero

    def _round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.clamp(min=_TINY).bfloat16().float()

    def _line(
        self, x: torch.Tensor, q: torch.Tensor, count: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of the weighted least-squares line through codes q and weights x."""
        mean_x, mean_q = ((count * v).mean(-1, keepdim=True) for v in (x, q))
        spread = (count * (q - mean_q).square()).sum(-1, keepdim=True)
        slope = (count * (q - mean_q) * (x - mean_x)).sum(-1, keepdim=True) / spread
        scale = self._round_scale(torch.where(slope > 0, slope, scale))
        return scale, self.round_zero(mean_q - mean_x / scale)

    def _error(
        self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        wrong = (self.codes(x, scale, zero) - zero) * scale - x
        return (count * wrong.square()).sum(-1, keepdim=True)

    def store(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Parts of codes [..., K] with scales and zeros [..., G]."""
        return {
            "": pack_bits(codes, self.bits),
            "_scale": scale.bfloat16(),
            "_zero": (zero * 2.0 ** (8 - self.bits)).round().to(torch.uint8),
        }

    def pack(self, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round [..., K] to the nearest codes under the best scales and zeros."""
        x = finite(w).unflatten(-1, (-1, group_size(w.shape[-1])))
        scale, zero = self.fit(x)
        return self.store(
            self.codes(x, scale, zero).flatten(-2), scale.squeeze(-1), zero.squeeze(-1)
        )

    def unpack(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """[..., K] in `dtype`, computed in float32."""
        scale = parts["_scale"].float()
        zero = parts["_zero"].float() * 2.0 ** (self.bits - 8)
        codes = unpack_bits(parts[""], self.bits).float()
        w = codes.unflatten(-1, (scale.shape[-1], -1)).sub_(zero[..., None])
        return w.mul_(scale[..., None]).flatten(-2).to(dtype)

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Shapes of the stored tensors."""
        *rows, k = shape
        groups = k // group_size(k)
        return {
            "": (torch.uint8, (*rows, k * self.bits // 8)),
            "_scale": (torch.bfloat16, (*rows, groups)),
            "_zero": (torch.uint8, (*rows, groups)),
        }


def group_size(k: int) -> int:
    """Weights that share a scale in rows of k."""
    group = math.gcd(k, GROUP)
    if group < _LEAST_GROUP:
        raise ValueError(
            f"wanted rows of a multiple of {_LEAST_GROUP} weights for whole-number codes, got {k}; "
            "leave this weight as it is, or take fp8_rows32"
        )
    return group


def finite(w: torch.Tensor) -> torch.Tensor:
    """A weight as float32; ValueError if it has infinities or NaN."""
    w = w.detach().float()
    if not w.isfinite().all():
        raise ValueError("wanted finite numbers to quantize, got infinities or NaN")
    return w


def _grid_format(grid: Grid) -> WeightFormat:
    return WeightFormat(
        name=f"int{grid.bits}",
        bits=grid.bits,
        group=GROUP,
        parts=grid.parts,
        pack=grid.pack,
        unpack=grid.unpack,
    )


GRIDS = {f"int{bits}": Grid(bits) for bits in (2, 3, 4)}
INT2, INT3, INT4 = (register_format(_grid_format(grid)) for grid in GRIDS.values())
