# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers: jsonl in three forms, asked greedily or by likelihood.

| keys | right is |
|---|---|
| `prompt`, `answer` (one or several) | what is generated, cut at `stop`, stripped, is one |
| `prompt`, `regex` | the expression is found in what is generated |
| `prompt`, `choices`, `answer` (text or place) | the answer is the likeliest choice, per byte |

`messages` may stand for `prompt`: a conversation that ends in a question. `stop` is optional.
Of texts whose answer is known the loss is measured too: it moves long before a greedy answer does.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_dsv4.chat import choose_variant, encode_messages

from .data import pad_token
from .dialects import key_name, short
from .records import ROLES, BadRecord, Record, parse_value, raise_bad
from .sources import Row, open_source

Kind = Literal["exact", "regex", "choice"]
_KEYS = frozenset({"prompt", "messages", "answer", "regex", "choices", "stop"})


@dataclass(frozen=True)
class Task:
    """One question. `answers`: all right ones; of a choice, the right one."""

    line: int
    kind: Kind
    prompt: str
    messages: tuple[dict[str, Any], ...] = ()
    answers: tuple[str, ...] = ()
    regex: str | None = None
    choices: tuple[str, ...] = ()
    stop: str | None = None

    @property
    def question(self) -> str:
        """The prompt, or the last message."""
        return self.prompt or str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Outcome:
    """What a model made of a task.

    Attributes:
        task: the question.
        text: what was generated; of a choice, the likeliest.
        right: whether that is right.
        answer_loss: nats per token of the (first) right answer; None where only a regex is known.
    """

    task: Task
    text: str
    right: bool
    answer_loss: float | None


def read_tasks(path: str | Path) -> list[Task]:
    """Read a file of tasks, of any kind that `sources` knows.

    Raises:
        ValueError: no file, no task, or lines that are none; names up to five.
    """
    tasks, wrong = [], []
    for row in open_source(path):
        try:
            tasks.append(check_task(parse_value(row), row.number))
        except ValueError as error:
            wrong.append(BadRecord(row.number, row.place, str(error)))
    raise_bad(path, wrong)
    if not tasks:
        raise ValueError(f"{path}: wanted at least one task, got an empty file")
    return tasks


def parse_task(line: str, number: int) -> Task:
    """Read one line; ValueError says what was wanted and what came."""
    return check_task(parse_value(Row(number, f"line {number}", line.encode())), number)


def check_task(value: Any, number: int) -> Task:
    """Read one row; ValueError says what was wanted and what came."""
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {type(value).__name__}")
    unknown = sorted(set(value) - _KEYS)
    if unknown:
        raise ValueError(
            f"wanted keys of {', '.join(sorted(_KEYS))}, got {', '.join(map(key_name, unknown))}"
        )
    prompt, messages = _question(value)
    stop = value.get("stop")
    if stop is not None and not (isinstance(stop, str) and stop):
        raise ValueError(f"`stop`: wanted text, got {short(stop)}")
    more: dict[str, Any] = {"prompt": prompt, "messages": messages, "stop": stop}
    if "choices" in value:
        choices, right = _choices(value)
        return Task(number, "choice", choices=choices, answers=(right,), **more)
    if ("regex" in value) == ("answer" in value):
        raise ValueError("wanted one of `answer`, `regex`, or `choices` with `answer`")
    if "regex" in value:
        try:
            re.compile(value["regex"])
        except (re.error, TypeError) as error:
            raise ValueError(f"`regex`: wanted an expression, got {error}") from error
        return Task(number, "regex", regex=value["regex"], **more)
    answers = value["answer"] if isinstance(value["answer"], list) else [value["answer"]]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"`answer`: wanted text or a list of texts, got {short(value['answer'])}")
    return Task(number, "exact", answers=tuple(answers), **more)


def _question(value: dict[str, Any]) -> tuple[str, tuple[dict[str, Any], ...]]:
    if ("prompt" in value) == ("messages" in value):
        raise ValueError("wanted one of `prompt` and `messages`")
    if "prompt" in value:
        if not isinstance(value["prompt"], str) or not value["prompt"]:
            raise ValueError(f"`prompt`: wanted text, got {short(value['prompt'])}")
        return value["prompt"], ()
    messages = value["messages"]
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages or messages[-1]["role"] == "assistant":
        raise ValueError("`messages`: wanted a conversation that ends in a question")
    return "", tuple(messages)


