# SPDX-License-Identifier: Apache-2.0
"""Answers read back: as the release reads them, in pieces of any size, and from our own text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from modeling_dsv4.chat import FORMATS, AnswerStream, encode_messages, parse_answer

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "chat" / "v4_tools.json").read_text(encoding="utf-8")
)
EOS = FORMATS["v4"].eos
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" '
    'string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
LETTERS = [
    "a",
    "é",
    "🙂",
    " ",
    "\n",
    "\n\n",
    '"',
    "<",
    ">",
    "</",
    "\\",
    "｜",
    "<tool_result>",
    "0",
    "{",
]


def merged(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind of text as one piece."""
    out: list[tuple[str, str]] = []
    for kind, text in pieces:
        if out and out[-1][0] == kind != "tool_call":
            out[-1] = (kind, out[-1][1] + text)
        else:
            out.append((kind, text))
    return out


def in_pieces(text: str, size: int, thinking: bool) -> list[tuple[str, str]]:
    stream = AnswerStream("v4", thinking)
    pieces = [p for i in range(0, len(text), size) for p in stream.feed(text[i : i + size])]
    return merged([*pieces, *stream.close()])


@pytest.mark.parametrize("case", GOLDEN["answers"])
def test_an_answer_is_read_as_the_official_reader_does(case: dict[str, Any]) -> None:
    got = parse_answer(case["text"], "v4", thinking=case["thinking"])
    assert got == case["message"]
    # Generation may leave the end out.
    assert parse_answer(case["text"].removesuffix(EOS), thinking=case["thinking"]) == got


@pytest.mark.parametrize("case", GOLDEN["answers"])
def test_pieces_of_any_size_say_the_same(case: dict[str, Any]) -> None:
    whole = in_pieces(case["text"], len(case["text"]), case["thinking"])
    for size in (1, 2, 3, 5, 11):
        assert in_pieces(case["text"], size, case["thinking"]) == whole
    said = {
        kind: "".join(text for k, text in whole if k == kind) for kind in ("content", "reasoning")
    }
    assert said["content"] == case["message"]["content"]
    assert said["reasoning"] == case["message"]["reasoning_content"]
    calls = [json.loads(text) for kind, text in whole if kind == "tool_call"]
    wanted = [called["function"] for called in case["message"]["tool_calls"]]
    assert [(c["name"], c["arguments"]) for c in calls] == [
        (w["name"], json.loads(w["arguments"])) for w in wanted
    ]


def test_no_marker_is_shown_by_halves_and_text_is_not_held_for_long() -> None:
    stream = AnswerStream("v4", thinking=True)
    assert stream.feed("so </th") == [("reasoning", "so ")]
    assert stream.feed("at </think") == [("reasoning", "</that ")]
    assert stream.feed(">yes\n") == [("content", "yes")]
    assert stream.feed("\n<｜DS") == []
    assert stream.feed("x") == [("content", "\n\n<｜DSx")]
    assert stream.feed(CALLS[:-1]) == [("tool_call", '{"name": "f", "arguments": {"a": 1}}')]
    assert stream.feed(">" + EOS[:3]) == []
    assert stream.feed(EOS[3:] + "!") == []
    assert (stream.part, stream.rest, stream.close()) == ("end", "!", [])


def test_what_was_held_is_shown_when_the_answer_ends() -> None:
    stream = AnswerStream("v4")
    assert stream.feed("a\n\n<") == [("content", "a")]
    assert stream.close() == [("content", "\n\n<")]


@pytest.mark.parametrize(
    ("text", "thinking", "wanted"),
    [
        ("why" + EOS, True, "wanted </think> behind the reasoning"),
        ("why", True, "wanted </think> behind the reasoning"),
        ("a" + EOS + "b", False, "nothing behind the end, got 'b'"),
        ("a</think>b", False, "the marker </think>"),
        ("a<｜User｜>b", False, "the marker <｜User｜>"),
        ("a<｜DSML｜b" + EOS, False, "the marker ｜DSML｜"),
        (CALLS[:-3], False, "tool call: wanted </｜DSML｜tool_calls>, got the end"),
        (CALLS + "x", False, "the end behind the tool calls, got 'x'"),
        (CALLS.replace(">1<", ">{<"), False, "wanted JSON as parameter 'a'"),
        (CALLS.replace('name="f"', ""), False, "wanted an invoke with a name"),
        (CALLS.replace('string="false"', ""), False, "tool call f: wanted a parameter"),
        (CALLS.replace("\n</｜DSML｜tool", "x</｜DSML｜tool"), False, "wanted an invoke, got"),
    ],
)
def test_a_malformed_answer_is_refused(text: str, thinking: bool, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        parse_answer(text, thinking=thinking)


def test_a_parameter_comes_once() -> None:
    parameter = CALLS[CALLS.index("<｜DSML｜parameter") : CALLS.index("</｜DSML｜invoke>")]
    with pytest.raises(ValueError, match="parameter 'a' came twice"):
        parse_answer(CALLS.replace(parameter, parameter * 2))


def test_a_format_without_thinking_has_no_reasoning_to_split() -> None:
    with pytest.raises(ValueError, match="plain has no thinking"):
        AnswerStream("plain", thinking=True)
    assert parse_answer(f"a{CALLS}<eos>", "plain")["content"] == f"a{CALLS}"


# --- round trip ---------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randrange(12)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return (random_text(rng), rng.randrange(-9, 99), rng.random(), None, rng.random() < 0.5)[kind]


def random_answer(rng: random.Random, thinking: bool) -> dict[str, Any]:
    calls = [
        {
            "type": "function",
            "function": {
                "name": rng.choice(["f", "ns::g", "имя"]),
                "arguments": json.dumps(
                    {f"k{i}": random_value(rng) for i in range(rng.randrange(4))},
                    ensure_ascii=False,
                ),
            },
        }
        for _ in range(rng.randrange(3))
    ]
    return {
        "role": "assistant",
        "content": random_text(rng),
        "reasoning_content": random_text(rng) if thinking else "",
        "tool_calls": calls,
    }


@pytest.mark.parametrize("variant", ["v4", "v4.1"])
@pytest.mark.parametrize("thinking", [False, True])
def test_random_conversations_are_read_back_as_they_were(variant: str, thinking: bool) -> None:
    rng = random.Random(f"{variant}{thinking}")
    for _ in range(100):
        messages: list[dict[str, Any]] = []
        for _ in range(rng.randrange(1, 4)):
            messages.append({"role": "user", "content": random_text(rng)})
            messages.append(random_answer(rng, thinking))
            calls = messages[-1]["tool_calls"]
            messages += [{"role": "tool", "content": random_text(rng)} for _ in calls]
        chat = encode_messages(messages, variant, thinking=thinking, drop_past_thinking=False)
        read = [
            parse_answer(chat.text[start:stop], variant, thinking=thinking)
            for start, stop in chat.spans
        ]
        assert read == [message for message in messages if message["role"] == "assistant"]
