# SPDX-License-Identifier: Apache-2.0
"""What a preset means for a run: what is chosen before it, what trains, what is saved of it."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .adapters import attach_adapters
from .checkpoints import last_checkpoint
from .config import RunConfig
from .deltas import CONFIG, read_config
from .full import train_weights
from .hot_experts import (
    DEFAULT_SHARE,
    HotExperts,
    Rows,
    find_hot_experts,
    hot_table,
)
from .hot_layers import LoraSomeExperts
from .indexer_training import teach_indexer
from .loading import load_tokenizer
from .memory_training import rows_for_run
from .targets import get_preset


def prepare_model(
    base: PreTrainedModel, config: RunConfig, rows: Rows
) -> PeftModel | PreTrainedModel:
    """Let train what the preset says: a PEFT model, or for `full` the model itself.

    Args:
        base: as loaded.
        config: the run; a choice of experts that its last checkpoint holds is taken from there.
        rows: its training examples, for presets that look at them.
    """
    preset = get_preset(config.preset)
    if preset.weights:
        train_weights(base, ("indexer",) if config.train_indexer else ())
        return base
    hot = None
    if preset.hot or config.hot_share is not None:
        hot = _earlier_choice(config.output) or find_hot_experts(
            base,
            rows,
            share=DEFAULT_SHARE if config.hot_share is None else config.hot_share,
            score=config.hot_score,
            tokens=config.hot_tokens,
            seed=config.seed,
            dealt=True,
        )
    memory = None
    if config.preset == "memory":
        documents = [rows[i]["input_ids"] for i in range(len(rows))]
        options = (config.memory_background, config.memory_rows)
        memory = rows_for_run(base, load_tokenizer(config.model), documents, *options)
    return attach_adapters(
        base,
        config.preset,
        config.rank,
        config.alpha,
        expert_rank=config.expert_rank,
        dropout=config.dropout,
        experts=hot,
        train_indexer=config.train_indexer,
        memory=memory,
    )


def _earlier_choice(output: str | Path) -> HotExperts | None:
    """The experts that the checkpoint to continue from has adapters on."""
    checkpoint = last_checkpoint(output) if Path(output).is_dir() else None
    if checkpoint is None or not (checkpoint / CONFIG).is_file():
        return None
    return HotExperts.read(read_config(checkpoint).get("auto_mapping"))


def run_callbacks(model: nn.Module, config: RunConfig) -> list[TrainerCallback]:
    """What a run's Trainer is given beside the model."""
    if not config.train_indexer:
        return []
    # The Trainer divides the model's own loss by all labels of a step, and sums over its batches.
    return [teach_indexer(model, weight=1 / config.accumulation).callback()]


class ShowHotExperts(TrainerCallback):
    """Shows which experts were chosen, when the training begins."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None or not isinstance(model, PeftModel):
            return
        hot = HotExperts.of(model.active_peft_config)
        if hot is not None:
            self.console.print(hot_table(hot, parameters_per_expert(model)))


def parameters_per_expert(model: nn.Module) -> int:
    """Parameters of the adapter on one routed expert."""
    layer = next(m for m in model.modules() if isinstance(m, LoraSomeExperts))
    tensors = [p for n, p in layer.named_parameters() if n.startswith("lora_")]
    return sum(p[0].numel() for p in tensors)
