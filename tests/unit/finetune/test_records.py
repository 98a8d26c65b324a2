# SPDX-License-Identifier: Apache-2.0
"""Records: three forms, faults named by line, splits by content."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.records import Record, read_records, split_records

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR = {"prompt": "p", "completion": "c"}
TEXT = {"text": "t"}


def _write(path: Path, *lines: Any) -> Path:
    file = path / "data.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def _texts(count: int) -> list[Record]:
    return [Record(i + 1, "text", {"text": f"text {i}"}) for i in range(count)]


def test_three_forms_may_be_mixed_and_other_keys_are_left_alone(tmp_path: Path) -> None:
    records = read_records(_write(tmp_path, CHAT, PAIR | {"id": 7}, TEXT, PAIR))
    assert [record.form for record in records] == ["messages", "prompt", "text", "prompt"]
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert records[1].content == PAIR
    assert [record.layout for record in records].count("prompt_completion") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"text": "a \ud800 b"}', "half of a surrogate pair"),
        ("[1]", "wanted an object, got list"),
        ("", "empty line"),
        ({}, "got no keys"),
        ({"question": "q"}, "got question"),
        (CHAT | TEXT, "got messages and text"),
        ({"completion": "c"}, "`completion` without `prompt`"),
        ({"prompt": "p"}, "`completion`: wanted text, got None"),
        ({"prompt": "p", "completion": " "}, "`completion`: wanted text, got blank text"),
        ({"text": 3}, "`text`: wanted text, got a number"),
        ({"messages": []}, "wanted a list of messages"),
        ({"messages": CHAT["messages"][:1]}, "wanted an assistant answer"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0: wanted a role"),
        ({"messages": ["x"]}, "message 0: wanted a role"),
        (CHAT | {"tools": {"name": "f"}}, "`tools`: wanted a list of schemas"),
        (
            {"messages": [*CHAT["messages"], {"role": "tool"}]},
            r"message 2 \(tool\): wanted text, got None",
        ),
        (
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": ""}]},
            r"message 1 \(assistant\): wanted text, got blank text",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.jsonl: line 2: .*{message}"):
        read_records(_write(tmp_path, TEXT, line, CHAT))


def test_bytes_that_are_no_utf8_are_a_fault_of_their_line(tmp_path: Path) -> None:
    file = _write(tmp_path, TEXT)
    file.write_bytes(file.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_records(file)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: .*line 5: .*and 3 more lines"):
        read_records(_write(tmp_path, *["{"] * 8))


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="wanted at least one record, got an empty file"):
        read_records(file)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted \.jsonl .*, got \.docx"):
        read_records(tmp_path / "data.docx")


def test_the_split_is_a_partition_of_the_asked_size() -> None:
    records = _texts(50)
    train, held = split_records(records, 0.2, seed=1)
    assert len(held) == 10
    assert sorted([*train, *held], key=lambda record: record.line) == records


def test_the_split_depends_on_content_and_seed_alone() -> None:
    records = _texts(50)
    held = {r.content["text"] for r in split_records(records, 0.2, seed=1)[1]}
    again = {r.content["text"] for r in split_records(records[::-1], 0.2, seed=1)[1]}
    other = {r.content["text"] for r in split_records(records, 0.2, seed=2)[1]}
    assert held == again != other


def test_copies_of_a_record_land_on_one_side() -> None:
    records = _texts(20) * 3
    train, held = split_records(records, 0.3)
    assert not {r.digest() for r in train} & {r.digest() for r in held}
    assert len(held) == 18


def test_small_data_still_leaves_something_on_both_sides() -> None:
    train, held = split_records(_texts(2), 0.01)
    assert (len(train), len(held)) == (1, 1)
    assert split_records(_texts(2), 0) == (_texts(2), [])
    with pytest.raises(ValueError, match="at least 2 distinct records, got 1"):
        split_records(_texts(1) * 4, 0.5)


def test_a_missing_file_is_told_with_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: wanted a \.jsonl file of records"):
        read_records(tmp_path / "none.jsonl")


def test_a_chat_keeps_its_tools_and_calls_may_stand_without_text(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        CHAT["messages"][0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
        CHAT["messages"][1],
    ]
    with_tools = {"messages": messages, "tools": tools}
    records = read_records(_write(tmp_path, with_tools, {"messages": messages, "tools": None}))
    assert records[0].content == with_tools
    assert records[1].content == {"messages": messages}
    assert records[0].digest() != records[1].digest()
