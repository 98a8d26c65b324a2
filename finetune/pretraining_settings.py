# SPDX-License-Identifier: Apache-2.0
"""What a pretraining is asked for, and what it tells of each step."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import STATE_FILE
from .pretraining_groups import Rates


@dataclass(frozen=True)
class Pretraining:
    """One training run; the same values give the same losses on the same machine.

    Rates are peaks: `warmup` steps up, then a cosine down to `floor` of them. `matrix_rate` is
    Muon's, the others are Adam's (`pretraining_groups`).

    Attributes:
        seed: of the order of rows.
        rows: of a batch, of `length` tokens each; a step has `accumulation` batches.
        document_start: id that begins a document, so that rows do not look across; None: they do.
        balance_rate: of the experts' biases at the first step, falling to nothing.
        clip: largest norm of the gradient.
        sparse_from: fraction of the steps from which on queries read what the indexer chooses.
        sparse_tables: Engram's tables learn row by row.
        checkpoint_minutes: between checkpoints, where the run has an output directory.
    """

    seed: int = 1
    steps: int = 1200
    rows: int = 8
    length: int = 512
    document_start: int | None = None
    accumulation: int = 1
    sparse_tables: bool = False
    warmup: int = 40
    floor: float = 0.0
    sparse_from: float = 0.5
    clip: float = 1.0
    rate: float = 3e-3
    matrix_rate: float = 0.02
    matrix_decay: float = 0.05
    embed_rate: float = 2e-2
    head_rate: float = 3e-3
    table_rate: float = 1.5e-2
    index_rate: float = 3e-3
    balance_rate: float = 1e-2
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        for name in [key for key in vars(self) if key == "rate" or key.endswith("_rate")]:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: wanted a finite number of at least 0, got {value}")
        if not 0 <= self.sparse_from <= 1:
            raise ValueError(
                f"sparse_from: wanted a fraction of the steps, 0 to 1, got {self.sparse_from}"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.length * self.accumulation

    @property
    def tokens(self) -> int:
        """Tokens seen over the whole run."""
        return self.steps * self.step_tokens

    @property
    def rates(self) -> Rates:
        return Rates(
            self.matrix_rate,
            self.rate,
            self.embed_rate,
            self.head_rate,
            self.table_rate,
            self.index_rate,
        )


@dataclass(frozen=True)
class Step:
    """What one step reports.

    Attributes:
        number: from 1.
        loss: of the language model, nats per token.
        index_loss: of the indexer, nats per query.
        busiest: the largest load of an expert over the mean of its layer.
        seconds: see `utilization.processor_seconds`.
        grad_norm: before clipping.
        utilization: operations of the model over what the device's products reach.
    """

    number: int
    loss: float
    index_loss: float
    busiest: float
    seconds: float
    grad_norm: float = 0.0
    utilization: float = 0.0


def schedule(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the peak rate at a step: linear up, cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def steps_of(history: list[dict[str, Any]]) -> list[Step]:
    """The steps in a Trainer's history."""
    names = ("loss", "index_loss", "busiest", "seconds", "grad_norm", "utilization")
    return [
        Step(int(line["step"]), *(float(line[name]) for name in names))
        for line in history
        if "index_loss" in line
    ]


def read_steps(checkpoint: str | Path) -> list[Step]:
    """The steps behind a checkpoint."""
    state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    return steps_of(state["log_history"])
