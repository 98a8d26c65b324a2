# SPDX-License-Identifier: Apache-2.0
"""The adapter of routed experts, on all of them or on those that an adapter names.

An adapter on n chosen experts has banks [n, ...]; rows of the other experts pass it by.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from modeling_dsv4 import ops

from .hot_experts import HotExperts
from .layers import Bank, Banks, LoraExperts, reset_pair


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
        # Before the modules: making banks asks for both.
        self.path: str = kwargs.get("target_name", "")
        self.hot: dict[str, list[int]] = {}
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

    def _low_ranks(
        self,
        x: torch.Tensor,
        counts: list[int],
        active: list[str],
        a: Banks,
        b: Banks,
    ) -> torch.Tensor:
        if not any(name in self.hot for name in active):
            return super()._low_ranks(x, counts, active, a, b)
        parts = []
        for name in active:
            if name not in self.hot:
                parts.append(super()._low_ranks(x, counts, [name], a, b))
                continue
            rows, some = rows_of(counts, self.hot[name], x.device)
            if len(rows):
                low = super()._low_ranks(x[rows], some, [name], a, b)
            else:
                # No rows, but of this graph: the backward's collectives want every process.
                low = F.linear(F.linear(x[:0].float(), a[name].weight[0]), b[name].weight[0])
            parts.append(low.new_zeros(len(x), low.shape[1]).index_copy(0, rows, low))
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def _add(self, name: str, sign: int, safe: bool) -> None:
        if name not in self.hot:
            super()._add(name, sign, safe)
            return
        scale = sign * self.scaling[name]
        for weight, (a, b) in zip(self.base_weights(), self._bank_pairs(), strict=True):
            pairs = zip(self.hot[name], a[name].weight, b[name].weight, strict=True)
            for expert, down, up in pairs:
                matrix = weight.data[expert]
                merged = ops.fp32(matrix) + scale * (up @ down).to(matrix.device)
                if safe and not bool(merged.isfinite().all()):
                    raise ValueError(f"adapter {name!r}: wanted finite merged weights, got NaN")
                matrix.copy_(merged)


def rows_of(
    counts: list[int], experts: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, list[int]]:
    """Where the rows of some experts stand among rows sorted by expert, and how many each has.

    Args:
        counts: rows of every expert.
        experts: ascending.
        device: of the first result.

    Returns:
        places [M'] int64, ascending, and counts of the given experts.
    """
    ends = list(accumulate(counts))
    some = [counts[e] for e in experts]
    spans = [torch.arange(ends[e] - counts[e], ends[e]) for e in experts if counts[e]]
    rows = torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)
    return rows.to(device), some
