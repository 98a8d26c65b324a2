# SPDX-License-Identifier: Apache-2.0
"""Training records: rows of a file in one of some forms, checked one by one, split by content.

| form | keys | what counts for the loss |
|---|---|---|
| messages | `messages: [{role, content}, ...]`, `tools` | every answer, its calls and its end |
| prompt | `prompt`, `completion` | the completion and its end |
| text | `text` | all of it |

Where rows come from: `sources`. Which layouts are brought into these forms: `dialects`. They may
be mixed within a file; other keys of a row (ids, sources) are left alone. Other objectives than
supervised ones have forms of their own: `preference_records`, `rewards`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from .dialects import find_layout, short, to_content
from .sources import Row, open_source

Form = Literal["messages", "prompt", "text", "preference", "rated", "task"]
ROLES = ("system", "latest_reminder", "user", "tool", "assistant")
# A message names what is wrong with this many lines, and counts the others.
_SHOWN = 5
_FORMS: dict[str, Form] = {"prompt_completion": "prompt", "text": "text"}


@dataclass(frozen=True)
class Record:
    """One row of a data file. `content` holds the form's own keys, nothing else.

    `layout` is how it was written (a name of `dialects.LAYOUTS`); `where` where it stood.
    """

    line: int
    form: Form
    content: dict[str, Any]
    layout: str = ""
    where: str = ""

    @property
    def place(self) -> str:
        return self.where or f"line {self.line}"

    def digest(self, seed: int = 0) -> str:
        """Hash of seed and content: equal rows have equal digests."""
        return _hash(self.content, seed)

    def split_digest(self, seed: int = 0) -> str:
        """Hash of what decides on which side of a split it is: of preferences, the prompt alone."""
        if self.form in ("preference", "rated"):
            return _hash({k: v for k, v in self.content.items() if k in ("prompt", "tools")}, seed)
        return self.digest(seed)


def _hash(content: dict[str, Any], seed: int) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()


@dataclass(frozen=True)
class BadRecord:
    """A row that is no record, and why."""

    line: int
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return {"line": self.line, "place": self.place, "reason": self.reason}


def iter_records(path: str | Path, objective: str = "sft") -> Iterator[Record | BadRecord]:
    """Read a data file row by row; only one is held at a time (see `sources` for each kind).

    Args:
        path: of the file or directory.
        objective: what its rows are to be records for.

    Raises:
        ValueError: no such file, of no known kind, or without any row.
    """
    rows = iter(open_source(path))
    first, second = next(rows, None), next(rows, None)
    if first is None or (second is None and first.value in (b"", b"\r")):
        raise ValueError(f"{path}: wanted at least one record, got an empty file")
    for row in chain((first, second) if second else (first,), rows):
        try:
            yield parse_row(row, objective)
        except ValueError as error:
            yield BadRecord(row.number, row.place, str(error))


def read_records(path: str | Path) -> list[Record]:
    """Read a whole data file.

    Raises:
        ValueError: no file, no record at all, or rows that are not records; names up to five.
    """
    found = list(iter_records(path))
    raise_bad(path, [item for item in found if isinstance(item, BadRecord)])
    return [item for item in found if isinstance(item, Record)]


def raise_bad(path: str | Path, bad: Sequence[BadRecord]) -> None:
    """Refuse a file with bad rows.

    Raises:
        ValueError: there are some; names the first five, counts the others.
    """
    if bad:
        more = f"; and {len(bad) - _SHOWN} more lines" if len(bad) > _SHOWN else ""
        raise ValueError(f"{path}: {'; '.join(str(item) for item in bad[:_SHOWN])}{more}")


def parse_row(row: Row, objective: str = "sft") -> Record:
    """Read one row as a record for an objective.

    Raises:
        ValueError: what was wanted and what came, without the file's name.
    """
    where = "" if row.place == f"line {row.number}" else row.place
    return _checked(parse_value(row), row.number, where, _builder(objective))


def _builder(objective: str) -> Callable[[Any, int, str], Record]:
    # These build on this module.
    if objective == "grpo":
        from .rewards import build_task

        return build_task
    if objective != "sft":
        from .preference_records import build_preference

        return partial(build_preference, objective=objective)
    return _build_record


def parse_value(row: Row) -> Any:
    """What a row's JSON says, of whatever layout.

    Raises:
        ValueError: it is not JSON.
    """
    return _parse_json(row.value) if isinstance(row.value, bytes) else row.value


def parse_record(raw: bytes | str, line: int, where: str = "") -> Record:
    """Read one line of JSON.

    Raises:
        ValueError: what was wanted and what came, without the file's name.
    """
    return _checked(_parse_json(raw), line, where, _build_record)


def _parse_json(raw: bytes | str) -> Any:
    if not raw.strip():
        raise ValueError("empty line")
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply; wanted text in flat objects") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error


def _checked(
    value: object, line: int, where: str, build: Callable[[Any, int, str], Record]
) -> Record:
    """Build a record whose content JSON and UTF-8 can say."""
    try:
        record = build(value, line, where)
        record.digest()
    except RecursionError:
        raise ValueError("nested too deeply; wanted text in flat objects") from None
    except UnicodeEncodeError:
        raise ValueError(r"half of a surrogate pair (\ud800 to \udfff); wanted text") from None
    except TypeError as error:
        raise ValueError(f"wanted values that JSON has, got: {error}") from error
    return record


def choose_held_out(digests: Iterable[str], fraction: float) -> set[str]:
    """Which of some digests are held out: the first of the sorted ones.

    Raises:
        ValueError: a share was asked for and there are fewer than two distinct digests.
    """
    if fraction == 0:
        return set()
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise ValueError(
            f"held-out split: wanted at least 2 distinct records, got {len(distinct)}; give more "
            "data, or eval_fraction 0"
        )
    count = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    return set(distinct[:count])


def split_records(
    records: Sequence[Record], fraction: float, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Hold out a share of the distinct records, by content: (train, held out), in file order.

    Equal lines land on one side, so that nothing held out was trained on; adding a line never
    moves another one far, and the order of the file does not matter.

    Raises:
        ValueError: a share was asked for and there are fewer than two distinct records.
    """
    digests = [record.split_digest(seed) for record in records]
    out = choose_held_out(digests, fraction)
    held = [digest in out for digest in digests]
    train = [record for record, away in zip(records, held, strict=True) if not away]
    return train, [record for record, away in zip(records, held, strict=True) if away]


