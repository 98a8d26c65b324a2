# SPDX-License-Identifier: Apache-2.0
"""One layer's routed experts with adapters: against the frozen layer, and against PEFT.

    python benchmarks/lora_experts.py                        # four minutes
    python benchmarks/lora_experts.py --quick                # the smallest shape alone
    python benchmarks/lora_experts.py --only frozen          # without transformers' experts
    python benchmarks/lora_experts.py --only peft --experts 128

Forward and backward, to the input, the routing weights and the adapters. "frozen" is the same
store of experts without adapters, so that the ratio is what adapters cost. Times of two sides are
taken in turns, the least of each counts. Extra memory is the most that is allocated at a time
between the first operation and the last, gradients included, weights not.

PEFT adapts transformers' own experts by `target_parameters`: it adds B A to all weights of a layer
in every pass. "eager" is their loop over experts, "grouped_mm" their grouped product. Each turn of
the loop sends back a gradient as large as all of the layer's weights, so that its time grows with
the square of the experts: V4-Flash has 256. It is timed once, without a warm-up.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from finetune.expert_lora import LoraExperts
from modeling_dsv4.moe import Dsv4Experts, ExpertsBase
from modeling_dsv4.storage import PackedExperts
from quantize.config import get_recipe
from quantize.experts import StoredExperts
from quantize.pack import PackLayout, RecordLayout

K, LIMIT = 6, 10.0
# D, F, experts, tokens.
SHAPES = [(1024, 1024, 32, 512), (2048, 1024, 16, 512)]
WIDTH, TOKENS = 1024, 512
STORES = ("float32", "bfloat16", "fp4", "q3")
MOST_RATIO, LEAST_SPEEDUP, MOST_MEMORY, LEAST_EAGER = 1.35, 2.0, 1 / 3, 20.0
# A loop over fewer experts than this is short.
LONG_LOOP = 64
Step = Callable[[], object]


def plain_experts(d: int, f: int, e: int, dtype: torch.dtype) -> Dsv4Experts:
    """Plain experts of random weights."""
    experts = Dsv4Experts(e, d, f, LIMIT)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts.requires_grad_(False).to(dtype)


def stored_experts(d: int, f: int, e: int) -> StoredExperts:
    """Resident records in the formats of the q3 recipe, of random bytes; scales near 0.02."""
    rules = dict(get_recipe("q3").rules)
    names = rules["*.mlp.experts.*"], rules["*.mlp.experts.*down_proj"]
    layout = RecordLayout.build(d, f, *names)
    module = StoredExperts("q3", e, d, f, LIMIT, PackLayout.repeat(layout, e))
    module.packed = torch.randint(0, 256, (e, layout.nbytes), dtype=torch.uint8)
    for parts in layout.decode(module.packed).values():
        parts["_scale"].uniform_(0.01, 0.03)
    return module


def experts_of(store: str, d: int, f: int, e: int) -> ExpertsBase:
    """A layer's experts in one kind of store."""
    if store == "q3":
        return stored_experts(d, f, e)
    if store == "fp4":
        return PackedExperts.from_plain(plain_experts(d, f, e, torch.float32))
    return plain_experts(d, f, e, getattr(torch, store))


def adapted(base: ExpertsBase, r: int) -> LoraExperts:
    """The same experts with an adapter that does something."""
    layer = LoraExperts(base, "default", LoraConfig(r=r), r=r, lora_alpha=2 * r)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return layer


def native_experts(
    d: int, f: int, e: int, r: int, implementation: str
) -> tuple[nn.Module, nn.Module]:
    """transformers' experts and the module that PEFT has put around them."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = DeepseekV4Config(
                hidden_size=d, moe_intermediate_size=f, n_routed_experts=e, swiglu_limit=LIMIT
            )
            config._experts_implementation = implementation
            self.experts: nn.Module = DeepseekV4Experts(config)

    holder = Holder()
    for weight in holder.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=names)
    return holder, get_peft_model(holder, config).base_model.model.experts


def batch(d: int, e: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows, ids and weights of n tokens."""
    index = torch.rand(n, e).argsort(-1)[:, :K].contiguous()
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    return x, index, torch.rand(n, K).requires_grad_()


def step_of(module: nn.Module, given: tuple[torch.Tensor, ...]) -> Step:
    """One forward pass and its way back."""
    leaves = [given[0], given[2], *(p for p in module.parameters() if p.requires_grad)]

    def step() -> object:
        y = module(*given)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def least(steps: list[Step], turns: int, warm: int = 1) -> list[float]:
    """Least milliseconds of each step, taken in turns; the first `warm` turns do not count."""
    times = [float("inf")] * len(steps)
    for turn in range(turns + warm):
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step()
            if turn >= warm:
                times[i] = min(times[i], (time.perf_counter() - start) * 1e3)
    return times


