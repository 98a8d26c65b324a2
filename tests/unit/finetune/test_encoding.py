# SPDX-License-Identifier: Apache-2.0
"""Reasoning, long records, and what encoding counts, with a tokenizer that has all markers."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.config import Long
from finetune.data import encode_records
from finetune.encoding import IGNORED, Example, Rules, encode_long, encode_record
from finetune.records import Record
from modeling_dsv4.chat import FORMATS

SYSTEM = {"role": "system", "content": "rules"}


def _chat(*texts: str, system: bool = False, reasons: bool = False, tools: Any = None) -> Record:
    """Questions and answers in turn; an answer `x` reasons `about x`."""
    messages: list[dict[str, Any]] = [SYSTEM] if system else []
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        more = {"reasoning_content": f"about {text}"} if role == "assistant" and reasons else {}
        messages.append({"role": role, "content": text, **more})
    return Record(1, "messages", {"messages": messages, **({"tools": tools} if tools else {})})


def _learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([i for i in example.labels if i != IGNORED]).replace(
        FORMATS["v4"].eos, "<eos>"
    )


def test_examples_take_eight_bytes_a_token_and_count_their_labels() -> None:
    example = Example(3, [5, 6, 7], [IGNORED, 6, IGNORED])
    assert (len(example), example.num_labels, example.line) == (3, 1, 3)
    assert (example.input_ids, example.labels) == ([5, 6, 7], [IGNORED, 6, IGNORED])
    assert example._ids.itemsize + example._labels.itemsize == 8


def test_reasoning_counts_where_the_prompt_format_keeps_it(thinker: Any) -> None:
    chat = _chat("q", "a", "r", "b", reasons=True)
    expected = {
        "never": ("a<eos>b<eos>", 2),
        "auto": ("a<eos>about b</think>b<eos>", 1),
        "always": ("a<eos>about b</think>b<eos>", 1),
    }
    for thinking, (text, dropped) in expected.items():
        found = encode_long(chat, thinker, Rules(500, thinking=thinking))  # type: ignore[arg-type]
        assert _learned(found.examples[0], thinker) == text
        assert found.reasoning_dropped == dropped
    silent = _chat("q", "a")
    assert _learned(encode_record(silent, thinker, 500), thinker) == "a<eos>"
    always = encode_record(silent, thinker, 500, thinking="always")
    assert _learned(always, thinker) == "</think>a<eos>"


def test_with_tools_every_answer_keeps_its_reasoning(thinker: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = encode_long(_chat("q", "a", "r", "b", reasons=True, tools=tools), thinker, Rules(9999))
    assert _learned(found.examples[0], thinker) == "about a</think>a<eos>about b</think>b<eos>"
    assert found.reasoning_dropped == 0


def test_a_format_without_thinking_drops_reasoning_and_says_so(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = _chat("q", "a", reasons=True)
    _, report = encode_records([chat], tokenizer, 100)
    assert report.reasoning_dropped == 1
    with pytest.raises(ValueError, match="line 1: chat: variant plain has no thinking"):
        encode_records([chat], tokenizer, 100, thinking="always")


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_split_chats_learn_what_whole_ones_do(thinker: Any, loss_on: Any) -> None:
    texts = [f"{'question' if i % 2 == 0 else 'answer'} {i} " * (1 + i % 3) for i in range(12)]
    chat = _chat(*texts, system=True)
    whole = encode_record(chat, thinker, 10**6, loss_on)
    found = encode_long(chat, thinker, Rules(120, loss_on, "split"))
    assert len(found.examples) > 2
    assert max(map(len, found.examples)) <= 120
    learned = "".join(_learned(example, thinker) for example in found.examples)
    assert learned == _learned(whole, thinker)
    # Every piece is a prompt that the model could be given: its opening, then a question.
    start = FORMATS["v4"].bos + "rules" + FORMATS["v4"].user
    assert all(thinker.decode(one.input_ids).startswith(start) for one in found.examples)
    assert found.label_tokens == whole.num_labels


def test_results_of_tools_stay_with_their_question(thinker: Any) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    turn = [
        {"role": "user", "content": "q" * 20},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r" * 20},
        {"role": "assistant", "content": "a" * 20},
    ]
    chat = Record(1, "messages", {"messages": turn * 3})
    size = len(encode_record(Record(1, "messages", {"messages": turn}), thinker, 10**6))
    # Room for a question and its call behind a whole exchange, not for two exchanges.
    found = encode_long(chat, thinker, Rules(2 * size - 30, long="split"))
    user = FORMATS["v4"].user
    for example in found.examples:
        text = thinker.decode(example.input_ids)
        assert text.startswith(FORMATS["v4"].bos + user + "qqq")
        assert text.count("<tool_result>") == text.count("qqqqqqqqqqqqqqqqqqqq") == 1
    assert len(found.examples) == 3


@pytest.mark.parametrize(
    ("long", "examples", "counts"),
    [
        ("cut", 1, {"truncated": 1, "split": 0, "cut_labels": 21}),
        ("split", 3, {"truncated": 0, "split": 1, "cut_labels": 0}),
    ],
)
def test_long_texts_are_cut_or_split_and_counted(
    thinker: Any, long: Long, examples: int, counts: dict[str, int]
) -> None:
    records = [Record(1, "text", {"text": "x" * 39}), Record(2, "text", {"text": "short"})]
    found, report = encode_records(records, thinker, 20, long=long)
    assert len(found) == report.examples == examples + 1
    values = report.to_dict()
    assert {name: values[name] for name in counts} == counts
    assert report.label_tokens + report.cut_labels == 40 + 6


def test_rejected_records_name_their_line_and_length(thinker: Any) -> None:
    with pytest.raises(ValueError, match="line 9: wanted at most 20 tokens, got 32; raise max_len"):
        encode_long(Record(9, "text", {"text": "x" * 30}), thinker, Rules(20, long="reject"))
    assert encode_long(Record(9, "text", {"text": "x"}), thinker, Rules(20, long="reject")).examples
