# SPDX-License-Identifier: Apache-2.0
"""One batch, learned by heart, before hours are spent: what cannot do that will not learn at all.

The adapters, every random generator and the gradients are afterwards what they were before, to
the bit, so that a run is the same with the gate and without it.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .data import IGNORED
from .state_files import random_state, restore_random_state
from .trainer import RunTrainer

STEPS = 20
# The loss must fall below this share of what it was.
SHARE = 0.9
# Small rates move a fresh adapter too little within the gate's few steps to tell anything.
LEAST_RATE = 2e-3
# A loss whose ups and downs add up to this share of its first value does more than tremble.
_JUMPS = 0.05
# Below it a batch counts as known already.
_KNOWN = 0.05


@dataclass(frozen=True)
class GateResult:
    """Loss of one batch while it was learned: at the first step, and after the last."""

    first: float
    last: float
    steps: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put what trains, its gradients, the mode and the generators back at the end."""
    trained = [p for p in model.parameters() if p.requires_grad]
    values = [p.detach().to("cpu", copy=True) for p in trained]
    training, dice = model.training, random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        model.train(training)
        restore_random_state(dice)


def run_gate(
    trainer: RunTrainer,
    batch: dict[str, Any],
    learning_rate: float,
    *,
    steps: int = STEPS,
    share: float = SHARE,
) -> GateResult:
    """Train on one batch over and over, then undo it.

    Args:
        trainer: with the model and the loss of the run.
        batch: as the collator gives it.
        learning_rate: of the run; the gate's is at least `LEAST_RATE`.
        steps: optimizer steps.
        share: of its first value that the loss must fall below.

    Raises:
        ValueError: it did not; says what is likely wrong.
    """
    model = trainer.model
    labels = int((batch["labels"] != IGNORED).sum()) if "labels" in batch else None
    losses, norms = [], []
    with unchanged(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=max(learning_rate, LEAST_RATE), weight_decay=0.0)
        for _ in range(steps + 1):
            optimizer.zero_grad()
            losses.append(trainer.learn_alone(batch))
            grads = [p.grad for p in trained if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)
            optimizer.step()
    result = GateResult(losses[0], losses[-1], steps)
    if not passes(result, share):
        raise ValueError(
            f"overfit gate: {steps} steps on one batch brought its loss from {result.first:.4f} to "
            f"{result.last:.4f}, wanted below {share:g} of it; {diagnose(losses, norms, labels)} "
            "(overfit_gate: off trains all the same)"
        )
    return result


def passes(result: GateResult, share: float) -> bool:
    """Whether the batch was learned; one that was known from the start counts."""
    if not math.isfinite(result.last):
        return False
    return result.last < share * result.first or max(result.first, result.last) < _KNOWN


def diagnose(losses: list[float], norms: list[float], labels: int | None) -> str:
    """Say what is likely wrong with a batch that was not learned.

    Args:
        losses: one per step.
        norms: of the gradients, likewise.
        labels: tokens of the batch that the loss counts, where that is known.
    """
    if labels == 0:
        return "no token of the batch counts for the loss: look at the data with `check`"
    if not math.isfinite(losses[0]):
        return "the loss is not finite from the start: the base model's weights or dtype are broken"
    if not all(map(math.isfinite, losses)):
        return "the loss became infinite on the way: learning_rate is much too high"
    if max(norms) == 0:
        return "no gradient reaches the adapters: the preset's modules take no part in the loss"
    # By small steps one batch falls all along; one that is jumped over goes up and down.
    path = sum(abs(b - a) for a, b in itertools.pairwise(losses))
    if path > _JUMPS * losses[0] and path > 2 * abs(losses[-1] - losses[0]):
        return "the loss jumps: learning_rate is too high, see `lr-find`"
    return "the loss barely moved: learning_rate or rank does not fit, see `lr-find`"
