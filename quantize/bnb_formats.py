# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' number formats as weight formats of a recipe: `nf4` and `int8_bnb`.

| format | bits | values | scale |
|---|---|---|---|
| `nf4` | 4 | 16 quantiles of a normal distribution, in [-1, 1] | float32 per 64 of a row |
| `int8_bnb` | 8 | -127 .. 127 | float32 per row |

Rounding is bitsandbytes' own (`functional.quantize_4bit`, `int8_vectorwise_quant`) and wants it
installed; reading is plain torch and gives its numbers bit for bit, so a converted model opens
anywhere.
"""

import functools
import importlib
from typing import Any

import torch

from modeling_dsv4.formats import Shape, WeightFormat, register_format

NF4_GROUP = 64
# Zero, and the quantiles of a normal distribution on either side of it, the largest at 1.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack_nf4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., R, K] to NF4 with one float32 scale per 64 of a row, by bitsandbytes.

    Returns:
        Codes [..., R, K / 2] uint8, the even column in the high nibble, and scales
        [..., R, K / 64] float32.
    """
    *rows, k = _check_rows(w.shape, NF4_GROUP)
    _check_finite(w)
    flat = w.detach().float().reshape(-1, k).contiguous()
    codes, state = _functional("nf4").quantize_4bit(
        flat, blocksize=NF4_GROUP, compress_statistics=False, quant_type="nf4"
    )
    return codes.view(*rows, k // 2), state.absmax.view(*rows, k // NF4_GROUP)


def unpack_nf4(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `pack_nf4`: `table[code] * scale` in float32, rounded to `dtype` once."""
    values = _nf4_table(codes.device)
    pairs = torch.stack((values[(codes >> 4).int()], values[(codes & 15).int()]), dim=-1)
    groups = pairs.flatten(-2).unflatten(-1, (-1, NF4_GROUP))
    return (groups * scale[..., None]).flatten(-2).to(dtype)


def pack_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., R, K] to int8 with one float32 scale a row, by bitsandbytes.

    It takes float16, so w is rounded to that first.

    Returns:
        Codes [..., R, K] int8 and largest magnitudes [..., R, 1] float32.
    """
    _check_finite(w)
    flat = w.detach().reshape(-1, w.shape[-1]).to(torch.float16)
    codes, largest, _ = _functional("int8_bnb").int8_vectorwise_quant(flat)
    return codes.view(w.shape), largest.float().view(*w.shape[:-1], 1)


def unpack_int8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `pack_int8`: `code * scale / 127` in float32, rounded to `dtype` once."""
    return (codes.float() * scale * (1 / 127)).to(dtype)


def _functional(name: str) -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ValueError(
            f"rounding to {name!r} wants bitsandbytes, which is not installed: "
            "pip install 'dsv4[bitsandbytes]', or choose another format"
        ) from None


def _check_rows(shape: Shape, group: int) -> Shape:
    if shape[-1] % group:
        raise ValueError(
            f"wanted rows of whole groups of {group} weights for nf4, got {list(shape)}; choose "
            "another format for them"
        )
    return tuple(shape)


def _check_finite(w: torch.Tensor) -> None:
    if not w.isfinite().all():
        raise ValueError("wanted finite numbers to quantize, got infinities or NaN")


@functools.cache
def _nf4_table(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4_VALUES, device=device)


def _nf4_parts(shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
    *rows, k = _check_rows(shape, NF4_GROUP)
    return {
        "": (torch.uint8, (*rows, k // 2)),
        "_scale": (torch.float32, (*rows, k // NF4_GROUP)),
    }


NF4 = register_format(
    WeightFormat(
        name="nf4",
        bits=4,
        group=NF4_GROUP,
        parts=_nf4_parts,
        pack=lambda w: dict(zip(("", "_scale"), pack_nf4(w), strict=True)),
        unpack=lambda p, dtype: unpack_nf4(p[""], p["_scale"], dtype),
    )
)
INT8 = register_format(
    WeightFormat(
        name="int8_bnb",
        bits=8,
        # A row is one group, whatever its length.
        group=1,
        parts=lambda shape: {
            "": (torch.int8, tuple(shape)),
            "_scale": (torch.float32, (*shape[:-1], 1)),
        },
        pack=lambda w: dict(zip(("", "_scale"), pack_int8(w), strict=True)),
        unpack=lambda p, dtype: unpack_int8(p[""], p["_scale"], dtype),
    )
)
