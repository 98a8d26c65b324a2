# SPDX-License-Identifier: Apache-2.0
"""Linear maps as pure functions: the references, and the choice of their twin in C.

A decoding step multiplies one row, or the few of a draft, by every dense weight: it takes as long
as these are read. torch reads them with one core, and copies what it has to widen.
"""

import torch
import torch.nn.functional as F

from .kernel_choice import use_cpu_linear
from .ops import fp32
from .tiled_products import linear_plus

# A float32 copy of the whole head would take 2 GB at 129,280 x 4,096.
_ROWS = 16384


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
    kernels: str = "torch",
) -> torch.Tensor:
    """`x W^T + bias`, or `+ plus` [..., out] in place of a bias: [..., in] -> [..., out]."""
    added = bias if plus is None else plus
    if x.dtype is weight.dtype and use_cpu_linear(kernels, x, weight, added):
        from .cpu import linear as in_c

        return in_c.linear(x, weight, plus=added)
    return F.linear(x, weight, bias) if plus is None else linear_plus(x, weight, plus)


def float32_linear(x: torch.Tensor, weight: torch.Tensor, kernels: str = "torch") -> torch.Tensor:
    """`x W^T` in float32, whatever the dtypes (float64 stays one): [..., in] -> [..., out]."""
    if use_cpu_linear(kernels, x, weight):
        from .cpu import linear as in_c

        return in_c.linear(x, weight, wide=True)
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x.to(weight.dtype), weight)
    x = fp32(x)
    parts = [F.linear(x, rows.to(x.dtype)) for rows in weight.split(_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
    plus: torch.Tensor | None = None,
    kernels: str = "torch",
) -> torch.Tensor:
    """One map a group, weight [G * O, in]: [..., G, in] -> [..., G, O]; `plus` [..., G, O]."""
    if x.dtype is weight.dtype and use_cpu_linear(kernels, x, weight, plus, groups=groups):
        from .cpu import linear as in_c

        flat = None if plus is None else plus.flatten(-2)
        return in_c.linear(x.flatten(-2), weight, plus=flat).unflatten(-1, (groups, -1))
    weight = weight.unflatten(0, (groups, -1))
    if plus is None:
        return torch.einsum("...gi,goi->...go", x, weight)
    rows, base = (t.movedim(-2, 0).flatten(1, -2) for t in (x, plus.to(x.dtype)))
    y = torch.baddbmm(base, rows, weight.mT)  # [G, n, O]
    return y.unflatten(1, x.shape[:-2]).movedim(0, -2)
