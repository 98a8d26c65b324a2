# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune merge`."""

from pathlib import Path
from typing import Annotated

import typer

from quantize.sizes import format_size, parse_size

from .output import JsonOpt, ModelOpt, Output, QuietOpt


def merge(
    model: ModelOpt,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter.")],
    output: Annotated[Path, typer.Option(help="Directory of the merged model.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16 (plain); fp4, q3 or q2 (packed); source (what the "
            "base is in, and what a plain base gets by itself)."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of a file, e.g. 5GB.")] = "5GB",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Add an adapter to its base, shard by shard, and say what rounding left of it."""
    from ..merge import REPORT, merge_files
    from ..survival import survival_table

    out = Output(as_json, quiet)
    size = parse_size(max_shard_size)
    result = merge_files(model, adapter, output, to=to, max_shard_size=size)
    console = out.console()
    if result.advice is not None:
        console.print(f"warning: {result.advice}", highlight=False, markup=False)
    values = {"output": result.output, "adapter": str(adapter), **result.to_dict()}
    lines = [
        f"merged model: {result.output} ({result.form}, {format_size(result.nbytes)}), "
        f"details in {REPORT}",
        f"peak memory: {format_size(result.peak_memory)}",
    ]
    peak = {"peak_memory": result.peak_memory}
    out.result(values | peak, lines, survival_table(result.tensors))
