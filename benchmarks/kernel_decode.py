# SPDX-License-Identifier: Apache-2.0
"""Decode steps of whole models on a GPU: eager, captured in a CUDA graph, and transformers' own V4.

    python benchmarks/kernel_decode.py                      # 1k, 8k and 64k tokens, a minute
    python benchmarks/kernel_decode.py --quick              # without 64k
    python benchmarks/kernel_decode.py --shape v4-small     # a small model, where launches count

`v4-wide` has four layers (window, CSA, HCA, CSA) of V4-Flash's widths and eight experts; weights
are random bfloat16. A context is filled by a prefill, then single tokens of one row follow: the
median of their times, each waited for. "floor" is the time that a copy at this GPU's bandwidth
takes for the weights a token reads: everything but the embedding and the experts it does not hit.

The program fails if ways disagree by more than bfloat16 does, or if a captured step is not faster
than an eager one.
"""

import gc
import json
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_limits import copy_bandwidth, require_gpu
from kernel_prefill import NATIVE_UP_TO, build
from rich import box
from rich.console import Console
from rich.table import Table

SIZES, QUICK_SIZES = (1024, 8192, 65536), (1024, 8192)
WARM_UP, STEPS = 4, 32
# Ways of ours: which kernels compute, and how a step is repeated.
OURS = {"torch": ("torch", "eager"), "kernels": ("auto", "eager"), "graph": ("auto", "captured")}
# Logits deviate by 1.3. A replay differs from its kernels by less than the first number; kernels
# from torch, whose bfloat16 additions have another order and tip other choices, by the second.
SAME, NEAR = 0.02, 0.25


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that one token reads."""
    config, count = model.config, 0
    for name, weight in model.named_parameters():
        share = 1.0
        if name.endswith("embed_tokens.weight") or name.startswith("mtp."):
            continue
        if ".experts." in name:
            share = config.num_experts_per_tok / config.n_routed_experts
        count += int(share * weight.nbytes)
    return count


@torch.no_grad()
def decode(model: torch.nn.Module, ids: torch.Tensor, cache: Any) -> tuple[float, torch.Tensor]:
    """Median milliseconds of the tokens ids [1, n] behind what the cache holds; last logits."""
    times, logits = [], None
    for token in ids.split(1, dim=1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    assert logits is not None
    return statistics.median(times[WARM_UP:]), logits.float()


def measure_ours(model: Any, ids: torch.Tensor, tokens: int) -> tuple[dict[str, float], list[str]]:
    """Milliseconds by way, and what the ways' last logits do not keep."""
    from modeling_dsv4 import Dsv4Cache

    found, last = {}, []
    filled = Dsv4Cache(model.config, max_length=ids.shape[1])
    model.set_kernels("auto")
    with torch.no_grad():
        model(ids[:, :tokens], past_key_values=filled, logits_to_keep=1)
    for name, (kernels, step) in OURS.items():
        model.set_kernels(kernels)
        model.set_step(step)
        found[name], logits = decode(model, ids[:, tokens:], deepcopy(filled))
        model.set_step("eager")
        last.append(logits)
    apart = [float((x - last[1]).abs().max()) for x in last]
    broken = [
        f"at {tokens} tokens {name} is {x:.2g} from the kernels, wanted {most}"
        for name, x, most in zip(OURS, apart, (NEAR, 0, SAME), strict=True)
        if x > most
    ]
    if found["graph"] > found["kernels"]:
        broken.append(f"at {tokens} tokens the captured step is slower than the eager one")
    return found, broken


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Without 64k.")] = False,
    shape: Annotated[str, typer.Option(help="A file of benchmarks/shapes.")] = "v4-wide",
    output: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.")] = None,
) -> None:
    """Measure decode steps on a GPU."""
    require_gpu()
    sizes, broken = QUICK_SIZES if quick else SIZES, []
    found: dict[int, dict[str, float]] = {}
    model: Any = build("auto", shape)
    floor = 1000 * weight_bytes(model) / copy_bandwidth()
    all_ids = {n: torch.randint(0, 1000, (1, n + WARM_UP + STEPS), device="cuda") for n in sizes}
    for tokens, ids in all_ids.items():
        found[tokens], apart = measure_ours(model, ids, tokens)
        broken += apart
    del model
    gc.collect()
    torch.cuda.empty_cache()
    native = build("native", shape)
    for tokens, ids in all_ids.items():
        if tokens <= NATIVE_UP_TO:
            with torch.no_grad():
                cache = native(ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values
            found[tokens]["native"], _ = decode(native, ids[:, tokens:], cache)
    title = f"decode of {shape}, ms a token: bfloat16, {torch.cuda.get_device_name()}"
    shown = Table("tokens", *OURS, "native", "faster", "floor", title=title, box=box.SIMPLE)
    for tokens, ms in found.items():
        cells = [f"{ms[k]:.2f}" if k in ms else "-" for k in (*OURS, "native")]
        ratio = f"{ms['native'] / ms['graph']:.1f}x" if "native" in ms else "-"
        shown.add_row(str(tokens), *cells, ratio, f"{floor:.2f}")
    Console(width=100).print(shown)
    if output is not None:
        output.write_text(json.dumps({"shape": shape, "floor": floor, "decode": found}) + "\n")
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    typer.run(main)
