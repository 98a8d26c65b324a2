# SPDX-License-Identifier: Apache-2.0
"""Training records: jsonl in three forms, checked line by line, and split by content.

| form | keys | what counts for the loss |
|---|---|---|
| chat | `messages: [{role, content}, ...]`, `tools` | every answer, its calls and its end |
| pair | `prompt`, `completion` | the completion and its end |
| text | `text` | all of it |

Forms may be mixed within a file; other keys of a line (ids, sources) are left alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Form = Literal["messages", "prompt", "text"]
ROLES = ("system", "latest_reminder", "user", "tool", "assistant")
# A message names what is wrong with this many lines, and counts the others.
_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One line of a data file. `content` holds the form's own keys, nothing else."""

    line: int
    form: Form
    content: dict[str, Any]

    def digest(self, seed: int = 0) -> str:
        """Hash of seed and content: equal lines have equal digests."""
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()


def read_records(path: str | Path) -> list[Record]:
    """Read a jsonl file.

    Raises:
        ValueError: no file, no record at all, or lines that are not records; names up to five.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: wanted a .jsonl file, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise ValueError(f"{path}: wanted a .jsonl file of records, found none")
    records, wrong = [], []
    # Bytes: a wrong encoding is a fault of its line, not of the file. A last newline is no line.
    for number, raw in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            records.append(parse_record(raw, number))
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong == ["line 1: empty line"]:
        raise ValueError(f"{path}: wanted at least one record, got an empty file")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more lines" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:_SHOWN])}{more}")
    return records


def parse_record(raw: bytes | str, line: int) -> Record:
    """Read one line.

    Raises:
        ValueError: what was wanted and what came, without the file's name.
    """
    if not raw.strip():
        raise ValueError("empty line")
    try:
        record = _build_record(json.loads(raw), line)
        record.digest()
        return record
    except RecursionError:
        raise ValueError("nested too deeply; wanted text in flat objects") from None
    except UnicodeEncodeError:
        raise ValueError(r"half of a surrogate pair (\ud800 to \udfff); wanted text") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error


def split_records(
    records: Sequence[Record], fraction: float, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Hold out a share of the distinct records, by content: (train, held out), in file order.

    Equal lines land on one side, so that nothing held out was trained on; adding a line never
    moves another one far, and the order of the file does not matter.

    Raises:
        ValueError: a share was asked for and there are fewer than two distinct records.
    """
    if fraction == 0:
        return list(records), []
    digests = sorted({record.digest(seed) for record in records})
    if len(digests) < 2:
        raise ValueError(
            f"held-out split: wanted at least 2 distinct records, got {len(digests)}; give more "
            "data, or eval_fraction 0"
        )
    count = min(max(1, round(len(digests) * fraction)), len(digests) - 1)
    out = set(digests[:count])
    held = [record.digest(seed) in out for record in records]
    train = [record for record, away in zip(records, held, strict=True) if not away]
    return train, [record for record, away in zip(records, held, strict=True) if away]


def count_forms(records: Sequence[Record]) -> dict[str, int]:
    """Records per form, and how many repeat an earlier one."""
    forms = Counter(record.form for record in records)
    repeats = len(records) - len({record.digest() for record in records})
    return {
        "records": len(records),
        "chat": forms["messages"],
        "prompt_completion": forms["prompt"],
        "text": forms["text"],
        "duplicates": repeats,
    }


def _build_record(value: object, line: int) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    forms: list[Form] = [form for form in ("messages", "prompt", "text") if form in value]
    if "completion" in value and "prompt" not in value:
        raise ValueError("`completion` without `prompt`")
    if len(forms) != 1:
        got = " and ".join(forms) or (", ".join(value) or "no keys")
        raise ValueError(f"wanted one of `messages`, `prompt` + `completion`, `text`, got {got}")
    if forms[0] == "messages":
        return Record(line, "messages", {"messages": _check_messages(value), **_check_tools(value)})
    keys = ("prompt", "completion") if forms[0] == "prompt" else ("text",)
    return Record(line, forms[0], {key: _check_text(value, key) for key in keys})


def _check_text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{key}`: wanted text, got {_short(text)}")
    return text


def _check_messages(value: dict[str, Any]) -> list[dict[str, Any]]:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages`: wanted a list of messages, got {_short(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            got = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {i}: wanted a role of {', '.join(ROLES)}, got {_short(got)}")
        _check_message(i, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("`messages`: wanted an assistant answer to learn from, got none")
    return messages


def _check_tools(value: dict[str, Any]) -> dict[str, Any]:
    """The schemas, if there are any; what is in them is the encoder's to judge."""
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools`: wanted a list of schemas, got {_short(tools)}")
    return {"tools": tools} if tools else {}


def _check_message(i: int, message: dict[str, Any]) -> None:
    content = message.get("content")
    # A call may say all, and a tool nothing.
    if (message["role"] == "tool" and content is not None) or (
        message.get("tool_calls") and content in (None, "")
    ):
        return
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {i} ({message['role']}): wanted text, got {_short(content)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
