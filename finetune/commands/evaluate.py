# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOpt, ModelOpt, Output, QuietOpt


def evaluate(
    model: ModelOpt,
    data: Annotated[Path | None, typer.Option(help="jsonl file: loss on its answers.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to compare with the base.")] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="jsonl of prompt + answer, prompt + regex, or prompt + choices."),
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Text that the adapter should leave as it was.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a generated answer.")] = 64,
    samples: Annotated[int, typer.Option(help="Answers to keep for looking at.")] = 0,
    general_tokens: Annotated[int, typer.Option(help="Tokens of the general text.")] = 20_000,
    expert_memory: Annotated[str | None, typer.Option(help="Resident experts.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only what the adapter's own run held out.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Write eval.json beside the adapter, for its report.")
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure loss, tasks and forgetting, with and without an adapter."""
    from ..evaluate import eval_table, evaluate_files

    out = Output(as_json, quiet)
    result = evaluate_files(
        model,
        data,
        adapter=adapter,
        tasks=tasks,
        general=general,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        samples=samples,
        general_tokens=general_tokens,
        expert_memory=expert_memory,
        held_out=held_out,
        save=save,
    )
    lines = []
    for sample in result.samples:
        lines += [f"question: {sample.question!r}", f"  wanted:  {sample.answer!r}"]
        lines.append(f"  base:    {sample.before!r}")
        if sample.after is not None:
            lines.append(f"  adapter: {sample.after!r}")
    out.result(result.to_dict(), lines, eval_table(result))