def _build_record(value: object, line: int, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    layout = find_layout(value)
    content = to_content(value, layout)
    form = _FORMS.get(layout, "messages")
    if form == "messages":
        check_messages(content)
        check_tools(content)
    else:
        for key in content:
            _check_text(content, key)
    return Record(line, form, content, layout, where)


def _check_text(value: dict[str, Any], key: str) -> None:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        hint = "; put all messages into `messages`" if isinstance(text, list) else ""
        raise ValueError(f"`{key}`: wanted text, got {short(text)}{hint}")


def check_messages(value: dict[str, Any]) -> None:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages`: wanted a list of messages, got {short(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            got = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {i}: wanted a role of {', '.join(ROLES)}, got {short(got)}")
        _check_message(i, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("`messages`: wanted an assistant answer to learn from, got none")


def check_tools(value: dict[str, Any]) -> None:
    """The schemas, if there are any; what is in them is the encoder's to judge."""
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools`: wanted a list of schemas, got {short(tools)}")


def _check_message(i: int, message: dict[str, Any]) -> None:
    content = message.get("content")
    # A call may say all, a tool nothing; parts of a question are the encoder's to join.
    if (message["role"] == "tool" and content is not None) or (
        message.get("tool_calls") and content in (None, "")
    ):
        return
    if message["role"] == "user" and isinstance(content, list) and content:
        return
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {i} ({message['role']}): wanted text, got {short(content)}")
