# SPDX-License-Identifier: Apache-2.0
"""A data file without what a check found: bad rows, duplicates, overlap, secrets."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .data_check import DataCheck
from .detectors import Detector
from .dialects import KEYS
from .records import parse_row
from .redaction import redact_value
from .sources import Row, open_source


def write_clean(
    check: DataCheck, path: str | Path, detector: Detector | None = None
) -> dict[str, Any]:
    """Write the good records of a checked file as jsonl, one beside, then renamed.

    Left out: bad rows; records that repeat an earlier one exactly or but for case, signs and
    blanks; records that repeat, also nearly, one of the evaluation file. Near duplicates within
    the file stay. Every layout is written in its form (ShareGPT and Alpaca as `messages`); other
    keys of a row stay.

    Args:
        check: of the file as it is now.
        path: of the copy, a .jsonl file that is not there yet, outside checked directories.
        detector: replaces what it finds by placeholders.

    Returns:
        `written`, `redacted`, `nulls` (numbers that JSON has not) and `left_out` by reason.

    Raises:
        ValueError: another suffix, a checked or any other file that is there, nothing to write,
            or a row that UTF-8 cannot say, named.
    """
    path, source = Path(path), open_source(check.data.path)
    _check_target(check, path)
    left_out = _left_out(check)
    if len(left_out) == len(check.data.rows) + len(check.data.bad_rows):
        raise ValueError(f"clean copy: wanted good records in {source.path}, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written, redacted, nulls = 0, 0, 0
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            for i, row in enumerate(source):
                if i in left_out:
                    continue
                values, missing = _to_json(_clean_row(row, check.objective))
                safe = values if detector is None else redact_value(values, detector)
                stream.write(_line(safe, row))
                written += 1
                nulls += missing
                redacted += safe != values
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    reasons = Counter(left_out.values())
    return {
        "path": str(path),
        "written": written,
        "redacted": redacted,
        "nulls": nulls,
        "left_out": dict(reasons),
    }


def _check_target(check: DataCheck, path: Path) -> None:
    if path.suffix != ".jsonl":
        raise ValueError(f"clean copy: wanted a .jsonl file, got {path.name}")
    target = path.resolve()
    for file in check.files:
        checked = open_source(file.path).path.resolve()
        # Also `data` of which one split was opened.
        if any(target.is_relative_to(at) for at in (checked, Path(file.path).resolve())):
            raise ValueError(f"clean copy: wanted another file than the checked {file.path}")
    if path.exists():
        raise ValueError(f"clean copy: {path} is there already; remove it, or name another")


def _to_json(value: Any) -> tuple[Any, int]:
    """A value of what JSON has, and how many numbers became null.

    Times and decimals of tables become text, bytes hexadecimal text.
    """
    if isinstance(value, dict):
        items = {str(key): _to_json(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, sum(n for _, n in items.values())
    if isinstance(value, list | tuple):
        found = [_to_json(item) for item in value]
        return [item for item, _ in found], sum(n for _, n in found)
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    if isinstance(value, bytes):
        return value.hex(), 0
    return (value if value is None or isinstance(value, str | int | float) else str(value)), 0


def _line(values: Any, row: Row) -> str:
    line = json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"clean copy: {row.place}: half of a surrogate pair (\\ud800 to \\udfff); wanted text"
        ) from None
    return line


def _left_out(check: DataCheck) -> dict[int, str]:
    """Why a row, by number of order, is not written."""
    found = dict.fromkeys(check.data.bad_rows, "bad")
    pairs = zip(check.data.rows, check.repeats, check.overlaps, strict=True)
    for row, repeat, overlap in pairs:
        if overlap is not None:
            found[row] = "overlap"
        elif repeat is not None and repeat.kind != "near":
            found[row] = f"{repeat.kind} duplicate"
    return found


def _clean_row(row: Row, objective: str) -> dict[str, Any]:
    """A good row in the keys of its form, its own other keys behind them."""
    record = parse_row(row, objective)
    values = json.loads(row.value) if isinstance(row.value, bytes) else row.value
    # A key that begins another layout would make the row ambiguous.
    taken = {*KEYS[record.layout], *(keys[0] for keys in KEYS.values()), *record.content}
    return {**record.content, **{k: v for k, v in values.items() if k not in taken}}
