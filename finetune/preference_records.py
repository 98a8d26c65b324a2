# SPDX-License-Identifier: Apache-2.0
"""Records of preferences: pairs of answers or rated ones, checked and encoded side by side.

| form | keys | for |
|---|---|---|
| preference | `prompt`, `chosen`, `rejected` | dpo, orpo; kto takes a pair apart |
| rated | `prompt`, `completion`, `label` | kto |

A prompt is text and its answers are text, or it is a list of messages and every answer is a list
of one assistant message; `tools` may stand beside messages. `chosen` and `rejected` may also be
whole conversations that share all but their last message: what they share is the prompt.
"""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_dsv4.chat import FORMATS, choose_variant

from .dialects import is_preference, short, to_content
from .encoding import IGNORED, Encoded, Example, Rules, encode_document
from .long_documents import Document
from .records import BadRecord, Record, check_messages, check_tools, iter_records, raise_bad

PAIR = ("prompt", "chosen", "rejected")
RATED = ("prompt", "completion", "label")
# Columns of csv have no truth values.
_TRUTH = {"true": True, "false": False}


def read_preferences(path: str | Path, objective: str) -> list[Record]:
    """Read a file of pairs, or for kto of rated answers, of any kind that `sources` knows.

    Raises:
        ValueError: lines that are neither, counted, up to five named; none at all.
    """
    found = list(iter_records(path, objective))
    raise_bad(path, [item for item in found if isinstance(item, BadRecord)])
    return [item for item in found if isinstance(item, Record)]


def build_preference(value: Any, line: int, where: str, objective: str) -> Record:
    """A row as a record.

    Raises:
        ValueError: what was wanted and what came; two answers that say the same among it.
    """
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    rated = objective == "kto" and "label" in value
    keys: tuple[str, ...] = RATED if rated else PAIR
    answers = tuple(key for key in keys if key not in ("prompt", "label"))
    if rated:
        value = {**value, "label": _read_label(value["label"])}
    else:
        value = _take_shared_prompt(value)
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"wanted {', '.join(keys)}, got no {', '.join(missing)}")
    chat = isinstance(value["prompt"], list)
    for key in ("prompt", *answers):
        if not isinstance(value[key], list if chat else str):
            wanted = "messages, as the prompt is" if chat else "text"
            raise ValueError(f"`{key}`: wanted {wanted}, got {type(value[key]).__name__}")
    content = _chat_content(value, answers) if chat else _text_content(value, answers)
    if rated:
        content["label"] = value["label"]
        return Record(line, "rated", content, "rated", where)
    if _words(content["chosen"]) == _words(content["rejected"]):
        raise ValueError("wanted two answers, got `chosen` equal to `rejected`")
    return Record(line, "preference", content, "preference", where)


def _read_label(label: Any) -> bool:
    if isinstance(label, str):
        label = _TRUTH.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise ValueError(f"`label`: wanted true or false, got {short(label)}")
    return label


def _take_shared_prompt(value: dict[str, Any]) -> dict[str, Any]:
    """A pair of whole conversations as their common prompt and two answers.

    Raises:
        ValueError: they share no prompt, or not the one that stands beside them.
    """
    both: list[Any] = [value.get(key) for key in PAIR[1:]]
    if not all(isinstance(one, list) and len(one) > 1 for one in both):
        return value
    one, other = both
    for i, (mine, theirs) in enumerate(zip(one[:-1], other[:-1], strict=False)):
        if mine != theirs:
            raise ValueError(
                f"wanted `chosen` and `rejected` to share a prompt, got another at {i}"
            )
    if len(one) != len(other):
        raise ValueError(
            "wanted `chosen` and `rejected` to share all but their last message, got "
            f"{len(one)} and {len(other)} messages"
        )
    prompt = value.get("prompt", one[:-1])
    last = one[-2].get("content") if isinstance(one[-2], dict) else None
    if prompt != one[:-1] and (not isinstance(prompt, str) or prompt.strip() != str(last).strip()):
        raise ValueError("wanted `chosen` to go on from `prompt`, got a conversation of its own")
    return {**value, "prompt": one[:-1], "chosen": one[-1:], "rejected": other[-1:]}


def _text_content(value: dict[str, Any], answers: tuple[str, ...]) -> dict[str, Any]:
    for key in ("prompt", *answers):
        if not value[key].strip():
            raise ValueError(f"`{key}`: wanted text, got {short(value[key])}")
    return {key: value[key] for key in ("prompt", *answers)}


def _chat_content(value: dict[str, Any], answers: tuple[str, ...]) -> dict[str, Any]:
    """Messages under their usual names, and tools if there are any."""
    content: dict[str, Any] = {}
    for key in answers:
        answer = value[key]
        if len(answer) != 1:
            raise ValueError(f"`{key}`: wanted one assistant message, got {len(answer)}")
        if not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise ValueError(f"`{key}`: wanted one assistant message, got {short(answer[0])}")
        row = {"messages": [*value["prompt"], *answer], "tools": value.get("tools")}
        try:
            chat = to_content(row, "chat")
            check_messages(chat)
            check_tools(chat)
        except ValueError as error:
            raise ValueError(f"`prompt` with `{key}`: {error}") from error
        *prompt, last = chat["messages"]
        content |= {"prompt": prompt, key: [last]}
        if "tools" in chat:
            content["tools"] = chat["tools"]
    return content


