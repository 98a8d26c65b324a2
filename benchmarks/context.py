# SPDX-License-Identifier: Apache-2.0
"""Prefill against context length: ours and transformers' `deepseek_v4`, same weights.

    python benchmarks/context.py            # 1k to 64k tokens, some minutes
    python benchmarks/context.py --quick    # 1k and 2k

Every measurement is a fresh process: load, a warm-up of 256 tokens, then one prefill that keeps its
cache and the last logits. "MiB" is that process's peak resident memory less what was resident
before the prefill; processor seconds stand in brackets, for machines with other work to do.
transformers' memory grows with the square, so a size it would not survive is not started.

The program fails if ours is slower than transformers' at 4k or beyond, if its memory grows more
than 4.3x from 16k to 64k tokens, or if the two models disagree on the warm-up, where no choice of
entries can be tied. Linux only: it reads /proc.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

SHAPES = Path(__file__).parent / "shapes"
SIZES, QUICK_SIZES = (1024, 4096, 8192, 16384, 65536), (1024, 2048)
WARM_UP = 256
# Promises: at most this growth for four times the tokens; never slower from this length on. Logits
# deviate by 0.3 and agree to 1e-6.
MOST_GROWTH, FASTER_FROM, SAME = 4.3, 4096, 1e-5


@dataclass(frozen=True)
class Prefill:
    """Wall and processor seconds, MiB before the prefill and at its peak, the warm-up's logits."""

    seconds: float
    cpu_seconds: float
    before: float
    peak: float
    logits: list[float]

    @property
    def growth(self) -> float:
        return self.peak - self.before


Runs = dict[int, Prefill]


def make_weights(shape: str, directory: Path) -> None:
    """Write random weights, official layout, so that both models read the very same numbers."""
    from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
    from modeling_dsv4.checkpoint import save_official

    torch.manual_seed(0)
    config = Dsv4Config.from_json_file(SHAPES / f"{shape}.json")
    # The official layout is bfloat16: rounded here, nothing is rounded there.
    save_official(Dsv4ForCausalLM(config).to(torch.bfloat16), directory)


def load(kind: str, directory: Path) -> torch.nn.Module:
    """Load the weights in float32 with either model."""
    if kind == "native":
        from transformers import DeepseekV4ForCausalLM

        return DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    from modeling_dsv4 import Dsv4ForCausalLM

    model = Dsv4ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if model.config.engram_layer_ids:
        used = model.config.engram_compressed_vocab_size
        model.set_engram_token_map(torch.arange(model.config.vocab_size) % used)
    return model


def memory_mib(file: str, field: str) -> float:
    """One line of /proc. Not getrusage: its peak is inherited from the process that forked."""
    lines = Path("/proc", file).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def prefill(kind: str, directory: Path, tokens: int, threads: int) -> Prefill:
    """Load and run; meant for a process of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = load(kind, directory)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
    logits = model(ids[:, :WARM_UP], logits_to_keep=1).logits.flatten().tolist()
    # Loading had a peak of its own; from here on VmHWM counts afresh.
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = memory_mib("self/status", "VmRSS"), time.perf_counter(), time.process_time()
    model(ids, logits_to_keep=1, use_cache=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Prefill(wall, cpu, before, memory_mib("self/status", "VmHWM"), logits)


def in_own_process(kind: str, directory: Path, tokens: int, threads: int) -> Prefill | None:
    """None: the process was killed, which is how Linux says that memory ran out."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(prefill, kind, directory, tokens, threads).result()
        except BrokenProcessPool:
            return None


def native_need(measured: Runs, tokens: int) -> float:
    """MiB that transformers' model would take, from its largest run so far: a square law."""
    if not measured:
        return 0.0
    largest = max(measured)
    run = measured[largest]
    return run.before + run.growth * (tokens / largest) ** 2


