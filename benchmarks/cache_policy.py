# SPDX-License-Identifier: Apache-2.0
"""Which records should leave memory first: hit rates of the store's policies against the optimum.

    python benchmarks/cache_policy.py           # traces of nano-v41, and a drawn one at V4's size
    python benchmarks/cache_policy.py --trace FILE --trace FILE   # recorded with quantize.routing

A simulation of decoding without disk or threads, with the policy objects that the store uses. The
optimum (Belady) knows the future: the record that is used again last leaves first. nano-v41 has six
layers of sixteen experts, so that its smallest caches hold a handful of records and say little; the
drawn trace has V4-Flash's 43 layers of 256 experts, and its popularity is assumed, not measured.
A second table says how often guesses of nano-v41's next choices are right: by the next layer's
router on this layer's input (`prefetch="next-layer"`), and by what the token before chose.
The program fails if a policy beats the optimum, which cannot be.
"""

import heapq
import itertools
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from quantize.replacement import REPLACEMENTS, make_replacement
from quantize.routing import Trace, record_routing, zipf_trace

ROOT = Path(__file__).resolve().parents[1]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
Key = tuple[int, int]


def hit_rate(trace: Trace, policy: str, capacity: int) -> float:
    """Share of uses whose record is there; what a step wants does not leave for it."""
    order, resident = make_replacement(policy), set[Key]()
    hits = uses = 0
    for layer, ids in trace.steps():
        wanted = [(layer, e) for e in ids]
        for key in wanted:
            uses += 1
            if key in resident:
                hits += 1
            else:
                while len(resident) >= capacity:
                    victim = next((k for k in order.order() if k not in wanted), None)
                    victim = victim or next(order.order())
                    order.remove(victim)
                    resident.remove(victim)
                order.add(key)
                resident.add(key)
            order.use(key)
    return hits / uses


def best_rate(trace: Trace, capacity: int) -> float:
    """The same by Belady's rule."""
    uses = [(layer, e) for layer, ids in trace.steps() for e in ids]
    following, last = [0] * len(uses), dict[Key, int]()
    for i in range(len(uses) - 1, -1, -1):
        following[i] = last.get(uses[i], len(uses) + i)
        last[uses[i]] = i
    until, heap, hits = dict[Key, int](), list[tuple[int, Key]](), 0
    for i, key in enumerate(uses):
        if key in until:
            hits += 1
        elif len(until) >= capacity:
            # Entries of the heap that were used since are stale.
            while until.get((found := heapq.heappop(heap))[1]) != -found[0]:
                pass
            del until[found[1]]
        until[key] = following[i]
        heapq.heappush(heap, (-following[i], key))
    return hits / len(uses)


class Guesses:
    """How many experts were guessed rightly, by the next router and by the token before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.right, self.asked = 0.0, 0
        gates = [layer.mlp.gate for layer in model.model.layers]
        self.handles = []
        for here, following in itertools.pairwise(gates):
            self.handles.append(here.register_forward_hook(partial(self._guess, following)))
            self.handles.append(following.register_forward_hook(self._compare))
        self._guessed: dict[torch.nn.Module, torch.Tensor] = {}

    def _guess(self, following: torch.nn.Module, _: object, given: Any, __: object) -> None:
        # Without the hooks: a guess is no choice.
        self._guessed[following] = type(following).forward(following, given[0])[2]

    def _compare(self, gate: torch.nn.Module, _: object, out: Any) -> None:
        found = self._guessed.pop(gate)
        self.right += (found[:, :, None] == out[2][:, None]).sum().item()
        self.asked += out[2].numel()


def repeated(trace: Trace) -> float:
    """Share of choices that the token before made as well."""
    a, b = trace.choices[:, 1:], trace.choices[:, :-1]
    return (a[..., None] == b[..., None, :]).any(-1).float().mean().item()


@torch.no_grad()
def nano_traces(tokens: int, recalls: Table) -> dict[str, Trace]:
    """Routing of nano-v41 over held-out prose and code, and over the example's chats."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from modeling_dsv4 import Dsv4ForCausalLM

    directory = ROOT / "models" / "nano-v41"
    model = Dsv4ForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = {k: v.long() for k, v in load_file(directory / "held_out.safetensors").items()}
    chats = (ROOT / "examples" / "data" / "private.jsonl").read_text(encoding="utf-8")
    ids = tokenizer(chats, return_tensors="pt").input_ids[0]
    texts["chat"] = ids[: len(ids) // 512 * 512].view(-1, 512)
    traces = {}
    for name, rows in texts.items():
        guesses = Guesses(model)
        with record_routing(model) as recorder:
            for row in rows[: max(1, tokens // rows.shape[1])]:
                model(row[None])
        for handle in guesses.handles:
            handle.remove()
        trace = traces[f"nano-v41, {name}"] = recorder.trace()
        by_chance = trace.choices.shape[2] / trace.num_experts
        shares = guesses.right / guesses.asked, repeated(trace), by_chance
        recalls.add_row(f"nano-v41, {name}", *(f"{share:.3f}" for share in shares))
    return traces


def add_rows(table: Table, name: str, trace: Trace) -> bool:
    """A row per policy and one of the optimum; whether none is above it."""
    layers, tokens, _ = trace.choices.shape
    records = layers * trace.num_experts
    sizes = [max(1, int(share * records)) for share in SHARES]
    best = [best_rate(trace, size) for size in sizes]
    rates = {p: [hit_rate(trace, p, size) for size in sizes] for p in REPLACEMENTS}
    for policy, row in {**rates, "optimum": best}.items():
        title = f"{name} ({tokens} tokens, {records} experts)" if policy == "lru" else ""
        table.add_row(title, policy, *(f"{rate:.3f}" for rate in row))
    table.add_section()
    return all(r <= b for row in rates.values() for r, b in zip(row, best, strict=True))


def main(
    trace: Annotated[list[Path] | None, typer.Option(help="Recorded traces.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each text of nano-v41.")] = 8192,
    zipf_tokens: Annotated[int, typer.Option(help="Of the drawn trace.")] = 512,
    exponent: Annotated[float, typer.Option(help="Popularity is rank^-exponent.")] = 0.8,
    repeat: Annotated[float, typer.Option(help="Share kept from the token before.")] = 0.25,
    seed: int = 0,
) -> None:
    """Print hit rates by policy and share of the experts that is resident."""
    recalls = Table("guesses that are right", "next router", "token before", "by chance")
    if trace:
        traces = {path.name: Trace.load(path) for path in trace}
    else:
        traces = nano_traces(tokens, recalls)
        generator = torch.Generator().manual_seed(seed)
        drawn = zipf_trace(43, 256, 6, zipf_tokens, exponent, repeat, generator)
        traces[f"drawn, Zipf {exponent}, {repeat:.0%} repeated"] = drawn
    heads = [f"{share:.3g}" for share in SHARES]
    table = Table("trace", "leaves first", *heads, box=box.SIMPLE)
    table.title = "hit rate by share of the experts resident, from empty"
    fine = [add_rows(table, name, found) for name, found in traces.items()]
    Console(width=120).print(table)
    if not trace:
        Console(width=120).print(recalls)
    if not all(fine):
        raise SystemExit("a policy is above the optimum: the simulation is wrong")


if __name__ == "__main__":
    typer.run(main)
