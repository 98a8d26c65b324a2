# SPDX-License-Identifier: Apache-2.0
"""Records searched for secrets and personal data, and rows freed from them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .detectors import Detector, excerpt
from .records import Record

# Whole numbers this long may be a card's or a person's.
_LONG_NUMBER = 10**7


@dataclass(frozen=True)
class Finding:
    """Something that should probably not be learned; `excerpt` shows around it, never itself."""

    line: int
    place: str
    kind: str
    detail: str
    key: str
    excerpt: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scan_record(record: Record, detector: Detector) -> Iterator[Finding]:
    """Everything found in any text of a record, in order."""
    for key, text in _texts(record.content, "", detector):
        spans = detector.find(text)
        for span in spans:
            shown = excerpt(text, spans, span)
            yield Finding(record.line, record.place, span.kind, span.detail, key, shown)


def redact_value(value: Any, detector: Detector) -> Any:
    """A row's value with placeholders; JSON texts (a call's arguments) stay JSON."""
    if isinstance(value, str):
        parsed = _parse(value)
        if isinstance(parsed, dict | list):
            redacted = redact_value(parsed, detector)
            return value if redacted == parsed else json.dumps(redacted, ensure_ascii=False)
        return detector.redact(value)
    if isinstance(value, dict):
        return _redact_keys(value, detector)
    if isinstance(value, list):
        return [redact_value(item, detector) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LONG_NUMBER:
        text = detector.redact(str(value))
        return value if text == str(value) else text
    return value


def _redact_keys(value: dict[str, Any], detector: Detector) -> dict[str, Any]:
    """Redacted items; keys that become the same placeholder are numbered."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = safe = detector.redact(str(key))
        again = 2
        # Keys that hold nothing keep their names.
        while safe in found or (safe != key and safe in value):
            safe, again = f"{name} {again}", again + 1
        found[safe] = redact_value(item, detector)
    return found


def _texts(value: Any, key: str, detector: Detector) -> Iterator[tuple[str, str]]:
    """(where, text) of every string, key and long number; where without what is found in keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            safe = detector.redact(str(name))
            path = f"{key}.{safe}" if key else safe
            if safe != name:
                yield path, str(name)
            yield from _texts(item, path, detector)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{key}[{i}]", detector)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LONG_NUMBER:
        yield key, str(value)


def _parse(text: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
