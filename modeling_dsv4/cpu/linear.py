# SPDX-License-Identifier: Apache-2.0
"""Linear maps of few rows in C (`linear.c`): twin of the references in `linear_ops.py`.

Products and sums are float32 and rounded once. The number of threads is torch's
(`torch.get_num_threads`), and changes no bit.
"""

import ctypes
import functools
from typing import Any

import torch

from .build import library

_NAMESPACE = "dsv4_cpu"
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}


@functools.cache
def _functions() -> Any:
    lib = library()
    assert lib is not None, "ask `kernel_choice` first"
    lib.dsv4_linear_scratch.argtypes = [ctypes.c_int64] * 4
    lib.dsv4_linear_scratch.restype = ctypes.c_int64
    lib.dsv4_linear.argtypes = [*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 10]
    lib.dsv4_linear.restype = None
    return lib


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    plus: torch.Tensor | None,
    block: int,
    wide: bool,
) -> torch.Tensor:
    lib, (rows, columns) = _functions(), weight.shape
    groups = x.shape[-1] // columns
    y = _empty(x, weight, wide)
    _check(x, weight, scale, block)
    m = y.numel() // rows
    if not m:
        return y
    x, kind = x.contiguous(), _KINDS[weight.dtype]
    if plus is not None:
        plus = (plus if plus.shape == (rows,) else plus.expand(y.shape)).float().contiguous()
    size = lib.dsv4_linear_scratch(kind, columns, groups, m)
    scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    given = (x, weight, scale, plus, scratch, y)
    lib.dsv4_linear(
        *(None if t is None else t.data_ptr() for t in given),
        kind,
        x.dtype is torch.bfloat16,
        y.dtype is torch.bfloat16,
        rows // groups,
        columns,
        groups,
        block,
        0 if plus is None or plus.dim() == 1 else rows,
        m,
        torch.get_num_threads(),
    )
    return y


def _check(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, block: int) -> None:
    """C trusts these sizes."""
    rows, columns = weight.shape
    groups = x.shape[-1] // columns
    if not groups or x.shape[-1] % columns or rows % groups:
        raise ValueError(
            f"wanted rows of as many groups as a weight {list(weight.shape)} has, got x "
            f"{list(x.shape)}"
        )
    if scale is not None:
        wanted = -(-rows // block), -(-columns // block)
        if tuple(scale.shape) != wanted or scale.device.type != "cpu":
            raise ValueError(
                f"wanted scales {list(wanted)} on the CPU for a weight {list(weight.shape)} in "
                f"blocks of {block}, got {list(scale.shape)} on {scale.device}"
            )


def _empty(x: torch.Tensor, weight: torch.Tensor, wide: bool) -> torch.Tensor:
    dtype = torch.float32 if wide else x.dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? plus, int block, bool wide) -> Tensor"
)
_LIBRARY.impl("linear", _linear, "CPU")


@torch.library.register_fake(f"{_NAMESPACE}::linear", lib=_LIBRARY)
def _(x: torch.Tensor, weight: torch.Tensor, scale: Any, plus: Any, block: int, wide: bool) -> Any:
    return _empty(x, weight, wide)


def covers(scale: torch.Tensor, block: int) -> bool:
    """Whether C knows FP8 with such scales."""
    plain = scale.dtype is torch.float8_e8m0fnu and scale.is_contiguous()
    return plain and block % 64 == 0


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
    *,
    block: int = 0,
    wide: bool = False,
) -> torch.Tensor:
    """Multiply rows by a weight; no gradients.

    Args:
        x: [..., G * K] float32 or bfloat16.
        weight: [G * O, K] contiguous: float32, bfloat16, or float8_e4m3fn with scales.
        scale: [ceil(G * O / block), ceil(K / block)] float8_e8m0fnu, contiguous.
        plus: [..., G * O] or [G * O], added before the one rounding.
        block: edge of the squares that have one scale each, a multiple of 64.
        wide: give float32, else x's dtype.

    Returns:
        [..., G * O].
    """
    op = torch.ops.dsv4_cpu.linear.default
    return op(x, weight, scale, plus, block, wide)
