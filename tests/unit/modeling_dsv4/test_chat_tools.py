# SPDX-License-Identifier: Apache-2.0
"""Tools, tasks and continued answers against the release's own encoder; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_dsv4.chat import FORMATS, encode_messages
from modeling_dsv4.chat_tools import write_calls, write_tools

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "chat" / "v4_tools.json").read_text(encoding="utf-8")
)
CASES = [
    pytest.param(case["messages"], text, id=f"{case['name']}-{i}")
    for case in GOLDEN["cases"]
    for i, text in enumerate(case["texts"])
]
TOOLS = [{"type": "function", "function": {"name": "ns::look", "parameters": {}}}]
USER = {"role": "user", "content": "q"}


def call(name: str = "look", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def answer(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **more}


def result(name: str, content: str = "r") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": content}


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "wanted"), CASES)
def test_text_equals_the_official_encoder(messages: Any, wanted: dict[str, Any]) -> None:
    options = {key: value for key, value in wanted.items() if key != "text"}
    assert encode_messages(messages, "v4", **options).text == wanted["text"]


def test_arguments_may_come_as_json_text() -> None:
    arguments = {"a": 'x"\n', "b": {"c": [1, None, "é"]}}
    texts = [
        encode_messages([USER, answer(call(arguments=given))]).text
        for given in (arguments, json.dumps(arguments))
    ]
    assert texts[0] == texts[1]
    assert '<｜DSML｜parameter name="b" string="false">{"c": [1, null, "é"]}</' in texts[0]


def test_tools_of_the_conversation_are_those_of_its_system_message() -> None:
    system = {"role": "system", "content": "s"}
    form = {"type": "json_object"}
    given = encode_messages([system, USER], tools=TOOLS, response_format=form)
    own = encode_messages([{**system, "tools": TOOLS, "response_format": form}, USER])
    assert given == own
    made = encode_messages([USER], tools=TOOLS)
    assert made == encode_messages([{"role": "system", "content": "", "tools": TOOLS}, USER])
    with pytest.raises(ValueError, match="tools came twice"):
        encode_messages([{**system, "tools": TOOLS}, USER], tools=TOOLS)


def test_v41_differs_by_its_tags_and_its_system_marker() -> None:
    messages = [USER, answer(call("ns::look", {"n": 1}, id="a")), result("a")]
    v4, v41 = (encode_messages(messages, name, tools=TOOLS).text for name in ("v4", "v4.1"))
    assert (
        '<｜DSML｜ invoke name="ns::look">\n<｜DSML｜ parameter name="n" string="false">1</' in v41
    )
    assert "<｜DSML｜ calls>" in v41
    back = v41.replace("<｜System｜>", "").replace("｜ calls", "｜tool_calls")
    back = back.replace("｜ invoke", "｜invoke").replace("｜ parameter", "｜parameter")
    assert back == v4


def test_tools_keep_past_reasoning() -> None:
    messages = [USER, {"role": "assistant", "content": "a", "reasoning_content": "why"}, USER]
    assert "why" not in encode_messages(messages, thinking=True).text
    assert "why</think>a" in encode_messages(messages, thinking=True, tools=TOOLS).text


def test_without_a_generation_prompt_the_text_ends_with_the_last_message() -> None:
    for messages in ([USER], [{**USER, "task": "query"}], [{**USER, "task": "action"}]):
        got = encode_messages(messages, add_generation_prompt=False).text
        assert got == FORMATS["v4"].bos + "<｜User｜>q"


# --- spans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "wanted"), CASES)
def test_spans_are_what_lies_between_the_hand_over_and_the_end(
    messages: Any, wanted: dict[str, Any]
) -> None:
    options = {key: value for key, value in wanted.items() if key != "text"}
    chat = encode_messages(messages, "v4", **options)
    said = [message for message in messages if message["role"] == "assistant"]
    assert len(chat.spans) == len(said)
    openers = ("<｜Assistant｜><think>", "<｜Assistant｜></think>", "｜>")
    for (start, stop), message in zip(chat.spans, said, strict=True):
        span = chat.text[start:stop]
        assert chat.text[:start].endswith(openers)
        assert message["content"] is None or message["content"] in span
        assert span.endswith("<｜end▁of▁sentence｜>") != bool(message.get("wo_eos"))
        assert span.count("<｜DSML｜invoke") == len(message.get("tool_calls") or ())
        assert "<｜User｜>" not in span


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([USER, answer({"name": "look"})], "tool call 0: wanted"),
        ([USER, answer(call(""))], "tool call 0: wanted"),
        ([USER, answer(call('a"b'))], "tool call 0: wanted"),
        ([USER, answer(call(arguments="[1]"))], r"\(look\): wanted arguments as a JSON object"),
        ([USER, answer(call(arguments="{"))], "wanted arguments as a JSON object, got '{'"),
        ([USER, answer(call(arguments={"": 1}))], "wanted a parameter's name"),
        ([USER, answer(call(arguments={"a": {1, 2}}))], "wanted a JSON value"),
        ([USER, answer(call(arguments={"a": "</｜DSML｜parameter>"}))], "the marker ｜DSML｜"),
        ([USER, answer(call(arguments={"a": ["<｜User｜>"]}))], "the marker <｜User｜>"),
        ([USER, answer(call(), content="<｜DSML｜invoke")], "the marker ｜DSML｜"),
        ([USER, answer(call(id="a")), result("b")], r"a call before it \(a\), got 'b'"),
        ([USER, answer(call(id="a")), result("a", "<｜title｜>")], "the marker <｜title｜>"),
        ([result("a")], "message 0: wanted an answer with tool_calls before"),
    ],
)
def test_calls_that_could_not_be_read_back_are_refused(messages: list[Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        encode_messages(messages)


def test_schemas_of_another_shape_are_refused() -> None:
    form = FORMATS["v4"]
    with pytest.raises(ValueError, match=r'tool 0: wanted \{"type": "function"'):
        write_tools([{"name": "look"}], form)
    with pytest.raises(ValueError, match="wanted a list, got dict"):
        write_tools(TOOLS[0], form)  # type: ignore[arg-type]


def test_a_tool_may_write_of_thinking() -> None:
    assert "</think>" in write_calls([call(arguments={"code": "</think>"})], FORMATS["v4"])


def test_plain_has_no_tools() -> None:
    for messages in (
        [USER, answer(call())],
        [{"role": "tool", "content": "x"}],
        [{**USER, "task": "title"}],
    ):
        with pytest.raises(ValueError, match="this format has no tools and tasks"):
            encode_messages(messages, "plain")
    with pytest.raises(ValueError, match="no tools and tasks, got tools"):
        encode_messages([USER], "plain", tools=TOOLS)
