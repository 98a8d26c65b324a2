# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, fed with rows that are encoded already; ORPO, which is short enough to write.

Needs `trl`; `preference.py` says so where it is missing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .config import RunConfig
from .data import IGNORED, pad_token
from .prepare import Prepared
from .trainer import RunTrainer


class DpoRun(RunTrainer, DPOTrainer):
    """DPO (arXiv 2305.18290); the reference is the base model, with the adapters off."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class KtoRun(RunTrainer, KTOTrainer):
    """KTO (arXiv 2402.01306); likewise."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class OrpoRun(RunTrainer):
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

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


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


def build(
    model: nn.Module,
    config: RunConfig,
    settings: dict[str, Any],
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
) -> RunTrainer:
    """The trainer of a run's objective."""
    del settings["label_names"]
    rows = {
        "train_dataset": _columns(data.train),
        "eval_dataset": None if data.held_out is None else _columns(data.held_out),
        "callbacks": callbacks,
    }
    trainer: RunTrainer
    if config.objective == "orpo":
        pad = pad_token(tokenizer)
        # Collated batches have no "labels", and the loss is the objective's own.
        trainer = OrpoRun(
            model=model,
            args=TrainingArguments(**settings),
            data_collator=DataCollatorForPreference(pad_token_id=pad),
            **rows,
        )
        trainer.loss_is_scaled_for_ga = False
        trainer.can_return_loss = True
        trainer.beta = config.beta
    else:
        kind, of = {"dpo": (DpoRun, DPOConfig), "kto": (KtoRun, KTOConfig)}[config.objective]
        checkpointing = settings["activation_checkpointing"]
        args = of(
            **settings,
            beta=config.beta,
            max_length=config.max_length,
            gradient_checkpointing=checkpointing,
            bf16=False,
        )
        trainer = kind(model=model, args=args, processing_class=tokenizer, **rows)
        # A copy of adapters that do nothing yet: the base with none is the same, and is there.
        trainer.model.delete_adapter("ref")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _columns(rows: Any) -> Dataset:
    return Dataset.from_list([rows[i] for i in range(len(rows))])
