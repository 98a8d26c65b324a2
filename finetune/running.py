# SPDX-License-Identifier: Apache-2.0
"""One fine-tuning run, from files to files, or the continuation of one.

The output directory holds the adapter (PEFT's files), `run.yaml` (what was asked), `result.json`
(what came out), `log.jsonl` and `logs/` (what was measured on the way), `data.json` (hashes of what
was learned from), `facts.json`, `report.html` and `README.md` (for those who ask about the run),
and, while training, `checkpoint-N` folders.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from modeling_dsv4 import Dsv4Config

from .adapters import count_adapters
from .arguments import steps_per_epoch
from .callbacks import LOG_FILE, LOG_FOLDER, split_reporters
from .checkpoints import check_writers, is_leftover, last_checkpoint, save_adapter, sweep
from .config import RUN_FILE, RunConfig
from .facts import document_lengths, hash_sources
from .files import staged, write_json
from .full import as_base
from .hot_experts import Rows
from .interruption import Interrupted, StopSignal, stop_signals
from .loading import load_model, load_tokenizer
from .losses import held_out_loss
from .optimizers import optimizer_class
from .overfit_gate import run_gate
from .preference import held_out_margin
from .prepare import Prepared, check_fingerprint, check_vocabulary, fingerprint, prepare_data
from .preset_runs import prepare_model, run_callbacks
from .ranks import (
    agree_to_stop,
    check_ranks,
    check_same,
    from_first,
    is_first,
    join_ranks,
    num_ranks,
    together,
    vary_dropout,
)
from .report import finish_run
from .rewards import Tasks, mean_reward
from .sharded import MeasureBase, is_sharded, shards, whole_adapter
from .targets import get_preset
from .trainer import RunTrainer, make_trainer

RESULT_FILE = "result.json"
DATA_FILE = "data.json"
# A run of so many steps is long enough to try one batch first.
LONG_RUN = 200


@dataclass(frozen=True)
class TrainResult:
    """What a run measured on held-out data; None without a split.

    Losses are means over label tokens. Runs on preferences have margins instead: how much likelier
    wanted answers are than unwanted ones, in nats. Those of grpo have rewards: means of greedy
    answers.
    """

    output: str
    steps: int
    seconds: float
    trained_parameters: int
    trained_tensors: int
    train_data: dict[str, int]
    held_out_data: dict[str, int]
    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    held_out_margin_before: float | None = None
    held_out_margin_after: float | None = None
    held_out_reward_before: float | None = None
    held_out_reward_after: float | None = None
    overfit_gate: dict[str, float] | None = None
    left_out: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Run a fine-tuning, or continue one from its last checkpoint.

    A finished run that is continued gives its result again. Started by accelerate or torchrun,
    every process calls this alike and gets the result; the first one writes.

    Raises:
        ValueError: bad data or settings, found before any weight is loaded; an output directory
            that holds another run.
        NotImplementedError: settings that want one process, and several.
        OSError: a checkpoint could not be written; those before it are whole.
        Interrupted: a signal stopped the run; it says which checkpoint to continue from.
    """
    with stop_signals() as stop:
        try:
            return _train(config, resume, callbacks, stop)
        except Interrupted as cut:
            if cut.checkpoint is None and (last := last_checkpoint(config.output)):
                cut.checkpoint, cut.step = str(last), int(last.name.rpartition("-")[2])
            raise


def _train(
    config: RunConfig, resume: bool, callbacks: Sequence[TrainerCallback], stop: StopSignal
) -> TrainResult:
    output = Path(config.output)
    join_ranks()
    check_ranks(config)
    checkpoint, finished = from_first(lambda: _look(config, resume))
    if finished is not None:
        return TrainResult(**finished)
    optimizer_class(config.optimizer)
    split_reporters(config.report_to)
    tokenizer = load_tokenizer(config.model)
    with together():
        data = prepare_data(config, tokenizer)
        check_vocabulary(data, Dsv4Config.from_pretrained(config.model).vocab_size)
        prints = fingerprint(config, data)
        # Files may change while the run learns.
        sources = hash_sources(config.to_dict()) if is_first() else {}
    check_same(prints, "data")
    if resume and (output / DATA_FILE).is_file():
        check_fingerprint(prints, json.loads((output / DATA_FILE).read_text(encoding="utf-8")))
    torch.manual_seed(config.seed)
    model = build_model(config, data.train)
    callbacks = [*run_callbacks(model, config), *callbacks]
    with _freeing(output, resume) as begun:
        with together():
            if is_first():
                write_json(output / DATA_FILE, prints)
                config.save(output / RUN_FILE)
                sweep(output)
        trainer = make_trainer(model, config, data, tokenizer, callbacks)
        begun.append(trainer)
        trainer.stop = stop
        gate = None if checkpoint else _try_one_batch(trainer, config, data)
        base = MeasureBase(lambda model: _held_out(model, config, data, tokenizer))
        if shards():
            # What is whole in no process can be measured when it is sharded.
            trainer.add_callback(base)
        else:
            with as_base(model):
                base.found = base.measure(model)
        start = time.perf_counter()
        vary_dropout(config.seed)
        with stop.patient():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            agree_to_stop(stop)
    if stop.signum is not None:
        raise Interrupted(stop.signum)
    seconds = time.perf_counter() - start
    result = _measure(trainer, config, data, tokenizer, base.found, seconds, gate)
    state_dict = whole_adapter(trainer.model) if is_sharded(trainer.model) else None
    with together():
        if is_first():
            _write(model, state_dict, config, data, tokenizer, result, sources)
    return result


