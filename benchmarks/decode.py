# SPDX-License-Identifier: Apache-2.0
"""Decode against context length: a growing cache, a static one, a compiled step, transformers' own.

    python benchmarks/decode.py                 # 1k, 8k and 32k tokens, V4 and V4.1
    python benchmarks/decode.py --quick         # V4 at 1k tokens
    python benchmarks/decode.py --no-compiled   # without two minutes of compiling a context

A context is filled by one prefill, then single tokens follow: the median of their wall times. Ours
run in one process for each shape, where the step is compiled anew for each context, as its cache
has another length; transformers' in one for each context, as its prefill's memory grows
with the square, and a size it would not survive is not started. Weights are those of context.py.

The program fails if ours, the fastest of the three, is less than 5 times as fast as transformers'
at 8k tokens or beyond, or if the three disagree. Linux only: it reads /proc.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

# The program beside this one: both models on the same random weights.
from context import load, make_weights, memory_mib
from rich import box
from rich.console import Console
from rich.table import Table

SHAPES = ("v4-small", "v41-small")
SIZES, QUICK_SIZES = (1024, 8192, 32768), (1024,)
# The compiler reads a step twice, the second time for any number of columns.
WARM_UP, STEPS = 4, 24
PREFILL = 2048
# Promises: so many times as fast from this length on; logits deviate by 0.3 and agree to this.
FASTER, FASTER_FROM, SAME = 5.0, 8192, 2e-4
OURS = ("dynamic", "static", "compiled")


@dataclass
class Decoding:
    """Milliseconds a token by kind at one context, seconds to compile, MiB of the prefill."""

    ms: dict[str, float] = field(default_factory=dict)
    compiling: float = 0.0
    difference: float = 0.0
    before: float = 0.0
    peak: float = 0.0


Runs = dict[int, Decoding]


def tokens_of(model: torch.nn.Module, count: int) -> torch.Tensor:
    """The same random ids [1, count] in every process."""
    dice = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (1, count), generator=dice)


def decode(step: Callable[..., Any], ids: torch.Tensor, cache: Any) -> tuple[list[float], Any]:
    """Seconds of every token of ids [1, n], and the logits of the last."""
    seconds, logits = [], None
    for token in ids.split(1, dim=1):
        start = time.perf_counter()
        logits = step(token, past_key_values=cache, use_cache=True).logits
        seconds.append(time.perf_counter() - start)
    return seconds, logits


@torch.no_grad()
def measure_ours(directory: Path, sizes: Sequence[int], threads: int, compiled: bool) -> Runs:
    """All contexts with each of our ways; meant for a process of its own."""
    from modeling_dsv4 import Dsv4Cache

    quiet(threads)
    model, runs = load("ours", directory), {}
    for tokens in sizes:
        ids = tokens_of(model, tokens + WARM_UP + STEPS)
        last, run = {}, Decoding()
        caches = [Dsv4Cache(model.config, max_length=n) for n in (None, ids.shape[1])]
        for cache in caches:
            for part in ids[:, :tokens].split(PREFILL, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
        if compiled:
            caches.append(deepcopy(caches[1]))
        for kind, cache in zip(OURS, caches, strict=False):
            model.set_step("compiled" if kind == "compiled" else "eager")
            seconds, last[kind] = decode(model, ids[:, tokens:], cache)
            run.ms[kind] = 1000 * statistics.median(seconds[WARM_UP:])
            if kind == "compiled":
                run.compiling = sum(seconds[:WARM_UP])
        run.difference = max(float((x - last["dynamic"]).abs().max()) for x in last.values())
        runs[tokens] = run
    return runs


@torch.no_grad()
def measure_native(directory: Path, tokens: int, threads: int) -> Decoding:
    """transformers' model at one context; meant for a process of its own."""
    quiet(threads)
    model = load("native", directory)
    ids = tokens_of(model, tokens + WARM_UP + STEPS)
    # Loading had a peak of its own; from here on VmHWM counts afresh.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("self/status", "VmRSS")
    cache = model(ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values
    peak = memory_mib("self/status", "VmHWM")
    seconds, _ = decode(model, ids[:, tokens:], cache)
    ms = {"native": 1000 * statistics.median(seconds[WARM_UP:])}
    return Decoding(ms, before=before, peak=peak)


def quiet(threads: int) -> None:
    """Set up a process that measures."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """None: the process was killed, which is how Linux says that memory ran out."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return None


def add_native(runs: Runs, directory: Path, threads: int, limit: float) -> None:
    """Measure transformers' model at the same contexts, as far as `limit` MiB allow."""
    need, last, largest = 0.0, Decoding(), 0
    for tokens, run in runs.items():
        if largest:
            # A square law, from its largest run so far.
            need = last.before + (last.peak - last.before) * (tokens / largest) ** 2
        room = min(limit, 0.9 * memory_mib("meminfo", "MemAvailable"))
        found = None
        if need <= room:
            found = in_own_process(measure_native, directory, tokens, threads)
        if found is None:
            why = f"would take about {need / 1024:.0f} GiB of {room / 1024:.0f}"
            print(f"transformers at {tokens} tokens: {why if need > room else 'out of memory'}")
            return
        last, largest = found, tokens
        run.ms |= found.ms


def faster(run: Decoding) -> float | None:
    """transformers' time over the shortest of ours."""
    if "native" not in run.ms:
        return None
    return run.ms["native"] / min(run.ms[kind] for kind in OURS if kind in run.ms)


def table_of(found: dict[str, Runs], title: str) -> Table:
    """One row per shape and context; "-" where something was not run."""
    table = Table("shape", "tokens", title=title, box=box.SIMPLE)
    for name in (*OURS, "native", "faster", "compile s"):
        table.add_column(name, justify="right", no_wrap=True)
    for shape, runs in found.items():
        for tokens, run in runs.items():
            times = [f"{run.ms[k]:.2f}" if k in run.ms else "-" for k in (*OURS, "native")]
            ratio, compiling = faster(run), run.compiling
            more = [f"{ratio:.1f}x" if ratio else "-", f"{compiling:.0f}" if compiling else "-"]
            table.add_row(shape, str(tokens), *times, *more)
    return table


def broken_promises(found: dict[str, Runs]) -> list[str]:
    """What the numbers do not keep, as sentences."""
    broken = []
    for shape, runs in found.items():
        for tokens, run in runs.items():
            ratio = faster(run)
            if ratio is not None and tokens >= FASTER_FROM and ratio < FASTER:
                times = f"{ratio:.1f}x transformers', wanted {FASTER:.0f}x"
                broken.append(f"{shape} at {tokens} tokens: {times}")
            if run.difference > SAME:
                worst = f"{run.difference:.0e}"
                broken.append(f"{shape} at {tokens} tokens: our ways disagree by {worst}")
    return broken


def main(
    quick: Annotated[bool, typer.Option("--quick", help="v4-small at 1k tokens only.")] = False,
    compiled: Annotated[bool, typer.Option(help="Also compile the step.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    native_limit: Annotated[float, typer.Option(help="GiB that transformers may take.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.")] = None,
) -> None:
    """Measure milliseconds per token against context length."""
    found: dict[str, Runs] = {}
    for shape in SHAPES[:1] if quick else SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            make_weights(shape, Path(folder))
            sizes = QUICK_SIZES if quick else SIZES
            runs = in_own_process(measure_ours, Path(folder), sizes, threads, compiled)
            if runs is None:
                sys.exit(f"ours, {shape}: killed, out of memory")
            # transformers has no DeepSeek-V4.1 to compare with.
            if shape == "v4-small" and native_limit:
                add_native(runs, Path(folder), threads, native_limit * 1024)
            found[shape] = runs
    title = f"decode, ms a token: float32, {threads} threads, torch {torch.__version__}"
    Console(width=100).print(table_of(found, title))
    if output is not None:
        rows = {shape: {n: asdict(run) for n, run in runs.items()} for shape, runs in found.items()}
        output.write_text(json.dumps({"threads": threads, **rows}) + "\n")
    broken = broken_promises(found)
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    typer.run(main)
