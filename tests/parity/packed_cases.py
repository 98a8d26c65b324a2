# SPDX-License-Identifier: Apache-2.0
"""What the tests of packed experts' kernels share: inputs, and how they meet the reference."""

from typing import Any, NamedTuple

import torch
from peft import LoraConfig

from finetune.layers import LoraExperts
from modeling_dsv4 import ops
from modeling_dsv4.moe import ExpertsBase


class Sizes(NamedTuple):
    """Width, expert width, experts, experts per token."""

    d: int
    f: int
    e: int
    k: int


class Inputs(NamedTuple):
    """Hidden states [n, D], expert ids [n, K], routing weights [n, K]."""

    x: torch.Tensor
    index: torch.Tensor
    routing: torch.Tensor


def inputs(n: int, sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """Part of a larger tensor, contiguous in no direction; one expert gets no token."""
    x = torch.randn(n, sizes.d + 3, 2) * (0.3 if device == "cpu" else 0.1)
    x = x.to(device, dtype)[:, 1:-2, 0]
    index = torch.rand(n, sizes.e - 1).argsort(-1)[:, : sizes.k] + 1
    return Inputs(x, index.to(device), torch.rand(n, sizes.k, device=device))


def near(found: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    """Compare, relative to the largest number."""
    worst = (found.float() - expected).abs().max() / expected.abs().max()
    assert worst <= most, f"{worst:.1e}"


def compare(module: ExpertsBase, given: Inputs, learn: bool, most: float) -> None:
    """The module by its kernels against itself by torch, in float32 of the same numbers."""
    x, routing = (t.detach().requires_grad_(learn) for t in (given.x, given.routing))
    wide, routing_ref = (t.detach().float().requires_grad_(learn) for t in (x, routing))
    module.kernels = "triton"
    found = [module(x, given.index, routing)]
    module.kernels = "torch"
    # Plain weights are widened; those in a format compute in the dtype of x anyway.
    expected = [module.float()(wide, given.index, routing_ref)]
    assert found[0].dtype is torch.float32
    if learn:
        grad = torch.randn_like(expected[0])
        found += torch.autograd.grad(found[0], (x, routing), grad)
        expected += torch.autograd.grad(expected[0], (wide, routing_ref), grad)
        assert found[1].dtype is x.dtype
    for a, b in zip(found, expected, strict=True):
        near(a, b, most)


def compare_grouped(module: ExpertsBase, given: Inputs, most: float) -> None:
    """Both projections of sorted rows, and their gradients, against expert by expert."""
    rows = ops.group_by_expert(given.index, module.num_experts)
    module.kernels = "triton"
    pair = module.grouped(given.x[rows.token], given.index)
    assert pair is not None
    for i, width in enumerate((module.hidden_size, module.intermediate_size)):
        x = torch.randn(len(rows.token), width, device=given.x.device, requires_grad=True)
        found, parts = pair[i](x), x.split(rows.counts)
        expected = torch.cat([module.open_expert(e)[i](part) for e, part in enumerate(parts)])
        grad = torch.randn_like(expected)
        near(found, expected, most)
        near(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)), most)


def compare_adapted(base: ExpertsBase, given: Inputs, most: float) -> None:
    """Adapters beside experts: outputs and their gradients by kernels and by torch."""
    layer = LoraExperts(base, "a", LoraConfig(init_lora_weights=False), 2, 4)
    layer.to(given.x.device)
    results = []
    for mode in ("triton", "torch"):
        base.kernels = mode
        layer.zero_grad()
        out = layer(*given)
        out.square().mean().backward()
        grads = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
        results.append([out.detach(), *grads])
    assert len(results[0]) == 5
    for a, b in zip(*results, strict=True):
        near(a, b, most)


def check_nothing_waits(module: Any, given: Inputs) -> None:
    """A pass on a GPU that would wait for it is an error; the first one may."""
    expected = module(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = module(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