@contextmanager
def _freeing(output: Path, resume: bool) -> Iterator[list[RunTrainer]]:
    """Free the directory for another try where a new run ends in an error before its first step.

    Yields:
        a list for its trainer, which knows of steps.
    """
    begun: list[RunTrainer] = []
    try:
        yield begun
    except Exception:
        if not resume and is_first() and not any(one.state.global_step for one in begun):
            for name in (RUN_FILE, DATA_FILE, LOG_FILE):
                (output / name).unlink(missing_ok=True)
            shutil.rmtree(output / LOG_FOLDER, ignore_errors=True)
        raise


def _look(config: RunConfig, resume: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to continue from, and the result of a run that is finished already."""
    checkpoint = _open_output(config, resume)
    file = Path(config.output, RESULT_FILE)
    if resume and file.is_file():
        return checkpoint, json.loads(file.read_text(encoding="utf-8"))
    if checkpoint is not None:
        check_writers(checkpoint)
    return checkpoint, None


def _write(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None,
    config: RunConfig,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    result: TrainResult,
    sources: dict[str, Any],
) -> None:
    """Write what came out, at once."""
    with staged(config.output) as folder:
        save_adapter(model, folder, state_dict)
        if get_preset(config.preset).weights:
            tokenizer.save_pretrained(str(folder))
        write_json(folder / RESULT_FILE, result.to_dict())
        lengths = document_lengths(data.train.rows)
        asked, found = config.to_dict(), result.to_dict()
        finish_run(folder, asked, found, lengths=lengths, sources=sources)


def _measure(
    trainer: RunTrainer,
    config: RunConfig,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    before: float | None,
    seconds: float,
    gate: dict[str, float] | None,
) -> TrainResult:
    model = trainer.model
    counted = count_adapters(model)
    after = _held_out(model, config, data, tokenizer)
    word = {"sft": "loss", "grpo": "reward"}.get(config.objective, "margin")
    return TrainResult(
        output=config.output,
        steps=trainer.state.global_step,
        seconds=seconds,
        trained_parameters=counted["parameters"],
        trained_tensors=counted["tensors"],
        **{f"held_out_{word}_before": before, f"held_out_{word}_after": after},
        train_data=data.train_report.to_dict(),
        held_out_data=data.held_out_report.to_dict(),
        overfit_gate=gate,
        left_out=data.left_out,
        history=trainer.state.log_history,
    )


def _held_out(
    model: nn.Module, config: RunConfig, data: Prepared, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """The loss, the margin, or the reward on what is held out."""
    if data.held_out is None:
        return None
    if config.objective == "sft":
        return held_out_loss(model, data.held_out, tokenizer)
    if isinstance(data.held_out, Tasks):
        sizes = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
        return mean_reward(model, data.held_out, tokenizer, **sizes)
    return held_out_margin(model, data.held_out, tokenizer)


def _try_one_batch(
    trainer: RunTrainer, config: RunConfig, data: Prepared
) -> dict[str, float] | None:
    """Run the gate where the settings ask for it, and before long runs."""
    an_epoch = steps_per_epoch(config, len(data.train), num_ranks())
    steps = config.max_steps or an_epoch * config.epochs
    wanted = config.overfit_gate == "on" or (config.overfit_gate == "auto" and steps >= LONG_RUN)
    # One batch of grpo says nothing: its answers are drawn anew.
    wanted = wanted and config.objective != "grpo"
    # Before training the model is whole, which may be more than a process can compute with.
    if shards() or not wanted:
        return None
    size = min(config.batch_size, len(data.train))
    batch = trainer.data_collator([data.train[i] for i in range(size)])
    return run_gate(trainer, batch, config.learning_rate).to_dict()


def build_model(config: RunConfig, rows: Rows = ()) -> PeftModel | PreTrainedModel:
    """The base model of a run with what trains of it; torch's seed decides fresh values.

    `rows`: its training examples, for presets that look at them.
    """
    base = load_model(
        config.model,
        dtype=config.dtype,
        expert_memory=config.expert_memory,
        engram_memory=config.engram_memory,
    )
    return prepare_model(base, config, rows)


def _open_output(config: RunConfig, resume: bool) -> Path | None:
    """The checkpoint to continue from; None at a beginning.

    Raises:
        ValueError: there is a run already, or other files, or none to continue, or other settings.
    """
    output = Path(config.output)
    run = output / RUN_FILE
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: wanted an empty or new directory, got the file {output}")
    if not resume:
        if run.exists():
            raise ValueError(
                f"output: {output} holds a run already; continue it with resume, or give another "
                "directory"
            )
        # A run that was killed before it began may have left these.
        others = [p for p in output.iterdir() if not is_leftover(p)] if output.is_dir() else []
        if any(path.name != DATA_FILE for path in others):
            raise ValueError(f"output: wanted an empty or new directory, got {output} with files")
        return None
    if not run.is_file():
        raise ValueError(f"resume: wanted a run in {output}, found no {RUN_FILE}")
    config.check_continues(RunConfig.from_yaml(run))
    return last_checkpoint(output)
