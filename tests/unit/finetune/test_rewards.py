# SPDX-License-Identifier: Apache-2.0
"""Rewards by rules from a file: read strictly, added up, held out, and checked like other data."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.config import RunConfig
from finetune.data_check import check_data
from finetune.encoding import Rules
from finetune.records import Record, iter_records
from finetune.rewards import Tasks, prepare_tasks, read_task

GOOD: list[Any] = [
    {"prompt": "how long", "answer": ["nine years", "9 years"], "id": 1},
    {"prompt": "how long", "regex": r"\d+"},
    {"messages": [{"role": "user", "content": "q"}], "rewards": [{"regex": "y"}], "stop": "\n"},
]


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_weights_of_all_rules_that_hold_are_added() -> None:
    rules = [
        {"answer": "9 years"},
        {"regex": r"\d", "weight": 0.5},
        {"regex": "sorry", "weight": -1},
    ]
    task = read_task({"prompt": "q", "rewards": rules, "stop": "."}, 1)
    assert [task.reward(text) for text in ("9 years", " 9 years. sorry", "9, sorry", "no")] == [
        1.5,
        1.5,
        -0.5,
        0.0,
    ]
    single = read_task({"prompt": "q", "answer": ["a", "b"]}, 1)
    assert [single.reward(text) for text in ("b", "ab")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "wanted an object, got list"),
        ({"prompt": "q"}, "wanted one of `answer`, `regex` and `rewards`, got none"),
        ({"prompt": "q", "answer": "a", "regex": "b"}, "got answer and regex"),
        ({"prompt": "q", "regex": "("}, "`regex`: wanted an expression"),
        ({"answer": "a"}, "wanted one of `prompt` and `messages`"),
        ({"prompt": "q", "answer": 0, "choices": ["a"]}, "`choices`: questions with rewards have"),
        ({"prompt": "q", "regex": "a", "tools": []}, "`tools`: questions with rewards have none"),
        ({"prompt": "q", "rewards": []}, "`rewards`: wanted a list of rules, got a list of 0"),
        ({"prompt": "q", "rewards": [{"regexp": "b"}]}, "rule 0: wanted `answer` or `regex`"),
        ({"prompt": "q", "rewards": [{"weight": 1}]}, "rule 0: wanted one of `answer`"),
        (
            {"prompt": "q", "rewards": [{"regex": "a"}, {"regex": "b", "weight": 0}]},
            "rule 1: `weight`: wanted a finite number other than 0",
        ),
    ],
)
def test_bad_lines_say_why(tmp_path: Path, line: Any, message: str) -> None:
    (found,) = iter_records(_write(tmp_path / "t.jsonl", line), "grpo")
    assert not isinstance(found, Record)
    assert message in str(found)


def test_questions_are_checked_before_a_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [*GOOD, {"prompt": "q"}, {"prompt": "long " * 40, "answer": "mail jo@corp-site.de"}]
    file = _write(tmp_path / "t.jsonl", *rows)
    check = check_data(file, tokenizer, rules=Rules(30), objective="grpo")
    assert [one.line for one in check.data.bad] == [4, 5]
    assert "wanted a question of at most 30 tokens" in check.data.bad[1].reason
    assert check.to_dict()["task"] == 3
    assert check.to_dict()["label_tokens"] == 0


def test_a_run_asks_what_is_not_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": f"question {i}", "answer": str(i)} for i in range(10)]
    file = _write(tmp_path / "t.jsonl", *rows, {"prompt": "q"})
    values = {"model": "m", "data": str(file), "output": "o", "objective": "grpo"}
    config = RunConfig(**values, batch_size=8, group_size=4, eval_fraction=0.2, on_bad="skip")
    data = prepare_tasks(config, tokenizer)
    assert isinstance(data.train, Tasks)
    assert isinstance(data.held_out, Tasks)
    assert (len(data.train), len(data.held_out)) == (8, 2)
    for side in (data.train, data.held_out):
        for row, task in zip(side.rows, side.tasks, strict=True):
            assert tokenizer.decode(row[0].input_ids) == "<bos>" + task.question.prompt
            assert task.reward(task.question.prompt.split()[1]) == 1.0
    assert [one["line"] for one in data.left_out["skipped"]] == [11]
    wide = RunConfig(**values, batch_size=64, group_size=4, on_bad="skip")
    with pytest.raises(ValueError, match=r"a step asks 16 questions .* got 9"):
        prepare_tasks(wide, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "group_size": 4}, "group_size: wanted a divisor of .* got 4"),
        ({"group_size": 1}, "group_size: wanted at least 2, got 1"),
        ({"beta": -0.1, "batch_size": 8}, "beta: wanted at least 0, got -0.1"),
        ({"temperature": 0.0, "batch_size": 8}, "temperature: wanted more than 0, got 0.0"),
        ({"overfit_gate": "on", "batch_size": 8}, "overfit_gate: grpo draws its answers anew"),
        ({"preset": "full", "batch_size": 8}, "preset 'full': wanted objective sft, got grpo"),
    ],
)
def test_settings_that_grpo_cannot_have_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(model="m", data="d", output="o", objective="grpo", **changes)


def test_the_divergence_has_a_weight_of_its_own() -> None:
    values = {"model": "m", "data": "d", "output": "o"}
    assert RunConfig(**values, objective="dpo").strength == 0.1
    assert RunConfig(**values, objective="grpo", batch_size=8).strength == 0.04
    assert RunConfig(**values, objective="grpo", batch_size=8, beta=0).strength == 0
    with pytest.raises(ValueError, match="beta: wanted more than 0, got 0"):
        RunConfig(**values, objective="dpo", beta=0)
