# SPDX-License-Identifier: Apache-2.0
"""The adapter of routed experts, on all of them or on those that an adapter names.

An adapter on n chosen experts has banks [n, ...]; rows of the other experts pass it by.
"""

from typing import Any

from peft import LoraConfig
from torch import nn

from .hot_experts import HotExperts
from .layers import Bank, LoraExperts, reset_pair


class LoraSomeExperts(LoraExperts):
    """`LoraExperts` whose adapters may each stand beside experts of their own choice."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        # Before the modules: making banks asks for it.
        self.path: str = kwargs.get("target_name", "")
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        hot = HotExperts.of(config)
        self.hot.pop(name, None)
        if hot is None:
            super()._make_banks(name, r, config)
            return
        base = self.get_base_layer()
        if hot.num_experts != base.num_experts:
            raise ValueError(
                f"hot experts: wanted a choice among {base.num_experts} experts, got one among "
                f"{hot.num_experts}; the adapter was made for another model"
            )
        self.hot[name] = hot.ids_of(self.path)
        n, d, f = len(self.hot[name]), base.hidden_size, base.intermediate_size
        self.lora_dropout[name] = nn.Identity()
        self.lora_A[name], self.lora_B[name] = Bank(n, r, d), Bank(n, 2 * f, r)
        self.lora_down_A[name], self.lora_down_B[name] = Bank(n, r, f), Bank(n, d, r)
        for a, b in self._bank_pairs():
            reset_pair(a[name], b[name], config.init_lora_weights)