def _choices(value: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    choices, answer = value["choices"], value.get("answer")
    if (
        not isinstance(choices, list)
        or len(set(map(str, choices))) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise ValueError(f"`choices`: wanted at least two different texts, got {short(choices)}")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if not isinstance(answer, str) or answer not in choices:
        raise ValueError(f"`answer`: wanted one of the choices or its place, got {short(answer)}")
    return tuple(choices), answer


def sample_tasks(records: Sequence[Record], count: int) -> list[Task]:
    """Questions out of training records, to look at answers: prompts, first turns, beginnings."""
    found: list[Task] = []
    for record in records[:count]:
        if record.form == "prompt":
            prompt, answer = record.content["prompt"], record.content["completion"]
            found.append(Task(record.line, "exact", prompt, answers=(answer,)))
        elif record.form == "text":
            words = record.content["text"].split(" ")
            cut = max(len(words) // 3, 1)
            begin, rest = " ".join(words[:cut]), " ".join(["", *words[cut:]])
            found.append(Task(record.line, "exact", begin, answers=(rest or begin,)))
        else:
            messages = record.content["messages"]
            at = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
            if at and isinstance(messages[at].get("content"), str):
                answers = (messages[at]["content"] or " ",)
                found.append(Task(record.line, "exact", "", tuple(messages[:at]), answers))
    return found


def prompt_ids(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The question as training saw prompts."""
    if task.messages:
        text = encode_messages(task.messages, variant=choose_variant(tokenizer)).text
        return _ids(tokenizer, text)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *_ids(tokenizer, task.prompt)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def answer_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Ask a model; outcomes in the order of the tasks.

    Args:
        model: a causal LM with or without adapters, which answers left-padded batches exactly.
        tokenizer: its own.
        tasks: questions.
        max_new_tokens: of a generated answer.
        batch_size: rows at a time.
        progress: called with the number of tasks that are finished.
    """
    training = model.training
    model.eval()
    outcomes: list[Outcome] = []
    try:
        for batch in _batches(tasks, batch_size):
            asked = [task for task in batch if task.kind != "choice"]
            texts = iter(generate_texts(model, tokenizer, asked, max_new_tokens))
            losses = _losses(model, tokenizer, batch, batch_size)
            for task, loss in zip(batch, losses, strict=True):
                if task.kind == "choice":
                    outcomes.append(_chosen(task, loss))
                else:
                    outcomes.append(_answered(task, next(texts), loss))
            if progress is not None:
                progress(len(outcomes))
    finally:
        model.train(training)
    return outcomes


def _batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


def judge(task: Task, text: str) -> tuple[str, bool]:
    """A generated text up to its end, and whether that is right."""
    if task.stop is not None:
        text = text.split(task.stop, 1)[0]
    if task.regex is not None:
        return text, re.search(task.regex, text) is not None
    return text, text.strip() in {answer.strip() for answer in task.answers}


def _answered(task: Task, text: str, losses: list[tuple[float, int]]) -> Outcome:
    text, right = judge(task, text)
    loss = None if task.regex is not None else losses[0][0] / losses[0][1]
    return Outcome(task, text, right, loss)


def _chosen(task: Task, losses: list[tuple[float, int]]) -> Outcome:
    # Per byte: choices of different lengths, and of different tokens, are on one scale.
    sizes = [len(choice.encode()) for choice in task.choices]
    scores = [loss / size for (loss, _), size in zip(losses, sizes, strict=True)]
    best = task.choices[min(range(len(scores)), key=scores.__getitem__)]
    right = task.choices.index(task.answers[0])
    return Outcome(task, best, best == task.answers[0], losses[right][0] / losses[right][1])


def generate_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], tokens: int
) -> list[str]:
    """Greedy answers to some questions in one batch, padded on the left."""
    if not tasks:
        return []
    rows = [prompt_ids(task, tokenizer) for task in tasks]
    width, pad = max(map(len, rows)), pad_token(tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    generate: Any = model.generate
    made = generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in made[:, width:]]


def _losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], size: int
) -> list[list[tuple[float, int]]]:
    """Summed loss and tokens of each known answer, or of each choice; none of a regex."""
    rows, owners = [], []
    for number, task in enumerate(tasks):
        prompt = prompt_ids(task, tokenizer)
        for text in task.choices or task.answers[:1]:
            rows.append((prompt, _ids(tokenizer, text)))
            owners.append(number)
    found: list[list[tuple[float, int]]] = [[] for _ in tasks]
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        for i, loss in enumerate(_row_losses(model, tokenizer, some)):
            found[owners[start + i]].append(loss)
    return found


def _row_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[list[int], list[int]]],
) -> list[tuple[float, int]]:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    device, pad = next(model.parameters()).device, pad_token(tokenizer)
    ids = torch.full((len(rows), width), pad, device=device)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer, device=device)
        mask[i, : len(prompt) + len(answer)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for i, (prompt, answer) in enumerate(rows):
        # Without anything before it, the first token cannot be asked for.
        first = max(len(prompt), 1)
        stop = len(prompt) + len(answer)
        loss = F.cross_entropy(logits[i, first - 1 : stop - 1].float(), ids[i, first:stop])
        found.append((float(loss) * (stop - first), stop - first))
    return found


def summarize(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of right outcomes by kind, and the mean loss of known answers."""
    found: dict[str, float] = {}
    kinds: tuple[Kind, ...] = ("exact", "regex", "choice")
    for kind in kinds:
        some = [outcome.right for outcome in outcomes if outcome.task.kind == kind]
        if some:
            found[kind] = sum(some) / len(some)
    losses = [outcome.answer_loss for outcome in outcomes if outcome.answer_loss is not None]
    if losses:
        found["answer_loss"] = sum(losses) / len(losses)
    return found
