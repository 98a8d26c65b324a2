# SPDX-License-Identifier: Apache-2.0
"""Small shared layers: RMSNorm with the release's rounding, a linear map in float32."""

import torch
import torch.nn.functional as F
from torch import nn

from . import ops


class RMSNorm(nn.Module):
    """`w * x / rms(x)` over the last axis, float32 inside, rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.kernels = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.kernels)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Float32Linear(nn.Linear):
    """[..., in] -> [..., out] computed and returned in float32, whatever the dtypes given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(ops.fp32(x), ops.fp32(self.weight))
