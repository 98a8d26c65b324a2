# SPDX-License-Identifier: Apache-2.0
"""What listens to a run: early stopping, the log as a file, TensorBoard and other reporters."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

from .files import write_text

LOG_FILE = "log.jsonl"
# TensorBoard's files, in the output directory.
LOG_FOLDER = "logs"


class EarlyStopping(TrainerCallback):
    """Stops when the held-out loss, or reward, has not improved for `patience` evaluations.

    All it knows is in the Trainer's history, so that a continued run stops where it would have.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_over(self, state: TrainerState) -> bool:
        measured = [e for e in state.log_history if "eval_loss" in e or "eval_reward" in e]
        losses = [e["eval_loss"] if "eval_loss" in e else -e["eval_reward"] for e in measured]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.is_over(state):
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.is_over(state):
            control.should_training_stop = True


class LogFile(TrainerCallback):
    """Keeps everything that is logged, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Forget what a stopped run logged behind the checkpoint that this one continues."""
        if state.is_world_process_zero and self.path.is_file():
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            write_text(self.path, "".join(_line(entry) for entry in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, "time": time.time(), **(logs or {})}))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read a run's log; a last line that a kill cut short is left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def split_reporters(report_to: str) -> list[str]:
    """Names in a comma-separated list, "none" left out.

    Raises:
        ValueError: a reporter that transformers does not know, or that is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    known = get_available_reporting_integrations() if names else []
    for name in names:
        if name not in known:
            raise ValueError(
                f"report_to: wanted none or installed reporters ({', '.join(known)}), got {name!r}"
            )
    return names


def report_callbacks(report_to: str, output: str | Path) -> tuple[list[str], list[TrainerCallback]]:
    """Names that transformers serves by itself, and callbacks for the others.

    TensorBoard is given its folder here: transformers takes it from an environment variable, or
    names a new one after the hour, and a continued run would be a second one.
    """
    names = split_reporters(report_to)
    callbacks = []
    if "tensorboard" in names:
        board = TensorBoardCallback()
        board.logging_dir = str(Path(output, LOG_FOLDER))
        callbacks.append(board)
    return [name for name in names if name != "tensorboard"], callbacks