def peak_bytes(step: Step) -> int:
    """The most that one step has allocated at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = step()
    del kept
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def cell(value: float, limit: float, most: bool) -> str:
    """A ratio against its limit, coloured by whether it holds."""
    good = value <= limit if most else value >= limit
    return f"[{'green' if good else 'red'}]{value:.2f}[/] ({'<=' if most else '>='} {limit:.2f})"


def beside_frozen(shapes: list[tuple[int, ...]], r: int, turns: int) -> Table:
    """What adapters cost over the frozen layer."""
    head = ("experts", "D", "F", "E", "tokens", "frozen ms", "adapted ms", "time", "again ms",
            "frozen MiB", "adapted MiB", "again MiB")  # fmt: skip
    table = Table(*head, title=f"adapters of rank {r}, K={K}", box=box.SIMPLE)
    for d, f, e, n in shapes:
        for store in STORES:
            base = experts_of(store, d, f, e)
            layer, again = adapted(base, r), adapted(base, r)
            again.keep_inner = False
            dtype = torch.bfloat16 if store == "bfloat16" else torch.float32
            given = batch(d, e, n, dtype)
            steps = [step_of(module, given) for module in (base, layer, again)]
            times, peaks = least(steps, turns), [peak_bytes(step) / 2**20 for step in steps]
            sizes = [str(x) for x in (d, f, e, n)]
            table.add_row(
                store, *sizes, f"{times[0]:.0f}", f"{times[1]:.0f}",
                cell(times[1] / times[0], MOST_RATIO, True), f"{times[2]:.0f}",
                *(f"{peak:.0f}" for peak in peaks),
            )  # fmt: skip
    return table


def beside_peft(experts: list[int], r: int, turns: int) -> Table:
    """The same in float32 against PEFT on transformers' experts."""
    head = ("PEFT's experts", "D", "F", "E", "tokens", "PEFT ms", "ours ms", "faster",
            "PEFT MiB", "ours MiB", "memory")  # fmt: skip
    table = Table(*head, title=f"against PEFT's target_parameters, rank {r}", box=box.SIMPLE)
    for e in experts:
        layer = adapted(plain_experts(WIDTH, WIDTH, e, torch.float32), r)
        given = batch(WIDTH, e, TOKENS, torch.float32)
        ours = step_of(layer, given)
        ours_bytes = peak_bytes(ours)
        for implementation in ("grouped_mm", "eager"):
            holder, native = native_experts(WIDTH, WIDTH, e, r, implementation)
            step = step_of(native, given)
            if implementation == "eager":
                times, goal = [*least([step], 1, 0), *least([ours], turns)], LEAST_EAGER
            else:
                times, goal = least([step, ours], turns), LEAST_SPEEDUP
            faster, peak = times[0] / times[1], peak_bytes(step)
            short = implementation == "eager" and e < LONG_LOOP
            table.add_row(
                implementation, *(str(x) for x in (WIDTH, WIDTH, e, TOKENS)),
                f"{times[0]:.0f}", f"{times[1]:.0f}",
                f"{faster:.2f}" if short else cell(faster, goal, False),
                f"{peak / 2**20:.0f}", f"{ours_bytes / 2**20:.0f}",
                cell(ours_bytes / peak, MOST_MEMORY, True),
            )  # fmt: skip
            del holder, native, step
    return table


def main(
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    turns: Annotated[int, typer.Option(help="Times each side runs.")] = 2,
    quick: Annotated[bool, typer.Option(help="The smallest shape alone.")] = False,
    only: Annotated[str, typer.Option(help="One table: peft or frozen.")] = "",
    experts: Annotated[list[int] | None, typer.Option(help="Of PEFT's layers: 32 and 64.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the tables as text, too.")] = None,
) -> None:
    """Measure adapters of routed experts on this CPU."""
    torch.manual_seed(0)
    shapes = SHAPES[:1] if quick else SHAPES
    console = Console(width=150, record=True)
    if only != "frozen":
        for count in experts or (32, 64)[: 1 if quick else 2]:
            console.print(beside_peft([count], rank, turns))
    for shape in shapes if only != "peft" else []:
        console.print(beside_frozen([shape], rank, turns))
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if output is not None:
        output.write_text(console.export_text(), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
