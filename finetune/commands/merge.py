# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune merge`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOpt, ModelOpt, Output, QuietOpt


def merge(
    model: ModelOpt,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter.")],
    output: Annotated[Path, typer.Option(help="Directory of the merged model.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Unpack a quantized base; the result is plain.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Add an adapter to its base and save a model that needs no adapter."""
    from ..evaluate import merge_files

    out = Output(as_json, quiet)
    values = merge_files(model, adapter, output, dequantize=dequantize, dtype=dtype)
    out.result(values, [f"merged model: {values['output']}"])
