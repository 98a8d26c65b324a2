# SPDX-License-Identifier: Apache-2.0
"""From records to batches: reports of what encoding did, packing, collators.

Labels are the tokens themselves where the loss counts and -100 elsewhere; the model shifts. The
first token of a document never has a label: nothing of its own comes before it.
"""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .config import Long, LossOn, Thinking
from .encoding import IGNORED, Encoded, Example, Rules, encode_long, encode_record
from .records import Record

__all__ = [
    "IGNORED",
    "DataReport",
    "Example",
    "Examples",
    "PackingCollator",
    "PaddingCollator",
    "Tally",
    "encode_record",
    "encode_records",
    "pack_examples",
    "pack_sizes",
    "pad_token",
    "report_on",
]


@dataclass(frozen=True)
class DataReport:
    """What encoding did to a set of records.

    Attributes:
        examples: documents to train on.
        tokens: theirs.
        label_tokens: those of them that count.
        longest: tokens of the longest.
        truncated: records that were cut.
        split: records that became several examples.
        dropped: records of which nothing to learn was left.
        cut_labels: tokens that would have counted, behind the cut.
        reasoning_dropped: answers written without the reasoning that they came with.
    """

    examples: int
    tokens: int
    label_tokens: int
    longest: int
    truncated: int
    dropped: int
    split: int = 0
    cut_labels: int = 0
    reasoning_dropped: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn = "answers",
    *,
    long: Long = "cut",
    thinking: Thinking = "auto",
) -> tuple[list[Example], DataReport]:
    """Tokenize records; those whose answer fell behind the cut are dropped and counted.

    Raises:
        ValueError: nothing is left to learn from, or a record cannot be said.
    """
    rules = Rules(max_length, loss_on, long, thinking)
    encoded = [encode_long(record, tokenizer, rules) for record in records]
    return [example for one in encoded for example in one.examples], report_on(encoded, rules)


def report_on(encoded: Sequence[Encoded], rules: Rules) -> DataReport:
    """Count what encoding did.

    Raises:
        ValueError: there are records, and nothing is left of them to learn from.
    """
    tally = Tally()
    for one in encoded:
        tally.add(one)
    return tally.report(rules)


class Tally:
    """Counts what encoding does, record by record, and keeps lengths alone.

    `sizes`: tokens of each example. `whole`: tokens of each record before it was cut or split.
    """

    def __init__(self) -> None:
        self.sizes, self.whole = array("i"), array("i")
        self._sums: Counter[str] = Counter()

    def add(self, one: Encoded) -> None:
        labels = sum(example.num_labels for example in one.examples)
        self.sizes.extend(map(len, one.examples))
        self.whole.append(one.tokens)
        self._sums.update(
            label_tokens=labels,
            truncated=one.truncated,
            dropped=not one.examples,
            split=len(one.examples) > 1 and not one.sides,
            cut_labels=one.label_tokens - labels,
            reasoning_dropped=one.reasoning_dropped,
        )

    def report(self, rules: Rules) -> DataReport:
        """The counts so far.

        Raises:
            ValueError: there are records, and nothing is left of them to learn from.
        """
        if self.whole and not self.sizes:
            raise ValueError(
                f"data: wanted answers within {rules.max_length} tokens, got none in "
                f"{len(self.whole)} records; raise max_length"
            )
        return DataReport(
            examples=len(self.sizes),
            tokens=sum(self.sizes),
            longest=max(self.sizes, default=0),
            **{name: int(self._sums[name]) for name in _SUMS},
        )


_SUMS = ("label_tokens", "truncated", "dropped", "split", "cut_labels", "reasoning_dropped")


def pack_examples(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Fill rows of `length` tokens with whole documents: best fit, longest first, stable."""
    rows = pack_sizes([len(example) for example in examples], length)
    return [[examples[i] for i in row] for row in rows]


def pack_sizes(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which documents of some sizes share a row, as indices."""
    rows: list[list[int]] = []
    # (free tokens, row) of rows that something may still fit into, in order.
    room: list[tuple[int, int]] = []
    smallest = min(sizes, default=0)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(room, (sizes[i], -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if free - sizes[i] >= smallest:
            insort(room, (free - sizes[i], row))
    return rows


class Examples(Dataset[dict[str, list[int]]]):
    """Rows of documents: one each, or packed, then with positions that restart."""

    def __init__(self, examples: Sequence[Example], pack_to: int | None = None) -> None:
        self.packed = pack_to is not None
        self.rows = (
            [[example] for example in examples]
            if pack_to is None
            else pack_examples(examples, pack_to)
        )
        self.width = pack_to or max(map(len, examples), default=0)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token, rows being as wide as the widest may be."""
        tokens = sum(len(example) for row in self.rows for example in row)
        return tokens / max(len(self.rows) * self.width, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        item = {
            "input_ids": [i for example in row for i in example.input_ids],
            "labels": [i for example in row for i in example.labels],
        }
        if self.packed:
            item["position_ids"] = [p for example in row for p in range(len(example))]
        return item


@dataclass(frozen=True)
class PaddingCollator:
    """Documents side by side [B, S], padded on the right."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(item["input_ids"]) for item in items)

        def pad(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([item[key] + [fill] * (width - len(item[key])) for item in items])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", IGNORED),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }


@dataclass(frozen=True)
class PackingCollator:
    """Documents behind each other in one row [1, S]: no pads, positions restart at each.

    Nothing else tells documents apart. The model resets windows, compression and n-grams where a
    position does not follow its neighbour, so each document gets what it gets alone.
    """

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        return {key: torch.tensor([[i for item in items for i in item[key]]]) for key in keys}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; it is masked, so end-of-sequence serves where there is no pad."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("tokenizer: wanted a pad or end-of-sequence token, got neither")
