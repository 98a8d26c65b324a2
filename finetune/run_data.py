# SPDX-License-Identifier: Apache-2.0
"""A run's data, from files to examples, before any weight is loaded.

Files are read once, record by record: what stays in memory are tokens (8 bytes each), a digest a
record, and fingerprints if repeats are to be left out. Every record is parsed and encoded here,
so that a bad one refuses the run, or is skipped and listed, and never ends it in the middle.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import RunConfig
from .data import DataReport, Example, report_on
from .duplicates import Fingerprints, find_overlaps
from .encoding import Encoded, Rules, encode_long
from .records import BadRecord, Form, Record, choose_held_out, iter_records, raise_bad


@dataclass(frozen=True)
class RunData:
    """Examples of a run, reports on them, and what was left out of it.

    `skipped`: bad records, with the file they are of. `removed`: records left out of training as
    repeats, by reason.
    """

    train: list[Example]
    held_out: list[Example]
    train_report: DataReport
    held_out_report: DataReport
    skipped: list[dict[str, Any]] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)


@dataclass
class Side:
    """Encoded records of one file or side, in file order."""

    encoded: list[Encoded]
    digests: list[str]
    prints: Fingerprints


def build_run_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read, encode and split a run's data, and leave out what was asked to be.

    Raises:
        ValueError: bad records, unless they are to be skipped; nothing to learn from.
    """
    train, held, left_out = build_sides(config, tokenizer)
    rules = run_rules(config)
    return RunData(
        [example for one in train.encoded for example in one.examples],
        [example for one in held.encoded for example in one.examples],
        report_on(train.encoded, rules),
        report_on(held.encoded, rules),
        left_out["skipped"],
        left_out["removed"],
    )


def build_sides(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Side, Side, dict[str, Any]]:
    """Encoded records to train on and to hold out, of any objective, and what was left out.

    Raises:
        ValueError: bad records, unless they are to be skipped.
    """
    skipped: list[dict[str, Any]] = []
    train = _load(config.data, config, tokenizer, skipped)
    if config.eval_data is not None:
        held = _load(config.eval_data, config, tokenizer, skipped)
    else:
        train, held = _divide(train, config.eval_fraction)
    return train, held, {"skipped": skipped, "removed": _remove_repeats(train, held, config)}


def build_held_out(
    config: RunConfig, data: str | Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], DataReport]:
    """What a run with these settings holds out of `data`, or of its own evaluation file.

    Raises:
        ValueError: bad records, unless they are to be skipped; nothing held out; a run whose
            records are no texts to predict.
    """
    if config.objective != "sft":
        raise ValueError(
            f"held-out records: wanted a supervised run, got objective {config.objective}; what it "
            "measured on them is in its result.json"
        )
    if config.eval_data is not None:
        held = _load(config.eval_data, config, tokenizer, [])
    else:
        held = _divide(_load(data, config, tokenizer, []), config.eval_fraction)[1]
    examples = [example for one in held.encoded for example in one.examples]
    return examples, report_on(held.encoded, run_rules(config))


def run_rules(config: RunConfig) -> Rules:
    """How a run encodes its records."""
    return Rules(config.max_length, config.loss_on, config.long, config.thinking)


def _load(
    path: str | Path,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[dict[str, Any]],
) -> Side:
    """Read and encode a file; `skipped` takes its bad records, or they refuse it."""
    rules = run_rules(config)
    side, bad = Side([], [], Fingerprints()), []
    compares = config.drop_duplicates or config.drop_overlap
    for item in iter_records(path, config.objective):
        encoded = item if isinstance(item, BadRecord) else try_encode(item, tokenizer, rules)
        if isinstance(encoded, BadRecord):
            bad.append(encoded)
            continue
        side.encoded.append(encoded)
        if isinstance(item, Record):
            side.digests.append(item.split_digest(config.seed))
            if compares:
                side.prints.add(item)
    if config.on_bad == "refuse" or not side.encoded:
        raise_bad(path, bad)
    skipped += [{"file": str(path), **one.to_dict()} for one in bad]
    return side


def try_encode(
    record: Record, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> Encoded | BadRecord:
    """Encode a record of any form; where that is not possible, say why."""
    try:
        return _encoder(record.form)(record, tokenizer, rules)
    except ValueError as error:
        reason = str(error).removeprefix(f"{record.place}: ")
        return BadRecord(record.line, record.place, reason)


def _encoder(form: Form) -> Callable[[Record, PreTrainedTokenizerBase, Rules], Encoded]:
    # These build on what this module builds on.
    if form == "task":
        from .rewards import encode_task

        return encode_task
    if form in ("preference", "rated"):
        from .preference_records import encode_sides

        return encode_sides
    return encode_long


def _divide(side: Side, fraction: float) -> tuple[Side, Side]:
    """(train, held out) by content."""
    out = choose_held_out(side.digests, fraction)
    away = [digest in out for digest in side.digests]
    return _choose(side, [not one for one in away]), _choose(side, away)


def _choose(side: Side, wanted: Sequence[bool]) -> Side:
    def some(values: list[Any]) -> list[Any]:
        return [value for value, keep in zip(values, wanted, strict=True) if keep]

    prints = side.prints.choose(wanted) if len(side.prints) else Fingerprints()
    return Side(some(side.encoded), some(side.digests), prints)


def _remove_repeats(train: Side, held: Side, config: RunConfig) -> dict[str, int]:
    """Drop training records that repeat held-out ones, or earlier ones, as asked; count them."""
    reasons: list[str | None] = [None] * len(train.encoded)
    if config.drop_duplicates:
        for i, repeat in enumerate(train.prints.repeats()):
            if repeat is not None and repeat.kind != "near":
                reasons[i] = "duplicates"
    if config.drop_overlap:
        for i, repeat in enumerate(find_overlaps(train.prints, held.prints)):
            if repeat is not None:
                reasons[i] = "overlap"
    pairs = zip(train.encoded, reasons, strict=True)
    kept = [one for one, reason in pairs if reason is None]
    if train.encoded and not kept:
        raise ValueError(
            f"data: wanted records that are not held out, got {len(reasons)} that all repeat such; "
            "give more data, or do not drop the overlap"
        )
    train.encoded[:] = kept
    return dict(Counter(reason for reason in reasons if reason is not None))
