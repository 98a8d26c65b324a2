# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of docs/evidence.md, from the logs alone."""

import csv
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .variant import Variant

# Student's t, 97.5 %, by degrees of freedom: half-widths of 95 % intervals.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
_BEGIN, _END = "<!-- derived: {} -->", "<!-- end -->"
Found = dict[str, list[dict[str, Any]]]


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval over seeds; a single seed has none."""
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.4g} (one seed)"
    half = _T[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.4g} ± {half:.2g}"


def read_logs(folder: Path) -> Found:
    """{variant: what each seed's run measured}."""
    found: Found = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        data["lines"] = read_lines(path.with_suffix(".csv"))
        found.setdefault(data["variant"], []).append(data)
    return found


def read_lines(path: Path) -> list[dict[str, float]]:
    """The steps of a run; what was not measured at a step is left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def residual_table(found: Found, variants: list[Variant]) -> list[str]:
    lines = _head("connection", "held-out prose", "code", "largest gradient norm",
                  "gain forward", "backward", "seeds")  # fmt: skip
    for v in variants:
        runs = found.get(v.name, [])
        norms = [max(line["grad_norm"] for line in r["lines"]) for r in runs]
        peak = {
            side: [max(line.get(f"{side}_gain", 0) for line in r["lines"]) for r in runs]
            for side in ("forward", "backward")
        }
        cells = [
            v.title, interval([r["prose"]["loss"] for r in runs]),
            interval([r["code"]["loss"] for r in runs]), interval(norms),
            interval(peak["forward"]), interval(peak["backward"]), str(len(runs)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def memory_table(found: Found, variants: list[Variant]) -> list[str]:
    lines = _head("memory", "parameters", "domain", "loss", "trigram unseen", "rare", "frequent",
                  "knocked out", "seeds")  # fmt: skip
    for v in variants:
        runs = found.get(v.name, [])
        for domain in ("prose", "code"):
            cells = [v.title, f"{runs[0]['parameters']:,}" if runs else "", domain]
            for key in ("loss", "unseen", "rare", "frequent", "knocked_out"):
                values = [r[domain][key] for r in runs if key in r[domain]]
                cells.append(interval(values) if values or not runs else "")
            lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return lines


def attention_table(found: Found, variants: list[Variant]) -> list[str]:
    places = ("0-127", "128-255", "256-511", "512-1k", "1k-2k", "2k-4k", "4k-8k")
    lines = _head("attention", "GFLOP of 8k tokens", "cache", *(f"prose {p}" for p in places),
                  "seeds")  # fmt: skip
    for v in variants:
        runs = found.get(v.name, [])
        cells = [
            v.title, interval([r["flops"] / 1e9 for r in runs]),
            interval([r["cache_bytes"] / 1e6 for r in runs]) + (" MB" if runs else ""),
        ]  # fmt: skip
        cells += [interval([r["prose_by_place"][i] for r in runs]) for i in range(len(places))]
        lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return lines


TABLES = {"residual": residual_table, "memory": memory_table, "attention": attention_table}


def derive(logs: Path, docs: Path, check: bool = False) -> None:
    """Write tables into docs/evidence.md and plots into docs/evidence/, or compare the tables.

    Raises:
        SystemExit: `check`, and the text has other tables than the logs.
    """
    found, variants = read_logs(logs), Variant.all()
    path = docs / "evidence.md"
    text = path.read_text(encoding="utf-8")
    for group, table in TABLES.items():
        begin = _BEGIN.format(group)
        start = text.index(begin) + len(begin)
        stop = text.index(_END, start)
        made = "\n".join(table(found, [v for v in variants if v.group == group]))
        text = f"{text[:start]}\n{made}\n{text[stop:]}"
    if check:
        if text != path.read_text(encoding="utf-8"):
            raise SystemExit(f"{path}: its tables are not what the logs say; run derive")
        return
    path.write_text(text, encoding="utf-8")
    draw(found, variants, docs / "evidence")


def draw(found: Found, variants: list[Variant], folder: Path) -> None:
    """Plots: loss and gain by step, gain by depth; one line a variant, of its first seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dsv4"
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    for group in TABLES:
        runs = [(v, found[v.name][0]) for v in variants if v.group == group and v.name in found]
        if not runs:
            continue
        gained = group == "residual"
        figure, axes = plt.subplots(1, 3 if gained else 1, figsize=(12 if gained else 5, 3.6))
        first = axes[0] if gained else axes
        for v, data in runs:
            steps = [line["step"] for line in data["lines"]]
            first.plot(steps, [line["loss"] for line in data["lines"]], label=v.title, lw=1)
            if gained:
                seen = [line for line in data["lines"] if "forward_gain" in line]
                by_step = [line["forward_gain"] for line in seen]
                axes[1].semilogy([line["step"] for line in seen], by_step, label=v.title)
                axes[2].semilogy(data["forward_gain"], label=v.title)
        first.set(xlabel="step", ylabel="training loss, nats")
        first.legend(fontsize=7)
        if gained:
            axes[1].set(xlabel="step", ylabel="largest forward gain")
            axes[2].set(xlabel="site", ylabel="forward gain at the end")
        figure.tight_layout()
        figure.savefig(folder / f"{group}.svg", metadata={"Date": None})
        plt.close(figure)
