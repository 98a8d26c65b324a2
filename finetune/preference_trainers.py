# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, fed with rows that are encoded already; ORPO, which is short enough to write.

Needs `trl`; `preference.py` says so where it is missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerControl, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .config import RunConfig
from .data import IGNORED, pad_token
from .prepare import Prepared
from .ranks import deal, gather, sum_ranks
from .trainer import RunTrainer


@contextmanager
def apart(accelerator: Accelerator) -> Iterator[None]:
    """Inside the block what TRL gathers from all processes is what this one has."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda value, *args, **kwargs: value)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


class PreferenceRun(RunTrainer):
    """A held-out loss that no number of processes changes.

    The batches are those of one process, each in one process alone: a loader would fill up with
    rows that count twice, and kto's divergence would be a mean over other rows.
    """

    # What TRL's trainers measure beside the loss, by mode.
    _metrics: dict[str, dict[str, list[float]]]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss of the held-out rows."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad(), apart(self.accelerator):
            for start in deal(range(0, len(rows), size)):
                some = [rows[i] for i in range(start, min(start + size, len(rows)))]
                batch = self._prepare_inputs(self.data_collator(some))
                total += float(self.compute_loss(self.model, batch)) * len(some)
                count += len(some)
        total, count = sum_ranks(torch.tensor([total, count], dtype=torch.float64)).tolist()
        self._share_metrics()
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        # TRL's log tells training from evaluation by the model's mode.
        self.log(dict(metrics))
        self.model.train(training)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _share_metrics(self) -> None:
        """Put what every process measured of its batches together."""
        if not hasattr(self, "_metrics"):
            return
        own = self._metrics["eval"]
        found = gather({key: list(values) for key, values in own.items()})
        own.clear()
        for measured in found:
            for key, values in measured.items():
                own[key] += values


class DpoRun(PreferenceRun, DPOTrainer):
    """DPO (arXiv 2305.18290); the reference is the base model, with the adapters off."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class KtoRun(PreferenceRun, KTOTrainer):
    """KTO (arXiv 2402.01306); likewise."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class OrpoRun(PreferenceRun):
    """ORPO (arXiv 2403.07691, eq. 6): the loss on what is wanted, and an odds ratio.

    Attributes:
        beta: weight of the odds ratio, the paper's lambda.
    """

    beta = 0.1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Rows of `inputs` [2 B, S]: the wanted answers, then the others in the same order."""
        inputs = dict(inputs)
        counts = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(counts == 0, IGNORED)[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = orpo_loss(logits, labels, self.beta)
        return (loss, {"loss": loss}) if return_outputs else loss


def orpo_loss(logits: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean over pairs of `nll(wanted) - beta log sigmoid(log odds ratio)`.

    Args:
        logits: [2 B, S, V], float32.
        labels: [2 B, S], already shifted; -100 does not count.
        beta: weight of the odds ratio.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    mean = -losses.sum(-1) / (labels != IGNORED).sum(-1)
    wanted, other = mean.chunk(2)
    # log(p / (1 - p)) of each, p the geometric mean over tokens.
    odds = (wanted - other) - (log1mexp(wanted) - log1mexp(other))
    return (-wanted - beta * F.logsigmoid(odds)).mean()


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of negative x, without cancellation at either end."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def build(config: RunConfig, settings: dict[str, Any], data: Prepared, **parts: Any) -> RunTrainer:
    """The trainer of a run's objective, of parts as in `grpo_trainer.build`."""
    del settings["label_names"]
    parts |= {
        "train_dataset": _columns(data.train),
        "eval_dataset": None if data.held_out is None else _columns(data.held_out),
    }
    trainer: RunTrainer
    if config.objective == "orpo":
        pad = pad_token(parts.pop("processing_class"))
        # Collated batches have no "labels", and the loss is the objective's own.
        trainer = OrpoRun(
            args=TrainingArguments(**settings),
            data_collator=DataCollatorForPreference(pad_token_id=pad),
            **parts,
        )
        trainer.loss_is_scaled_for_ga = False
        trainer.beta = config.strength
    else:
        kind, of = {"dpo": (DpoRun, DPOConfig), "kto": (KtoRun, KTOConfig)}[config.objective]
        checkpointing = settings["activation_checkpointing"]
        args = of(
            **settings,
            beta=config.strength,
            max_length=config.max_length,
            gradient_checkpointing=checkpointing,
            bf16=False,
        )
        trainer = kind(args=args, **parts)
        # A copy of adapters that do nothing yet: the base with none is the same, and is there.
        trainer.model.delete_adapter("ref")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _columns(rows: Any) -> Dataset:
    return Dataset.from_list([rows[i] for i in range(len(rows))])
