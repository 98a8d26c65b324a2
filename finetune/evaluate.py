# SPDX-License-Identifier: Apache-2.0
"""Measure a base and its adapter side by side: loss on data, tasks, and what was kept of before.

The adapter is switched off for the base's figures, so that both are of one model in one process.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from .adapters import check_adapter, load_adapters
from .config import RUN_FILE, RunConfig
from .data import IGNORED, DataReport, Example, Examples, encode_records
from .files import write_json
from .loading import load_model, load_tokenizer
from .losses import held_out_loss
from .measures import EVAL_FILE, WORDS, Measure
from .records import Record, read_records
from .run_data import build_held_out
from .tasks import Outcome, Task, answer_tasks, read_tasks, sample_tasks, summarize

# Tokens of general text that are read, unless more are asked for.
GENERAL_TOKENS = 20_000


@dataclass(frozen=True)
class Sample:
    """A question, its answer, and what was generated."""

    question: str
    answer: str
    before: str
    after: str | None


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        measures: figures before and after.
        samples: answers to look at.
        data: what was measured on: files, records, tokens.
        tasks: each question with both answers and whether they are right.
    """

    measures: tuple[Measure, ...]
    samples: tuple[Sample, ...]
    data: dict[str, Any]
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, name: str) -> Measure | None:
        """A figure by name; None if it was not measured."""
        return next((m for m in self.measures if m.name == name), None)

    @property
    def forgetting(self) -> float | None:
        """How much worse general perplexity became, as a share; None if it was not measured."""
        found = self.measure("general_perplexity")
        return None if found is None or found.after is None else found.after / found.before - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the losses stand on top too, as they did before there were others."""
        loss = self.measure("loss")
        return {
            "loss_before": loss.before if loss else None,
            "loss_after": loss.after if loss else None,
            "forgetting": self.forgetting,
            "measures": [asdict(m) | {"better": m.better} for m in self.measures],
            "samples": [asdict(sample) for sample in self.samples],
            "tasks": self.tasks,
            **self.data,
        }


def evaluate_files(
    model: str | Path,
    data: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    tasks: str | Path | None = None,
    general: str | Path | None = None,
    max_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    samples: int = 0,
    general_tokens: int = GENERAL_TOKENS,
    expert_memory: str | None = None,
    held_out: bool = False,
    save: bool = False,
) -> EvalResult:
    """Measure a base model and an adapter of it.

    Args:
        model: base model.
        data: jsonl file of records: mean loss per answer token.
        adapter: directory of an adapter; without it only the base is measured.
        tasks: jsonl file of questions, see `finetune.tasks`.
        general: text file, or jsonl of records, that the adapter should leave as it was.
        max_length: tokens per example.
        max_new_tokens: of a generated answer.
        batch_size: questions at a time.
        samples: how many answers to keep for looking at.
        general_tokens: of the general text, from its beginning.
        expert_memory: how much of the experts may be resident.
        held_out: only the records that the adapter's run held out of `data`, cut and masked as it
            did.
        save: write eval.json beside the adapter, where its report finds it.

    Raises:
        ValueError: nothing to measure, or files that are not readable.
    """
    if data is None and tasks is None and general is None:
        raise ValueError("eval: wanted data, tasks or a general text to measure on, got none")
    if max_length < 2:
        raise ValueError(f"eval: wanted max_length of at least 2, got {max_length}")
    if save and adapter is None:
        raise ValueError("eval: wanted an adapter to save the result beside, got none")
    if adapter is not None:
        check_adapter(adapter)
    questions = [] if tasks is None else read_tasks(tasks)
    tokenizer = load_tokenizer(model)
    told: dict[str, Any] = {"model": str(model), "adapter": str(adapter) if adapter else None}
    sets: dict[str, Examples] = {}
    records: list[Record] = []
    if data is not None:
        records, examples, report = _encode(data, adapter, held_out, tokenizer, max_length, samples)
        sets["loss"] = Examples(examples)
        told |= {"data": str(data), "held_out": held_out, **report.to_dict()}
    if general is not None:
        sets["general"] = general_rows(general, tokenizer, max_length, general_tokens)
        read = sum(len(e.input_ids) for row in sets["general"].rows for e in row)
        told |= {"general": str(general), "general_tokens": read}
    if questions:
        told |= {"tasks_file": str(tasks), "num_tasks": len(questions)}
    looked = questions[:samples] or sample_tasks(records, samples)
    asked = questions or looked
    network: nn.Module = load_model(model, expert_memory=expert_memory)
    if adapter is not None:
        network = load_adapters(network, adapter)
    found = []
    for attached in (False, True)[: 1 + (adapter is not None)]:
        with nullcontext() if attached or adapter is None else network.disable_adapter():  # type: ignore[operator]
            outcomes = answer_tasks(
                network, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
            figures = _figures(network, sets, tokenizer)
            found.append((figures | (summarize(outcomes) if questions else {}), outcomes))
    result = _result(found, told, len(looked), questions)
    if save:
        write_json(Path(str(adapter), EVAL_FILE), result.to_dict())
    return result


def _encode(
    data: str | Path,
    adapter: str | Path | None,
    held_out: bool,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    samples: int,
) -> tuple[list[Record], list[Example], DataReport]:
    """Records of a file, or those of them that the adapter's run held out, as that encodes them."""
    if not held_out:
        records = read_records(data)
        return records, *encode_records(records, tokenizer, max_length)
    run = Path(adapter or "", RUN_FILE)
    if adapter is None or not run.is_file():
        raise ValueError(f"held-out records: wanted an adapter with its {RUN_FILE}, got none")
    config = RunConfig.from_yaml(run)
    examples, report = build_held_out(config, data, tokenizer)
    lines = {example.line for example in examples}
    # The run may have left bad records out; here they are only looked at.
    every = read_records(config.eval_data or data) if samples else []
    return [record for record in every if record.line in lines], examples, report


