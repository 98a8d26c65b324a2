# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/evidence.md about memory, routing and drafting; what all tables are made of."""

import math
from statistics import mean, stdev
from typing import Any

from .drafting import by_place
from .variant import Variant

# Student's t, 97.5 %, by degrees of freedom: half-widths of 95 % intervals.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
KINDS = ("loss", "unseen", "rare", "names", "frequent")
# Seeds of "no Engram" are those of "bias" too: it is the same model.
BIASED = "memory-none"
# The last steps over which loads and losses are averaged, and the first that do not count.
LATE = 40
Found = dict[str, list[dict[str, Any]]]


def interval(values: list[float], digits: int = 4) -> str:
    """Mean and half-width of the 95 % interval over seeds; a single seed has none."""
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.{digits}g} (one seed)"
    return f"{mean(values):.{digits}g} ± {half_width(values):.2g}"


def difference(pairs: list[tuple[float, float]]) -> str:
    """Mean of a - b and its 95 % interval over pairs, each of one seed."""
    values = [a - b for a, b in pairs]
    if len(values) < 2:
        return f"{values[0]:+.3f} (one seed)" if values else "not run"
    return f"{mean(values):+.3f} ± {half_width(values):.3f}"


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean."""
    return _T[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*names), "|" + "---|" * len(names)]


def row(*cells: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def memory_table(found: Found, variants: list[Variant]) -> list[str]:
    """Losses by kind of token; below, differences of runs of one seed."""
    lines = head("memory", "parameters", "active", "domain", "loss", "trigram unseen", "rare",
                 "rare, ends a name", "frequent", "seeds")  # fmt: skip
    for v in variants:
        runs = found.get(v.name, [])
        for domain in ("prose", "code"):
            size = [f"{runs[0][key]:,}" for key in ("parameters", "active")] if runs else ["", ""]
            cells = [interval([r[domain][kind] for r in runs]) for kind in KINDS]
            lines.append(row(v.title, *size, domain, *cells, str(len(runs))))
    return [*lines, "", *memory_differences(found, variants)]


def memory_differences(found: Found, variants: list[Variant]) -> list[str]:
    """Loss of one variant less that of another, seed by seed, and what knocking out costs."""
    lines = head("difference", "domain", "loss", "trigram unseen", "rare", "rare, ends a name",
                 "frequent", "seeds")  # fmt: skip
    titles = {v.name: v.title for v in variants}
    base, memory = "memory-none", "memory-engram"
    pairs = [(name, base) for name in titles if name != base]
    pairs += [(memory, name) for name in titles if name not in (memory, base)]
    for a, b in pairs:
        both = paired(found.get(a, []), found.get(b, []))
        for domain in ("prose", "code"):
            cells = [difference([(x[domain][k], y[domain][k]) for x, y in both]) for k in KINDS]
            lines.append(row(f"{titles[a]} - {titles[b]}", domain, *cells, str(len(both))))
    for name, title in titles.items():
        runs = [r for r in found.get(name, []) if "knocked_out" in r["prose"]]
        for domain in ("prose", "code") if runs else ():
            cells = [difference([(r[domain]["knocked_out"][k], r[domain][k]) for r in runs])
                     for k in KINDS]  # fmt: skip
            lines.append(row(f"{title}, knocked out - not", domain, *cells, str(len(runs))))
    return [*lines, "", *disk_lines(found)]


def paired(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Runs of one seed, which read the same rows of text in the same order."""
    by_seed = {r["seed"]: r for r in b}
    return [(r, by_seed[r["seed"]]) for r in a if r["seed"] in by_seed]


def disk_lines(found: Found) -> list[str]:
    """What reading tables from disk changed."""
    lines = head("seed", "domain", "loss, table in memory", "from disk", "largest difference",
                 "reads", "MB read")  # fmt: skip
    for r in found.get("memory-engram", []):
        for domain in ("prose", "code"):
            disk = r[domain]["from_disk"]
            lines.append(row(
                str(r["seed"]), domain, f"{disk['loss_in_memory']:.6f}", f"{disk['loss']:.6f}",
                f"{disk['largest_difference']:g}", f"{disk['reads']:,.0f}",
                f"{disk['bytes_read'] / 1e6:.1f}",
            ))  # fmt: skip
    return lines


def routing_table(found: Found, variants: list[Variant]) -> list[str]:
    """How evenly experts are used with each kind of balance, and what it costs.

    Over the steps that all runs have; no batch is read twice in them.
    """
    lines = head("balance by", "training loss", "the same - that of bias", "busiest",
                 "busiest, worst step", "entropy of loads", "idle", "dead at the end",
                 "seeds")  # fmt: skip
    rows = [("bias (V4)", found.get(BIASED, []))]
    rows += [(v.title, found.get(v.name, [])) for v in variants]
    some = [r["lines"] for _, runs in rows for r in runs]
    stop = min(map(len, some), default=0)

    def late(run: dict[str, Any], key: str) -> float:
        return mean(line[key] for line in run["lines"][max(stop - LATE, 0) : stop])

    for title, runs in rows:
        both = [] if runs is rows[0][1] else paired(runs, rows[0][1])
        cells = [
            interval([late(r, "loss") for r in runs]),
            difference([(late(x, "loss"), late(y, "loss")) for x, y in both]) if both else "",
            interval([late(r, "busiest") for r in runs]),
            interval([max(x["busiest"] for x in r["lines"][LATE:stop]) for r in runs]),
            interval([late(r, "entropy") for r in runs]),
            interval([late(r, "idle") for r in runs]),
            interval([float(r["routing"]["dead"]) for r in runs]),
        ]
        lines.append(row(title, *cells, str(len(runs))))
    return lines


def drafting_table(found: dict[str, Any] | None) -> list[str]:
    """Guesses accepted by place, for each number of guesses."""
    places = range(1, 6)
    lines = head("text", "chosen", "guesses", *(f"place {i}" for i in places), "tokens a pass",
                 "same text")  # fmt: skip
    if found is None:
        return lines
    for domain, told in found["behind_text"].items():
        for key, title in (("agreed", "behind true text"), ("sure", "its confidence there")):
            cells = [f"{share:.3f}" for share in told[key]]
            lines.append(row(domain, title, str(len(cells)), *cells, "", ""))
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        case = tuple(run[key] for key in ("domain", "sample", "markov", "guesses"))
        cases.setdefault(case, []).append(run)
    for (domain, sample, markov, guesses), runs in cases.items():
        parts = [by_place([r]) for r in runs]
        # A part in which no guess before was right says nothing of a place.
        told = [[s[i] for s, _ in parts if not math.isnan(s[i])] for i in range(guesses)]
        cells = [interval(values, 3) if values else "none reached" for values in told]
        cells += [""] * (len(places) - guesses)
        cells.append(interval([tokens for _, tokens in parts], 3))
        same = "" if sample else f"{sum(r['same'] for r in runs)} of {found['prompts']}"
        chosen = ("sampled" if sample else "greedy") + ("" if markov else ", no Markov part")
        lines.append(row(domain, chosen, str(guesses), *cells, same))
    return lines
