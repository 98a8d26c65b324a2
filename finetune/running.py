# SPDX-License-Identifier: Apache-2.0
"""One fine-tuning run, from files to files, or the continuation of one.

The output directory holds the adapter (PEFT's files), `run.yaml` (what was asked), `result.json`
(what came out) and, while training, `checkpoint-N` folders.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_dsv4 import Dsv4Config

from .adapters import attach_adapters, count_adapters
from .config import RUN_FILE, RunConfig
from .files import staged, write_json
from .loading import load_model, load_tokenizer
from .losses import held_out_loss
from .prepare import check_vocabulary, prepare_data
from .trainer import make_trainer, save_adapter

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run measured. Losses are means over held-out label tokens; None without a split."""

    output: str
    steps: int
    seconds: float
    trained_parameters: int
    trained_tensors: int
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    train_data: dict[str, int]
    held_out_data: dict[str, int]
    history: list[dict[str, float]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Run a fine-tuning, or continue one from its last checkpoint.

    Raises:
        ValueError: bad data or settings, found before any weight is loaded; an output directory
            that holds another run.
    """
    checkpoint = _open_output(config, resume)
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    check_vocabulary(data, Dsv4Config.from_pretrained(config.model).vocab_size)
    torch.manual_seed(config.seed)
    model = build_model(config)
    config.save(Path(config.output, RUN_FILE))
    trainer = make_trainer(model, config, data, tokenizer, callbacks)
    before = None
    if data.held_out is not None:
        with model.disable_adapter():
            before = held_out_loss(model, data.held_out, tokenizer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = None if data.held_out is None else held_out_loss(model, data.held_out, tokenizer)
    counted = count_adapters(model)
    result = TrainResult(
        output=config.output,
        steps=trainer.state.global_step,
        seconds=seconds,
        trained_parameters=counted["parameters"],
        trained_tensors=counted["tensors"],
        held_out_loss_before=before,
        held_out_loss_after=after,
        train_data=data.train_report.to_dict(),
        held_out_data=data.held_out_report.to_dict(),
        history=trainer.state.log_history,
    )
    with staged(config.output) as folder:
        save_adapter(model, folder)
        write_json(folder / RESULT_FILE, result.to_dict())
    return result


def build_model(config: RunConfig) -> PeftModel:
    """The base model of a run with its fresh adapters; torch's seed decides their values."""
    return attach_adapters(
        load_model(
            config.model,
            dtype=config.dtype,
            expert_memory=config.expert_memory,
            engram_memory=config.engram_memory,
        ),
        config.preset,
        config.rank,
        config.alpha,
        expert_rank=config.expert_rank,
        dropout=config.dropout,
    )


def _open_output(config: RunConfig, resume: bool) -> str | None:
    """The checkpoint to continue from; None at a beginning.

    Raises:
        ValueError: there is a run already, or other files, or none to continue, or other settings.
    """
    output = Path(config.output)
    run = output / RUN_FILE
    if not resume:
        if run.exists():
            raise ValueError(
                f"output: {output} holds a run already; continue it with resume, or give another "
                "directory"
            )
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"output: wanted an empty or new directory, got {output} with files")
        return None
    if not run.is_file():
        raise ValueError(f"resume: wanted a run in {output}, found no {RUN_FILE}")
    config.check_continues(RunConfig.from_yaml(run))
    return get_last_checkpoint(str(output))
