# SPDX-License-Identifier: Apache-2.0
"""From records to batches: tokens, loss mask, packing.

Labels are the tokens themselves where the loss counts and -100 elsewhere; the model shifts. The
first token of a document never has a label: nothing of its own comes before it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_dsv4.chat import choose_variant, encode_messages

from .config import LossOn
from .records import Record

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One document [S], as tokens and labels, and the line it came from."""

    line: int
    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class DataReport:
    """What encoding did to a set of records. `dropped`: nothing to learn was left after the cut."""

    examples: int
    tokens: int
    label_tokens: int
    longest: int
    truncated: int
    dropped: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def encode_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn = "answers",
) -> Example:
    """Tokenize one record and mark what counts, the end-of-sequence token included.

    Raises:
        ValueError: the prompt format cannot say it; names the line.
    """
    try:
        encode = _encode_chat if record.form == "messages" else _encode_plain
        ids, counts = encode(record, tokenizer)
    except ValueError as error:
        raise ValueError(f"line {record.line}: {error}") from error
    if loss_on == "all":
        counts = [True] * len(ids)
    labels = [i if counted else IGNORED for i, counted in zip(ids, counts, strict=True)]
    labels[0] = IGNORED
    return Example(record.line, ids[:max_length], labels[:max_length], len(ids) > max_length)


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn = "answers",
) -> tuple[list[Example], DataReport]:
    """Tokenize records; those whose answer fell behind the cut are dropped and counted.

    Raises:
        ValueError: nothing is left to learn from.
    """
    encoded = [encode_record(record, tokenizer, max_length, loss_on) for record in records]
    examples = [example for example in encoded if example.num_labels]
    if records and not examples:
        raise ValueError(
            f"data: wanted answers within {max_length} tokens, got none in {len(records)} "
            "records; raise max_length"
        )
    lengths = [len(example.input_ids) for example in examples]
    report = DataReport(
        examples=len(examples),
        tokens=sum(lengths),
        label_tokens=sum(example.num_labels for example in examples),
        longest=max(lengths, default=0),
        truncated=sum(example.truncated for example in encoded),
        dropped=len(encoded) - len(examples),
    )
    return examples, report


def _encode_plain(
    record: Record, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Texts and pairs: bos, the parts tokenized apart (a prompt alone looks the same), eos."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: wanted an end-of-sequence token, got none")
    prompt = _tokens(tokenizer, record.content.get("prompt", ""))
    answer = _tokens(tokenizer, record.content[_ANSWER[record.form]])
    ids = [*bos, *prompt, *answer, tokenizer.eos_token_id]
    silent = len(bos) + len(prompt)
    return ids, [False] * silent + [True] * (len(ids) - silent)


_ANSWER = {"prompt": "completion", "text": "text"}


def _encode_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Conversations: the encoder's text, tokenized once; a token counts if it touches a span."""
    encoded = encode_messages(
        record.content["messages"],
        variant=choose_variant(tokenizer),
        tools=record.content.get("tools"),
    )
    batch = tokenizer(
        encoded.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, counts, spans = list(batch["input_ids"]), [], iter(encoded.spans)
    span = next(spans, None)
    for start, stop in batch["offset_mapping"]:
        while span is not None and start >= span[1]:
            span = next(spans, None)
        counts.append(span is not None and stop > span[0])
    return ids, counts


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def pack_examples(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Fill rows of `length` tokens with whole documents: first fit, longest first, stable."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(example)
        room[at] -= size
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

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        item = {
            "input_ids": [i for example in row for i in example.input_ids],
            "labels": [i for example in row for i in example.labels],
        }
        if self.packed:
            item["position_ids"] = [p for example in row for p in range(len(example.input_ids))]
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
