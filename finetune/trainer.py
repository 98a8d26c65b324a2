# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on our data: what differs from it, and nothing else.

The run around it, from files to files, is `running.train`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
)

from .arguments import training_arguments
from .config import RunConfig
from .data import PackingCollator, PaddingCollator, pad_token
from .losses import held_out_loss, sum_loss
from .prepare import Prepared, prepare_data

__all__ = [
    "AdapterTrainer",
    "Prepared",
    "held_out_loss",
    "make_trainer",
    "prepare_data",
    "save_adapter",
    "sum_loss",
    "training_arguments",
]


class AdapterTrainer(Trainer):
    """transformers' Trainer with a held-out loss that counts tokens, not rows or batches."""

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per held-out label token, and its exponential."""
        batches = self.get_eval_dataloader(eval_dataset)
        totals = torch.tensor(sum_loss(self.model, batches), dtype=torch.float64)
        total, tokens = self.accelerator.reduce(totals.to(self.args.device), "sum").tolist()
        loss = total / max(tokens, 1)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
        }
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter alone: transformers would pickle the arguments beside it."""
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir, state_dict)


def save_adapter(model: PeftModel, directory: str | Path, state_dict: dict | None = None) -> None:
    """Save adapters in PEFT's layout, without asking the Hub whether the vocabulary has grown."""
    model.save_pretrained(str(directory), state_dict=state_dict, save_embedding_layers=False)


def make_trainer(
    model: nn.Module,
    config: RunConfig,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
) -> AdapterTrainer:
    """transformers' Trainer, silent and offline, with a run's settings."""
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(config, evaluates=data.held_out is not None),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=(
            PackingCollator() if config.packing else PaddingCollator(pad_token(tokenizer))
        ),
        callbacks=list(callbacks),
    )
    # It prints to standard output, which belongs to the caller.
    trainer.remove_callback(PrinterCallback)
    return trainer


def __getattr__(name: str) -> Any:
    """Find `train` and `TrainResult` here too: `running`, their home, imports this module."""
    if name in ("train", "TrainResult"):
        from . import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
