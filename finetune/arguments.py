# SPDX-License-Identifier: Apache-2.0
"""A run's settings in transformers' words."""

import math
from typing import Any

import torch
from transformers import TrainingArguments

from .config import RunConfig

# transformers' "constant" knows no warm-up.
_SCHEDULES = {"constant": "constant_with_warmup"}


def steps_per_epoch(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Optimizer steps in one pass over `rows` training rows; of grpo, over so many questions."""
    rows *= config.group_size if config.objective == "grpo" else 1
    batches = math.ceil(math.ceil(rows / config.batch_size) / processes)
    return max(1, math.ceil(batches / config.accumulation))


def warmup_steps(config: RunConfig, epoch_steps: int) -> int:
    """Whole steps of warm-up. Its first step has a rate of 0, so that a short run has none."""
    return int(config.warmup_ratio * (config.max_steps or math.ceil(config.epochs * epoch_steps)))


def training_settings(
    config: RunConfig,
    *,
    evaluates: bool,
    epoch_steps: int,
    report_to: list[str] | None = None,
) -> dict[str, Any]:
    """Keywords of `TrainingArguments`, which TRL's arguments take too.

    Everything happens at steps, at the end of an epoch too: transformers treats what is due at an
    epoch's end apart from what is due at its last step, and a run that is killed between the two
    would lose the former.

    Args:
        config: the run.
        evaluates: whether anything is held out.
        epoch_steps: optimizer steps of an epoch.
        report_to: reporters that transformers is to find by name.
    """
    return {
        "output_dir": config.output,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": _SCHEDULES.get(config.schedule, config.schedule),
        "warmup_steps": warmup_steps(config, epoch_steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "activation_checkpointing": config.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps or epoch_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps or epoch_steps,
        "save_total_limit": config.keep_checkpoints,
        "metric_for_best_model": "loss" if evaluates else None,
        "greater_is_better": False,
        "report_to": report_to or "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        # As where the processes joined.
        "use_cpu": not torch.accelerator.is_available(),
        # Experts that no token of a process chose have no gradient there.
        "ddp_find_unused_parameters": True,
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def training_arguments(config: RunConfig, **wanted: Any) -> TrainingArguments:
    """`training_settings` as transformers' own record."""
    return TrainingArguments(**training_settings(config, **wanted))
