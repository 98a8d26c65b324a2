# SPDX-License-Identifier: Apache-2.0
"""A data file without what a check found: bad rows, duplicates, overlap, secrets."""

import json
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
        path: of the copy, a .jsonl file that is not the checked one.
        detector: replaces what it finds by placeholders.

    Returns:
        `written`, and `left_out` by reason.

    Raises:
        ValueError: another suffix, the checked file itself, or nothing to write.
    """
    path, source = Path(path), open_source(check.data.path)
    if path.suffix != ".jsonl":
        raise ValueError(f"clean copy: wanted a .jsonl file, got {path.name}")
    if path.resolve() == source.path.resolve() or path.resolve().is_relative_to(
        source.path.resolve()
    ):
        raise ValueError(f"clean copy: wanted another file than the checked {source.path}")
    left_out = _left_out(check)
    if len(left_out) == len(check.data.rows) + len(check.data.bad_rows):
        raise ValueError(f"clean copy: wanted good records in {source.path}, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written, redacted = 0, 0
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            for i, row in enumerate(source):
                if i in left_out:
                    continue
                values = _clean_row(row)
                safe = values if detector is None else redact_value(values, detector)
                stream.write(json.dumps(safe, ensure_ascii=False) + "\n")
                written += 1
                redacted += safe != values
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    reasons = Counter(left_out.values())
    return {
        "path": str(path),
        "written": written,
        "redacted": redacted,
        "left_out": dict(reasons),
    }


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


def _clean_row(row: Row) -> dict[str, Any]:
    """A good row in the keys of its form, its own other keys behind them."""
    record = parse_row(row)
    values = json.loads(row.value) if isinstance(row.value, bytes) else row.value
    # A key that begins another layout would make the row ambiguous.
    taken = {*KEYS[record.layout], *(keys[0] for keys in KEYS.values()), *record.content}
    return {**record.content, **{k: v for k, v in values.items() if k not in taken}}