def general_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int, tokens: int
) -> Examples:
    """A text in rows, every token of which counts: records of jsonl, or windows of plain text.

    Raises:
        ValueError: no such file, or an empty one.
    """
    path = Path(path)
    if max_length < 2:
        raise ValueError(f"general text: wanted max_length of at least 2, got {max_length}")
    if path.suffix in (".jsonl", ".json"):
        examples, _ = encode_records(read_records(path), tokenizer, max_length, "all")
    else:
        if not path.is_file():
            raise ValueError(f"{path}: wanted a text file, found none")
        text = path.read_text(encoding="utf-8")
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise ValueError(f"{path}: wanted some text, got an empty file")
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        step = max_length - len(bos)
        windows = [bos + ids[at : at + step] for at in range(0, len(ids), step)]
        examples = [Example(0, row, [IGNORED, *row[1:]]) for row in windows if len(row) > 1]
    kept, count = [], 0
    for example in examples:
        if count < tokens:
            left = tokens - count
            kept.append(Example(example.line, example.input_ids[:left], example.labels[:left]))
            count += len(kept[-1].input_ids)
    return Examples(kept)


def _figures(
    network: nn.Module, sets: dict[str, Examples], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    found = {}
    if "loss" in sets:
        found["loss"] = held_out_loss(network, sets["loss"], tokenizer)
        found["perplexity"] = _perplexity(found["loss"])
    if "general" in sets:
        loss = held_out_loss(network, sets["general"], tokenizer)
        found["general_perplexity"] = _perplexity(loss)
    return found


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def _result(
    found: list[tuple[dict[str, float], list[Outcome]]],
    told: dict[str, Any],
    samples: int,
    questions: Sequence[Task],
) -> EvalResult:
    (before, first), (after, second) = found[0], found[-1]
    both = len(found) == 2
    order = [name for name in WORDS if name in before]
    measures = tuple(Measure(n, before[n], after[n] if both else None) for n in order)
    pairs = list(zip(first, second, strict=True))
    looked = tuple(
        Sample(
            one.task.question,
            one.task.answers[0] if one.task.answers else f"/{one.task.regex}/",
            one.text,
            other.text if both else None,
        )
        for one, other in pairs[:samples]
    )
    listed = [
        {
            "line": one.task.line,
            "kind": one.task.kind,
            "before": {"text": one.text, "right": one.right, "loss": one.answer_loss},
            "after": {"text": other.text, "right": other.right, "loss": other.answer_loss}
            if both
            else None,
        }
        for one, other in pairs
        if questions
    ]
    return EvalResult(measures, looked, told, listed)


def eval_table(result: EvalResult) -> Table:
    """Figures side by side."""
    table = Table(box=SIMPLE)
    table.add_column("measure", no_wrap=True)
    for column in ("base", "with adapter", "difference"):
        table.add_column(column, justify="right")
    for measure in result.measures:
        colour = {True: "green", False: "red", None: ""}[measure.better]
        name, before, after, change = measure.words()
        table.add_row(name, before, after, f"[{colour}]{change}[/]" if colour else change)
    return table
