# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune check`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOpt, Output, QuietOpt

DataArg = Annotated[Path, typer.Argument(help="jsonl file: messages, prompt + completion, or text")]


def check(
    data: DataArg,
    model: Annotated[
        str | None, typer.Option("--model", help="Also count tokens, with this model's tokenizer.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 2048,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Validate data before any weight is loaded; bad lines are named."""
    from ..records import count_forms, read_records

    records = read_records(data)
    values: dict[str, Any] = {"data": str(data), **count_forms(records)}
    if model is not None:
        # Late, here and below: these import torch and transformers, which takes seconds.
        from ..data import encode_records
        from ..loading import load_tokenizer

        values |= encode_records(records, load_tokenizer(model), max_length)[1].to_dict()
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in values.items()]
    Output(as_json, quiet).result(values, lines)
