# SPDX-License-Identifier: Apache-2.0
"""How fast a run trains, and in how much memory."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .ranks import sum_ranks
from .router_load import RouterLoad

GIB = 1 << 30


def resident_bytes() -> int:
    """Memory of this process; where the system does not tell it now, the most it ever was."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Pace(TrainerCallback):
    """Tokens and seconds of training steps; evaluations and checkpoints between them are left out.

    Attributes:
        tokens: seen since the last reading, pads not counted.
        seconds: the steps took since then.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._began = 0.0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.seconds += time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """Speed since the last reading, and memory now, in GiB; VRAM is the peak since then."""
        found = {"memory_gib": round(resident_bytes() / GIB, 3)}
        if self.seconds:
            found["tokens_per_second"] = round(self.tokens / self.seconds, 1)
        if torch.cuda.is_initialized():
            found["vram_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            torch.cuda.reset_peak_memory_stats()
        self.tokens, self.seconds = 0, 0.0
        return found


class MeasuredTrainer(Trainer):
    """Logs speed, memory and the load of experts beside every training loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pace, self.router_load = Pace(), RouterLoad()
        self.add_callback(self.pace)
        self.add_callback(self.router_load)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "input_ids" not in inputs:
            return
        mask = inputs.get("attention_mask")
        count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        count = int(sum_ranks(torch.tensor(count)))
        self.pace.tokens += count
        self.state.num_input_tokens_seen += count

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add to training logs what was measured since the last."""
        if "loss" in logs:
            logs = {
                **logs,
                "tokens": self.state.num_input_tokens_seen,
                **self.pace.read(),
                **self.router_load.read(),
            }
        super().log(logs, start_time)
