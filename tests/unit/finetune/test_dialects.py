# SPDX-License-Identifier: Apache-2.0
"""ShareGPT and Alpaca become chats; what cannot is said."""

import json
from typing import Any

import pytest

from finetune.dialects import find_layout
from finetune.records import parse_record


def _messages(row: dict[str, Any]) -> Any:
    record = parse_record(json.dumps(row), 1)
    assert record.form == "messages"
    return record.content["messages"]


def test_sharegpt_becomes_a_chat_with_calls_and_results() -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    schema = {"name": "f", "parameters": {}}
    row = {
        "system": "s",
        "tools": json.dumps([schema]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "a"},
        ],
    }
    record = parse_record(json.dumps(row), 1)
    assert record.layout == "sharegpt"
    assert record.content == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": schema}],
    }


def test_alpaca_becomes_a_question_with_its_input_and_an_answer() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "text": "all of it again"}
    assert _messages(row) == [
        {"role": "user", "content": "Add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    row = {"instruction": "Go", "input": "", "output": "x", "system": "s", "history": [["q", "a"]]}
    assert [(m["role"], m["content"]) for m in _messages(row)] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Go"),
        ("assistant", "x"),
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key: str) -> None:
    answer = {"role": "assistant", "content": "a", key: "because"}
    assert _messages({"messages": [{"role": "user", "content": "q"}, answer]})[1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "because",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, "`conversations`: wanted a list of turns"),
        ({"conversations": ["x"]}, "turn 0: wanted an object, got str"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: wanted `from` to be one of"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "turn 0: wanted a call"),
        ({"conversations": [{"from": "gpt"}]}, r"message 0 \(assistant\): wanted text, got None"),
        ({"instruction": "x"}, "`instruction` without `output`"),
        ({"instruction": "x", "output": ""}, r"message 1 \(assistant\): wanted text"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "`history`: wanted a list of"),
        ({"conversations": [], "messages": []}, "got messages and conversations"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "put all messages into `messages`"),
        ({"messages": [], "tools": "{"}, "`tools`: wanted a list of schemas"),
    ],
)
def test_what_cannot_be_brought_into_a_form_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_record(json.dumps(row), 1)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "hunter2"}]},
        {"text": {"hunter2": 1}},
        {"conversations": [{"from": "hunter2"}]},
        {"instruction": "q", "output": "a", "history": ["hunter2"]},
        {"messages": [], "tools": "hunter2"},
        {"hunter2 is no name": 1},
    ],
)
def test_a_reason_never_shows_content(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted") as caught:
        parse_record(json.dumps(row), 1)
    assert "hunter2" not in str(caught.value)


def test_questions_with_rewards_are_told_where_they_are_read() -> None:
    for rule in ({"answer": "a"}, {"regex": "a"}, {"rewards": []}):
        with pytest.raises(ValueError, match="read by `train --objective grpo` and `eval --tasks`"):
            find_layout({"prompt": "q", **rule})
    assert find_layout({"prompt": "q", "completion": "c", "answer": "a"}) == "prompt_completion"


def test_preferences_are_recognised() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"got preferences .* `train --objective dpo`"):
        parse_record(json.dumps(row), 1)
