# SPDX-License-Identifier: Apache-2.0
"""What the commands share: common options, and where their words go."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

ModelOpt = Annotated[str, typer.Option("--model", help="Directory of the base model.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


@dataclass(frozen=True)
class Output:
    """Where a command's words go."""

    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        if self.quiet:
            # transformers' bars for loading weights.
            disable_progress_bar()

    def result(self, values: dict[str, Any], lines: list[str], table: Table | None = None) -> None:
        """Write the result in the form that was asked for; a table stands above the lines."""
        if self.as_json:
            typer.echo(json.dumps(values, ensure_ascii=False))
            return
        if table is not None:
            # Standard output as it is now: tests and callers may have put another in its place.
            Console(file=sys.stdout, highlight=False).print(table)
        if lines:
            typer.echo("\n".join(lines))

    def console(self) -> Console:
        return Console(stderr=True, quiet=self.quiet)


def loss_lines(before: float | None, after: float | None, word: str = "loss") -> list[str]:
    """Say two losses, or other numbers, those that there are."""
    named = (("before", before), ("after", after))
    return [f"{word} {name}: {value:.4f}" for name, value in named if value is not None]
