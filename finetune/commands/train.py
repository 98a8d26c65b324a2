# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import RunConfig, read_yaml
from ..progress import show_progress
from .output import JsonOpt, Output, QuietOpt, loss_lines


def train(
    model: Annotated[str | None, typer.Option(help="Directory of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="jsonl file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the adapter.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="attention, attention+shared or all (default).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of attention and shared experts.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per forward pass.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several documents per row.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of split, order and first weights.")] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Resident experts of a quantized model, e.g. 2GiB.")
    ] = None,
    engram_memory: Annotated[str | None, typer.Option(help="Resident Engram rows.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with these and more settings; options win over it.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output."),
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Train adapters on jsonl data, and measure the held-out loss before and after."""
    given = dict(locals())
    for name in ("config", "resume", "as_json", "quiet"):
        del given[name]
    settings = run_config(given, config, resume)
    from ..running import train as run_training

    out = Output(as_json, quiet)
    with show_progress(out.console()) as callback:
        result = run_training(settings, resume=resume, callbacks=[callback])
    values = result.to_dict()
    del values["history"]
    lines = [
        f"trained {result.trained_parameters:,} parameters in {result.steps} steps, "
        f"{result.seconds:.0f} s",
        *loss_lines(result.held_out_loss_before, result.held_out_loss_after),
        f"adapter: {result.output}",
    ]
    out.result(values, lines)


def run_config(given: dict[str, Any], config: Path | None, resume: bool) -> RunConfig:
    """Settings from the file (or the run to be continued), with the options over them."""
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in given.items()
        if value is not None
    }
    values: dict[str, Any] = {}
    if resume and config is None and "output" in options:
        earlier = Path(options["output"], "run.yaml")
        if not earlier.is_file():
            raise ValueError(f"resume: wanted a run in {options['output']}, found no run.yaml")
        values = read_yaml(earlier)
    elif config is not None:
        values = read_yaml(config)
    missing = [f"--{key}" for key in ("model", "data", "output") if key not in values | options]
    if missing:
        raise typer.BadParameter(f"wanted {', '.join(missing)}, or a --config that has them")
    return RunConfig.from_dict(values | options)
