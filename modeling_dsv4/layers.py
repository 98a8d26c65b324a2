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


class Float32Head(nn.Linear):
    """`lm_head`: input and weight in float32, whatever the model's dtype; logits are float32."""

    kernels = "auto"  # of a loss over the logits, see kernel_choice.py

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return F.linear(x.to(self.weight.dtype), self.weight)
        x = ops.fp32(x)
        # In blocks of rows: a float32 copy of the whole head would take 2 GB at 129,280 x 4,096.
        return torch.cat([F.linear(x, rows.float()) for rows in self.weight.split(16384)], dim=-1)
