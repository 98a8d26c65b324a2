# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune plan`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .output import JsonOpt

if TYPE_CHECKING:
    from ..planning import TrainPlan

_TIER = {"vram": "VRAM", "ram": "RAM", "disk": "disk"}
_LINK = {"disk": "the disk", "link": "the link to the GPU", "compute": "computing"}


def plan(
    model: Annotated[
        str, typer.Argument(help="v4-flash, v4-pro, v4.1-flash, a directory or a config.json.")
    ],
    vram: Annotated[str, typer.Option(help="GPU memory, or of each: 24GB,24GB; 0 is none.")] = "0",
    ram: Annotated[str, typer.Option(help="Host memory; what is free, if not given.")] = "",
    disk: Annotated[str, typer.Option(help="Read rate of the disk.")] = "",
    link: Annotated[str, typer.Option(help="Copy rate to the GPU.")] = "",
    tokens: Annotated[int, typer.Option(help="Of all micro-batches of a step.")] = 16384,
    micro_tokens: Annotated[int, typer.Option(help="Of one micro-batch.")] = 2048,
    preset: Annotated[str, typer.Option(help="attention, attention+shared or all.")] = "all",
    rank: Annotated[int, typer.Option(help="Rank of attention and shared experts.")] = 32,
    expert_rank: Annotated[int | None, typer.Option(help="Of one routed expert.")] = None,
    optimizer: Annotated[
        str, typer.Option(help="sgd, adamw, adamw_8bit, or paged: paged_adamw, paged_adamw_8bit.")
    ] = "adamw_8bit",
    recipe: Annotated[str, typer.Option(help="Formats of the routed experts.")] = "",
    checkpoint_memory: Annotated[
        str, typer.Option(help="Host memory of stream checkpoints; half of what is left.")
    ] = "",
    teraflops: Annotated[float, typer.Option(help="TFLOP/s that products reach.")] = 100.0,
    as_json: JsonOpt = False,
) -> None:
    """Show what a training step takes, and how fast it could be. Reads no weight."""
    from quantize.config import get_recipe
    from quantize.machine import MachineProfile
    from quantize.placement import Machine
    from quantize.planning import read_vram, this_ram, with_rates
    from quantize.sizes import parse_rate, parse_size

    from ..known_models import find_model
    from ..planning import Settings, describe_problem, plan_training

    if not teraflops > 0:
        raise ValueError(f"teraflops: wanted more than 0, got {teraflops}")
    config, stored = find_model(model)
    wished = Machine(this_ram(parse_size(ram) if ram else None), read_vram(vram))
    machine, measured = with_rates(wished, MachineProfile.load(), Path(model))
    given = {"disk_rate": disk, "link_rate": link}
    rates: dict[str, Any] = {name: parse_rate(text) for name, text in given.items() if text}
    machine = replace(machine, **rates)
    measured = tuple(name for name in measured if name not in rates)
    settings = Settings(
        tokens, micro_tokens, preset, rank, expert_rank, optimizer,
        parse_size(checkpoint_memory) if checkpoint_memory else None,
    )  # fmt: skip
    chosen = get_recipe(recipe) if recipe else stored
    found = plan_training(config, chosen, machine, settings, int(teraflops * 10**12))
    if as_json:
        typer.echo(json.dumps(_data(found, measured), indent=1))
    else:
        _show(found, measured)
    if found.problem is not None:
        raise ValueError(describe_problem(found))


def _data(found: "TrainPlan", measured: tuple[str, ...]) -> dict[str, Any]:
    fits = found.problem is None
    return {
        "derived": True,
        "fits": fits,
        "problem": found.problem,
        "nearest": list(found.nearest),
        "settings": asdict(found.settings),
        "machine": asdict(found.machine),
        "measured": list(measured),
        "adapter_parameters": found.adapter_parameters,
        "parts": [asdict(part) for part in found.parts],
        "bytes": {tier: found.total(tier) for tier in _TIER},
        "experts_in": found.placed.experts_in,
        "layers_per_checkpoint": found.group,
        "extra_layer_reads": found.extra_layer_reads,
        "expert_bytes_per_step": found.expert_bytes,
        "seconds_per_step": found.seconds,
        "limit": found.limit if fits else None,
        "tokens_per_second_at_most": found.tokens_per_second if fits else None,
    }


def _show(found: "TrainPlan", measured: tuple[str, ...]) -> None:
    from quantize.sizes import format_size, format_time

    console = Console()
    table = Table("part", "bytes", "where")
    for part in found.parts:
        table.add_row(part.name, format_size(part.nbytes), _TIER[part.tier])
    console.print(table)
    totals = ", ".join(
        f"{name} {format_size(found.total(tier))}"
        for tier, name in _TIER.items()
        if found.total(tier)
    )
    console.print(f"together: {totals}; {found.adapter_parameters:,} parameters train")
    if found.problem is not None:
        return
    if found.group > 1:
        console.print(
            f"streams are kept at every {found.group} layers; the experts of "
            f"{found.extra_layer_reads} layers are read a third time for it"
        )
    read = ", ".join(
        f"{format_size(size)} over {_LINK[link]}" for link, size in found.expert_bytes.items()
    )
    console.print(f"experts read for a step of {found.settings.tokens} tokens: {read}")
    times = ", ".join(
        f"{_LINK[name]} {format_time(seconds)}" for name, seconds in found.seconds.items()
    )
    console.print(
        f"derived from sizes and rates, not measured: at most {found.tokens_per_second:.3g} "
        f"tokens/s; the limit is {_LINK[found.limit]} ({times})"
    )
    machine = found.machine
    rates = {"disk_rate": machine.disk_rate, "link_rate": machine.link_rate}
    told = ", ".join(
        f"{name.removesuffix('_rate')} {format_size(rate)}/s "
        f"{'measured' if name in measured else 'as given or assumed'}"
        for name, rate in rates.items()
        if machine.cards or name == "disk_rate"
    )
    console.print(f"rates: {told}")
    if len(machine.cards) > 1:
        console.print("several GPUs: their memory is added up, one computes at a time")
