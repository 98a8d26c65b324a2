# SPDX-License-Identifier: Apache-2.0
"""Experts kept equally busy without a loss, by the bias of their selection (V3; `noaux_tc`).

After every step the bias of an expert that got less than its share of the tokens rises by a fixed
amount, that of the others falls (arXiv 2408.15664). The bias decides who is chosen, never how much
a chosen expert counts, so nothing pulls against the language-model loss.
"""

from typing import Any

import torch
from torch import nn

from modeling_dsv4.moe import Dsv4Router

from .ranks import sum_ranks


class ExpertBalance:
    """Counts what routers choose while a model trains, and moves their biases.

    Routers that choose by token id have none and are left out.

    Attributes:
        routers: what is balanced, in the order of the model.
        counts: tokens of each expert since the last step, [E] each, as the biases' dtype.
        last: those of the last step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [m for m in model.modules() if isinstance(m, Dsv4Router) and not m.hashed]
        self.counts = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        self.last = list(self.counts)
        self._handles = [
            router.register_forward_hook(self._counter(place))
            for place, router in enumerate(self.routers)
        ]

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _counter(self, place: int) -> Any:
        def count(module: nn.Module, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                chosen = outputs[2].flatten()
                held = self.counts[place].to(chosen.device)
                self.counts[place] = held + torch.bincount(chosen, minlength=len(held))

        return count

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Move the biases by `rate`; returns the largest load of an expert over the mean load."""
        worst = 0.0
        self.last = [sum_ranks(counts) for counts in self.counts]
        self.counts = [torch.zeros_like(counts) for counts in self.counts]
        for router, counts in zip(self.routers, self.last, strict=True):
            bias = router.e_score_correction_bias
            bias += rate * torch.sign(counts.mean() - counts).to(bias.device)
            worst = max(worst, float(counts.max() / counts.mean().clamp(min=1e-9)))
        return worst
