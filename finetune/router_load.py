# SPDX-License-Identifier: Apache-2.0
"""How evenly a run's tokens are routed: a text of one kind may leave most experts without any.

Routers and their biases are frozen in fine-tuning; their load is watched, not balanced.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_dsv4.moe import Dsv4Router

from .ranks import sum_ranks


class RouterLoad(TrainerCallback):
    """Counts the tokens of every expert while a model trains.

    Routers that choose by token id are left out, and so are those of draft heads. What is computed
    again for its gradient is counted again: shares stay what they are.
    """

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.watch(kwargs["model"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.leave()

    def watch(self, model: nn.Module) -> None:
        """Begin to count."""
        self.leave()
        for name, module in model.named_modules():
            if isinstance(module, Dsv4Router) and not module.hashed and "mtp." not in name:
                counts = torch.zeros(
                    len(module.weight), dtype=torch.int64, device=module.weight.device
                )
                self._counts.append(counts)
                self._handles.append(module.register_forward_hook(_counter(counts)))

    def leave(self) -> None:
        """Stop counting, and forget."""
        for handle in self._handles:
            handle.remove()
        self._counts, self._handles = [], []

    def read(self) -> dict[str, float]:
        """Load since the last reading; nothing where no token was routed.

        `idle_experts`: share of experts without a token. `busiest_expert`: its tokens as a multiple
        of the mean in its layer.
        """
        counts = sum_ranks(torch.stack(self._counts)).double() if self._counts else torch.zeros(0)
        for held in self._counts:
            held.zero_()
        if not counts.sum():
            return {}
        peak = (counts.amax(-1) / counts.mean(-1).clamp(min=1e-9)).max()
        return {
            "idle_experts": round(float((counts == 0).double().mean()), 4),
            "busiest_expert": round(float(peak), 2),
        }


def _counter(counts: torch.Tensor) -> Any:
    def count(module: nn.Module, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            chosen = outputs[2].flatten()
            counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    return count
