# SPDX-License-Identifier: Apache-2.0
"""Adapter layers for the module kinds that PEFT does not know.

| base | weight | adapter |
|---|---|---|
| grouped linear (`o_a_proj`) | [G * O, in] | A [G, r, in], B [G, O, r]: one low rank per group |
| routed experts | gate_up [E, 2F, D], down [E, D, F] | A and B per expert: `expert_lora.py` |
| linear with packed weights | bytes and scales | A [r, in], B [out, r], as PEFT has it |

All stand *beside* the frozen weight, in float32: `beside.py` says why.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from modeling_dsv4 import ops
from modeling_dsv4.moe import ExpertsBase
from modeling_dsv4.storage import GroupedLinear

from .beside import PLAIN, Bank, Banks, BesideLora, plain_weight, reset_pair
from .expert_lora import LoraExperts

__all__ = [
    "LAYER_KINDS",
    "Bank",
    "Banks",
    "BesideLora",
    "LoraExperts",
    "LoraGroupedLinear",
    "LoraPackedLinear",
    "is_packed_linear",
    "plain_weight",
    "reset_pair",
]


class LoraGroupedLinear(BesideLora):
    """A grouped linear layer with one low rank per group: x [..., G, in] -> [..., G, O]."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        groups = base.groups
        p = config.lora_dropout
        self.lora_dropout[name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_A[name] = Bank(groups, r, base.in_features)
        self.lora_B[name] = Bank(groups, base.out_features // groups, r)
        reset_pair(self.lora_A[name], self.lora_B[name], config.init_lora_weights)

    def base_weights(self) -> list[nn.Parameter]:
        return [plain_weight(self.get_base_layer(), "weight")]

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """[..., G, in] -> [..., G, O]; `adapter_names` gives each row of a batch its adapter."""
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
        # Asked first: it may take merged deltas out of the base.
        acting = self._who_acts(x, adapter_names)
        result = self.base_layer(x)
        total = ops.fp32(result)
        for name, rows in acting.items():
            a, b = self.lora_A[name], self.lora_B[name]
            mine = x if rows is None else x[rows]
            low = a(self.lora_dropout[name](mine.to(a.weight.dtype)))
            delta = b(low) * self.scaling[name]
            total = total + delta if rows is None else total.index_put((rows,), delta, True)
        # Rounded once, however many adapters there are.
        return total.to(result.dtype)


class LoraPackedLinear(PeftLinear):
    """PEFT's linear adapter beside a weight that is stored in bytes: float32, never merged."""

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype]:
        # PEFT would make the adapter float8, since it follows the weight's dtype.
        tensor = next(base_layer.parameters(), next(base_layer.buffers(), None))
        return None if tensor is None else tensor.device, torch.float32

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        plain_weight(self.get_base_layer(), "weight")


def is_packed_linear(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in another form than plain numbers."""
    if not isinstance(module, nn.Linear):
        return False
    weight = getattr(module, "weight", None)
    return not isinstance(weight, torch.Tensor) or weight.dtype not in PLAIN


LAYER_KINDS: tuple[tuple[type[nn.Module], type[BesideLora]], ...] = (
    (GroupedLinear, LoraGroupedLinear),
    (ExpertsBase, LoraExperts),
)
