# SPDX-License-Identifier: Apache-2.0
"""Preferences: answers that are to become more likely than others.

| objective | what a line says | reference |
|---|---|---|
| dpo | `prompt`, `chosen`, `rejected` | the base model, adapters off |
| orpo | the same | none |
| kto | `prompt`, `completion`, `label`, or pairs, taken apart | the base model, adapters off |

A prompt is text, or a list of messages; answers are text, or one assistant message. They are
encoded as in supervised runs, by the model's own prompt format. The optimization is TRL's for dpo
and kto.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .arguments import training_settings
from .config import RunConfig
from .data import IGNORED, DataReport, Example, Examples, PaddingCollator, encode_record, pad_token
from .dialects import short
from .prepare import Prepared
from .records import (
    BadRecord,
    Record,
    check_messages,
    parse_value,
    raise_bad,
    split_records,
)
from .sources import open_source
from .trainer import RunTrainer

PAIR = ("prompt", "chosen", "rejected")
RATED = ("prompt", "completion", "label")
# Settings of supervised data, and what they must be left at.
_SUPERVISED_ONLY: dict[str, Any] = {
    "long": "cut",
    "thinking": "auto",
    "on_bad": "refuse",
    "eval_data": None,
    "drop_duplicates": False,
    "drop_overlap": False,
}


def read_preferences(path: str | Path, objective: str) -> list[Record]:
    """Read a file of pairs, or for kto of rated answers, of any kind that `sources` knows.

    Raises:
        ValueError: lines that are neither, counted, up to five named; none at all.
    """
    records, bad = [], []
    for row in open_source(path):
        try:
            content = _check_line(parse_value(row), objective)
            record = Record(row.number, "prompt", content, where=row.place)
            record.digest()
            records.append(record)
        except UnicodeEncodeError:
            reason = r"half of a surrogate pair (\ud800 to \udfff); wanted text"
            bad.append(BadRecord(row.number, row.place, reason))
        except ValueError as error:
            bad.append(BadRecord(row.number, row.place, str(error)))
    raise_bad(path, bad)
    if not records:
        raise ValueError(f"{path}: wanted at least one record, got an empty file")
    return records


def _check_line(value: Any, objective: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    keys = RATED if objective == "kto" and "label" in value else PAIR
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"wanted {', '.join(keys)}, got no {', '.join(missing)}")
    if keys is RATED and not isinstance(value["label"], bool):
        raise ValueError(f"`label`: wanted true or false, got {short(value['label'])}")
    chat = isinstance(value["prompt"], list)
    for key in keys:
        if key != "label" and not isinstance(value[key], list if chat else str):
            wanted = "messages, as the prompt is" if chat else "text"
            raise ValueError(f"`{key}`: wanted {wanted}, got {type(value[key]).__name__}")
        if key in ("prompt", "label"):
            continue
        if chat:
            _check_answer(value, key)
        elif not value[key].strip():
            raise ValueError(f"`{key}`: wanted text, got {short(value[key])}")
    if keys is PAIR and value["chosen"] == value["rejected"]:
        raise ValueError("wanted two answers, got `chosen` equal to `rejected`")
    return {key: value[key] for key in keys}


def _check_answer(value: dict[str, Any], key: str) -> None:
    """One assistant message, that goes with the prompt's messages."""
    answer = value[key]
    if len(answer) != 1:
        raise ValueError(f"`{key}`: wanted one assistant message, got {len(answer)}")
    if not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
        raise ValueError(f"`{key}`: wanted one assistant message, got {short(answer[0])}")
    try:
        check_messages({"messages": [*value["prompt"], *answer]})
    except ValueError as error:
        raise ValueError(f"`prompt` with `{key}`: {error}") from error


def encode_answer(
    record: Record, key: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Tokenize a prompt with one of its answers; labels are the last answer's alone.

    Raises:
        ValueError: nothing of the answer is left within `max_length`.
    """
    prompt, answer = record.content["prompt"], record.content[key]
    if isinstance(prompt, list):
        plain = Record(record.line, "messages", {"messages": [*prompt, *answer]})
    else:
        plain = Record(record.line, "prompt", {"prompt": prompt, "completion": answer})
    example = encode_record(plain, tokenizer, max_length)
    labels = list(example.labels)
    if not example.num_labels or labels[-1] == IGNORED:
        raise ValueError(
            f"line {record.line}: `{key}` begins behind {max_length} tokens; raise max_length"
        )
    start = len(labels)
    while start and labels[start - 1] != IGNORED:
        start -= 1
    labels[:start] = [IGNORED] * start
    return Example(example.line, example.input_ids, labels, example.truncated)


def split_answer(example: Example) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the answer behind it."""
    start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:start], example.input_ids[start:]


class Pairs(Examples):
    """Rows of a chosen and a rejected answer, in TRL's columns."""

    def __init__(self, pairs: Sequence[tuple[Example, Example]]) -> None:
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
    """Read, split and encode a run's preferences.

    Raises:
        ValueError: bad lines, or settings that go with supervised runs alone.
    """
    if config.packing:
        raise ValueError(f"packing: wanted false for objective {config.objective}, got true")
    for name, wanted in _SUPERVISED_ONLY.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"{name}: wanted {wanted} for objective {config.objective}, "
                f"got {getattr(config, name)}"
            )
    records = read_preferences(config.data, config.objective)
    train, held = split_records(records, config.eval_fraction, config.seed)
    rows = [_encode(part, config, tokenizer) for part in (train, held)]
    report, held_report = (_report(part) for part in rows)
    return Prepared(rows[0], rows[1] if len(rows[1]) else None, report, held_report)


def _encode(
    records: Sequence[Record], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> Examples:
    def encode(record: Record, key: str) -> Example:
        return encode_answer(record, key, tokenizer, config.max_length)

    if config.objective != "kto":
        return Pairs([(encode(r, "chosen"), encode(r, "rejected")) for r in records])
    rated: list[tuple[Example, bool]] = []
    for record in records:
        if "label" in record.content:
            rated.append((encode(record, "completion"), record.content["label"]))
        else:
            rated += [(encode(record, "chosen"), True), (encode(record, "rejected"), False)]
    return Rated(rated)


def _report(rows: Examples) -> DataReport:
    examples = [example for row in rows.rows for example in row]
    lengths = [len(example.input_ids) for example in examples]
    return DataReport(
        examples=len(examples),
        tokens=sum(lengths),
        label_tokens=sum(example.num_labels for example in examples),
        longest=max(lengths, default=0),
        truncated=sum(example.truncated for example in examples),
        dropped=0,
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


def held_out_margin(model: nn.Module, rows: Examples, tokenizer: PreTrainedTokenizerBase) -> float:
    """How much likelier wanted answers are than others: difference of the two means, in nats."""
    sums: dict[bool, list[float]] = {True: [], False: []}
    training = model.training
    model.eval()
    for place, row in enumerate(rows.rows):
        wanted = [rows.labels[place]] if isinstance(rows, Rated) else [True, False]
        for label, example in zip(wanted, row, strict=True):
            sums[label].append(answer_log_prob(model, example, tokenizer))
    model.train(training)
    means = {label: sum(found) / max(len(found), 1) for label, found in sums.items()}
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
    return build(model, config, settings, data, tokenizer, callbacks)
