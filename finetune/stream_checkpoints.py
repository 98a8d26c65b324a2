# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps of the layers' inputs, and what it computes again instead.

The residual is N streams, so that one layer's input is N times that of other models: 1.4 MB a
token over V4-Flash in bfloat16. It lies in host memory. Over the budget, only every k-th layer's
input is kept; the backward pass runs each group of k layers once more to have those between.

| kept | of which layers |
|---|---|
| streams [N, D] that enter a layer | every k-th; inside the group gone through, all |
| what the routed experts read [D], so that their backward pass comes first | the group's |

A group that is computed again reads the experts of all its layers but the last once more; the last
group still is in memory when the backward pass begins.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from quantize.sizes import format_size


@dataclass(frozen=True)
class CheckpointPlan:
    """Which inputs are kept.

    Attributes:
        layers: of the model.
        group: layers from one kept input to the next; 1 keeps all.
        nbytes: host memory that this takes at most.
    """

    layers: int
    group: int
    nbytes: int

    @property
    def extra_layer_reads(self) -> int:
        """Layers whose experts are read a third time in a step."""
        return (len(self.starts()) - 1) * (self.group - 1)

    def starts(self) -> list[int]:
        """First layers of the groups."""
        return list(range(0, self.layers, self.group))

    def group_of(self, start: int) -> range:
        """Layers of the group that begins at `start`."""
        return range(start, min(start + self.group, self.layers))


def plan_checkpoints(
    layers: int, stream_bytes: int, input_bytes: int, budget: int | None
) -> CheckpointPlan:
    """The smallest group of layers whose checkpoints fit.

    Args:
        layers: of the model.
        stream_bytes: of all tokens' streams at one layer.
        input_bytes: of what all tokens bring to one layer's experts.
        budget: bytes of host memory; None keeps everything.

    Raises:
        ValueError: even the best group does not fit.
    """

    def nbytes(group: int) -> int:
        plan = CheckpointPlan(layers, group, 0)
        # While a group is gone through, the inputs of those before it are kept as well.
        return (
            max(
                before * stream_bytes + len(plan.group_of(start)) * (stream_bytes + input_bytes)
                for before, start in enumerate(plan.starts())
            )
            if group > 1
            else layers * (stream_bytes + input_bytes)
        )

    plans = [CheckpointPlan(layers, k, nbytes(k)) for k in range(1, layers + 1)]
    for plan in plans:
        if budget is None or plan.nbytes <= budget:
            return plan
    least = min(plans, key=lambda plan: plan.nbytes)
    assert budget is not None
    raise ValueError(
        f"checkpoint_memory: wanted at least {format_size(least.nbytes)} for the streams of these "
        f"tokens (groups of {least.group} layers), got {format_size(budget)}; allow more, or use "
        "fewer tokens per step"
    )


class StreamCheckpoints:
    """Tensors put aside on the host, each taken out once or looked at.

    Args:
        dtype: that wider floats are kept in; None keeps them as they are. What is kept is what the
            pass goes on with, so that the backward pass sees the same numbers.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.nbytes = self.peak = 0
        self._kept: dict[Hashable, tuple[torch.Tensor, torch.dtype, torch.device]] = {}

    def put(self, key: Hashable, x: torch.Tensor) -> None:
        """Keep a tensor until it is dropped."""
        kept = x.detach()
        if self.dtype is not None and x.is_floating_point():
            kept = kept.to(self.dtype)
        if x.device.type == "cuda":
            host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            kept = host.copy_(kept, non_blocking=True)
        self.nbytes += kept.nbytes
        self.peak = max(self.peak, self.nbytes)
        self._kept[key] = kept, x.dtype, x.device

    def get(self, key: Hashable) -> torch.Tensor:
        """What was kept, in the dtype and on the device that it came in."""
        kept, dtype, device = self._kept[key]
        return kept.to(device, non_blocking=True).to(dtype)

    def drop(self, key: Hashable) -> None:
        """Forget it, if it is there."""
        if key in self._kept:
            self.nbytes -= self._kept.pop(key)[0].nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept
