# SPDX-License-Identifier: Apache-2.0
"""Routed experts of V4-Flash straight from their storage, against what the GPU can do at best.

    python benchmarks/kernel_experts.py            # under a minute
    python benchmarks/kernel_experts.py --quick    # decoding and one prefill
    python benchmarks/kernel_experts.py --tune     # and which tiles are fastest here

One layer (D 4096, F 2048, 256 experts, 6 a token) in FP4 and in bfloat16, 17 GiB in all. The floor
of decoding is the bytes of the experts that were hit at the speed of a copy; that of a prefill is
its multiplications at the speed of a large matrix product. "torch" is the same module without
kernels: FP4 and FP8 dequantized tile by tile and multiplied, bfloat16 by `grouped_mm` or, for few
tokens, a loop. Both are measured in the same run.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import gpu_limits
import torch
import typer
from gpu_limits import Limits, Row, time_us

from modeling_dsv4.moe import Dsv4Experts, ExpertsBase
from modeling_dsv4.storage import Fp8Linear, PackedExperts

D, F, E, K = 4096, 2048, 256, 6
LIMIT = 10.0
PREFILL = 4096
# Experts among which a prefill's rows are shared out for "large groups": 1536 rows each.
FEW = 16


def packed_experts() -> PackedExperts:
    """All experts of a layer in FP4, of random bytes; their scales are near 2^-7."""
    with torch.device("meta"):
        module = PackedExperts(E, D, F, LIMIT)
    for name, parameter in list(module.named_parameters()):
        low, high = (119, 121) if name.endswith("_scale") else (0, 256)
        raw = torch.randint(low, high, parameter.shape, dtype=torch.uint8, device="cuda")
        setattr(module, name, torch.nn.Parameter(raw.view(parameter.dtype), requires_grad=False))
    return module


def plain_experts() -> Dsv4Experts:
    """The same shapes in bfloat16."""
    with torch.device("meta"):
        module = Dsv4Experts(E, D, F, LIMIT).to(torch.bfloat16)
    for name, parameter in list(module.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        weight.normal_(std=parameter.shape[-1] ** -0.5)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return module


def tokens(n: int, experts: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, ids and routing weights of n tokens that choose among so many experts."""
    index = torch.rand(n, experts, device="cuda").argsort(-1)[:, :K].contiguous()
    x = torch.randn(n, D, dtype=torch.bfloat16, device="cuda")
    return x, index, torch.rand(n, K, device="cuda")


def both(
    module: torch.nn.Module, run: Callable[[], object], torch_runs: int
) -> tuple[float, float]:
    """Microseconds by the kernels and by torch."""
    module.kernels = "triton"
    kernel = time_us(run)
    module.kernels = "torch"
    reference = time_us(run, runs=torch_runs, warm=1)
    module.kernels = "auto"
    return kernel, reference


def measure(
    name: str, module: ExpertsBase, n: int, limits: Limits, experts: int = E, backward: bool = False
) -> Row:
    """One forward pass, or one and its way back to the inputs, of n tokens."""
    x, index, routing = tokens(n, experts)
    x.requires_grad_(backward)
    routing.requires_grad_(backward)
    grad = torch.randn(n, D, device="cuda")

    def run() -> object:
        y = module(x, index, routing)
        return torch.autograd.grad(y, (x, routing), grad) if backward else y

    hit = len(index.unique())
    moved = hit / E * sum(p.nbytes for p in module.parameters()) * (1 + backward)
    flops = 2.0 * n * K * 3 * D * F * (1 + backward)
    kernel, reference = both(module, run, 3 if n > 16 else 10)
    shape = f"{n} x {K} of {experts}"
    return Row(name, shape, moved, flops, limits.floor_us(moved, flops), kernel, reference)


