# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune lr-find`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOpt, Output, QuietOpt
from .train import run_config


def lr_find(
    model: Annotated[str | None, typer.Option(help="Directory of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="jsonl file.")] = None,
    output: Annotated[Path, typer.Option(help="Directory of table and plot.")] = Path("lr-find"),
    preset: Annotated[str | None, typer.Option(help="Which modules get adapters.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of attention and shared experts.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per forward pass.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of split, order and first weights.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As in `train`.")] = None,
    expert_memory: Annotated[str | None, typer.Option(help="Resident experts.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="YAML of the run; options win over it.")
    ] = None,
    low: Annotated[float, typer.Option(help="First rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="Last rate.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Rates between them.")] = 60,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the curve too.")] = True,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Find a learning rate: train shortly while it rises, and see where the loss falls."""
    given = dict(locals())
    for name in ("config", "low", "high", "steps", "plot", "as_json", "quiet"):
        del given[name]
    settings = run_config(given, config or [], resume=False)
    from ..lr_find import find_rate, table

    out = Output(as_json, quiet)
    found = find_rate(settings, low=low, high=high, steps=steps, plot=plot)
    if found.suggestion is None:
        last = f"no suggestion: {found.reason}"
    else:
        last = (
            f"suggested learning rate: {found.suggestion:.1e} (steepest at {found.steepest:.1e}, "
            f"lowest loss at {found.lowest:.1e})"
        )
    values = {**found.to_dict(), "output": settings.output}
    out.result(values, [*([] if quiet else table(found)), last, f"files: {settings.output}"])
