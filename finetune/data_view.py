# SPDX-License-Identifier: Apache-2.0
"""A data check for people: tables and a histogram on a console, plain lines in a pipe."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import DataReport
from .data_check import DataCheck, FileCheck
from .preview import mark_runs

# Bad lines, repeats and findings shown; `--json` has all of them.
SHOWN = 10
_BAR = 40


def print_check(check: DataCheck, console: Console) -> None:
    """Print everything but the verdict."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(check):
        table.add_row(name, Text(value))
    console.print(table)
    if check.report is not None and check.data.tally.whole:
        _print_lengths(check, console)
    for sample in check.data.samples:
        console.print(Text(f"\n{sample['place']}", style="bold"))
        colour = console.is_terminal and console.color_system is not None
        console.print(mark_runs(sample["runs"], colour), soft_wrap=True)


def _lines(check: DataCheck) -> list[tuple[str, str]]:
    lines = [("objective", check.objective), *_file_lines(check.data, "data")]
    if check.held_out is not None:
        lines += _file_lines(check.held_out, "eval")
    if check.report is not None:
        lines += _token_lines(check, check.report)
    if check.compares:
        lines += _side_lines(check.data.preferences.to_dict())
    kinds = Counter(repeat.kind for repeat in check.repeats if repeat)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("exact", "normalised", "near"))
    lines.append(("duplicates", counts))
    if check.held_out is not None:
        kinds = Counter(repeat.kind for repeat in check.overlaps if repeat)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("exact", "normalised", "near"))
        lines.append(("overlap", f"{counts} (with eval)"))
    values = check.to_dict()
    for name, pairs in (("duplicates", values["repeats"]), ("overlap", values["overlaps"])):
        shown = [f"{one['place']}: {one['kind']}, of {one['of']}" for one in pairs[:SHOWN]]
        lines += [(f"  {name}", one) for one in shown]
    return lines


def _file_lines(file: FileCheck, name: str) -> list[tuple[str, str]]:
    layouts = ", ".join(f"{count} {layout}" for layout, count in file.layouts.items())
    lines = [
        (name, f"{file.path}: {file.source}"),
        ("records", f"{len(file.rows):,}{f' ({layouts})' if layouts else ''}"),
        ("bad lines", f"{len(file.bad):,}"),
    ]
    lines += [("", str(one)) for one in file.bad[:SHOWN]]
    if len(file.bad) > SHOWN:
        lines.append(("", f"and {len(file.bad) - SHOWN} more"))
    found = Counter(finding.kind for finding in file.findings)
    if found:
        lines.append(("findings", ", ".join(f"{n} {kind}" for kind, n in found.items())))
    for one in file.findings[:SHOWN]:
        detail = f" ({one.detail})" if one.detail else ""
        lines.append(("", f"{one.place}, {one.key}: {one.kind}{detail}: {one.excerpt}"))
    if len(file.findings) > SHOWN:
        lines.append(("", f"and {len(file.findings) - SHOWN} more"))
    return lines


def _token_lines(check: DataCheck, report: DataReport) -> list[tuple[str, str]]:
    share = report.label_tokens / max(report.tokens, 1)
    limit = check.rules.max_length
    lines = [
        ("examples", f"{report.examples:,}"),
        ("tokens", f"{report.tokens:,}, of which {report.label_tokens:,} count ({share:.1%})"),
        ("lengths", _say_quantiles(check.quantiles())),
        (
            "too long",
            f"{report.truncated} cut, {report.split} split, {report.dropped} without an answer "
            f"before {limit:,} tokens; {report.cut_labels:,} answer tokens lost",
        ),
    ]
    if check.objective == "sft":
        packing = check.packing()
        text = f"{report.examples:,} examples in {packing['rows']:,} rows of {limit:,}, "
        lines.append(("packing", f"{text}{packing['fill']:.1%} full"))
    return lines


def _side_lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Answers of preferences: a side that is longer is learned as such."""
    lines = [("prompts", f"{values['prompts']:,} different")]
    for side, found in values["sides"].items():
        tokens = f", {found['mean']:.1f} tokens each ({_say_quantiles(found['quantiles'])})"
        lines.append((side, f"{found['answers']:,}{tokens if found['tokens'] else ''}"))
    lines.append(("longer", f"{values['chosen_longer']:,} pairs have the longer answer as chosen"))
    return lines


def _say_quantiles(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _print_lengths(check: DataCheck, console: Console) -> None:
    """Records by tokens, in bins that double; those behind the limit are marked."""
    bins: list[tuple[int, int, int]] = check.histogram()
    most = max(count for *_, count in bins)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title, justify in (("tokens", "right"), ("records", "right"), ("", "left")):
        table.add_column(title, justify=_justify(justify))
    for low, high, count in bins:
        style = "red" if high > check.rules.max_length + 1 else "green"
        bar = "█" * max(round(_BAR * count / most), count > 0)
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", Text(bar, style=style))
    console.print(table)


def _justify(name: str) -> Any:
    return name
