# SPDX-License-Identifier: Apache-2.0
"""Pretraining on transformers' Trainer: from first weights and a stream of tokens, in one call.

    steps = pretrain(model, tokens, Pretraining(steps=1200), "out/nano", resume=True)

What a step does besides the Trainer's: queries read every entry until the indexer has seen enough
(V3.2's dense warm-up), the indexer learns from attention, biases keep experts equally busy. The
data are `token_batches`, groups and rates `pretraining_groups`. Checkpoints and stops by signal are
those of every run here: a continued run is bit by bit the undisturbed one.
"""

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from .checkpoints import SafeCheckpoints, last_checkpoint, sweep
from .expert_balance import ExpertBalance
from .files import write_json
from .indexer_training import IndexerTeacher
from .interruption import stop_signals
from .pace import MeasuredTrainer
from .pretraining_groups import make_optimizer
from .pretraining_settings import Pretraining, Step, schedule, steps_of
from .token_batches import TokenBatches
from .utilization import CountOperations, matmul_rate, processor_seconds

logger = logging.getLogger(__name__)
SETTINGS_FILE = "pretraining.json"
_EVERY_ENTRY = 1 << 20


# Something to add to the loss of a pass that is minimised, not to the one that is reported.
MoreLoss = Callable[[ModelOutput], torch.Tensor]
# Batches of the model's keywords, in the order in which they are read.
Batches = Sequence[dict[str, torch.Tensor]] | TokenBatches
# Is given every step, and the Trainer that made it.
Tell = Callable[[Step, "Pretrainer"], None]


