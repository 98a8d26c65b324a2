# SPDX-License-Identifier: Apache-2.0
"""Which twin computes: the torch references and their twins, Triton's kernels, or C.

The choice is an argument that every dispatching function takes (`kernels=`); modules keep it as
their attribute `kernels`, which `model.set_kernels` writes. Nothing here imports triton.
"""

import math
import os
import sys
from importlib.util import find_spec

import torch
from torch import nn

MODES = ("auto", "torch", "triton")
# With more tokens than this, torch's operations spread over all cores.
_FEW_TOKENS = 16
# Linear maps in C are the faster ones from so many bytes of a weight on, and up to so many rows:
# torch has a product of its own for bfloat16, and none at all for E4M3.
_LEAST_BYTES = {torch.float32: 1 << 21, torch.bfloat16: 1 << 17, torch.float8_e4m3fn: 1 << 16}
_FEW_ROWS = {torch.float32: 8, torch.bfloat16: 4}
_FEW_WIDENED = 16
_PLAIN = (torch.Tensor, nn.Parameter)


def use_triton(mode: str, x: torch.Tensor) -> bool:
    """Whether a Triton kernel computes on `x`.

    Args:
        mode: "auto" takes Triton where `x` is on a GPU and both triton and the kernels are
            there; "torch" never; "triton" always.
        x: the tensor that decides.

    Raises:
        ValueError: an unknown mode, or "triton" where it cannot run. On a CPU it runs in Triton's
            interpreter alone, which the environment variable TRITON_INTERPRET=1 switches on.
    """
    check_mode(mode)
    if mode == "torch" or (mode == "auto" and not x.is_cuda):
        return False
    there = _importable("triton") and _importable(f"{__package__}.kernels")
    if mode == "auto":
        return there and x.dtype is not torch.float64
    if not there:
        raise ValueError(
            "kernels: wanted 'triton', but it cannot be imported here; install dsv4[kernels], or "
            "call set_kernels('auto')"
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels: wanted 'triton' for a tensor on {x.device}, which has no Triton kernels; "
            "move the model to a GPU, or call set_kernels('auto')"
        )
    return True


def use_cpu(mode: str, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether C computes on `x` [..., N, D] and others: "auto", few tokens, no gradients, a CPU.

    Only where a C compiler is there, see `cpu/build.py`; the numbers agree to rounding.
    """
    if mode != "auto" or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.shape[:-2].numel() > _FEW_TOKENS:
        return False
    return not _learns(x, *others) and _cpu_library()


def use_cpu_linear(
    mode: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    plus: torch.Tensor | None = None,
    groups: int = 1,
) -> bool:
    """Whether C multiplies x [..., in], or [..., G, in], by a weight [G * O, in].

    "auto", few rows by a weight of float32, bfloat16 or E4M3 that lies in one piece on a CPU, and
    that is large enough to be worth a call; no gradients, no autocast, no subclass of a tensor.
    """
    # Ordered so that the small weights of a small model are seen off at once.
    return (
        mode == "auto"
        and weight.numel() * weight.dtype.itemsize >= _LEAST_BYTES.get(weight.dtype, math.inf)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype in _FEW_ROWS
        and x.numel() <= x.shape[-1] * groups * _few_rows(x, weight)
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and x.shape[-1] == weight.shape[1]
        and (groups == 1 or x.shape[-2] == groups)
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not _learns(x, weight, plus)
        and not torch.is_autocast_enabled("cpu")
        and _cpu_library()
    )


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> int:
    return _FEW_ROWS[x.dtype] if x.dtype is weight.dtype else _FEW_WIDENED


def _learns(*tensors: torch.Tensor | None) -> bool:
    # Forward-mode gradients hang on no flag of the tensors.
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.compiler.assume_constant_result
def _cpu_library() -> bool:
    from .cpu.build import library

    return library() is not None


def check_mode(mode: str) -> None:
    """Refuse a name that is not one of MODES."""
    if mode not in MODES:
        raise ValueError(f"kernels: wanted one of {', '.join(MODES)}, got {mode!r}")


def set_kernels(model: nn.Module, mode: str) -> None:
    """Write the mode to every module that dispatches; nothing is saved."""
    check_mode(mode)
    if mode == "triton" and not _importable("triton"):
        raise ValueError(
            "kernels: wanted 'triton', but it is not installed; install dsv4[kernels], or call "
            "set_kernels('auto')"
        )
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.__dict__["kernels"] = mode


def _importable(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None