def measure(directory: Path, sizes: Sequence[int], threads: int, limit: float) -> tuple[Runs, Runs]:
    """Run both models, size by size in turn, so that other work on the machine meets both.

    Args:
        directory: the weights.
        sizes: token counts, ascending.
        threads: of torch.
        limit: MiB that transformers' model may take; 0 leaves it out.
    """
    ours: Runs = {}
    native: Runs = {}
    for tokens in sizes:
        run = in_own_process("ours", directory, tokens, threads)
        if run is None:
            sys.exit(f"ours at {tokens} tokens: killed, out of memory")
        ours[tokens] = run
        room = min(limit, 0.9 * memory_mib("meminfo", "MemAvailable"))
        need = native_need(native, tokens)
        if not limit:
            continue
        if need <= room and (run := in_own_process("native", directory, tokens, threads)):
            native[tokens] = run
            continue
        why = f"would take about {need / 1024:.0f} GiB of {room / 1024:.0f}"
        print(f"transformers at {tokens} tokens: {why if need > room else 'out of memory'}")
        limit = 0.0
    return ours, native


def table_of(ours: Runs, native: Runs, title: str) -> Table:
    """One row per size; "-" where transformers' model was not run."""
    table = Table("tokens", title=title, box=box.SIMPLE)
    names = ("ours s (cpu)", "native s (cpu)", "faster", "ours MiB", "native MiB", "smaller")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for tokens, a in ours.items():
        cells = [f"{a.seconds:.2f} ({a.cpu_seconds:.1f})", "-", "-", f"{a.growth:.0f}", "-", "-"]
        if tokens in native:
            b = native[tokens]
            faster, smaller = b.seconds / a.seconds, b.growth / max(a.growth, 1)
            cells[1:3] = f"{b.seconds:.2f} ({b.cpu_seconds:.1f})", f"{faster:.1f}x"
            cells[4:6] = f"{b.growth:.0f}", f"{smaller:.1f}x"
        table.add_row(str(tokens), *cells)
    return table


def growth_64k(ours: Runs) -> float | None:
    """Memory at 64k tokens over that at 16k, where both were run."""
    if not {16384, 65536} <= set(ours):
        return None
    return ours[65536].growth / ours[16384].growth


def broken_promises(ours: Runs, native: Runs) -> list[str]:
    """What the numbers do not keep, as sentences."""
    broken = []
    times = growth_64k(ours)
    if times is not None and times > MOST_GROWTH:
        broken.append(f"memory grew {times:.2f}x from 16k to 64k tokens, wanted {MOST_GROWTH}x")
    for tokens, run in native.items():
        if tokens >= FASTER_FROM and ours[tokens].seconds >= run.seconds:
            seconds = f"{ours[tokens].seconds:.1f} s against {run.seconds:.1f} s"
            broken.append(f"slower than transformers at {tokens} tokens: {seconds}")
        difference = torch.tensor(ours[tokens].logits) - torch.tensor(run.logits)
        if difference.abs().max() > SAME:
            worst = f"{difference.abs().max():.0e}"
            broken.append(f"not the same model: logits of the warm-up differ by {worst}")
    return broken


def main(
    quick: Annotated[bool, typer.Option("--quick", help="1k and 2k tokens only.")] = False,
    shape: Annotated[str, typer.Option(help="A file of benchmarks/shapes.")] = "v4-small",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    native_limit: Annotated[float, typer.Option(help="GiB that transformers may take.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.")] = None,
) -> None:
    """Measure prefill time and memory against context length."""
    # transformers has no DeepSeek-V4.1 to compare with.
    limit = native_limit * 1024 if shape == "v4-small" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        make_weights(shape, Path(folder))
        sizes = QUICK_SIZES if quick else SIZES
        ours, native = measure(Path(folder), sizes, threads, limit)
    title = f"prefill of {shape}: float32, {threads} threads, torch {torch.__version__}"
    Console(width=100).print(table_of(ours, native, title))
    if output is not None:
        runs = {"ours": ours, "native": native}
        rows = {name: {n: asdict(run) for n, run in found.items()} for name, found in runs.items()}
        output.write_text(json.dumps({"shape": shape, "threads": threads, **rows}) + "\n")
    times = growth_64k(ours)
    if times is not None:
        print(f"memory at 64k tokens over that at 16k: {times:.2f}x (promised: {MOST_GROWTH}x)")
    broken = broken_promises(ours, native)
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    typer.run(main)
