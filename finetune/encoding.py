# SPDX-License-Identifier: Apache-2.0
"""One record as tokens: which of them count, and what becomes of it where it is long.

Chats are written by `modeling_dsv4.chat` and tokenized once; texts and pairs are plain tokens
between begin and end of sequence. With `thinking` "auto", a chat that has reasoning is written as
a thinking one: as in the release, only answers to its last question keep their reasoning (all of
them, where there are tools), and what is left out is counted.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_dsv4.chat import FORMATS, ChatFormat, EncodedChat, choose_variant, encode_messages

from .config import Long, LossOn, Thinking
from .long_documents import Document, split_document
from .records import Record

IGNORED = -100


class Example:
    """One document [S] for the model: tokens, labels (IGNORED where nothing counts), its line.

    Kept as int32, 8 bytes a token; `input_ids` and `labels` are fresh lists.
    """

    __slots__ = ("_ids", "_labels", "line", "num_labels", "truncated")

    def __init__(
        self, line: int, input_ids: Sequence[int], labels: Sequence[int], truncated: bool = False
    ) -> None:
        self.line = line
        self.truncated = truncated
        self._ids = array("i", input_ids)
        self._labels = array("i", labels)
        self.num_labels = sum(label != IGNORED for label in labels)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def input_ids(self) -> list[int]:
        return self._ids.tolist()

    @property
    def labels(self) -> list[int]:
        return self._labels.tolist()


@dataclass(frozen=True)
class Rules:
    """How records become examples; the fields are those of a run's settings."""

    max_length: int
    loss_on: LossOn = "answers"
    long: Long = "cut"
    thinking: Thinking = "auto"


def check_rules(objective: str, rules: Rules) -> None:
    """Refuse what other objectives than supervised ones cannot do.

    Raises:
        ValueError: answers that are compared, or prompts, are to be split.
    """
    if objective != "sft" and rules.long == "split":
        raise ValueError(f"long: wanted cut or reject for objective {objective}, got split")


@dataclass(frozen=True)
class Encoded:
    """A record as examples: one, several if it was split, none if nothing was left to learn.

    `sides`: of a preference, "chosen" or "rejected" for each example; then these are no pieces.
    `task`: of a task, what is rewarded.
    """

    examples: tuple[Example, ...]
    tokens: int
    label_tokens: int
    truncated: bool = False
    reasoning_dropped: int = 0
    sides: tuple[str, ...] = ()
    task: Any = None


def encode_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn = "answers",
    thinking: Thinking = "auto",
) -> Example:
    """Tokenize one record and mark what counts, the end-of-sequence token included; cut it.

    Raises:
        ValueError: the prompt format cannot say it; names the line.
    """
    ids, labels = _labelled(encode_document(record, tokenizer, loss_on, thinking)[0])
    return Example(record.line, ids[:max_length], labels[:max_length], len(ids) > max_length)


def encode_long(record: Record, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> Encoded:
    """Tokenize one record, and cut, split or reject it if it is longer than `max_length`.

    Raises:
        ValueError: the prompt format cannot say it, or it is long and to be rejected; names the
            line.
    """
    document, dropped = encode_document(record, tokenizer, rules.loss_on, rules.thinking)
    size, long = len(document.ids), len(document.ids) > rules.max_length
    ids, labels = _labelled(document)
    total = sum(label != IGNORED for label in labels)
    if long and rules.long == "reject":
        raise ValueError(
            f"{record.place}: wanted at most {rules.max_length} tokens, got {size}; raise "
            "max_length, or let long records be cut or split"
        )
    if long and rules.long == "split":
        pieces = [
            Example(record.line, *_labelled(Document(*piece)))
            for piece in split_document(document, rules.max_length)
        ]
        kept = tuple(piece for piece in pieces if piece.num_labels)
        return Encoded(kept, size, total, reasoning_dropped=dropped)
    example = Example(record.line, ids[: rules.max_length], labels[: rules.max_length], long)
    return Encoded((example,) if example.num_labels else (), size, total, long, dropped)


def encode_document(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn = "answers",
    thinking: Thinking = "auto",
) -> tuple[Document, int]:
    """A record as a whole document, and how many of its messages lost their reasoning.

    Raises:
        ValueError: the prompt format cannot say it; names the line.
    """
    try:
        if record.form == "messages":
            document, dropped = _encode_chat(record, tokenizer, thinking)
        else:
            document, dropped = _encode_plain(record, tokenizer), 0
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from error
    if loss_on == "all":
        everything = [True] * len(document.ids)
        document = Document(document.ids, everything, document.opening, document.borders)
    return document, dropped


def write_chat(record: Record, variant: str, thinking: Thinking = "auto") -> EncodedChat:
    """A chat in a format's text, thinking as asked.

    Raises:
        ValueError: the format cannot say it.
    """
    reasons = any(message.get("reasoning_content") for message in record.content["messages"])
    can = bool(FORMATS[variant].think)
    return encode_messages(
        record.content["messages"],
        variant,
        tools=record.content.get("tools"),
        thinking=thinking == "always" or (thinking == "auto" and reasons and can),
    )


def _labelled(document: Document) -> tuple[list[int], list[int]]:
    """Ids and labels; the first token has none, as nothing of its own comes before it."""
    ids = list(document.ids)
    labels = [i if counted else IGNORED for i, counted in zip(ids, document.counts, strict=True)]
    return ids, [IGNORED, *labels[1:]]


def _encode_plain(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Texts and pairs: bos, the parts tokenized apart (a prompt alone looks the same), eos."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: wanted an end-of-sequence token, got none")
    prompt = _tokens(tokenizer, record.content.get("prompt", ""))
    answer = _tokens(tokenizer, record.content[_ANSWER[record.form]])
    ids = [*bos, *prompt, *answer, tokenizer.eos_token_id]
    silent = len(bos) + len(prompt)
    return Document(ids, [False] * silent + [True] * (len(ids) - silent))


_ANSWER = {"prompt": "completion", "text": "text"}


def _encode_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase, thinking: Thinking
) -> tuple[Document, int]:
    """Conversations: the encoder's text, tokenized once; a token counts if it touches a span."""
    variant = choose_variant(tokenizer)
    encoded = write_chat(record, variant, thinking)
    batch = tokenizer(
        encoded.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    counts, spans = [], iter(encoded.spans)
    span = next(spans, None)
    for start, stop in batch["offset_mapping"]:
        while span is not None and start >= span[1]:
            span = next(spans, None)
        counts.append(span is not None and stop > span[0])
    form = FORMATS[variant]
    places = {start: i for i, (start, _) in reversed(list(enumerate(batch["offset_mapping"])))}
    opening, *borders = [places[at] for at in _exchanges(encoded, form) if at in places] or [0]
    texts = [message.get("reasoning_content") for message in record.content["messages"]]
    lost = sum(bool(text) and text + form.end_think not in encoded.text for text in texts)
    dropped = lost if form.end_think else sum(map(bool, texts))
    return Document(batch["input_ids"], counts, opening, borders), dropped


def _exchanges(encoded: EncodedChat, form: ChatFormat) -> list[int]:
    """Characters at which exchanges begin: behind the opening, and behind every full answer."""
    markers = [marker for marker in (form.user, form.reminder, form.system) if marker]
    after = len(form.bos) + len(form.system)
    starts = [encoded.text.find(marker, after) for marker in markers]
    first = min((at for at in starts if at >= 0), default=len(form.bos))
    result = f"{form.user}<tool_result>"
    stops = [stop for _, stop in encoded.spans if not encoded.text.startswith(result, stop)]
    return [first, *(stop for stop in stops if first < stop < len(encoded.text))]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
