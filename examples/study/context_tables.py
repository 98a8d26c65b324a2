# SPDX-License-Identifier: Apache-2.0
"""Tables and panels of docs/evidence.md about attention and long contexts."""

from itertools import pairwise
from statistics import mean
from typing import Any

from .context import EDGES
from .facts import PROBES
from .tables import Found, difference, half_width, head, interval, paired, row
from .variant import Variant

Runs = list[tuple[str, list[dict[str, Any]]]]
_PLACES = ("0-127", "128-255", "256-511", "512-1k", "1k-2k", "2k-4k", "4k-8k")
_DISTANCES = max(PROBES.values(), key=len)
_MEASURES = (("exact", "likeliest of all"), ("probability", "probability"))


def attention_table(found: Found, variants: list[Variant]) -> list[str]:
    """Three tables: what 8,192 tokens cost, loss by place, recall by distance."""
    runs = [(v.title, found.get(v.name, [])) for v in variants]
    return [*_costs(runs), "", *_losses(runs), "", *_recall(runs)]


def _costs(runs: Runs) -> list[str]:
    lines = head("attention", "parameters", "active", "GFLOP, all tokens", "of full",
                 "GFLOP, prompt", "of full", "cache", "of full", "seeds")  # fmt: skip
    # The same for every seed: of the first.
    full = runs[0][1][0] if runs[0][1] else None
    for title, seeds in runs:
        if not seeds:
            lines.append(row(title, *["not run"] * 8, "0"))
            continue
        one = seeds[0]
        cells = [title, f"{one['parameters']:,}", f"{one['active']:,}"]
        for key, unit in (("flops", ""), ("prefill_flops", ""), ("cache_bytes", " MB")):
            scale = 1e6 if unit else 1e9
            share = f"{100 * one[key] / full[key]:.3g} %" if full else ""
            cells += [f"{one[key] / scale:.3g}{unit}", share]
        lines.append(row(*cells, str(len(seeds))))
    return lines


def _losses(runs: Runs) -> list[str]:
    lines = head("attention", "domain", *_PLACES, "4k-8k less that of full")
    for title, seeds in runs:
        for domain in ("prose", "code"):
            values = [[r[f"{domain}_by_place"][i] for r in seeds] for i in range(len(_PLACES))]
            both = [] if seeds is runs[0][1] else paired(seeds, runs[0][1])
            far = [(x[f"{domain}_by_place"][-1], y[f"{domain}_by_place"][-1]) for x, y in both]
            cells = [title, domain, *map(interval, values), difference(far) if far else ""]
            lines.append(row(*cells))
    return lines


def _recall(runs: Runs) -> list[str]:
    lines = head("attention", "row", "true value is", *(f"{d:,} back" for d in _DISTANCES))
    for title, seeds in runs:
        for size, distances in PROBES.items() if seeds else ():
            for key, label in _MEASURES:
                told = [r["recall"][str(size)][key] for r in seeds]
                cells = [interval([values[i] for values in told], 2) for i in range(len(distances))]
                cells += [""] * (len(_DISTANCES) - len(cells))
                lines.append(row(title, f"{size:,}", label, *cells))
    return lines


def loss_panel(axis: Any, runs: Runs) -> None:
    """Held-out loss by place, mean of both domains and of seeds, with intervals."""
    middles = [(a + b) / 2 for a, b in pairwise(EDGES)]
    for title, seeds in runs:
        curves = [
            [mean(pair) for pair in zip(r["prose_by_place"], r["code_by_place"], strict=True)]
            for r in seeds
        ]
        _curve(axis, middles, curves, label=title)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="place in the row", ylabel="held-out loss, nats")
    axis.legend(fontsize=7)


def recall_panel(axis: Any, runs: Runs) -> None:
    """How often a planted fact is recalled, by distance; dotted: a guess that knows the kind.

    Full lines: in rows of 1,024 tokens; dashed, in the same colour: of 8,192.
    """
    for title, seeds in runs:
        color = None
        for size, distances in PROBES.items():
            told = [r["recall"][str(size)]["exact"] for r in seeds]
            style = {"label": title} if color is None else {"color": color, "ls": "--"}
            color = _curve(axis, list(distances), told, **style)
    axis.axhline(runs[0][1][0]["chance"], color="black", lw=0.7, ls=":")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens between fact and question", ylabel="recalled", ylim=(-0.02, 1.02))
    axis.legend(fontsize=7)


def cost_panel(axis: Any, runs: Runs) -> None:
    """Operations and bytes of 8,192 tokens, against the first variant's."""
    keys = (("flops", "operations,\nall tokens"), ("prefill_flops", "operations,\nprompt"),
            ("cache_bytes", "bytes\nof cache"))  # fmt: skip
    base, width = runs[0][1][0], 0.8 / len(runs)
    for number, (title, seeds) in enumerate(runs):
        places = [i + (number - (len(runs) - 1) / 2) * width for i in range(len(keys))]
        axis.bar(places, [seeds[0][k] / base[k] for k, _ in keys], width, label=title)
    axis.set_xticks(range(len(keys)), [label for _, label in keys], fontsize=7)
    axis.set_yscale("log")
    axis.set(ylabel=f"against {runs[0][0]}")


def _curve(axis: Any, x: list[float], curves: list[list[float]], **style: Any) -> Any:
    """Means of seeds with their intervals; returns the colour."""
    columns = list(zip(*curves, strict=True))
    halves = [half_width(list(c)) if len(c) > 1 else 0.0 for c in columns]
    style = {"marker": "o", "ms": 3, "lw": 1, "capsize": 2, **style}
    return axis.errorbar(x, [mean(c) for c in columns], halves, **style)[0].get_color()
