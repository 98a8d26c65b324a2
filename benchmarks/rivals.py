# SPDX-License-Identifier: Apache-2.0
"""Ways to round a weight that other projects publish, each behind one signature.

A way takes a weight [out, in] (float32) and the second moments of its inputs [in, in] or None, and
gives the weight back as the format holds it, with the bytes that it takes: codes, scales, zeros
and codebooks per weight. Where a format wants rows of 256 and a weight has others, several rows
are put together, which costs the rival nothing. Packages that are missing are left out, by name.

ggml's K and IQ types come from a shared library, `--ggml libggml-base.so`; it builds in a minute
from llama-cpp-python's source package: `cmake -S vendor/llama.cpp -B out/ggml
-DBUILD_SHARED_LIBS=ON -DGGML_OPENMP=OFF && cmake --build out/ggml --target ggml-base`.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Rounded = tuple[torch.Tensor, float]


@dataclass(frozen=True)
class Way:
    """One way to round a weight.

    Attributes:
        family: who publishes it.
        name: what they call it.
        calibrated: whether it looks at the inputs' moments.
        round: (weight [out, in], moments [in, in] or None) to (rounded weight, bytes).
        down: the same for down projections, where a recipe spends more on them.
    """

    family: str
    name: str
    calibrated: bool
    round: Callable[[torch.Tensor, torch.Tensor | None], Rounded]
    down: Callable[[torch.Tensor, torch.Tensor | None], Rounded] | None = None


def in_rows_of(weight: torch.Tensor, block: int) -> torch.Tensor:
    """View [out, in] as rows that are whole blocks long: as many rows together as that takes."""
    together = block // math.gcd(block, weight.shape[1])
    if weight.shape[0] % together:
        raise ValueError(f"{list(weight.shape)} cannot be cut into rows of blocks of {block}")
    return weight.reshape(weight.shape[0] // together, -1)


def round_to_nearest(bits: int, group: int) -> Callable[..., Rounded]:
    """Least and largest value of a group on the ends of the grid; both kept in float16."""

    def rounding(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
        x = in_rows_of(w, group).unflatten(-1, (-1, group))
        low, high = x.amin(-1, keepdim=True).half().float(), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
        codes = ((x - low) / scale).round().clamp(0, 2**bits - 1)
        return (codes * scale + low).reshape(w.shape), w.numel() * (bits + 32 / group) / 8

    return rounding


def hqq_ways() -> Iterator[Way]:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer

    def make(bits: int, group: int) -> Callable[..., Rounded]:
        def rounding(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
            codes, meta = quantizer.quantize(
                in_rows_of(w, group), nbits=bits, group_size=group, optimize=True, axis=1,
                round_zero=False, compute_dtype=torch.float32, device="cpu",
            )  # fmt: skip
            meta = {k: v.half().float() if k in ("scale", "zero") else v for k, v in meta.items()}
            wide = quantizer.dequantize(codes, meta).float().reshape(w.shape)
            return wide, w.numel() * (bits + 32 / group) / 8

        return rounding

    for bits in (4, 3, 2):
        for group in (64, 128):
            yield Way("HQQ", f"{bits}-bit g{group}", False, make(bits, group))


def bitsandbytes_ways() -> Iterator[Way]:
    functional = importlib.import_module("bitsandbytes.functional")

    def make(kind: str, twice: bool) -> Callable[..., Rounded]:
        def rounding(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
            codes, state = functional.quantize_4bit(
                w.contiguous(), blocksize=64, compress_statistics=twice, quant_type=kind
            )
            size = codes.nbytes + state.absmax.nbytes
            size += state.state2.absmax.nbytes if twice else 0
            return functional.dequantize_4bit(codes, state).float(), size

        return rounding

    def int8(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
        codes, largest, _ = functional.int8_vectorwise_quant(w.half())
        wide = functional.int8_vectorwise_dequant(codes, largest)
        return wide, codes.nbytes + largest.nbytes

    for kind in ("nf4", "fp4"):
        yield Way("bitsandbytes", kind, False, make(kind, False))
        yield Way("bitsandbytes", f"{kind}, double", False, make(kind, True))
    yield Way("bitsandbytes", "int8", False, int8)


def torchao_ways() -> Iterator[Way]:
    formats = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").MXTensor

    def mxfp4(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
        packed = formats.to_mx(w.bfloat16(), torch.float4_e2m1fn_x2, 32)
        return packed.dequantize(torch.float32), w.numel() * 4.25 / 8

    def int8(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
        scale = w.abs().amax(1, keepdim=True) / 127
        primitives = importlib.import_module("torchao.quantization.quant_primitives")
        zero = torch.zeros_like(scale)
        codes = primitives.quantize_affine(w, (1, w.shape[1]), scale, zero, torch.int8, -127, 127)
        wide = primitives.dequantize_affine(
            codes, (1, w.shape[1]), scale, zero, torch.int8, -127, 127
        )
        return wide, codes.nbytes + scale.nbytes

    yield Way("torchao", "MXFP4", False, mxfp4)
    yield Way("torchao", "int8 per row", False, int8)


def gguf_ways() -> Iterator[Way]:
    gguf = importlib.import_module("gguf")

    def make(kind: Any) -> Callable[..., Rounded]:
        def rounding(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
            codes = gguf.quants.quantize(in_rows_of(w, 32).numpy(), kind)
            wide = torch.from_numpy(gguf.quants.dequantize(codes, kind).copy())
            return wide.reshape(w.shape), codes.nbytes

        return rounding

    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4"):
        yield Way("gguf", name, False, make(gguf.GGMLQuantizationType[name]))


# Number of a type in ggml.h, bytes of a block, weights of a block.
_GGML_TYPES = {
    "IQ4_XS": (23, 136, 256),
    "Q4_K": (12, 144, 256),
    "IQ4_NL": (20, 18, 32),
    "Q3_K": (11, 110, 256),
    "IQ3_S": (21, 110, 256),
    "IQ3_XXS": (18, 98, 256),
    "Q2_K": (10, 84, 256),
    "IQ2_S": (22, 82, 256),
    "IQ2_XS": (17, 74, 256),
    "IQ2_XXS": (16, 66, 256),
    "IQ1_M": (29, 56, 256),
    "IQ1_S": (19, 50, 256),
}


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def ggml_ways(library: Path) -> Iterator[Way]:
    """llama.cpp's K and IQ types, with and without an importance matrix (the inputs' moments)."""
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

    def make(name: str, calibrated: bool) -> Callable[..., Rounded]:
        number, size, block = _GGML_TYPES[name]
        traits = ggml.ggml_get_type_traits(number).contents
        if (traits.blck_size, traits.type_size) != (block, size):
            raise ValueError(f"{library}: {name} is {traits.type_size} bytes per "
                             f"{traits.blck_size}, wanted {size} per {block}")  # fmt: skip

        def rounding(w: torch.Tensor, moments: torch.Tensor | None) -> Rounded:
            x = in_rows_of(w, block).contiguous()
            importance = None
            if calibrated:
                assert moments is not None
                importance = moments.diagonal().float().repeat(x.shape[1] // w.shape[1])
            elif ggml.ggml_quantize_requires_imatrix(number):
                importance = torch.ones(x.shape[1])
            codes = torch.empty(x.numel() // block * size, dtype=torch.uint8)
            wide = torch.empty_like(x)
            ggml.ggml_quantize_chunk(
                number, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(codes.data_ptr()),
                ctypes.c_int64(0), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]),
                ctypes.c_void_p(None if importance is None else importance.data_ptr()),
            )  # fmt: skip
            traits.to_float(codes.data_ptr(), wide.data_ptr(), x.numel())
            return wide.reshape(w.shape), codes.nbytes

        return rounding

    for name in _GGML_TYPES:
        yield Way("ggml", name, False, make(name, False))
        yield Way("ggml", f"{name}, imatrix", True, make(name, True))


def rivals(ggml: Path | None, say: Callable[[str], None]) -> list[Way]:
    """Every way whose package is here; `say` hears of the others."""
    found = [
        Way("round to nearest", f"{bits}-bit g{group}", False, round_to_nearest(bits, group))
        for bits in (4, 3, 2)
        for group in (64, 128)
    ]
    makers: dict[str, Callable[[], Iterator[Way]]] = {
        "hqq": hqq_ways,
        "bitsandbytes": bitsandbytes_ways,
        "torchao": torchao_ways,
        "gguf": gguf_ways,
    }
    for package, make in makers.items():
        try:
            found += make()
        except ImportError as error:
            say(f"{package} is left out: {error}")
    if ggml is None:
        say("ggml's K and IQ types are left out: no --ggml")
    else:
        found += ggml_ways(ggml)
    return found
