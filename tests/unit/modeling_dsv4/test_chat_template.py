# SPDX-License-Identifier: Apache-2.0
"""The Jinja templates against `encode_messages`, text and answers, through transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_dsv4.chat import FORMATS, encode_messages
from modeling_dsv4.chat_format import DSML, TASKS
from modeling_dsv4.chat_template import set_chat_template, write_template

FOLDER = Path(__file__).parents[2] / "golden" / "chat"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"a": "é\"<'"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": "x", "b": [1]}}}


def golden(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))["cases"]


def conversations() -> list[Any]:
    """(variant, messages, options) of every golden case; V4's tool cases as V4.1 too."""
    found = []
    for variant, name in (("v4", "v4.json"), ("v4.1", "v41.json")):
        for case in golden(name):
            keys = ("thinking", "drop_past_thinking", "reasoning_effort")
            options = {key: case[key] for key in keys if case.get(key) is not None}
            found.append((variant, case["name"], case["messages"], options))
    for case in golden("v4_tools.json"):
        for text in case["texts"]:
            options = {key: value for key, value in text.items() if key != "text"}
            found += [(v, case["name"], case["messages"], options) for v in ("v4", "v4.1")]
    return [pytest.param(v, m, o, id=f"{v}-{n}-{i}") for i, (v, n, m, o) in enumerate(found)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and markers: no token is longer than a letter, so masks tell every letter's side."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {piece: i for i, piece in enumerate(sorted(letters))}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([*FORMATS["v4.1"].markers(), *TASKS.values(), DSML])
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("variant", "messages", "options"), conversations())
def test_the_template_writes_what_the_encoder_writes_and_marks_its_spans(
    tokenizer: PreTrainedTokenizerFast, variant: str, messages: Any, options: dict[str, Any]
) -> None:
    set_chat_template(tokenizer, variant)
    chat = encode_messages(messages, variant, **options)
    batch = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_assistant_tokens_mask=True,
        return_dict=True,
        **options,
    )
    assert tokenizer.decode(batch["input_ids"], skip_special_tokens=False) == chat.text
    encoded = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = [
        int(any(start < span_stop and stop > span_start for span_start, span_stop in chat.spans))
        for start, stop in encoded["offset_mapping"]
    ]
    assert batch["assistant_masks"] == wanted


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("variant", ["v4", "v4.1"])
def test_tools_and_format_of_the_conversation(
    tokenizer: PreTrainedTokenizerFast, variant: str, thinking: bool, add_generation_prompt: bool
) -> None:
    set_chat_template(tokenizer, variant)
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL]}
    result = {"role": "tool", "content": [{"type": "text", "text": "a"}]}
    options: dict[str, Any] = {
        "tools": TOOLS,
        "thinking": thinking,
        "add_generation_prompt": add_generation_prompt,
    }
    for form in (None, {"type": "json_object"}):
        for start in ([], [{"role": "system", "content": "s"}]):
            messages = [*start, question, answer, result]
            got = tokenizer.apply_chat_template(
                messages, tokenize=False, response_format=form, **options
            )
            want = encode_messages(messages, variant, response_format=form, **options)
            assert got == want.text


def test_plain_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "s\n"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": " b"},
        {"role": "assistant", "content": "c"},
    ]
    set_chat_template(tokenizer, "plain")
    for count in (1, 2, 3, 4):
        got = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=count > 1
        )
        if count > 1:
            assert got == encode_messages(messages[:count], "plain").text
        else:
            assert got == "<bos>s\n"


def test_a_started_answer_can_be_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, "v4")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is"}]
    got = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    open_end = [messages[0], {**messages[1], "wo_eos": True}]
    assert got == encode_messages(open_end).text


def test_the_template_follows_from_the_tokenizer_and_is_saved_with_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert set_chat_template(tokenizer) == "v4.1"
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == write_template("v4.1")


def test_arguments_as_text_and_unknown_roles_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    set_chat_template(tokenizer, "v4")
    question = {"role": "user", "content": "q"}
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    for message, wanted in (
        ({"role": "assistant", "content": "", "tool_calls": [call]}, "as an object, not as text"),
        ({"role": "model", "content": "x"}, "message 1: wanted a known role, got model"),
    ):
        with pytest.raises(Exception, match=wanted):
            tokenizer.apply_chat_template([question, message], tokenize=False)
