# SPDX-License-Identifier: Apache-2.0
"""Preferences: answers that are to become more likely than others.

| objective | what a line says | reference |
|---|---|---|
| dpo | `prompt`, `chosen`, `rejected` | the base model, adapters off |
| orpo | the same | none |
| kto | `prompt`, `completion`, `label`, or pairs, taken apart | the base model, adapters off |

Lines are read and encoded by `preference_records`, held out by their prompts. The optimization is
TRL's for dpo and kto.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .arguments import training_settings
from .config import RunConfig
from .data import IGNORED, Example, Examples, PaddingCollator, pad_token, report_on
from .encoding import check_rules
from .prepare import Prepared
from .run_data import Side, build_sides, run_rules
from .trainer import RunTrainer


def split_answer(example: Example) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the answer behind it."""
    start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:start], example.input_ids[start:]


class Pairs(Examples):
    """Rows of a chosen and a rejected answer, in TRL's columns."""

    def __init__(self, pairs: Sequence[Sequence[Example]]) -> None:
        super().__init__([])
        self.rows = [list(pair) for pair in pairs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        (prompt, chosen), (_, rejected) = map(split_answer, self.rows[index])
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


class Rated(Examples):
    """Rows of one answer and whether it is wanted, in TRL's columns.

    kto estimates a divergence from answers that belong to another prompt: those of the nearest
    earlier row whose prompt differs, before the first row comes the last.

    Raises:
        ValueError: there are rows, all of one prompt.
    """

    def __init__(self, answers: Sequence[tuple[Example, bool]]) -> None:
        super().__init__([example for example, _ in answers])
        self.labels = [label for _, label in answers]
        self.others = _other_prompts([split_answer(example)[0] for example, _ in answers])

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, completion = split_answer(self.rows[index][0])
        other = split_answer(self.rows[self.others[index]][0])[1]
        return {
            "prompt_ids": prompt,
            "completion_ids": completion,
            "KL_completion_ids": other,
            "label": self.labels[index],
        }


def _other_prompts(prompts: Sequence[list[int]]) -> list[int]:
    """For every row the nearest earlier one, in a circle, of another prompt."""
    if not prompts:
        return []
    start = next((i for i in range(-1, -len(prompts), -1) if prompts[i] != prompts[i - 1]), None)
    if start is None:
        raise ValueError(
            "kto: wanted at least two different prompts, as answers to others measure how far the "
            "model has moved, got one; give more prompts, or eval_fraction 0"
        )
    count, found = len(prompts), [0] * len(prompts)
    # From the first row of a stretch of equal prompts on, each row looks back once.
    for step in range(count):
        at = (start + step) % count
        before = (at - 1) % count
        found[at] = before if prompts[before] != prompts[at] else found[before]
    return found


def prepare_preferences(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, check, split and encode a run's preferences, as `check` does.

    Raises:
        ValueError: bad lines, unless they are to be skipped, or settings that go with supervised
            runs alone.
    """
    if config.packing:
        raise ValueError(f"packing: wanted false for objective {config.objective}, got true")
    rules = run_rules(config)
    check_rules(config.objective, rules)
    train, held, left_out = build_sides(config, tokenizer)
    rows, other = (_make_rows(side, config.objective) for side in (train, held))
    learned, away = (report_on(side.encoded, rules) for side in (train, held))
    return Prepared(rows, other if len(other) else None, learned, away, left_out)


def _make_rows(side: Side, objective: str) -> Examples:
    if objective != "kto":
        return Pairs([one.examples[:2] for one in side.encoded if one.examples])
    return Rated(
        [
            (example, name == "chosen")
            for one in side.encoded
            for example, name in zip(one.examples, one.sides, strict=False)
        ]
    )


@torch.no_grad()
def answer_log_prob(
    model: nn.Module, example: Example, tokenizer: PreTrainedTokenizerBase
) -> float:
    """Log-probability of an answer given its prompt, summed over its tokens."""
    batch = PaddingCollator(pad_token(tokenizer))(
        [{"input_ids": example.input_ids, "labels": example.labels}]
    )
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    return -float(model(**batch, use_cache=False).loss) * example.num_labels


def held_out_margin(
    model: nn.Module, rows: Examples, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """How much likelier wanted answers are than others: difference of the two means, in nats.

    None where rated answers are all of one kind.
    """
    if isinstance(rows, Rated) and len(set(rows.labels)) < 2:
        return None
    sums: dict[bool, list[float]] = {True: [], False: []}
    training = model.training
    model.eval()
    for place, row in enumerate(rows.rows):
        wanted = [rows.labels[place]] if isinstance(rows, Rated) else [True, False]
        for label, example in zip(wanted, row, strict=True):
            sums[label].append(answer_log_prob(model, example, tokenizer))
    model.train(training)
    means = {label: sum(found) / len(found) for label, found in sums.items()}
    return means[True] - means[False]


def make_preference_trainer(
    model: nn.Module,
    config: RunConfig,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    epoch_steps: int,
    report_to: list[str],
    callbacks: list[TrainerCallback],
) -> RunTrainer:
    """TRL's trainer of an objective, with a run's settings.

    Raises:
        ValueError: TRL is not installed.
    """
    try:
        if config.objective == "grpo":
            from .grpo_trainer import build
        else:
            from .preference_trainers import build
    except ImportError as error:
        raise ValueError(
            f"objective {config.objective}: wanted trl, which is not installed ({error}); pip "
            "install 'dsv4[preference]'"
        ) from error
    settings = training_settings(
        config,
        evaluates=data.held_out is not None,
        epoch_steps=epoch_steps,
        report_to=report_to,
    )
    parts = {"model": model, "processing_class": tokenizer, "callbacks": callbacks}
    return build(config, settings, data, **parts)
