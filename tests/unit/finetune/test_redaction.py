# SPDX-License-Identifier: Apache-2.0
"""Findings say where, never what; redacted rows stay rows."""

import json
from typing import Any

import pytest

from finetune.detectors import Detector
from finetune.records import Record, parse_record
from finetune.redaction import redact_value, scan_record

MAIL, CARD = "jo@mail.corp-site.de", 4111111111111111


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


def _row(arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "pay", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"I am {MAIL}"},
            {"role": "assistant", "content": "", "reasoning_content": MAIL, "tool_calls": [call]},
        ]
    }


@pytest.mark.parametrize("as_text", [False, True])
def test_every_text_of_a_record_is_searched(detector: Detector, as_text: bool) -> None:
    arguments: Any = {"card": CARD, "to": [MAIL], "n": 3, "now": True}
    row = _row(json.dumps(arguments) if as_text else arguments)
    record = parse_record(json.dumps(row), 7)
    found = list(scan_record(record, detector))
    path = "messages[1].tool_calls[0].function.arguments"
    keys = [path] * 2 if as_text else [f"{path}.card", f"{path}.to[0]"]
    assert [(one.kind, one.key) for one in found] == [
        ("email", "messages[0].content"),
        ("email", "messages[1].reasoning_content"),
        ("card", keys[0]),
        ("email", keys[1]),
    ]
    shown = json.dumps([one.to_dict() for one in found])
    assert MAIL not in shown
    assert str(CARD) not in shown
    assert found[0].line == 7


@pytest.mark.parametrize("as_text", [False, True])
def test_a_redacted_row_is_a_record_and_its_arguments_stay_json(
    detector: Detector, as_text: bool
) -> None:
    arguments: Any = {"card": CARD, "to": [MAIL], "n": 3, "now": True}
    row = redact_value(_row(json.dumps(arguments) if as_text else arguments), detector)
    record = parse_record(json.dumps(row), 1)
    call = record.content["messages"][1]["tool_calls"][0]["function"]
    got = json.loads(call["arguments"]) if as_text else call["arguments"]
    assert got == {"card": "[CARD]", "to": ["[EMAIL]"], "n": 3, "now": True}
    assert list(scan_record(record, detector)) == []


def test_what_holds_nothing_is_not_touched(detector: Detector) -> None:
    text = '{"a":  1,\t"b": [2]}'
    assert redact_value({"x": text, "y": [None, 1.5, 12345678, False]}, detector) == {
        "x": text,
        "y": [None, 1.5, 12345678, False],
    }


def test_pairs_and_texts_are_searched_too(detector: Detector) -> None:
    pair = Record(1, "prompt", {"prompt": MAIL, "completion": f"and {MAIL}"})
    assert [one.key for one in scan_record(pair, detector)] == ["prompt", "completion"]


def test_keys_are_searched_and_never_shown(detector: Detector) -> None:
    row = _row({MAIL: 1, "sam@mail.corp-site.de": {"inner": MAIL}, "n": 2})
    found = list(scan_record(parse_record(json.dumps(row), 1), detector))
    path = "messages[1].tool_calls[0].function.arguments.[EMAIL]"
    assert [one.key for one in found][2:] == [path, path, f"{path}.inner"]
    safe = redact_value(row, detector)
    assert "corp-site" not in json.dumps(safe) + json.dumps([one.to_dict() for one in found])
    call = safe["messages"][1]["tool_calls"][0]["function"]
    assert call["arguments"] == {"[EMAIL]": 1, "[EMAIL] 2": {"inner": "[EMAIL]"}, "n": 2}
