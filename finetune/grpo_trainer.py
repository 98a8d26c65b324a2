# SPDX-License-Identifier: Apache-2.0
"""GRPO (arXiv 2402.03300) by TRL's trainer, with questions that are encoded already.

For every question a group of answers is drawn; those with more reward than their group's mean
become likelier. Answers are drawn in batches padded on the left, which are exact here. Needs `trl`;
`preference.py` says so where it is missing.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerControl
from trl import GRPOConfig, GRPOTrainer

from .config import RunConfig
from .prepare import Prepared
from .rewards import Tasks, mean_reward
from .trainer import RunTrainer


class GrpoRun(RunTrainer, GRPOTrainer):
    """TRL's trainer, whose prompts are the numbers of a run's questions.

    Attributes:
        questions: what is trained on.
        held_out: what is measured on, if anything.
    """

    questions: Tasks
    held_out: Tasks | None
    _asked: list[int]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self._asked = [int(at) for at in prompts]
        return [self.questions.rows[int(at)][0].input_ids for at in prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[Any] | None]:
        drawn, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # What stands behind `stop` earns nothing, so nothing of it may be learned.
        stops = [self.questions.tasks[at].question.stop for at in self._asked]
        answers = [self._answer(ids, stop) for ids, stop in zip(drawn, stops, strict=True)]
        if log_probs is not None:
            log_probs = [p[: len(ids)] for p, ids in zip(log_probs, answers, strict=True)]
        return answers, log_probs

    def _answer(self, ids: list[int], stop: str | None) -> list[int]:
        """The tokens of an answer up to those that complete `stop`."""
        if stop is None or stop not in self._text(ids):
            return ids
        return next(ids[:n] for n in range(1, len(ids) + 1) if stop in self._text(ids[:n]))

    def _text(self, ids: list[int]) -> str:
        return self.processing_class.decode(ids, skip_special_tokens=True)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        count = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        # The state's own count is TRL's.
        self.pace.tokens += count
        return super()._compute_loss(model, inputs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward of greedy answers to what is held out."""
        assert self.held_out is not None
        reward = mean_reward(
            self.model,
            self.held_out,
            self.processing_class,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
        )
        metrics = {f"{metric_key_prefix}_reward": reward}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def build(config: RunConfig, settings: dict[str, Any], data: Prepared, **parts: Any) -> RunTrainer:
    """The trainer of a run with the objective grpo.

    Args:
        config: the run.
        settings: as `arguments.training_settings` gives them.
        data: its questions.
        parts: what TRL's trainer is made of: model, processing_class, callbacks.
    """
    train, held_out = data.train, data.held_out
    assert isinstance(train, Tasks)
    assert held_out is None or isinstance(held_out, Tasks)
    del settings["label_names"]
    settings |= {"metric_for_best_model": held_out and "reward", "greater_is_better": True}
    tasks = train.tasks

    def reward(completions: list[str], task: list[int], **others: Any) -> list[float]:
        return [tasks[at].reward(text) for at, text in zip(task, completions, strict=True)]

    args = GRPOConfig(
        **settings,
        beta=config.strength,
        num_generations=config.group_size,
        # Held-out questions are answered by `mean_reward`.
        num_generations_eval=1,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        gradient_checkpointing=settings["activation_checkpointing"],
        bf16=False,
    )
    trainer = GrpoRun(
        reward_funcs=reward,
        args=args,
        train_dataset=_numbers(train),
        eval_dataset=None if held_out is None else _numbers(held_out),
        **parts,
    )
    trainer.questions, trainer.held_out = train, held_out
    if "ref" in trainer.model.peft_config:
        # A copy of adapters that do nothing yet: the base with none is the same, and is there.
        trainer.model.delete_adapter("ref")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _numbers(rows: Tasks) -> Dataset:
    return Dataset.from_list([{"prompt": str(i), "task": i} for i in range(len(rows))])
