# SPDX-License-Identifier: Apache-2.0
"""One routed expert on this CPU from its packed record: decode and prefill, format by format.

Decode is one token through experts that lie in memory but in no cache, in large pages as a model's
do (quantize/pinned.py), in GB/s of records against what a sum of int64 reads in the same run, from
large pages or small ones, whichever it reads faster. Prefill is many tokens through one expert, in
GFLOP/s against `F.linear` in float32 of the same run. "torch" is the reference path
(`kernels="torch"`). Records hold random codes. Measure on an idle machine; the numbers of threads
are taken in turn.

    python benchmarks/cpu_experts.py                       every format at V4-Flash's sizes
    python benchmarks/cpu_experts.py --formats fp4,int3    some of them
    python benchmarks/cpu_experts.py --threads 1           with one thread alone
    python benchmarks/cpu_experts.py --decode              one token alone, which is quick
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import quantize.trellis  # noqa: F401  registers its formats
from quantize.experts import StoredExperts
from quantize.pack import PackLayout, RecordLayout
from quantize.pinned import in_huge_pages

HIDDEN, WIDTH, LIMIT = 4096, 2048, 10.0
FORMATS = (
    "fp4,int4,int3,int2,trellis4,trellis3.5,trellis3,trellis2.5,trellis2,fp8_rows32,fp8_block32"
)
PREFILL = (64, 128, 256, 512)


def seconds(run: Callable[[int], object], times: int) -> float:
    """Median time of run(0), run(1), ..., after one that does not count."""
    run(0)
    taken = []
    for i in range(times):
        start = time.perf_counter()
        run(i)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def read_rate() -> float:
    """Bytes a second that a sum over 1 GiB reads, in pages of the size that is faster."""
    rates = []
    for place in (lambda data: data, in_huge_pages):
        data = place(torch.empty(1 << 27, dtype=torch.int64)).fill_(1)
        rates += [data.nbytes / seconds(lambda _, data=data: data.sum(), 5)]
    return max(rates)


def linear_rate() -> float:
    """Operations a second of F.linear in float32, 256 rows by [4096, 4096]."""
    x, w = torch.randn(256, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    return 2 * 256 * HIDDEN * HIDDEN / seconds(lambda _: F.linear(x, w), 7)


def experts_of(name: str, count: int) -> StoredExperts:
    """So many resident experts with random codes, and scales of one size."""
    layout = RecordLayout.build(HIDDEN, WIDTH, name, name)
    record = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)
    for parts in layout.decode(record).values():
        if parts["_scale"].dtype is torch.bfloat16:
            parts["_scale"].fill_(0.01)
        else:
            parts["_scale"].view(torch.uint8).fill_(118)
        if parts[""].dtype is torch.float8_e4m3fn:
            parts[""].view(torch.uint8).bitwise_and_(0xBF)
    layouts = PackLayout.repeat(layout, count)
    experts = StoredExperts("experts", count, HIDDEN, WIDTH, LIMIT, layouts)
    experts.packed = in_huge_pages(torch.empty(count, layout.nbytes, dtype=torch.uint8))
    experts.packed.copy_(record)
    return experts


def time_rows(experts: StoredExperts, rows: int, dtype: torch.dtype, times: int) -> float:
    """Seconds of one expert on so many rows, every time another expert."""
    x, weights = torch.randn(rows, HIDDEN).to(dtype), torch.rand(rows)
    return seconds(lambda i: experts.run_expert(i % experts.num_experts, x, weights), times)


def add_rows(table: Table, name: str, threads: int, gigabytes: float, decode: bool) -> None:
    """Measure one format on so many threads."""
    record = RecordLayout.build(HIDDEN, WIDTH, name, name).nbytes
    experts = experts_of(name, max(int(gigabytes * 1e9 / record), 1))
    read = read_rate()
    cells = [name, str(threads), f"{read / 1e9:.1f}"]
    for dtype in (torch.float32, torch.bfloat16):
        taken = time_rows(experts, 1, dtype, experts.num_experts)
        rate = record / taken
        cells.append(f"{taken * 1e6:.0f}")
        cells.append(f"{rate / 1e9:.1f} ({rate / read:.0%})")
    cells.append(f"{time_rows(experts, 8, torch.float32, 30) * 1e6:.0f}")
    if not decode:
        cells += prefill_cells(experts)
    table.add_row(*cells)


def prefill_cells(experts: StoredExperts) -> list[str]:
    """Measure many tokens, and the reference."""
    cells, linear = [], linear_rate()
    experts.kernels = "torch"
    cells.append(f"{time_rows(experts, 1, torch.float32, 5) * 1e6:.0f}")
    slow = time_rows(experts, 256, torch.float32, 2)
    experts.kernels = "auto"
    cells.append(f"{linear / 1e9:.0f}")
    for rows in PREFILL:
        rate = 6 * rows * HIDDEN * WIDTH / time_rows(experts, rows, torch.float32, 3)
        cells.append(f"{rate / 1e9:.0f} ({rate / linear:.0%})")
    cells.append(f"{6 * 256 * HIDDEN * WIDTH / slow / 1e9:.0f}")
    return cells


def main(
    formats: Annotated[str, typer.Option(help="names, with commas between")] = FORMATS,
    threads: Annotated[str, typer.Option(help="numbers of threads, with commas")] = "1,2",
    gigabytes: Annotated[float, typer.Option(help="of experts that decode goes through")] = 2.0,
    decode: Annotated[bool, typer.Option("--decode", help="leave out many tokens")] = False,
) -> None:
    """Print a table."""
    head = (
        "format", "threads", "read GB/s", "M=1 fp32 us", "GB/s", "M=1 bf16 us", "GB/s", "M=8 us",
        "torch M=1 us", "linear GF/s", *(f"M={m} GF/s" for m in PREFILL), "torch M=256 GF/s",
    )  # fmt: skip
    table = Table(
        *head[: 8 if decode else None],
        title=f"one expert, D={HIDDEN} F={WIDTH}; % of read, and of F.linear",
    )
    with torch.no_grad():
        for count in map(int, threads.split(",")):
            torch.set_num_threads(count)
            for name in formats.split(","):
                add_rows(table, name, count, gigabytes, decode)
    Console(width=220).print(table)


if __name__ == "__main__":
    typer.run(main)