def measure_linear(block: int, n: int, limits: Limits) -> Row:
    """A dense map of 4096 to 8192 in FP8 blocks."""
    with torch.device("meta"):
        module = Fp8Linear(D, 2 * D, block)
    raw = torch.randint(0, 120, (2 * D, D), dtype=torch.uint8, device="cuda")
    module.weight = torch.nn.Parameter(raw.view(torch.float8_e4m3fn), requires_grad=False)
    scale = torch.full(module.weight_scale_inv.shape, 119, dtype=torch.uint8, device="cuda")
    module.weight_scale_inv = torch.nn.Parameter(scale.view(torch.float8_e8m0fnu), False)
    x = torch.randn(n, D, dtype=torch.bfloat16, device="cuda")
    moved, flops = sum(p.nbytes for p in module.parameters()), 2.0 * n * 2 * D * D
    kernel, reference = both(module, lambda: module(x), 10)
    name, shape = f"linear fp8 {block}x{block}", f"{n} x {D} -> {2 * D}"
    return Row(name, shape, moved, flops, limits.floor_us(moved, flops), kernel, reference)


def tune(module: PackedExperts) -> None:
    """Try tiles one family at a time, and print the three fastest of each."""
    from triton.runtime.errors import OutOfResources

    from modeling_dsv4.kernels import experts

    decode = {"BLOCK_N": (4, 8, 16, 32), "BLOCK_G": (32, 64), "num_warps": (4, 8)}
    prefill = {"BLOCK_N": (64, 128), "BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (2, 4)}
    back = {"BLOCK_N": (32, 64), "BLOCK_K": (64,), "num_warps": (4,), "num_stages": (2, 3)}
    families = (
        (experts.GEMV_TILES, "gate_up", decode, 1, False),
        (experts.GEMV_TILES, "down", decode, 1, False),
        (experts.GEMM_TILES, "forward", prefill, PREFILL, False),
        (experts.GEMM_TILES, "backward", back, PREFILL, True),
    )
    module.kernels = "triton"
    for tiles, name, choices, n, backward in families:
        x, index, routing = tokens(n, E)
        x.requires_grad_(backward)
        grad, usual, found = torch.randn(n, D, device="cuda"), tiles[name], []

        def run(x=x, index=index, routing=routing, grad=grad, backward=backward) -> None:
            y = module(x, index, routing)
            if backward:
                y.backward(grad)

        for values in itertools.product(*choices.values()):
            tiles[name] = dict(zip(choices, values, strict=True))
            try:
                found.append((time_us(run, runs=7, warm=1), tiles[name]))
            except OutOfResources:
                continue
        tiles[name] = usual
        for us, tile in sorted(found, key=lambda f: f[0])[:3]:
            print(f"{name}: {us:.1f} us with {tile}")


def main(
    output: Annotated[Path | None, typer.Option(help="Write all numbers as JSON.")] = None,
    quick: Annotated[bool, typer.Option(help="Decoding and one prefill only.")] = False,
    tiles: Annotated[bool, typer.Option("--tune", help="Also try other tiles.")] = False,
) -> None:
    """Measure the experts' kernels on this GPU."""
    gpu_limits.require_gpu()
    torch.manual_seed(0)
    limits, packed, rows = Limits.measure(), packed_experts(), []
    with torch.no_grad():
        rows += [measure("decode fp4", packed, n, limits) for n in (1, 8)]
        rows.append(measure("prefill fp4", packed, PREFILL, limits))
    if not quick:
        rows.append(measure("prefill fp4, large groups", packed, PREFILL, limits, FEW))
        rows.append(measure("forward + backward fp4", packed, PREFILL, limits, backward=True))
        plain = plain_experts()
        with torch.no_grad():
            rows += [measure("decode bf16", plain, n, limits) for n in (1, 8)]
            rows.append(measure("prefill bf16", plain, PREFILL, limits))
            # The same product from a quarter of the bytes, against torch's own on wide weights.
            fp4 = next(row for row in rows if row.op == "prefill fp4")
            rows.append(
                Row("prefill fp4, torch: bf16", fp4.shape, fp4.bytes, fp4.flops, fp4.floor_us,
                    fp4.us, rows[-1].torch_us)
            )  # fmt: skip
            rows += [measure_linear(block, n, limits) for block in (128, 32) for n in (1, 8)]
    gpu_limits.table(rows, f"experts, {limits.device}")
    gpu_limits.write(output, limits, rows)
    if tiles:
        tune(packed)


if __name__ == "__main__":
    typer.run(main)
