# SPDX-License-Identifier: Apache-2.0
"""An answer as it comes on a terminal, with a line of figures under it."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..sizes import format_size
from .stats import Meter, RunStats

_REFRESH = 8


class Plain:
    """Text to standard output as it comes."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *error: object) -> None:
        self.write("\n")

    def say(self, text: str) -> None:
        self.write(text)


class LivePanel:
    """The same on a terminal: lines that are complete scroll by, the open one stands over figures.

    Args:
        console: a terminal.
        model: whose counters are shown.
    """

    def __init__(self, console: Console, model: Any) -> None:
        self.console = console
        self.meter, self.tokens = Meter(model), 0
        self.first: float | None = None
        self.line = ""
        self.live = Live(console=console, refresh_per_second=_REFRESH, transient=True)

    def __enter__(self) -> "LivePanel":
        self.live.__enter__()
        self.live.update(self._view(), refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.live.update(Text(""))
        self.live.__exit__(None, None, None)
        self.console.print(Text(self.line))

    def say(self, text: str) -> None:
        self.first = self.first or time.perf_counter()
        self.tokens += 1
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.console.print(Text(line))
        self.live.update(self._view())

    def _view(self) -> Group:
        return Group(Text(self.line), Panel(self.figures(), expand=False))

    def figures(self) -> str:
        """One line: pace, hits, bytes, waits."""
        since = self.meter.difference()
        return describe(since, self.tokens, time.perf_counter() - (self.first or 0))


def describe(since: RunStats, pieces: int, seconds: float) -> str:
    """The panel's line."""
    if not pieces:
        parts = ["reading the prompt"]
    else:
        parts = [f"{pieces / max(seconds, 1e-9):.3g} pieces/s" if pieces > 1 else "first token"]
    parts += [f"{tier} {share:.0%}" for tier, share in since.hit_rates.items()]
    parts += [f"{link} {format_size(size)}" for link, size in since.bytes_by_link.items()]
    waited = since.counts.get("wait_seconds", 0)
    return " · ".join(parts + ([f"waited {waited:.2g} s"] if waited else []))
