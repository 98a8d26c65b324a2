# SPDX-License-Identifier: Apache-2.0
"""A plan as a table for people, or as data."""

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .placement import Plan
from .sizes import format_size

_TIER = {"vram": "VRAM", "ram": "RAM", "disk": "disk"}


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan to standard output."""
    if as_json:
        typer.echo(json.dumps(_plan_data(plan), indent=1))
        return
    console = Console()
    console.print(_plan_table(plan))
    if plan.problem:
        console.print(f"does not fit: {plan.problem}")
        return
    console.print(
        f"derived from sizes and links, not measured: at most {plan.overlapped:.3g} tokens/s if "
        f"transfers overlap, {plan.serial:.3g} if they do not; {plan.limit} is the limit"
    )
    for note in _notes(plan):
        console.print(note)
    if plan.lookup_loads:
        console.print(f'load with from_pretrained(..., expert_memory="{plan.expert_memory}B")')


def _plan_data(plan: Plan) -> dict[str, Any]:
    sizes, machine, notes = plan.sizes, plan.machine, _notes(plan)
    engram = {"engram_on_disk_supported": False} if plan.lookup_in == "disk" else {}
    return {
        "sizes": {**vars(sizes), "experts": sizes.experts, "routed_per_token": sizes.routed},
        "machine": vars(machine),
        "experts_in": plan.experts_in,
        "lookup_in": plan.lookup_in,
        "expert_memory": plan.expert_memory,
        "fits": plan.problem is None and plan.lookup_loads,
        "problem": plan.problem,
        "derived_tokens_per_second": {"serial": plan.serial, "overlapped": plan.overlapped},
        "limit": plan.limit,
        **engram,
        **({"note": "; ".join(notes)} if notes else {}),
    }


def _notes(plan: Plan) -> list[str]:
    """Where the plan is arithmetic, and this version does otherwise."""
    notes, sizes = [], plan.sizes
    if plan.lookup_in == "disk":
        room = "" if plan.lookup_loads else f", which cannot hold their {format_size(sizes.lookup)}"
        notes.append(
            f"lookup tables on disk are arithmetic: this version loads them into memory{room}"
        )
    if 0 < plan.experts_in["vram"] < sizes.num_experts:
        notes.append(
            "a part of the experts in VRAM is arithmetic: this version keeps experts in RAM or on "
            "disk"
        )
    return notes


def _plan_table(plan: Plan) -> Table:
    sizes, fast = plan.sizes, "VRAM" if plan.machine.vram else "RAM"
    table = Table("part", "bytes", "per token", "where")
    table.add_row(
        "dense, read for every token", format_size(sizes.dense), *[format_size(sizes.dense), fast]
    )
    table.add_row("cache of the context", format_size(sizes.cache), "", fast)
    table.add_row("embedding table", format_size(sizes.embedding), "one row", "RAM")
    if sizes.lookup:
        table.add_row(
            "lookup tables", format_size(sizes.lookup), "some rows", _TIER[plan.lookup_in]
        )
    for tier, count in plan.experts_in.items():
        share = count / max(sizes.num_experts, 1)
        if count:
            table.add_row(
                f"routed experts ({count} of {sizes.num_experts})",
                format_size(count * sizes.expert),
                format_size(share * sizes.routed),
                _TIER[tier],
            )
    for name, size, told in (
        ("draft heads", sizes.draft, "not in plain decoding"),
        ("vision", sizes.vision, "carried, not used"),
    ):
        if size:
            table.add_row(name, format_size(size), "", told)
    return table
