# SPDX-License-Identifier: Apache-2.0
"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Key of a log -> how it is said.
_WORDS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gib": "{:.1f} GiB",
    "vram_gib": "{:.1f} GiB VRAM",
}


def describe(logs: dict[str, Any]) -> str:
    """Say the values of a log that a person follows; "" where there are none."""
    return ", ".join(form.format(logs[key]) for key, form in _WORDS.items() if key in logs)


def say_time(seconds: float) -> str:
    """Write a duration as 1:23:45 or 2:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class ProgressCallback(TrainerCallback):
    """Shows step, losses, speed, memory and the time that is left on a console."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self.console, self.bar = console, bar
        self._task = None if bar is None else bar.add_task("training", total=None, loss="")
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._began, self._first = time.perf_counter(), state.global_step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        words = describe(logs or {}) if {"loss", "eval_loss"} & set(logs or {}) else ""
        if not words:
            return
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, loss=words)
        else:
            left = self._time_left(state)
            line = f"step {state.global_step}/{state.max_steps}: {words}{left}"
            # As long as it is: a log is no place for a terminal's width.
            self.console.print(line, highlight=False, soft_wrap=True)

    def _time_left(self, state: TrainerState) -> str:
        """From the mean of this session's steps, with the evaluations between them."""
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        if done < 1 or left < 1:
            return ""
        return f", {say_time((time.perf_counter() - self._began) / done * left)} left"


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressCallback]:
    """Give a callback for the Trainer that shows the run on `console`."""
    if console.quiet or not console.is_terminal:
        yield ProgressCallback(console, None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield ProgressCallback(console, bar)