def _words(answer: Any) -> Any:
    """What an answer says, blanks at its ends apart."""
    if isinstance(answer, str):
        return answer.strip()
    return [{k: v.strip() if isinstance(v, str) else v for k, v in answer[0].items()}]


def sides_of(record: Record) -> dict[str, str]:
    """Keys of a record's answers, and the side that each is on."""
    if record.form == "rated":
        return {"completion": "chosen" if record.content["label"] else "rejected"}
    return {"chosen": "chosen", "rejected": "rejected"}


def with_answer(record: Record, key: str) -> Record:
    """A record's prompt with one of its answers, as a supervised record."""
    prompt, answer = record.content["prompt"], record.content[key]
    if isinstance(prompt, str):
        content = {"prompt": prompt, "completion": answer}
        return Record(record.line, "prompt", content, where=record.where)
    content = {"messages": [*prompt, *answer]}
    if "tools" in record.content:
        content["tools"] = record.content["tools"]
    return Record(record.line, "messages", content, where=record.where)


def opposite(record: Record) -> Record:
    """The record that says the contrary: sides exchanged, or the other label."""
    content = dict(record.content)
    if record.form == "rated":
        content["label"] = not content["label"]
    else:
        content |= {"chosen": content["rejected"], "rejected": content["chosen"]}
    return dataclasses.replace(record, content=content)


def guess_objective(value: Any) -> str:
    """What a row is for: "dpo" for pairs, "kto" for rated answers, else "sft"."""
    if not isinstance(value, dict):
        return "sft"
    if is_preference({"prompt": None, **value}):
        return "dpo"
    rated = all(key in value for key in RATED) and isinstance(value["label"], bool)
    return "kto" if rated else "sft"


def encode_sides(record: Record, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> Encoded:
    """Tokenize every answer behind the same prompt; labels are those of the answers alone.

    Nothing is left (no examples) where the cut comes before an answer begins, or where it leaves
    two answers equal.

    Raises:
        ValueError: the prompt format cannot say it, it is long and to be rejected, or the format
            writes the prompt otherwise for one of the answers; names the place.
    """
    keys = sides_of(record)
    plain = {key: with_answer(record, key) for key in keys}
    thinking = _common_thinking(list(plain.values()), tokenizer, rules)
    found = [encode_document(one, tokenizer, thinking=thinking) for one in plain.values()]
    starts = [_answer_start(document) for document, _ in found]
    prompts = [document.ids[:start] for (document, _), start in zip(found, starts, strict=True)]
    if prompts[0] != prompts[-1]:
        raise ValueError(
            f"{record.place}: wanted one prompt for both answers, got two: the prompt format "
            "writes it otherwise for `rejected`"
        )
    size = max(len(document.ids) for document, _ in found)
    if rules.long == "reject" and size > rules.max_length:
        raise ValueError(
            f"{record.place}: wanted at most {rules.max_length} tokens, got {size}; raise "
            "max_length, or let long records be cut"
        )
    examples = tuple(
        _cut(record.line, document, start, rules.max_length)
        for (document, _), start in zip(found, starts, strict=True)
    )
    answers = [one.input_ids[start:] for one, start in zip(examples, starts, strict=True)]
    lost = not all(answers) or (len(answers) > 1 and answers[0] == answers[1])
    return Encoded(
        () if lost else examples,
        size,
        sum(len(document.ids) - start for (document, _), start in zip(found, starts, strict=True)),
        any(one.truncated for one in examples),
        max(dropped for _, dropped in found),
        tuple(keys.values()),
    )


def _common_thinking(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> Any:
    """One way of writing for all sides: thinking where any of them reasons and the format can."""
    if rules.thinking != "auto" or records[0].form != "messages":
        return rules.thinking
    reasons = any(m.get("reasoning_content") for one in records for m in one.content["messages"])
    can = bool(FORMATS[choose_variant(tokenizer)].think)
    return "always" if reasons and can else "never"


def _answer_start(document: Document) -> int:
    """Where the last run of tokens that count begins: earlier answers belong to the prompt."""
    start = len(document.ids)
    while start and document.counts[start - 1]:
        start -= 1
    return start


def _cut(line: int, document: Document, start: int, max_length: int) -> Example:
    labels = [IGNORED] * start + list(document.ids[start:])
    whole = len(document.ids) <= max_length
    return Example(line, document.ids[:max_length], labels[:max_length], not whole)


def encode_answer(
    record: Record, key: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Tokenize a prompt with one of its answers; labels are the answer's alone.

    Raises:
        ValueError: nothing of the answer is left within `max_length`.
    """
    document, _ = encode_document(with_answer(record, key), tokenizer)
    example = _cut(record.line, document, _answer_start(document), max_length)
    if not example.num_labels:
        raise ValueError(
            f"line {record.line}: `{key}` begins behind {max_length} tokens; raise max_length"
        )
    return example
