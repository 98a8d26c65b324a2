# SPDX-License-Identifier: Apache-2.0
"""Linear maps of few rows on this CPU: GB/s of weights against a sum, and time against torch.

    python benchmarks/cpu_linear.py                    the maps of a V4-Flash layer, and a nano's
    python benchmarks/cpu_linear.py --rows 1,2,4,8     more rows of x
    python benchmarks/cpu_linear.py --threads 1        with one thread alone

Weights lie in memory but in no cache: every call takes another, of so many that they fill half a
gigabyte (a nano's stay in the cache, as they do in a nano). The limit is what a sum of int64 reads
in the same run. "torch" is what the same module computes with `kernels="torch"`; for E4M3 it
unpacks the weight every time. Measure on an idle machine.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer

# The program beside this one: a median of times, and what a sum reads.
from cpu_experts import read_rate, seconds
from rich.console import Console
from rich.table import Table
from torch import nn

from modeling_dsv4.kernel_choice import use_cpu_linear
from modeling_dsv4.layers import Dsv4Linear, Float32Head
from modeling_dsv4.storage import Fp8GroupedLinear, Fp8Linear, GroupedLinear

# name, outputs, inputs, groups
LAYER = (
    ("q_a_proj", 1024, 4096, 0),
    ("q_b_proj", 32768, 1024, 0),
    ("kv_proj", 512, 4096, 0),
    ("o_a_proj", 8192, 4096, 8),
    ("o_b_proj", 4096, 8192, 0),
    ("shared gate", 2048, 4096, 0),
    ("shared down", 4096, 2048, 0),
    ("router", 256, 4096, 0),
)
NANO = (("nano q_b_proj", 512, 64, 0), ("nano head", 1024, 256, 0), ("nano o_b_proj", 256, 128, 0))
RESIDENT = 1 << 29
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "e4m3": torch.bfloat16}


def make(kind: str, out: int, columns: int, groups: int) -> nn.Module:
    """A module with weights of one kind; codes and numbers are small, and none is zero."""
    module: nn.Module
    if kind == "e4m3":
        module = (
            Fp8GroupedLinear(columns, out, groups, 128) if groups else Fp8Linear(columns, out, 128)
        )
        module.get_parameter("weight").view(torch.uint8).random_(1, 64)
        module.get_parameter("weight_scale_inv").view(torch.uint8).fill_(120)
        return module
    with torch.device("meta"):
        module = (
            GroupedLinear(columns, out, groups) if groups else Dsv4Linear(columns, out, bias=False)
        )
    module = module.to_empty(device="cpu").to(DTYPES[kind])
    module.get_parameter("weight").fill_(0.01)
    return module


def head(kind: str) -> nn.Module:
    """A float32 head over weights of the model's dtype."""
    module = Float32Head(4096, 16384, bias=False, device="meta").to(DTYPES[kind])
    module.to_empty(device="cpu").get_parameter("weight").fill_(0.01)
    return module


def add_row(
    table: Table, name: str, kind: str, threads: int, rows: int, make_one: Callable[[], nn.Module],
    groups: int, read: float,
) -> None:  # fmt: skip
    """Measure one map with C and without."""
    first = make_one()
    weight = first.get_parameter("weight")
    several = 1 if name.startswith("nano") else max(RESIDENT // weight.nbytes, 2)
    modules = [first, *(make_one() for _ in range(several - 1))]
    shape = (1, rows, groups, weight.shape[1]) if groups else (1, rows, weight.shape[1])
    x = torch.randn(shape).to(DTYPES[kind])
    taken = {}
    for kernels in ("auto", "torch"):
        for module in modules:
            module.__dict__["kernels"] = kernels
        times = 5 if kernels == "torch" and kind == "e4m3" else max(min(several, 50), 20)
        taken[kernels] = seconds(lambda i: modules[i % several](x), times)
    rates = {k: weight.nbytes / v for k, v in taken.items()}
    in_c = use_cpu_linear("auto", x, weight, groups=groups or 1)
    table.add_row(
        name, kind, str(threads), str(rows), f"{weight.nbytes / 1e6:.1f}",
        "C" if in_c else "torch", f"{taken['auto'] * 1e6:.0f}", f"{rates['auto'] / 1e9:.1f}",
        f"{rates['auto'] / read:.0%}", f"{taken['torch'] * 1e6:.0f}",
        f"{taken['torch'] / taken['auto']:.2f}",
    )  # fmt: skip


def main(
    rows: Annotated[str, typer.Option(help="of x, numbers with commas between")] = "1",
    threads: Annotated[str, typer.Option(help="numbers of threads, with commas")] = "1,2",
    kinds: Annotated[str, typer.Option(help="of weights")] = "float32,bfloat16,e4m3",
) -> None:
    """Print a table."""
    head_row = ("map", "weights", "threads", "rows", "MB", "by", "us", "GB/s", "of the sum",
                "torch us", "times")  # fmt: skip
    with torch.inference_mode():
        for count in map(int, threads.split(",")):
            torch.set_num_threads(count)
            read = read_rate()
            table = Table(*head_row, title=f"{count} threads; a sum reads {read / 1e9:.1f} GB/s")
            for kind in kinds.split(","):
                for m in map(int, rows.split(",")):
                    for name, out, columns, groups in (*LAYER, *NANO):

                        def one(o: int = out, c: int = columns, g: int = groups) -> nn.Module:
                            return make(kind, o, c, g)  # noqa: B023

                        add_row(table, name, kind, count, m, one, groups, read)
                    if kind != "e4m3":
                        add_row(table, "head", kind, count, m, lambda: head(kind), 0, read)  # noqa: B023
            Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
