# SPDX-License-Identifier: Apache-2.0
"""Tasks: read strictly, asked as training saw prompts, judged by what was generated."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.records import parse_record
from finetune.tasks import (
    answer_tasks,
    parse_task,
    prompt_ids,
    read_tasks,
    sample_tasks,
    summarize,
)

MakeModel = Callable[..., PreTrainedModel]


def _task(**values: Any) -> Any:
    return parse_task(json.dumps(values), 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "wanted an object, got list"),
        ("{", "not JSON"),
        ('{"prompt": "x"}', "wanted one of `answer`, `regex`, or `choices`"),
        ('{"prompt": "x", "answer": "y", "regex": "z"}', "wanted one of `answer`, `regex`"),
        ('{"prompt": "x", "answer": ""}', "`answer`: wanted text"),
        ('{"prompt": "", "answer": "y"}', "`prompt`: wanted text"),
        ('{"answer": "y"}', "wanted one of `prompt` and `messages`"),
        ('{"prompt": "x", "regex": "("}', "`regex`: wanted an expression"),
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', "at least two different texts"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', "one of the choices or its place"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": true}', "one of the choices"),
        ('{"prompt": "x", "answer": "y", "colour": 1}', "got colour"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "answer": "y"}', "ends in a quest"),
        ('{"prompt": "x", "answer": "y", "stop": ""}', "`stop`: wanted text"),
    ],
)
def test_a_bad_line_says_why(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: ") as caught:
        read_tasks(file)
    assert reason in str(caught.value)


def test_no_file_and_no_task_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        read_tasks(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="wanted at least one task"):
        read_tasks(tmp_path / "empty.jsonl")


class Scripted(torch.nn.Module):
    """A language model that continues a prompt with the text that it was given for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.script = tokenizer, script
        self.widths: list[int] = []

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.widths.append(len(input_ids))
        said = []
        for row, mask in zip(input_ids, kwargs["attention_mask"], strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
            ids = self.tokenizer(self.script[prompt], add_special_tokens=False)["input_ids"]
            said.append([*ids, self.tokenizer.eos_token_id])
        width = max(map(len, said))
        tails = torch.tensor([x + [kwargs["pad_token_id"]] * (width - len(x)) for x in said])
        return torch.cat([input_ids, tails], 1)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 290))


def test_generated_text_is_judged_by_its_form(tokenizer: PreTrainedTokenizerFast) -> None:
    script = {"a:": " nine years ", "b:": "nine\nmore", "c:": "it lasts 12 years", "d:": "ten"}
    model = Scripted(tokenizer, script)
    tasks = [
        _task(prompt="a:", answer=["eight years", "nine years"]),
        _task(prompt="b:", answer="nine"),
        _task(prompt="b:", answer="nine", stop="\n"),
        _task(prompt="c:", regex=r"\b\d+ years"),
        _task(prompt="d:", regex=r"nine"),
    ]
    outcomes = answer_tasks(model, tokenizer, tasks, batch_size=2)
    assert [outcome.right for outcome in outcomes] == [True, False, True, True, False]
    assert [outcome.text for outcome in outcomes][2] == "nine"
    assert model.widths == [2, 2, 1]
    found = summarize(outcomes)
    assert found["exact"] == pytest.approx(2 / 3)
    assert found["regex"] == pytest.approx(1 / 2)
    # Logits of zeros: every token costs the logarithm of the vocabulary.
    assert found["answer_loss"] == pytest.approx(torch.tensor(290.0).log().item())


def test_the_likeliest_choice_is_taken_per_byte(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    choices = ["lasts nine years", "battery", "the meter lasts too long for this"]
    task = _task(prompt="the meter", choices=choices, answer=1)
    (outcome,) = answer_tasks(model, tokenizer, [task], batch_size=2)
    losses = []
    for choice in choices:
        prompt = prompt_ids(task, tokenizer)
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
        loss = F.cross_entropy(
            logits[len(prompt) - 1 : -1].float(), torch.tensor(ids), reduction="sum"
        )
        losses.append((float(loss) / len(choice.encode()), float(loss) / len(ids)))
    best = min(range(3), key=lambda i: losses[i][0])
    assert outcome.text == choices[best]
    assert outcome.right == (best == 1)
    assert outcome.answer_loss == pytest.approx(losses[1][1], rel=1e-4)


def test_a_long_choice_is_not_dear_for_its_length(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Scripted(tokenizer, {})
    long, short = " battery lasts", "xq"
    tokens = [len(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in (long, short)]
    # Every token costs the same here: more in all, less a byte.
    assert tokens[0] > tokens[1]
    assert tokens[0] / len(long) < tokens[1] / len(short)
    task = _task(prompt="the", choices=[short, long], answer=1)
    (outcome,) = answer_tasks(model, tokenizer, [task])
    assert outcome.right


def test_batches_answer_as_single_questions_do(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    prompts = ["the", "the meter lasts nine years and", "battery lasts"]
    tasks = [_task(prompt=prompt, answer="nine years") for prompt in prompts]
    together = answer_tasks(model, tokenizer, tasks, max_new_tokens=12, batch_size=3)
    alone = answer_tasks(model, tokenizer, tasks, max_new_tokens=12, batch_size=1)
    assert [o.text for o in together] == [o.text for o in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.answer_loss == pytest.approx(other.answer_loss, rel=1e-4)


def test_samples_ask_what_training_data_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    lines = [
        {"prompt": "a", "completion": "b"},
        {"messages": chat},
        {"text": "one two three four five six"},
    ]
    records = [parse_record(json.dumps(line), i) for i, line in enumerate(lines, 1)]
    tasks = sample_tasks(records, 3)
    assert [task.answers[0] for task in tasks] == ["b", "So.", " three four five six"]
    assert [task.question for task in tasks] == ["a", "How?", "one two"]
    assert len(sample_tasks(records, 1)) == 1
    text = tokenizer.decode(prompt_ids(tasks[1], tokenizer))
    assert "How?" in text
    assert "So." not in text


def test_tasks_are_read_like_records(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    line = json.dumps({"prompt": "a\u2028b", "answer": "y"}, ensure_ascii=False)
    file.write_text("\ufeff" + line + "\n", encoding="utf-8")
    assert [task.prompt for task in read_tasks(file)] == ["a\u2028b"]
