# SPDX-License-Identifier: Apache-2.0
"""Prefill of whole models on a GPU: with kernels, with torch alone, and transformers' own V4.

    python benchmarks/kernel_prefill.py                      # 4k, 8k and 64k tokens, a minute
    python benchmarks/kernel_prefill.py --quick              # without 64k
    python benchmarks/kernel_prefill.py --shape v4-small     # a small model, where launches count

`v4-wide` has four layers (window, CSA, HCA, CSA) of V4-Flash's widths and eight experts; weights
are random bfloat16. Each number is the second of two prefills that keep their cache and the last
logits; "GiB" is the peak less what the weights take. A model that runs out of memory shows "-".
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_limits import require_gpu
from rich import box
from rich.console import Console
from rich.table import Table

SHAPES = Path(__file__).parent / "shapes"
SIZES, QUICK_SIZES = (4096, 8192, 65536), (4096, 8192)
# Native attention scores every token against every other; beyond this it is not tried.
NATIVE_UP_TO = 8192
KINDS = ("auto", "torch", "native")


def build(kind: str, shape: str, device: str = "cuda") -> torch.nn.Module:
    """A model with random weights, made on the GPU."""
    config: Any
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if kind == "native":
                from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

                config = DeepseekV4Config.from_json_file(SHAPES / f"{shape}.json")
                return DeepseekV4ForCausalLM(config).eval()
            from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

            config = Dsv4Config.from_json_file(SHAPES / f"{shape}.json")
            model = Dsv4ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.set_kernels(kind)
    return model


@torch.no_grad()
def prefill(model: torch.nn.Module, tokens: int) -> tuple[float, float] | None:
    """Tokens a second and GiB of the second of two prefills; None: out of memory."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    taken = torch.cuda.memory_allocated()
    seconds = 0.0
    try:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids, logits_to_keep=1, use_cache=True)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return None
    return tokens / seconds, (torch.cuda.max_memory_allocated() - taken) / 2**30


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Without 64k.")] = False,
    shape: Annotated[str, typer.Option(help="A file of benchmarks/shapes.")] = "v4-wide",
    output: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.")] = None,
) -> None:
    """Measure prefill speed and memory on a GPU."""
    require_gpu()
    shown = Table(
        "model", "tokens", "tokens/s", "GiB", box=box.SIMPLE,
        title=f"prefill of {shape}: bfloat16, {torch.cuda.get_device_name()}",
    )  # fmt: skip
    found: dict[str, dict[int, tuple[float, float] | None]] = {}
    for kind in KINDS:
        model = build(kind, shape)
        found[kind] = {}
        for tokens in QUICK_SIZES if quick else SIZES:
            run = None
            if kind != "native" or tokens <= NATIVE_UP_TO:
                run = prefill(model, tokens)
            found[kind][tokens] = run
            cells = ("-", "-") if run is None else (f"{run[0]:.0f}", f"{run[1]:.2f}")
            shown.add_row(kind, str(tokens), *cells)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    Console(width=100).print(shown)
    if output is not None:
        output.write_text(json.dumps({"shape": shape, "prefill": found}) + "\n")
    slower = [n for n, run in found["auto"].items() if run is None]
    if slower:
        sys.exit(f"out of memory at {slower} tokens")


if __name__ == "__main__":
    typer.run(main)
