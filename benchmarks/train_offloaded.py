# SPDX-License-Identifier: Apache-2.0
"""Training a model whose experts stay on disk: bytes, memory and time of an optimizer step.

    python benchmarks/train_offloaded.py                    64 experts, 2 layers: 1.7 GB of disk
    python benchmarks/train_offloaded.py --experts 256      as many as V4-Flash has: 6.9 GB
    ... --checkpoint DIR                                    keep the model there, and use it again

Layers are as wide as V4-Flash (4096, experts of 2048 at FP4: 13.4 MB each); weights are drawn and
packs written as they are. LoRA on all modules, AdamW, float32, layer by layer (`LayerMajor`). Every
row is a process of its own with direct reads. First, with 16 experts, gradients are compared with
those of the ordinary order and all experts in memory.

Bytes are compared with one read of every expert that was hit in each direction: the limit, whatever
the number of micro-batches. The ordinary order is the peer. The ideal time is the larger of what
the same step takes with all experts resident, and its bytes at the rate that the same run measures
(direct reads of 4 MiB, eight at a time). The program fails if bytes exceed their limit for any
number of micro-batches, gradients differ, or a process takes more than --memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from offload_true import ROOT, make_checkpoint, of_process
from rich.console import Console
from rich.table import Table

ERROR = 1e-4
VOCABULARY = 8192


@dataclass
class Step:
    """One optimizer step; `read` are bytes that the process made the disk read."""

    micro_batches: int
    seconds: float
    read: int
    counted: int
    hit_bytes: int
    peak: int
    checkpoints: int


def load(directory: Path, budget: int, threads: int) -> Any:
    """The model with fresh adapters on all modules; every second half of a pair drawn, not 0."""
    torch.set_num_threads(threads)
    import quantize  # noqa: F401  (registers the storage method)
    from finetune import attach_adapters
    from modeling_dsv4 import Dsv4ForCausalLM

    torch.manual_seed(0)
    model = Dsv4ForCausalLM.from_pretrained(directory, dtype=torch.float32, expert_memory=budget)
    adapted = attach_adapters(model, "all", r=32).train()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "_B" in name:
            parameter.data.normal_(std=0.01)
    return adapted


def make_batches(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one row each."""
    dice = torch.Generator().manual_seed(count)
    rows = [torch.randint(2, VOCABULARY, (1, tokens), generator=dice) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def ordinary(model: Any, batches: list[dict[str, torch.Tensor]], items: int) -> None:
    """The peer: one micro-batch after the other, checkpoints at every layer."""
    for batch in batches:
        model(**batch, num_items_in_batch=torch.tensor(items), use_cache=False).loss.backward()


def measure(
    directory: Path, budget: int, order: str, threads: int, tokens: int, counts: str
) -> list[Step]:
    """A first step to warm up, then one for each number of micro-batches."""
    from finetune.layer_major import LayerMajor

    model = load(directory, budget, threads)
    schedule = LayerMajor(model)
    if order == "ordinary":
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    stored = [e.base for e in schedule.experts]
    steps = []
    for count in (1, *(int(c) for c in counts.split(","))):
        batches = make_batches(count, tokens)
        items = count * (tokens - 1)
        disk, clock = of_process("io", "read_bytes"), time.perf_counter()
        counted = sum(base.counts.bytes_read for base in stored)
        if order == "ordinary":
            ordinary(model, batches, items)
        else:
            schedule.step(batches, items)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - clock
        hit = sum(e.base.layout.of(i).nbytes for e in schedule.experts for i in e.hit)
        steps.append(
            Step(
                micro_batches=count,
                seconds=seconds,
                read=of_process("io", "read_bytes") - disk,
                counted=sum(base.counts.bytes_read for base in stored) - counted,
                hit_bytes=hit,
                peak=1024 * of_process("status", "VmHWM"),
                checkpoints=schedule.checkpoint_peak,
            )
        )
    return steps[1:]


def compare_gradients(directory: Path, total: int, threads: int, tokens: int) -> list[float]:
    """Largest error of a gradient, by its norm: layer by layer from disk, against all in memory."""
    from finetune.layer_major import LayerMajor

    batches, items = make_batches(3, tokens), 3 * (tokens - 1)
    found = []
    for budget in (total, total // 8):
        model = load(directory, budget, threads)
        if budget == total:
            ordinary(model, batches, items)
        else:
            LayerMajor(model).step(batches, items)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        del model
    want, got = found
    if sorted(want) != sorted(got):
        raise SystemExit("other parameters got gradients")
    return [float((got[n] - want[n]).norm() / want[n].norm()) for n in want]


def in_a_process(directory: Path, **options: Any) -> Any:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--one", str(directory)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(console: Console, name: str, directory: Path, **options: Any) -> list[Step]:
    """Steps of one process, told as soon as they are known: it takes minutes."""
    steps = [Step(**found) for found in in_a_process(directory, **options)]
    told = [f"{s.micro_batches}: {s.seconds:.1f} s, {s.peak / 2**30:.2f} GiB" for s in steps]
    console.print(f"{name}, micro-batches: {'; '.join(told)}")
    return steps


def show(rows: list[tuple[str, Step, float]], rate: float, memory: int) -> bool:
    """Print steps against their limits; whether all keep them."""
    from quantize.sizes import format_size

    table = Table(title="an optimizer step over experts on disk")
    for head in ("order", "micro-batches", "read", "hit twice", "ratio", "time", "ideal", "ratio",
                 "peak RSS", "stream checkpoints"):  # fmt: skip
        table.add_column(head, justify="right")
    fine = True
    for order, step, compute in rows:
        limit, ideal = 2 * step.hit_bytes, max(compute, step.read / rate)
        if order == "layer-major":
            # A directory entry, a page of python: some kB are read beside the packs.
            fine = fine and max(step.read - 2**20, step.counted) <= limit and step.peak <= memory
        known = bool(step.hit_bytes)
        table.add_row(
            order, str(step.micro_batches), format_size(step.read),
            format_size(limit) if known else "", f"{step.read / limit:.2f}" if known else "",
            f"{step.seconds:.1f} s", f"{ideal:.1f} s" if compute else "",
            f"{step.seconds / ideal:.2f}" if compute else "",
            f"{step.peak / 2**30:.2f} GiB", format_size(step.checkpoints),
        )  # fmt: skip
    Console(width=130).print(table)
    return fine


def provide(made: Path, layers: int, experts: int) -> int:
    """A model of so many layers and experts, unless it is there; bytes of all experts."""
    from quantize.pack import PackFile

    if not made.exists():
        return make_checkpoint(made, layers, experts, 0)
    packs = [PackFile.open(path) for path in sorted(made.glob("experts-*.safetensors"))]
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    found = len(packs), config["n_routed_experts"]
    if found != (layers, experts):
        raise SystemExit(f"{made}: wanted {layers} layers of {experts} experts, got {found}")
    return sum(pack.nbytes for pack in packs)


def compare(
    scratch: Path,
    made: Path,
    layers: int,
    experts: int,
    budget: int,
    memory: int,
    options: dict[str, Any],
) -> bool:
    """Gradients at a size where both orders fit, then bytes, memory and time at the true width."""
    from quantize.machine import measure_disk

    threads, tokens, counts = options["threads"], options["tokens"], options["counts"]
    small = scratch / "small"
    total = make_checkpoint(small, layers, 16, 0)
    more = {"order": "gradients", "budget": total, "threads": threads, "tokens": tokens}
    errors = in_a_process(small, **more)
    console = Console(width=130)
    console.print(
        f"16 experts, {len(errors)} gradients: largest difference from the ordinary order with all "
        f"experts in memory {max(errors):.1e} of the gradient's norm (limit {ERROR:.0e})"
    )
    total = provide(made, layers, experts)
    os.sync()
    packs = sorted(made.glob("experts-*.safetensors"))
    alike = {**options, "order": "layer-major"}
    resident = run(console, "all experts in memory", made, **alike, budget=total)
    seconds = {step.micro_batches: step.seconds for step in resident}
    rates = [measure_disk(packs).rate]
    steps = run(console, "layer-major", made, **alike, budget=budget)
    rates.append(measure_disk(packs).rate)
    few = {**options, "counts": min(2, int(counts[-1])), "order": "ordinary"}
    peer = run(console, "ordinary", made, **few, budget=budget)
    rows = [("layer-major", step, seconds[step.micro_batches]) for step in steps]
    rows += [("ordinary", step, 0.0) for step in peer]
    rate = sum(rates) / len(rates)
    fine = show(rows, rate, memory)
    console.print(
        f"{experts} experts, {layers} layers: {total / 1e9:.2f} GB of packs, "
        f"{budget / 1e9:.2f} GB of them resident; {tokens} tokens a micro-batch, {threads} "
        f"threads, disk {rate / 1e9:.2f} GB/s"
    )
    return fine and max(errors) <= ERROR


def main(
    layers: int = 2,
    experts: int = 64,
    tokens: Annotated[int, typer.Option(help="Of one micro-batch.")] = 128,
    counts: Annotated[str, typer.Option(help="Micro-batches of a step.")] = "1,2,4",
    threads: int = 2,
    resident: Annotated[str, typer.Option(help="Of the experts.")] = "0.4GB",
    memory: Annotated[str, typer.Option(help="A process may take.")] = "8GiB",
    directory: Annotated[Path | None, typer.Option(help="On a real disk.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Of the model; kept.")] = None,
    one: Annotated[Path | None, typer.Option(hidden=True)] = None,
    order: Annotated[str, typer.Option(hidden=True)] = "layer-major",
    budget: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Print tables of bytes and times against their limits."""
    from quantize.sizes import parse_size

    if one is not None:
        if order == "gradients":
            print(json.dumps(compare_gradients(one, budget, threads, tokens)))
        else:
            steps = measure(one, budget, order, threads, tokens, counts)
            print(json.dumps([asdict(step) for step in steps]))
        return
    options: dict[str, Any] = {"threads": threads, "tokens": tokens, "counts": counts}
    with tempfile.TemporaryDirectory(dir=directory, prefix="train-") as scratch:
        limits = parse_size(resident), parse_size(memory)
        made = checkpoint or Path(scratch, "model")
        fine = compare(Path(scratch), made, layers, experts, *limits, options)
    if not fine:
        raise SystemExit("above a limit")


if __name__ == "__main__":
    typer.run(main)
