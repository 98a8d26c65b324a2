# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune check`."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from ..config import Long, LossOn, Objective, Thinking
from .output import JsonOpt, QuietOpt

_KINDS = "jsonl (.gz, .zst), json, csv, tsv, parquet, txt, md, a saved data set, or a directory"
DataArg = Annotated[Path, typer.Argument(help=f"Records: {_KINDS}.")]


def check(
    data: DataArg,
    model: Annotated[
        str | None, typer.Option("--model", help="Also count tokens, with this model's tokenizer.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="Records held out: checked, and compared with.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What the records are for: sft, dpo, kto, orpo or grpo; else as found."),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 2048,
    show: Annotated[int, typer.Option(help="Print so many samples, marked by what counts.")] = 0,
    write: Annotated[
        Path | None, typer.Option(help="Write a clean copy here, as jsonl: no bad lines or copies.")
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Placeholders for what was found, in the clean copy.")
    ] = False,
    long: Annotated[str, typer.Option(help="Long records: cut, split or reject.")] = "cut",
    loss_on: Annotated[str, typer.Option(help="What counts: answers or all.")] = "answers",
    thinking: Annotated[
        str,
        typer.Option(help="Chats written with reasoning: auto (those with some), always, never."),
    ] = "auto",
    scan: Annotated[
        bool, typer.Option("--scan/--no-scan", help="Look for secrets and personal data.")
    ] = True,
    region: Annotated[
        str | None, typer.Option(help="Country of national phone numbers, as in DE.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are failures.")] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Validate data before any weight is loaded; bad lines, copies and secrets are named."""
    for name, value, allowed in (
        ("--long", long, Long),
        ("--loss-on", loss_on, LossOn),
        ("--thinking", thinking, Thinking),
        ("--objective", objective, Objective),
    ):
        if value is not None and value not in get_args(allowed):
            raise typer.BadParameter(f"{name}: wanted {', '.join(get_args(allowed))}, got {value}")
    if show and model is None:
        raise typer.BadParameter("--show wants --model: samples are tokens")
    if redact and (write is None or not scan):
        raise typer.BadParameter("--redact wants --write, and no --no-scan")
    # Late: these import torch and transformers, which takes seconds.
    from ..clean_copy import write_clean
    from ..data_check import check_data
    from ..data_view import print_check
    from ..detectors import Detector
    from ..encoding import Rules
    from ..loading import load_tokenizer

    detector = Detector(region) if scan else None
    tokenizer = None if model is None else load_tokenizer(model)
    rules = Rules(max_length, loss_on, long, thinking)  # type: ignore[arg-type]
    verdict = check_data(
        data,
        tokenizer,
        eval_data=eval_data,
        rules=rules,
        detector=detector,
        show=show,
        objective=objective,
    )
    values: dict[str, Any] = verdict.to_dict()
    console = Console(highlight=False)
    if write is not None:
        values["clean"] = write_clean(verdict, write, detector if redact else None)
    if as_json:
        typer.echo(json.dumps(values, ensure_ascii=False))
    elif not quiet:
        print_check(verdict, console)
    if not as_json:
        _print_verdict(values, console)
    _fail(verdict.errors(), verdict.warnings() if strict else [])


def _print_verdict(values: dict[str, Any], console: Console) -> None:
    for warning in values["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    clean = values.get("clean")
    if clean is not None:
        reasons = ", ".join(f"{n} {reason}" for reason, n in clean["left_out"].items()) or "nothing"
        text = f"clean copy: {clean['path']}, {clean['written']} records, {clean['redacted']} "
        nulls = f"{clean['nulls']} numbers are null, as JSON has no NaN; " if clean["nulls"] else ""
        console.print(f"{text}redacted; {nulls}left out: {reasons}", markup=False, soft_wrap=True)
    if not values["errors"]:
        console.print("no errors")


def _fail(errors: list[str], warnings: list[str]) -> None:
    """Exit with code 1 and a line of reason, if there is one."""
    if errors or warnings:
        raise ValueError("; ".join([*errors, *warnings]))