class Pretrainer(SafeCheckpoints, MeasuredTrainer):
    """The Trainer of a `Pretraining`.

    Attributes:
        balance: of experts; `balance.last` is what each got in the last step.
        teacher: of the indexer, where there is one.
        flops_per_token: of model and teacher, forward and backward; counted at the first step.
        matmul_rate: what utilization is measured against, operations a second.
    """

    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Pretraining,
        data: Batches,
        arguments: TrainingArguments,
        tell: Tell | None = None,
        more_loss: MoreLoss | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.phases = _Phases(self, settings)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast(Dataset, data),
            data_collator=_only,
            callbacks=[self.phases, *callbacks],
        )
        # The mean of a batch, not a sum over label tokens: batches are equally large.
        self.model_accepts_loss_kwargs = False
        self.settings, self.tell, self.more_loss = settings, tell, more_loss
        self.balance = ExpertBalance(model.model.layers)
        selects = bool(model.config.index_source_layer_ids)
        self.teacher = IndexerTeacher(model) if selects else None
        self.flops_per_token = 0.0
        self.matmul_rate = matmul_rate(model.device, model.dtype)
        self.index_loss = self.more = self.busiest = self.seconds = 0.0
        self.tokens = 0
        # It prints to standard output, which belongs to the caller.
        self.remove_callback(PrinterCallback)

    def release(self) -> None:
        """Leave the model without hooks, and selecting as before."""
        self.phases.dense.close()
        self.balance.remove()
        self.router_load.leave()
        if self.teacher is not None:
            self.teacher.remove()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon and Adam, over what trains."""
        if not self.optimizer:
            run = self.settings
            self.optimizer = make_optimizer(
                self.model if model is None else model,
                run.rates,
                run.matrix_decay,
                run.sparse_tables,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The run's schedule, whatever step it is to stop at."""
        run = self.settings
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: schedule(step, run.steps, run.warmup, run.floor),
        )
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **how: Any
    ) -> torch.Tensor:
        """Loss and gradient of a batch; the first one counts its operations."""
        tokens = inputs["input_ids"].numel()
        if self.flops_per_token:
            loss = super().training_step(model, inputs, *args, **how)
        else:
            with CountOperations() as counter:
                loss = super().training_step(model, inputs, *args, **how)
            self.flops_per_token = counter.total / tokens
        self.tokens += tokens
        if self.teacher is not None:
            self.index_loss += self.teacher.added / self.settings.accumulation
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **how: Any) -> Any:
        """The model's own loss, and what more was asked for."""
        if self.more_loss is None:
            return super().compute_loss(model, inputs, *args, **how)
        outputs = model(**inputs)
        more = self.more_loss(outputs)
        self.more += float(more.detach()) / self.settings.accumulation
        return outputs.loss + more

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip what is dense: rows of tables learn at a rate of their own anyway."""
        dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
        return nn.utils.clip_grad_norm_(dense, self.args.max_grad_norm)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what a `Step` holds, and tell it."""
        if "loss" in logs:
            made = self.flops_per_token * self.tokens
            logs = {
                **logs,
                "loss": logs["loss"] - self.index_loss - self.more,
                "index_loss": self.index_loss,
                "busiest": self.busiest,
                "seconds": self.seconds,
                "utilization": made / max(self.seconds, 1e-9) / self.matmul_rate,
            }
            self.index_loss, self.more, self.tokens = 0.0, 0.0, 0
        super().log(logs, start_time)
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                logger.warning(
                    "step %d: the loss is %s; the run ends here",
                    self.state.global_step,
                    logs["loss"],
                )
                self.control.should_training_stop = True
            if self.tell is not None:
                self.tell(steps_of(self.state.log_history[-1:])[0], self)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Restore every tensor: biases of routers are no parameters, but they move."""
        stored: dict[str, torch.Tensor] = {}
        for file in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
            stored |= load_file(file)
        target = self.model if model is None else model
        found, _ = target.load_state_dict(stored, strict=False)
        missing = [n for n in found if n not in self.model.all_tied_weights_keys]
        if missing:
            raise ValueError(
                f"{resume_from_checkpoint}: wanted all tensors of the model, found no "
                f"{', '.join(missing[:3])}; it was written for another configuration"
            )


class _Phases(TrainerCallback):
    """What happens around a step."""

    def __init__(self, trainer: Pretrainer, settings: Pretraining) -> None:
        self.trainer, self.settings = trainer, settings
        self.dense = ExitStack()
        self._saved = time.monotonic()
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.settings.sparse_from * self.settings.steps:
            self.dense.enter_context(every_entry(self.trainer.model))
        self._began = processor_seconds()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, run = self.trainer, self.settings
        done = (state.global_step - 1) / run.steps
        trainer.busiest = trainer.balance.step(run.balance_rate * (1 - done))
        trainer.seconds = processor_seconds() - self._began
        # Before a checkpoint writes the configuration.
        self.dense.close()
        minutes = (time.monotonic() - self._saved) / 60
        last = state.global_step == state.max_steps
        if args.save_strategy != "no" and (last or minutes > run.checkpoint_minutes):
            control.should_save = True
            self._saved = time.monotonic()


@contextmanager
def every_entry(model: PreTrainedModel) -> Iterator[None]:
    """No selection inside the block: queries read whatever they see, as in a dense model."""
    config = model.config
    kept = config.index_topk, config.candidate_topk_blocks
    config.index_topk, config.candidate_topk_blocks = _EVERY_ENTRY, _EVERY_ENTRY
    try:
        yield
    finally:
        config.index_topk, config.candidate_topk_blocks = kept


def pretrain(
    model: PreTrainedModel,
    data: np.ndarray | Batches,
    settings: Pretraining,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    tell: Tell | None = None,
    more_loss: MoreLoss | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[Step]:
    """Train a model in place, in float32 or whatever its weights are, or go on with a run.

    Args:
        model: in its first weights; those of a checkpoint replace them where a run goes on.
        data: [n] ids, documents end to end; or batches of the model's keywords in their order,
            whose rows may be as many and as long as they like.
        settings: of the run.
        output: directory of checkpoints; None: none are written, and signals are left alone.
        resume: go on behind the newest whole checkpoint; from the beginning where there is none.
        stop_at: end after so many steps of the same schedule.
        tell: is given every step, and the Trainer.
        more_loss: makes of a pass's outputs what is added to its loss.
        callbacks: more listeners of the Trainer.

    Returns:
        every step, those before a stop included.

    Raises:
        ValueError: a directory that holds a run already, or one of other settings; too little
            data; a wrong `stop_at`.
        Interrupted: a signal stopped the run; it says which checkpoint to continue from.
    """
    stop_at = settings.steps if stop_at is None else stop_at
    if not 1 <= stop_at <= settings.steps:
        raise ValueError(f"stop_at: wanted 1 to {settings.steps} steps, got {stop_at}")
    batches = _batches(data, settings, stop_at)
    _check_vocabulary(batches[0], model.config.vocab_size, data)
    checkpoint = None if output is None else _open(Path(output), resume, settings, _mark(data))
    with ExitStack() as stack:
        folder = output or stack.enter_context(tempfile.TemporaryDirectory())
        arguments = _arguments(settings, str(folder), stop_at, saves=output is not None)
        trainer = Pretrainer(
            model.train(), settings, batches, arguments, tell, more_loss, callbacks
        )
        stack.callback(trainer.release)
        if output is not None:
            trainer.stop = stack.enter_context(stop_signals())
            stack.enter_context(trainer.stop.patient())
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return steps_of(trainer.state.log_history)


def _only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """An item of the data is a batch already."""
    return items[0]


def _batches(data: np.ndarray | Batches, run: Pretraining, steps: int) -> Batches:
    """What the first steps of a run read."""
    if isinstance(data, np.ndarray):
        count = run.steps * run.accumulation
        return TokenBatches(data, run.length, run.rows, count, run.seed, run.document_start)
    wanted = steps * run.accumulation
    if len(data) < wanted:
        raise ValueError(f"data: wanted {wanted:,} batches, got {len(data):,}; take fewer steps")
    return data


def _check_vocabulary(
    first: dict[str, torch.Tensor], size: int, data: np.ndarray | Batches
) -> None:
    """Ids of the stream, or of the first batch, must be the model's."""
    ids = data if isinstance(data, np.ndarray) else first["input_ids"]
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        raise ValueError(f"data: wanted ids of 0 to {size - 1}, got {least} to {most}")


def _mark(data: np.ndarray | Batches) -> str:
    """What tells data apart: a hash of the stream, or of the first batch."""
    ids = data if isinstance(data, np.ndarray) else data[0]["input_ids"].numpy()
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).hexdigest()


def _open(output: Path, resume: bool, settings: Pretraining, data: str) -> Path | None:
    """The checkpoint to go on from; settings stand beside it, and must be the same."""
    sweep(output)
    last, file = last_checkpoint(output), output / SETTINGS_FILE
    if last is not None and not resume:
        raise ValueError(
            f"output: {output} holds a run already; continue it with resume, or give another "
            "directory"
        )
    asked = {k: v for k, v in asdict(settings).items() if k != "checkpoint_minutes"}
    asked["data"] = data
    if last is not None and file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in asked.items() if held.get(name) != value]
        if other:
            raise ValueError(
                f"resume: wanted the settings of the run in {output}, got another "
                f"{', '.join(other)}; give another directory"
            )
    write_json(file, asked)
    return last


def _arguments(
    settings: Pretraining, output: str, stop_at: int, *, saves: bool
) -> TrainingArguments:
    """A pretraining's settings in transformers' words."""
    return TrainingArguments(
        output_dir=output,
        # An item of the data is a whole batch.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=stop_at,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        # Saving is by time: `_Phases`.
        save_strategy="steps" if saves else "no",
        save_steps=settings.steps + 1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
