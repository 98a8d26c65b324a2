# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune train`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import RunConfig, read_yaml
from ..interruption import Interrupted
from ..progress import show_progress
from .output import JsonOpt, Output, QuietOpt, loss_lines


def train(
    model: Annotated[str | None, typer.Option(help="Directory of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="jsonl file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the adapter.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="sft (default), preferences: dpo, kto, orpo, or rewards: grpo."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="attention, attention+shared, all (default), hot-experts, memory or full."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of attention and shared experts.")] = None,
    hot_share: Annotated[
        float | None, typer.Option(help="Routing that experts with adapters cover, 0.5.")
    ] = None,
    hot_score: Annotated[str | None, typer.Option(help="What is counted: token or gate.")] = None,
    train_indexer: Annotated[
        bool | None, typer.Option("--train-indexer", help="Train the indexer by its own loss.")
    ] = None,
    memory_rows: Annotated[
        int | None, typer.Option(help="Rows of each Engram layer that memory may write.")
    ] = None,
    memory_background: Annotated[
        Path | None, typer.Option(help="Ordinary text whose n-grams memory leaves alone.")
    ] = None,
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
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (default), adamw_8bit, paged_adamw_8bit, ...")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without improvement that end the run.")
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(help="tensorboard (default), none, or others by name.")
    ] = None,
    overfit_gate: Annotated[
        bool | None,
        typer.Option(
            "--overfit-gate/--no-overfit-gate",
            help="Learn one batch by heart first; by default before long runs.",
        ),
    ] = None,
    layer_schedule: Annotated[
        str | None,
        typer.Option(help="ordinary, or layer-major: read experts once a direction and step."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML with these and more settings; later files win, options over all."),
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
    if overfit_gate is not None:
        given["overfit_gate"] = "on" if overfit_gate else "off"
    settings = run_config(given, config or [], resume)
    from ..preset_runs import ShowHotExperts
    from ..ranks import is_first, join_ranks, leave_ranks
    from ..running import train as run_training

    join_ranks()
    out = Output(as_json, quiet or not is_first())
    shows = ShowHotExperts(out.console())
    try:
        with show_progress(out.console()) as callback:
            result = run_training(settings, resume=resume, callbacks=[callback, shows])
    except Interrupted as cut:
        if is_first():
            typer.echo(stop_line(cut, settings.output), err=True)
        raise typer.Exit(cut.exit_code) from None
    first = is_first()
    leave_ranks()
    if not first:
        return
    values = result.to_dict()
    del values["history"]
    lines = [
        f"trained {result.trained_parameters:,} parameters in {result.steps} steps, "
        f"{result.seconds:.0f} s",
        *loss_lines(result.held_out_loss_before, result.held_out_loss_after),
        *loss_lines(result.held_out_margin_before, result.held_out_margin_after, "margin"),
        *loss_lines(result.held_out_reward_before, result.held_out_reward_after, "reward"),
        f"adapter: {result.output}",
    ]
    out.result(values, lines)


def stop_line(cut: Interrupted, output: str) -> str:
    """Say what a stopped run has saved, and how to go on."""
    if cut.checkpoint is None:
        return f"stopped by {cut} before the first checkpoint: nothing is saved in {output}"
    again = shlex.join(["dsv4-finetune", "train", "--output", output, "--resume"])
    return f"stopped by {cut}: {cut.checkpoint} holds {cut.step} steps; continue with: {again}"


def run_config(given: dict[str, Any], config: list[Path], resume: bool) -> RunConfig:
    """Settings from the files (or the run to be continued), with the options over them."""
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in given.items()
        if value is not None
    }
    values: dict[str, Any] = {}
    if resume and not config and "output" in options:
        earlier = Path(options["output"], "run.yaml")
        if not earlier.is_file():
            raise ValueError(f"resume: wanted a run in {options['output']}, found no run.yaml")
        values = read_yaml(earlier)
    else:
        values = read_yaml(*config)
    missing = [f"--{key}" for key in ("model", "data", "output") if key not in values | options]
    if missing:
        raise typer.BadParameter(f"wanted {', '.join(missing)}, or a --config that has them")
    return RunConfig.from_dict(values | options)
