# SPDX-License-Identifier: Apache-2.0
"""Questions whose answers are rewarded by rules from a file: what the objective grpo learns from.

| key | what it is |
|---|---|
| `prompt` or `messages` | the question |
| `answer` (one or several) | 1 if what is generated, stripped, is one |
| `regex` | 1 if the expression is found in what is generated |
| `rewards` | a list of `{answer or regex, weight}`: the weights of all that hold, added up |
| `stop` | text that ends an answer |

A line has one of `answer`, `regex` and `rewards`; the rules are those of `tasks`, which `eval`
measures by. A weight may be negative. `choices` and `tools` are refused; other keys are left alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .config import RunConfig
from .data import IGNORED, Example, Examples, report_on
from .dialects import KEYS, short
from .encoding import Encoded, Rules, check_rules
from .prepare import Prepared
from .records import Record
from .run_data import build_sides, run_rules
from .tasks import Task, check_task, generate_texts, judge, prompt_ids

_RULES = ("answer", "regex", "rewards")


@dataclass(frozen=True)
class RewardedTask:
    """One question under its rules, each with the weight that it adds where it holds."""

    rules: tuple[tuple[Task, float], ...]

    @property
    def question(self) -> Task:
        return self.rules[0][0]

    def reward(self, text: str) -> float:
        """Sum of the weights of all rules that a generated text fulfils."""
        return sum(weight for task, weight in self.rules if judge(task, text)[1])


def build_task(value: Any, line: int, where: str) -> Record:
    """A row as a record.

    Raises:
        ValueError: what was wanted and what came.
    """
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    unread = sorted({"choices", "tools", "functions"} & value.keys())
    if unread:
        raise ValueError(
            f"`{unread[0]}`: questions with rewards have none; "
            "wanted `answer`, `regex` or `rewards`"
        )
    content = {key: value[key] for key in KEYS["task"] if key in value}
    read_task(content, line)
    return Record(line, "task", content, "task", where)


def read_task(content: dict[str, Any], line: int) -> RewardedTask:
    """The question and the rules of a record's content.

    Raises:
        ValueError: no question, no rule, or a rule that is none.
    """
    given = [key for key in _RULES if key in content]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"wanted one of `answer`, `regex` and `rewards`, got {got}")
    question = {k: v for k, v in content.items() if k not in _RULES}
    if given[0] != "rewards":
        return RewardedTask(((check_task(content, line), 1.0),))
    rewards = content["rewards"]
    if not isinstance(rewards, list) or not rewards:
        raise ValueError(f"`rewards`: wanted a list of rules, got {short(rewards)}")
    rules = []
    for i, rule in enumerate(rewards):
        if not isinstance(rule, dict) or set(rule) - {"answer", "regex", "weight"}:
            raise ValueError(
                f"rule {i}: wanted `answer` or `regex`, and `weight`, got {short(rule)}"
            )
        try:
            plain = {k: v for k, v in rule.items() if k != "weight"}
            rules.append((check_task({**question, **plain}, line), _weight(rule.get("weight", 1))))
        except ValueError as error:
            raise ValueError(f"rule {i}: {error}") from error
    return RewardedTask(tuple(rules))


def _weight(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value == 0:
        raise ValueError(f"`weight`: wanted a finite number other than 0, got {short(value)}")
    return float(value)


def encode_task(record: Record, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> Encoded:
    """Tokenize a question; nothing of it is learned.

    Raises:
        ValueError: it is longer than `max_length`, as a question without its end is another one.
    """
    task = read_task(record.content, record.line)
    ids = prompt_ids(task.question, tokenizer)
    if len(ids) > rules.max_length:
        raise ValueError(
            f"{record.place}: wanted a question of at most {rules.max_length} tokens, got "
            f"{len(ids)}; raise max_length"
        )
    return Encoded((Example(record.line, ids, [IGNORED] * len(ids)),), len(ids), 0, task=task)


class Tasks(Examples):
    """Rows of one question each.

    Attributes:
        tasks: how the answers are rewarded, in the order of the rows.
    """

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        super().__init__([one.examples[0] for one in encoded])
        self.tasks: list[RewardedTask] = [one.task for one in encoded]


def prepare_tasks(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, check, split and encode a run's questions, as `check` does.

    Raises:
        ValueError: bad lines, unless they are to be skipped; settings that go with supervised runs
            alone; fewer questions than a step asks.
    """
    if config.packing:
        raise ValueError(f"packing: wanted false for objective {config.objective}, got true")
    rules = run_rules(config)
    check_rules(config.objective, rules)
    train, held, left_out = build_sides(config, tokenizer)
    asked = config.batch_size * config.accumulation // config.group_size
    if len(train.encoded) < asked:
        raise ValueError(
            f"grpo: a step asks {asked} questions (batch_size * accumulation / group_size), wanted "
            f"as many in the data, got {len(train.encoded)}"
        )
    return Prepared(
        Tasks(train.encoded),
        Tasks(held.encoded) if held.encoded else None,
        report_on(train.encoded, rules),
        report_on(held.encoded, rules),
        left_out,
    )


def mean_reward(
    model: nn.Module,
    rows: Tasks,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> float:
    """Mean reward of greedy answers, some at a time, padded on the left."""
    training = model.training
    model.eval()
    total = 0.0
    try:
        for start in range(0, len(rows.tasks), batch_size):
            some = rows.tasks[start : start + batch_size]
            asked = [task.question for task in some]
            texts = generate_texts(model, tokenizer, asked, max_new_tokens)
            total += sum(task.reward(text) for task, text in zip(some, texts, strict=True))
    finally:
        model.train(training)
    return total / len(rows.tasks)
