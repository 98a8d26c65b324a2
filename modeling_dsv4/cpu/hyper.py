# SPDX-License-Identifier: Apache-2.0
"""mHC sites in C (`hyper.c`): twins of `hyper_ops.open_site` and `hyper_ops.expand`.

They are operators of torch, so that compilers and dispatch modes see one operation each.
"""

import ctypes
from typing import Any

import torch

from .build import library

_NAMESPACE = "dsv4_cpu"
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _function(name: str, *kinds: Any) -> Any:
    lib = library()
    assert lib is not None, "ask `kernel_choice.use_cpu` first"
    function = getattr(lib, name)
    function.argtypes, function.restype = list(kinds), None
    return function


def _open_site(
    streams: torch.Tensor,
    handed: torch.Tensor | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[torch.Tensor, ...]:
    streams, fn, base, scale = (x.contiguous() for x in (streams, fn, base, scale))
    handed = None if handed is None else handed.contiguous()
    n, d = streams.shape[-2:]
    out = _empty(streams, fn)
    scratch = fn.new_empty((n + 1) * d)
    given = (streams, handed, fn, base, scale, scratch, *out)
    run = _function("dsv4_open_site", *[_POINTER] * 10, *[_INT] * 5, *[_FLOAT] * 2)
    sizes = (out[0].numel() // d, n, d, iters, streams.dtype is torch.bfloat16)
    run(*(None if x is None else x.data_ptr() for x in given), *sizes, eps, rms_eps)
    return out


def _empty(streams: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *lead, n, d = streams.shape
    shapes = ((*lead, n), (*lead, n), (*lead, n, n))
    return streams.new_empty((*lead, d)), *(fn.new_empty(shape) for shape in shapes)


def _expand(
    u: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    u, streams, post, comb = (x.contiguous() for x in (u, streams, post, comb))
    n, d = streams.shape[-2:]
    out, scratch = torch.empty_like(streams), post.new_empty(2 * d)
    run = _function("dsv4_expand", *[_POINTER] * 6, *[_INT] * 4)
    pointers = (x.data_ptr() for x in (u, streams, post, comb, scratch, out))
    run(*pointers, u.numel() // d, n, d, streams.dtype is torch.bfloat16)
    return out


_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_LIBRARY.define(
    "open_site(Tensor streams, Tensor? handed, Tensor fn, Tensor base, Tensor scale, int iters, "
    "float eps, float rms_eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("expand(Tensor u, Tensor streams, Tensor post, Tensor comb) -> Tensor")
_LIBRARY.impl("open_site", _open_site, "CPU")
_LIBRARY.impl("expand", _expand, "CPU")


@torch.library.register_fake(f"{_NAMESPACE}::open_site", lib=_LIBRARY)
def _(streams: torch.Tensor, handed: Any, fn: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return _empty(streams, fn)


@torch.library.register_fake(f"{_NAMESPACE}::expand", lib=_LIBRARY)
def _(u: torch.Tensor, streams: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(streams, memory_format=torch.contiguous_format)


def open_site(
    streams: torch.Tensor,
    handed: torch.Tensor | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[torch.Tensor, ...]:
    """As `hyper_ops.open_site`; streams [..., N, D] float32 or bfloat16; no gradients."""
    op = torch.ops.dsv4_cpu.open_site.default
    return *op(streams, handed, fn, base, scale, iters, eps, rms_eps), streams


def expand(
    u: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """As `hyper_ops.expand`; u and streams of one dtype, float32 or bfloat16; no gradients."""
    op = torch.ops.dsv4_cpu.expand.default
    return op(u, streams, post, comb)
