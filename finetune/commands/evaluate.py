# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOpt, ModelOpt, Output, QuietOpt, loss_lines


def evaluate(
    model: ModelOpt,
    data: Annotated[Path, typer.Option(help="jsonl file; all of it is evaluated.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to compare with the base.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 2048,
    expert_memory: Annotated[str | None, typer.Option(help="Resident experts.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only what the adapter's own run held out.")
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure the loss on answers, with and without an adapter."""
    from ..evaluate import evaluate_files

    out = Output(as_json, quiet)
    values = evaluate_files(
        model,
        data,
        adapter=adapter,
        max_length=max_length,
        expert_memory=expert_memory,
        held_out=held_out,
    )
    out.result(values, loss_lines(values["loss_before"], values["loss_after"]))
