# SPDX-License-Identifier: Apache-2.0
"""Plots of docs/evidence.md, from what the logs say."""

from pathlib import Path
from statistics import mean
from typing import Any

from .context_tables import cost_panel, loss_panel, recall_panel
from .drafting import by_place
from .tables import BIASED, KINDS, Found, half_width, paired
from .variant import Variant

# Steps whose mean is one point of a curve.
_SMOOTH = 10
_NAMES = ("all", "trigram\nunseen", "rare", "rare,\nends a name", "frequent")


def draw(
    found: Found, variants: list[Variant], drafting: dict[str, Any] | None, folder: Path
) -> None:
    """Write one SVG a group that has runs."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dsv4"
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    groups = sorted({v.group for v in variants})
    panels: dict[str, list[Any]] = {group: [_losses] for group in groups}
    panels["residual"] += [_gain_by_step, _gain_by_site]
    panels["memory"] += [_differences]
    panels["attention"] = [loss_panel, recall_panel, cost_panel]
    panels["routing"] = [_loads("busiest"), _loads("entropy")]
    for group, parts in panels.items():
        runs = [(v.title, found[v.name]) for v in variants if v.group == group and v.name in found]
        if group == "routing" and runs and BIASED in found:
            runs.insert(0, ("bias (V4)", found[BIASED]))
        if runs:
            figure, axes = plt.subplots(1, len(parts), figsize=(1 + 4 * len(parts), 3.6))
            for part, axis in zip(parts, [axes] if len(parts) == 1 else axes, strict=True):
                part(axis, runs)
            _save(plt, figure, folder / f"{group}.svg")
    if drafting is not None:
        figure, axis = plt.subplots(figsize=(5, 3.6))
        _acceptance(axis, drafting)
        _save(plt, figure, folder / "drafting.svg")


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


Runs = list[tuple[str, list[dict[str, Any]]]]


def _losses(axis: Any, runs: Runs) -> None:
    """Training loss by step, of the first seed."""
    for title, seeds in runs:
        lines = seeds[0]["lines"]
        axis.plot([x["step"] for x in lines], [x["loss"] for x in lines], label=title, lw=1)
    axis.set(xlabel="step", ylabel="training loss, nats")
    axis.legend(fontsize=7)


def _gain_by_step(axis: Any, runs: Runs) -> None:
    for title, seeds in runs:
        seen = [x for x in seeds[0]["lines"] if "forward_gain" in x]
        axis.semilogy([x["step"] for x in seen], [x["forward_gain"] for x in seen], label=title)
    axis.set(xlabel="step", ylabel="largest forward gain")


def _gain_by_site(axis: Any, runs: Runs) -> None:
    for title, seeds in runs:
        axis.semilogy(seeds[0]["forward_gain"], label=title)
    axis.set(xlabel="site", ylabel="forward gain at the end")


def _differences(axis: Any, runs: Runs) -> None:
    """Held-out prose and code together: loss less that of the first variant, by kind of token."""
    base, width = runs[0][1], 0.8 / max(len(runs) - 1, 1)
    for number, (title, seeds) in enumerate(runs[1:]):
        heights, halves = [], []
        for kind in KINDS:
            values = [
                mean(x[d][kind] - y[d][kind] for d in ("prose", "code"))
                for x, y in paired(seeds, base)
            ]
            heights.append(mean(values) if values else 0.0)
            halves.append(half_width(values) if len(values) > 1 else 0.0)
        places = [i + (number - (len(runs) - 2) / 2) * width for i in range(len(KINDS))]
        axis.bar(places, heights, width, yerr=halves, label=title, error_kw={"lw": 1})
    axis.axhline(0, color="black", lw=0.5)
    axis.set_xticks(range(len(KINDS)), _NAMES, fontsize=7)
    axis.set(ylabel=f"loss - that of {runs[0][0]!r}, nats")
    if runs[1:]:
        axis.legend(fontsize=7)


def _loads(key: str) -> Any:
    """A panel with one of the measures of a step, mean over seeds and ten steps."""
    titles = {"busiest": "busiest expert over mean load", "entropy": "entropy of loads (1: equal)"}

    def panel(axis: Any, runs: Runs) -> None:
        for title, seeds in runs:
            stops = range(_SMOOTH, min(len(r["lines"]) for r in seeds) + 1, _SMOOTH)
            curve = [
                mean(x[key] for r in seeds for x in r["lines"][stop - _SMOOTH : stop])
                for stop in stops
            ]
            axis.plot(stops, curve, label=title)
        axis.set(xlabel="step", ylabel=titles[key])
        axis.legend(fontsize=7)

    return panel


def _acceptance(axis: Any, drafting: dict[str, Any]) -> None:
    """Acceptance by place of a whole block, with and without its Markov part."""
    most = max(r["guesses"] for r in drafting["runs"])
    cases: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for run in drafting["runs"]:
        if run["sample"] and run["guesses"] == most:
            cases.setdefault((run["domain"], run["markov"]), []).append(run)
    for (domain, markov), runs in cases.items():
        steps, _ = by_place(runs)
        label = domain + ("" if markov else ", no Markov part")
        axis.plot(range(1, most + 1), steps, "o-" if markov else "o--", label=label)
    axis.set(xlabel="place in the block", ylabel="accepted, if those before were", ylim=(0, 1))
    axis.set_xticks(range(1, most + 1))
    axis.legend(fontsize=7)
