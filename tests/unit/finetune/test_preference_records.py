# SPDX-License-Identifier: Apache-2.0
"""Preferences as records: bad lines named, one prompt for both answers, what a cut leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.encoding import IGNORED, Rules
from finetune.preference_records import encode_sides, opposite, read_preferences
from finetune.records import Record, split_records

USER = {"role": "user", "content": "q"}
OTHER = {"role": "user", "content": "another"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def _write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "objective", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "dpo",
            "line 1: wanted prompt, chosen, rejected, got",
        ),
        ({"prompt": "a", "completion": "b", "label": 1}, "kto", "`label`: wanted true or false"),
        ({"prompt": [], "chosen": "b", "rejected": []}, "dpo", "wanted messages, as the prompt is"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "orpo", "`chosen`: wanted text, got list"),
        ({"prompt": [], "chosen": [], "rejected": []}, "dpo", "wanted one assistant message"),
        ([], "dpo", "wanted an object, got list"),
        (
            {"prompt": " ", "chosen": "b", "rejected": "c"},
            "dpo",
            "`prompt`: wanted text, got blank",
        ),
        ({"prompt": "a", "chosen": "b ", "rejected": " b"}, "orpo", "`chosen` equal to `rejected`"),
        (
            {"prompt": [USER], "chosen": [NO], "rejected": [{**NO, "content": "no "}]},
            "dpo",
            "`chosen` equal to `rejected`",
        ),
        ({"chosen": [USER, YES], "rejected": [OTHER, NO]}, "dpo", "to share a prompt, .* at 0"),
        ({"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]}, "dpo", "got 2 and 4 messages"),
        (
            {"prompt": "another", "chosen": [USER, YES], "rejected": [USER, NO]},
            "dpo",
            "wanted `chosen` to go on from `prompt`",
        ),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": "{"},
            "dpo",
            "`prompt` with `chosen`: `tools`: wanted a list of schemas",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_preferences(_write(tmp_path / "x.jsonl", [line]), objective)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": ["hi"], "rejected": ["ho"]},
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "p", "chosen": " ", "rejected": "x"},
    ],
)
def test_all_bad_pairs_are_counted(tmp_path: Path, line: dict[str, Any]) -> None:
    good = {"prompt": "a\u2028b", "chosen": "x", "rejected": "y"}
    file = tmp_path / "x.jsonl"
    lines = [json.dumps(one, ensure_ascii=False) for one in [good, *[line] * 7]]
    file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"jsonl: line 2: .*line 6: .*and 2 more lines"):
        read_preferences(file, "dpo")


def test_conversations_that_share_their_prompt_are_pairs(tmp_path: Path) -> None:
    talk = [OTHER, YES, USER]
    rows = [
        {"prompt": talk, "chosen": [YES], "rejected": [NO]},
        {"chosen": [*talk, YES], "rejected": [*talk, NO], "score": 3},
        {"prompt": " q", "chosen": [*talk, YES], "rejected": [*talk, NO]},
    ]
    found = read_preferences(_write(tmp_path / "x.jsonl", rows), "dpo")
    assert [one.content for one in found] == [rows[0]] * 3


def test_labels_of_a_table_are_truth_values(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,label\nq,yes,True\nq,no,false\n")
    assert [one.content["label"] for one in read_preferences(file, "kto")] == [True, False]


def _pair(**changes: Any) -> Record:
    content = {"prompt": "meter 1", "chosen": " lasts", "rejected": " ends now"}
    return Record(1, "preference", content | changes, "preference")


def test_both_answers_follow_one_prompt_and_alone_are_learned(thinker: Any) -> None:
    talk = [OTHER, YES, USER]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for record in (_pair(), _pair(prompt=talk, chosen=[YES], rejected=[NO], tools=tools)):
        encoded = encode_sides(record, thinker, Rules(4096))
        starts = [
            one.labels.index(next(i for i in one.labels if i >= 0)) for one in encoded.examples
        ]
        one, other = encoded.examples
        assert encoded.sides == ("chosen", "rejected")
        assert one.input_ids[: starts[0]] == other.input_ids[: starts[1]]
        assert one.labels[starts[0] :] == one.input_ids[starts[0] :]
        assert set(one.labels[: starts[0]]) == {IGNORED}
        assert encoded.label_tokens == one.num_labels + other.num_labels
        assert encoded.tokens == max(len(one), len(other))
    assert '"name": "f"' in thinker.decode(one.input_ids)


def test_reasoning_of_one_answer_decides_how_both_are_written(thinker: Any) -> None:
    deep = [{**YES, "reasoning_content": "hm"}]
    record = _pair(prompt=[USER], chosen=deep, rejected=[NO])
    shown = [
        thinker.decode(one.input_ids) for one in encode_sides(record, thinker, Rules(512)).examples
    ]
    assert "hm</think>" in shown[0]
    assert all("<think>" in one for one in shown)
    never = encode_sides(record, thinker, Rules(512, thinking="never"))
    assert all("<think>" not in thinker.decode(one.input_ids) for one in never.examples)
    assert never.reasoning_dropped == 1


def test_what_a_cut_leaves_equal_or_without_an_answer_is_not_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = encode_sides(_pair(), tokenizer, Rules(512))
    start = len(whole.examples[0]) - whole.examples[0].num_labels
    cut = encode_sides(_pair(), tokenizer, Rules(start + 1))
    assert [one.num_labels for one in cut.examples] == [1, 1]
    assert cut.truncated
    assert encode_sides(_pair(), tokenizer, Rules(start)).examples == ()
    # Two tokens of the answers are the same.
    alike = _pair(chosen=" lasts long", rejected=" lasts on")
    assert encode_sides(alike, tokenizer, Rules(start + 2)).examples == ()
    # An earlier answer is no answer, however the cut falls.
    talk = _pair(prompt=[OTHER, {**YES, "content": "y" * 60}, USER], chosen=[YES], rejected=[NO])
    assert encode_sides(talk, tokenizer, Rules(40)).examples == ()
    with pytest.raises(ValueError, match=r"line 1: wanted at most 4 tokens, got \d+; raise"):
        encode_sides(_pair(), tokenizer, Rules(4, long="reject"))


def test_a_prompt_is_on_one_side_of_the_split() -> None:
    records = [
        Record(i, "preference", {"prompt": f"p{i % 5}", "chosen": f"a{i}", "rejected": "b"})
        for i in range(40)
    ]
    train, held = split_records(records, 0.4)
    assert len(train) == 24
    assert not {r.content["prompt"] for r in train} & {r.content["prompt"] for r in held}


def test_the_opposite_of_the_opposite_is_the_same() -> None:
    rated = Record(1, "rated", {"prompt": "p", "completion": "c", "label": True}, "rated")
    for one in (_pair(), rated):
        assert opposite(one) != one
        assert opposite(opposite(one)) == one
