# SPDX-License-Identifier: Apache-2.0
"""How transformers' Trainer comes to train a layer at a time.

Its loop hands micro-batches over one by one, and takes the optimizer's step behind the last of an
accumulation. Here they are gathered, and the last brings the gradients and the loss of them all.
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from quantize.memory import available_memory
from quantize.sizes import parse_size

from .config import RunConfig
from .layer_major import LayerMajor

# Of the memory that is free when training begins, what streams may take unless told otherwise.
_DEFAULT_SHARE = 0.5


class LayerMajorSteps(Trainer):
    """A Trainer whose steps are taken by a schedule, if it has one.

    Attributes:
        layer_major: the schedule; None leaves the steps as they are.
    """

    layer_major: LayerMajor | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Gather a micro-batch; with the last one of the accumulation, run them all.

        Returns:
            the loss of the whole accumulation with its last micro-batch, 0 before.
        """
        if self.layer_major is None:
            return super().training_step(model, inputs, num_items_in_batch)
        gathered = self.__dict__.setdefault("_gathered", [])
        gathered.append(self._prepare_inputs(inputs))
        if len(gathered) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        batches = gathered.copy()
        gathered.clear()
        model.train()
        return self.layer_major.step(batches, num_items_in_batch).to(self.args.device)


def make_schedule(model: nn.Module, config: RunConfig, processes: int = 1) -> LayerMajor | None:
    """The schedule that a run asks for, None for the ordinary order.

    Raises:
        NotImplementedError: several processes.
    """
    if config.layer_schedule == "ordinary":
        return None
    if processes > 1:
        raise NotImplementedError(
            f"layer_schedule layer-major: wanted one process, got {processes}; gradients of "
            "several are not added up yet, use layer_schedule ordinary"
        )
    if config.checkpoint_memory is None:
        return LayerMajor(model, int(_DEFAULT_SHARE * available_memory()))
    return LayerMajor(model, parse_size(config.checkpoint_memory))
