# SPDX-License-Identifier: Apache-2.0
"""How much of an update is left after weights were rounded: sums that tiles and experts add to.

Let D be the update, and R what the stored weights differ by from those of the base in the same
format. `kept = <R, D> / <D, D>` is the share of the update that arrived in its own direction, and
`error = |R - D| / |D|` how far what arrived is from what was meant.

A base that is on the grid already has a dead zone around every weight: a small update moves none,
`kept` falls, and the merged model does what the base did. A base that is rounded for the first time
has none: `kept` stays near 1, and `error` is the noise of rounding beside a small update. Noise
adds up over the inputs of a product far slower than the update does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

# Less of the update than this is a merge to be warned of; so is noise as large as the update.
LEAST_KEPT = 0.75
MOST_NOISE = 1.0


@dataclass
class Survival:
    """Sums over weights. Squares are of float64 sums of float32 numbers.

    Attributes:
        weights: how many there are.
        moved: how many have another stored value than the base's.
        base: sum of squares of the base's weights.
        delta: of the update.
        arrived: inner product of the update and what arrived of it.
        wrong: squares of what arrived and was not meant.
    """

    weights: int = 0
    moved: int = 0
    base: float = 0.0
    delta: float = 0.0
    arrived: float = 0.0
    wrong: float = 0.0

    def add(self, base: torch.Tensor, delta: torch.Tensor, stored: torch.Tensor) -> None:
        """Take a tile up, all float32 of one shape: the base's in the same format, the update, and
        what is stored now."""
        left = stored - base
        self.weights += base.numel()
        self.moved += int((left != 0).sum())
        self.base += _squares(base)
        self.delta += _squares(delta)
        self.arrived += float((left.double() * delta).sum())
        self.wrong += _squares(left - delta)

    def join(self, other: "Survival") -> None:
        """Add another's sums."""
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def size(self) -> float:
        """|D| / |W|."""
        return (self.delta / self.base) ** 0.5 if self.base else 0.0

    @property
    def kept(self) -> float | None:
        """Share of the update that arrived in its direction; None without an update."""
        return self.arrived / self.delta if self.delta else None

    @property
    def error(self) -> float | None:
        """|R - D| / |D|; None without an update."""
        return (self.wrong / self.delta) ** 0.5 if self.delta else None

    def to_dict(self) -> dict[str, Any]:
        """Shares for a report, and the sums that they are made of."""
        shares = {"moved_share": self.moved / max(self.weights, 1), "size": self.size}
        return {**shares, "kept": self.kept, "error": self.error, "sums": asdict(self)}


def _squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def total(parts: Mapping[str, Survival]) -> Survival:
    """Sum over all weights."""
    whole = Survival()
    for part in parts.values():
        whole.join(part)
    return whole


def advice(whole: Survival, target: str) -> str | None:
    """What to tell of a merge that lost the update, or covered it; None of a good one."""
    if whole.kept is None or whole.error is None:
        return "the adapter adds nothing to any weight: it was never trained, nothing is merged"
    serve = (
        "serve the base with the adapter beside it (load_adapters, or PEFT), merge into float32, "
        "or measure this result with eval first"
    )
    size = f"the update is {whole.size:.2%} of the weights"
    if whole.kept < LEAST_KEPT:
        still = 1 - whole.moved / max(whole.weights, 1)
        return (
            f"{size}, and rounding to {target} left {max(whole.kept, 0):.0%} of it "
            f"({still:.0%} of the weights did not move): close to no merge at all; {serve}"
        )
    if whole.error >= MOST_NOISE:
        return (
            f"{size}, and rounding to {target} adds noise {whole.error:.1f} times as large; {serve}"
        )
    return None


def kind_of(weight: str) -> str:
    """A weight's name without the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in weight.split("."))


def survival_table(parts: Mapping[str, Survival]) -> Table:
    """A row for each kind of weight, over all layers, and the worst of its layers."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title="What is left of the update")
    table.add_column("weight", no_wrap=True)
    for column in ("n", "|D|/|W|", "moved", "kept", "error", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[str, list[Survival]] = {}
    for name, part in parts.items():
        groups.setdefault(kind_of(name), []).append(part)
    for kind, members in groups.items():
        name = kind.removeprefix("model.layers.*.").removeprefix("self_attn.")
        table.add_row(name.removesuffix(".weight"), str(len(members)), *_cells(members))
    table.add_section()
    table.add_row("all", str(len(parts)), *_cells(list(parts.values())))
    return table


def _cells(members: list[Survival]) -> list[str]:
    whole = total({str(i): member for i, member in enumerate(members)})
    worst = max((member.error for member in members if member.error is not None), default=None)
    return [
        f"{whole.size:.3%}",
        f"{whole.moved / max(whole.weights, 1):.1%}",
        _share(whole.kept),
        _share(whole.error),
        _share(worst),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


__all__ = ["Survival", "advice", "survival_table", "total"]
