# SPDX-License-Identifier: Apache-2.0
"""Small shared layers: RMSNorm with the release's rounding, linear maps."""

import torch
from torch import nn

from . import linear_ops, ops


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


class Dsv4Linear(nn.Linear):
    """torch's linear map; C computes it for few rows of a CPU, see `linear_ops.py`.

    `from_pretrained` makes it of every `nn.Linear` once all is loaded. Whoever then looks for
    `nn.Linear` by its exact type (`torch.ao.quantization.quantize_dynamic`) finds none.
    """

    kernels = "auto"  # see kernel_choice.py

    def forward(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in] -> [..., out]; `plus` [..., out] is added before the one rounding."""
        return linear_ops.linear(x, self.weight, self.bias, plus, self.kernels)


# Linear maps whose weight is plain numbers, and nothing else.
PLAIN_LINEAR = (nn.Linear, Dsv4Linear)


class Float32Linear(nn.Linear):
    """[..., in] -> [..., out] computed and returned in float32, whatever the dtypes given."""

    kernels = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_ops.float32_linear(x, self.weight, self.kernels)


class Float32Head(nn.Linear):
    """`lm_head`: input and weight in float32, whatever the model's dtype; logits are float32."""

    kernels = "auto"  # also of a loss over the logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_ops.float32_linear(x, self.weight, self.kernels)
