# SPDX-License-Identifier: Apache-2.0
"""Adapter layers for the module kinds that PEFT does not know, or adds up with a loss.

| base | weight | adapter |
|---|---|---|
| grouped linear (`o_a_proj`) | [G * O, in] | A [G, r, in], B [G, O, r]: one low rank per group |
| routed experts | gate_up [E, 2F, D], down [E, D, F] | A and B per expert: `expert_lora.py` |
| linear, plain or packed | [out, in], or bytes and scales | as PEFT has it: `linear_lora.py` |

All stand *beside* the frozen weight, in float32: `beside.py` says why.
"""

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from modeling_dsv4.moe import ExpertsBase
from modeling_dsv4.storage import GroupedLinear

from .beside import Bank, Banks, BesideLora, plain_weight, reset_pair
from .expert_lora import LoraExperts
from .linear_lora import LoraLinear, LoraPackedLinear, add_rows, is_packed_linear

__all__ = [
    "LAYER_KINDS",
    "Bank",
    "Banks",
    "BesideLora",
    "LoraExperts",
    "LoraGroupedLinear",
    "LoraLinear",
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
        # Asked before the base: it may take merged deltas out of it.
        acting = self._who_acts(x, adapter_names)
        total: torch.Tensor | None = None
        for name, rows in acting.items():
            a, b = self.lora_A[name], self.lora_B[name]
            mine = x if rows is None else x[rows]
            delta = b(a(self.lora_dropout[name](mine.to(a.weight.dtype))) * self.scaling[name])
            total = add_rows(total, delta, rows, x)
        return self.base_layer(x) if total is None else self.base_layer(x, total)


LAYER_KINDS: tuple[tuple[type[nn.Module], type[BesideLora]], ...] = (
    (GroupedLinear, LoraGroupedLinear),
    (ExpertsBase, LoraExperts),
)
