# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .output import JsonOpt, Output, QuietOpt

AdapterArg = Annotated[Path, typer.Argument(help="Directory of the adapter.")]


def inspect(adapter: AdapterArg, as_json: JsonOpt = False, quiet: QuietOpt = False) -> None:
    """Say what an adapter is: its targets, ranks, size, base, chosen experts, written memory."""
    # Late: it imports torch and PEFT, which takes seconds.
    from ..hot_experts import HotExperts, hot_table
    from ..inspection import inspect_adapter
    from ..memory_inspect import describe_memory, find_tokenizer, is_memory, memory_table

    values = inspect_adapter(adapter)
    if is_memory(adapter):
        values["memory"] = describe_memory(adapter, find_tokenizer(values["base"]["path"]))
    out = Output(as_json, quiet)
    if as_json:
        out.result(values, [])
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(values):
        console.print(line, markup=False)
    console.print(_group_table(values["groups"]))
    if values["hot_experts"] is not None:
        hot = HotExperts(**values["hot_experts"])
        chosen = sum(len(ids) for ids in hot.ids.values())
        parameters = values["groups"]["routed experts"]["parameters"] // chosen
        console.print(hot_table(hot, parameters))
    if "memory" in values:
        console.print(memory_table(values["memory"]))


def _lines(values: dict[str, Any]) -> list[str]:
    base = values["base"]
    return [
        f"adapter: {values['adapter']}",
        f"preset: {values['preset'] or 'none of ours'}",
        f"base: {base['path'] or 'path unknown'}, {base['identity'] or 'identity unknown'}",
        f"parameters: {values['parameters']:,} ({values['bytes']:,} bytes)",
    ]


def _group_table(groups: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("group")
    for heading in ("layers", "modules", "rank", "scale", "tensors", "parameters"):
        table.add_column(heading, justify="right")
    for name, group in groups.items():
        table.add_row(
            name,
            str(len(group["layers"])),
            str(group["modules"]),
            ", ".join(str(rank) for rank in group["ranks"]),
            ", ".join(f"{scale:g}" for scale in group["scales"]),
            f"{group['tensors']:,}",
            f"{group['parameters']:,}",
        )
    return table
