# SPDX-License-Identifier: Apache-2.0
"""Every benchmark that needs a GPU and every test marked `gpu`, and one table of what they found.

    python benchmarks/bench_gpu.py                     # what `make bench-gpu` runs: half an hour
    python benchmarks/bench_gpu.py --quick             # the short forms: some minutes
    python benchmarks/bench_gpu.py --only training     # programs and tests whose name has this word

Writes `bench-gpu.json` and `bench-gpu.md`: for each operation its floor, what was achieved, the
goal and what is missing, in rows as docs/kernels.md has them. A program that fails stands in the
table with its last line, and the others go on; the exit code then is 1.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from gpu_limits import require_gpu

HERE = Path(__file__).parent
# Shares of the floor: 1.3 times the floor for mHC, three quarters of the bandwidth for what only
# reads, three fifths of the matrix rate for products.
FUSED, BYTES, PRODUCTS = 1 / 1.3, 0.75, 0.6
GOALS: list[tuple[str, str, float]] = [
    ("kernel_streams", r"^mHC", FUSED),
    ("kernel_streams", r"^(pool|Engram)", BYTES),
    ("kernel_experts", r"^(decode|linear)", BYTES),
    ("kernel_experts", r"^(prefill|forward|projections)", PRODUCTS),
    ("kernel_attention", r"^(window|CSA|HCA)$", PRODUCTS),
]


class Program(NamedTuple):
    """One run: its name in the table, its command, and which options make it short."""

    name: str
    command: list[str]
    quick: tuple[str, ...] = ("--quick",)


class Outcome(NamedTuple):
    """What came of a program: its exit code, seconds, last line, and rows it measured."""

    name: str
    code: int
    seconds: float
    last: str
    found: dict[str, Any]


def programs(folder: Path = HERE) -> list[Program]:
    """All of them: the scripts in a folder, one of them twice, and the tests."""
    found = []
    for path in sorted(folder.glob("kernel_*.py")):
        short = ("--quick",) if "--quick" in path.read_text(encoding="utf-8") else ()
        found.append(Program(path.stem, [sys.executable, str(path)], short))
        if path.stem == "kernel_experts":
            stored = [*found[-1].command, "--stored"]
            found.append(Program(f"{path.stem} --stored", stored, short))
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder.parent / "tests")]
    return [*found, Program("pytest -m gpu", tests, ())]


def run(program: Program, quick: bool) -> Outcome:
    """Run one and show what it prints; read what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [*program.command, *(program.quick if quick else ())]
        if "pytest" not in command:
            command += ["--output", str(path)]
        print(f"--- {program.name}", flush=True)
        begun, last = time.perf_counter(), ""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        seconds = time.perf_counter() - begun
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Outcome(program.name, process.returncode, seconds, last, found)


def goal_of(program: str, op: str) -> float | None:
    """The share of its floor that an operation should reach; None where none was set."""
    script = program.split()[0]
    return next((g for name, like, g in GOALS if name == script and re.search(like, op)), None)


def lines_of(outcomes: Iterable[Outcome]) -> list[str]:
    """The table in markdown: a line a row, then what failed."""
    lines = [
        "| program | operation | shape | floor us | achieved us | of floor | goal | beside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for outcome in outcomes:
        for row in outcome.found.get("rows", []):
            lines.append(line_of(outcome.name, row))
        if outcome.code:
            failed.append(f"- `{outcome.name}` failed with {outcome.code}: {outcome.last}")
        elif not outcome.found:
            failed.append(f"- `{outcome.name}`: {outcome.last}")
    return [*lines, "", *failed]


def line_of(program: str, row: dict[str, Any]) -> str:
    """One operation; a share under its goal says so."""
    goal = goal_of(program, row["op"])
    wanted = "-" if goal is None else f"{goal:.0%}"
    if goal is not None and row["share"] < goal:
        wanted += ", short"
    others = dict(row.get("others") or {})
    if row.get("torch_us") is not None:
        others = {"torch": row["torch_us"], **others}
    beside = [
        f"{name}: {value}" if isinstance(value, str) else f"{name}: {value / row['us']:.1f}x"
        for name, value in others.items()
    ]
    if row.get("note"):
        beside.append(row["note"])
    times = (f"{row['floor_us']:.1f}", f"{row['us']:.1f}", f"{row['share']:.0%}")
    cells = (program, row["op"], row["shape"], *times, wanted, "; ".join(beside))
    return "| " + " | ".join(cells) + " |"


def run_all(chosen: Sequence[Program], quick: bool, output: Path) -> list[Outcome]:
    """Run all, whatever fails, and write both files anew after each."""
    outcomes: list[Outcome] = []
    for program in chosen:
        outcomes.append(run(program, quick))
        whole = [outcome._asdict() for outcome in outcomes]
        _write(output.with_suffix(".json"), json.dumps(whole, indent=1))
        _write(output.with_suffix(".md"), "\n".join(lines_of(outcomes)))
    return outcomes


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="The short forms.")] = False,
    only: Annotated[str, typer.Option(help="Those whose name has this word.")] = "",
    output: Annotated[Path, typer.Option(help="Both files, by their common name.")] = Path(
        "bench-gpu"
    ),
) -> None:
    """Measure everything that a GPU is needed for."""
    require_gpu()
    outcomes = run_all([p for p in programs() if only in p.name], quick, output)
    for outcome in outcomes:
        word = "failed" if outcome.code else "done"
        print(f"{word:>6}  {outcome.seconds:6.0f} s  {outcome.name}")
    print(f"written: {output.with_suffix('.md')}, {output.with_suffix('.json')}")
    sys.exit(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    typer.run(main)
