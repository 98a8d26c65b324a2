# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of docs/evidence.md, from the logs alone."""

import csv
import json
from pathlib import Path

from .context_tables import attention_table
from .plots import draw
from .tables import (
    Found,
    difference,
    drafting_table,
    head,
    interval,
    memory_table,
    paired,
    routing_table,
    row,
)
from .variant import Variant

_BEGIN, _END = "<!-- derived: {} -->", "<!-- end -->"


def read_logs(folder: Path) -> Found:
    """{variant: what each seed's run measured}."""
    found: Found = {}
    for path in sorted(folder.glob("*-s[0-9]*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        data["lines"] = read_lines(path.with_suffix(".csv"))
        found.setdefault(data["variant"], []).append(data)
    return found


def read_lines(path: Path) -> list[dict[str, float]]:
    """The steps of a run; what was not measured at a step is left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]


def residual_table(found: Found, variants: list[Variant]) -> list[str]:
    """Losses, and beside them their difference to the first variant's, seed by seed."""
    lines = head("connection", "held-out prose", "- plain", "code", "- plain",
                 "largest gradient norm", "gain forward", "gain of each seed", "backward",
                 "seeds")  # fmt: skip
    plain = found.get(variants[0].name, [])
    for v in variants:
        runs = found.get(v.name, [])
        both = [] if v is variants[0] else paired(runs, plain)
        cells = [v.title]
        for domain in ("prose", "code"):
            cells.append(interval([r[domain]["loss"] for r in runs]))
            pairs = [(x[domain]["loss"], y[domain]["loss"]) for x, y in both]
            cells.append(difference(pairs) if pairs else "")
        peak = {
            side: [max(line.get(f"{side}_gain", 0) for line in r["lines"]) for r in runs]
            for side in ("forward", "backward")
        }
        cells.append(interval([max(line["grad_norm"] for line in r["lines"]) for r in runs]))
        cells += [interval(peak["forward"]), ", ".join(f"{gain:.2g}" for gain in peak["forward"])]
        lines.append(row(*cells, interval(peak["backward"]), str(len(runs))))
    return lines


TABLES = {
    "residual": residual_table,
    "memory": memory_table,
    "routing": routing_table,
    "attention": attention_table,
}


def derive(logs: Path, docs: Path, check: bool = False) -> None:
    """Write tables into docs/evidence.md and plots into docs/evidence/, or compare the tables.

    Raises:
        SystemExit: `check`, and the text has other tables than the logs.
    """
    found, variants = read_logs(logs), Variant.all()
    path = docs / "evidence.md"
    text = path.read_text(encoding="utf-8")
    made = {
        group: table(found, [v for v in variants if v.group == group])
        for group, table in TABLES.items()
    }
    drafting = logs / "drafting.json"
    told = json.loads(drafting.read_text(encoding="utf-8")) if drafting.exists() else None
    made["drafting"] = drafting_table(told)
    for group, lines in made.items():
        begin = _BEGIN.format(group)
        start = text.index(begin) + len(begin)
        stop = text.index(_END, start)
        text = "\n".join((text[:start], *lines, text[stop:]))
    if check:
        if text != path.read_text(encoding="utf-8"):
            raise SystemExit(f"{path}: its tables are not what the logs say; run derive")
        return
    path.write_text(text, encoding="utf-8")
    draw(found, variants, told, docs / "evidence")
