# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: whole or not there, and found again by what is in them.

A checkpoint is written beside its place and renamed when every byte is on the disk. `files.json`,
its last file, names the others with their sizes and CRC-32: a folder that does not match it, torn
by hands or by a disk, is no checkpoint. `SafeCheckpoints` gives this to any of transformers'
Trainers, TRL's included.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from .full import restore_weights
from .interruption import Interrupted, StopSignal
from .ranks import agree_to_stop, num_ranks, together
from .sharded import is_sharded, put_adapter, spread_optimizer, whole, whole_adapter
from .state_files import load_state, random_state, restore_random_state, save_state

logger = logging.getLogger(__name__)
MANIFEST = "files.json"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
# Of a folder that is being written, or removed; of a file that `files.write_text` writes.
_BESIDE = re.compile(r"\.checkpoint-\d+\.(?:new|old)|\.staged-.*|\..*\.tmp")


def save_adapter(model: Any, directory: str | Path, state_dict: dict | None = None) -> None:
    """Save what trains: adapters in PEFT's layout, or all of a model without adapters.

    PEFT is not asked to look on the Hub whether the vocabulary has grown.

    Raises:
        OSError: they could not be written.
    """
    more = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    try:
        model.save_pretrained(str(directory), state_dict=state_dict, **more)
    except SafetensorError as error:
        raise OSError(f"{directory}: could not write the adapter ({error})") from error


def restore_adapter(model: nn.Module, directory: str | Path) -> None:
    """Put the values that `save_adapter` wrote into what trains of `model`."""
    if not isinstance(model, PeftModel):
        restore_weights(model, directory)
        return
    tensors = load_peft_weights(str(directory), device="cpu")
    if is_sharded(model):
        put_adapter(model, tensors)
        return
    set_peft_model_state_dict(model, tensors)


class SafeCheckpoints(Trainer):
    """Saves and loads checkpoints that survive a kill, without a pickle in them.

    Attributes:
        stop: asked after every step; a run that is to stop saves one more checkpoint.
        keeps_best: whether every new best held-out loss is saved, and loaded at the end.
    """

    stop: StopSignal | None = None
    keeps_best = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter alone: transformers would pickle the arguments beside it."""
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir, state_dict)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best and self.keeps_best:
            self.control.should_save = True
        return best

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save what is due, then stop if a signal asked for it.

        Raises:
            Interrupted: after the checkpoint.
        """
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop is None or self.is_done():
            return
        agree_to_stop(self.stop)
        if self.stop.signum is None:
            return
        target = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if not target.is_dir():
            self._save_checkpoint(self.model, None)
        raise Interrupted(self.stop.signum, str(target), self.state.global_step)

    def is_done(self) -> bool:
        """Whether no step is left to train."""
        return self.control.should_training_stop or self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch; a run that was stopped behind its last step has none left."""
        if self.is_done():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.keeps_best and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        output = Path(self.args.output_dir)
        target = output / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = output / f"checkpoint-{self.state.best_global_step}"
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        try:
            self._write_checkpoint(target)
        except (OSError, SafetensorError) as error:
            raise OSError(_could_not_write(target, error)) from error
        if self.args.should_save:
            drop_old(output, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, target: Path) -> None:
        """Write a checkpoint in turns; none begins before all processes are done with the last."""
        state_dict = whole_adapter(self.model) if is_sharded(self.model) else None
        optimizer = whole(self.optimizer.state_dict())
        with ExitStack() as stack:
            with together():
                folder = stack.enter_context(
                    checkpoint_folder(target, writes=self.args.should_save)
                )
                self._save(str(folder), state_dict)
                self._save_optimizer_and_scheduler(str(folder), optimizer)
            with together():
                # Generators differ between processes.
                self._save_rng_state(str(folder))
            with together():
                if self.args.should_save:
                    self.state.save_to_json(str(folder / STATE_FILE))
                # What seals the folder and gives it its name.
                stack.close()

    def _save_optimizer_and_scheduler(self, output_dir: str, state: Any = None) -> None:
        if self.args.should_save:
            save_state(Path(output_dir, OPTIMIZER_FILE), state or self.optimizer.state_dict())
            save_state(Path(output_dir, SCHEDULER_FILE), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = load_state(Path(checkpoint, OPTIMIZER_FILE))
            self.optimizer.load_state_dict(spread_optimizer(self.optimizer, state))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint, SCHEDULER_FILE)))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir, self._random_file()), random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        check_writers(checkpoint)
        restore_random_state(load_state(Path(checkpoint, self._random_file())))

    def _random_file(self) -> str:
        return f"random-{self.args.process_index}.safetensors"

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_adapter(self.model, self.state.best_model_checkpoint)


def _could_not_write(target: Path, error: Exception) -> str:
    earlier = last_checkpoint(target.parent)
    kept = f"{earlier} is intact" if earlier else "there is no earlier one"
    reason = " ".join(str(error).split())
    return (
        f"{target}: could not write the checkpoint ({reason}); {kept}. Make room and continue "
        "with --resume"
    )


@contextmanager
def checkpoint_folder(target: Path, *, writes: bool = True) -> Iterator[Path]:
    """Give a folder that becomes `target` when the block ends well, and is gone otherwise.

    Args:
        target: directory of the checkpoint, replaced if it is there.
        writes: False in the processes that only add to what another one renames.
    """
    beside = target.with_name(f".{target.name}.new")
    if writes:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        yield beside
        if writes:
            _seal(beside)
            _remove(target)
            beside.rename(target)
            _sync(target.parent)
    finally:
        if writes:
            shutil.rmtree(beside, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write the manifest, and wait until all of it is on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): _measure(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for path in (*paths, folder / MANIFEST, folder):
        _sync(path)


def _measure(path: Path) -> dict[str, int]:
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves no part of it under its name."""
    if folder.is_dir():
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds every file that its manifest names, unchanged."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(_measure(folder / name) == found for name, found in wanted.items())
    except (OSError, ValueError, AttributeError):
        return False


def list_checkpoints(output: str | Path) -> list[Path]:
    """Folders that are named like checkpoints, by step."""
    output = Path(output)
    if not output.is_dir():
        return []
    named = [(match, path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named)]


def last_checkpoint(output: str | Path) -> Path | None:
    """The newest whole checkpoint; torn ones are passed over with a warning."""
    for folder in reversed(list_checkpoints(output)):
        if is_whole(folder):
            return folder
        logger.warning("%s: not whole, so it is not continued from", folder)
    return None


def check_writers(checkpoint: str | Path) -> None:
    """Compare the number of processes with that of a checkpoint.

    Raises:
        ValueError: it was another; names both.
    """
    written = len(list(Path(checkpoint).glob("random-*.safetensors")))
    if written != num_ranks():
        raise ValueError(
            f"resume: {checkpoint} was written by {written} processes, got {num_ranks()}; rows "
            "would be dealt otherwise, so start as many again"
        )


def drop_old(output: Path, keep: int | None, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    if keep is None:
        return
    for folder in list_checkpoints(output)[:-keep]:
        if best is None or folder != Path(best):
            _remove(folder)


def sweep(output: str | Path) -> None:
    """Remove what a killed process left half-written; nobody else may be writing here."""
    output = Path(output)
    for path in output.iterdir() if output.is_dir() else ():
        if _BESIDE.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a killed process left this half-written."""
    return _BESIDE.fullmatch(path.name) is not None
