# SPDX-License-Identifier: Apache-2.0
"""Triton twins of the low ranks beside routed experts against products of torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from finetune import low_rank
from finetune.expert_lora import LoraExperts
from finetune.expert_rows import Share
from modeling_dsv4.moe import Dsv4Experts
from modeling_dsv4.storage import PackedExperts

kernels = pytest.importorskip("finetune.kernels.low_rank")

pytestmark = pytest.mark.usefixtures("poison")

Agree = Callable[..., None]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16]
# Rows of each matrix: none, one, more than a tile; all of one; none at all.
COUNTS = [[3, 0, 17, 1, 0], [0, 35, 0], [0, 0]]


def _share(counts: list[int], placed: bool, device: str) -> tuple[Share, int]:
    """A share of rows, with `placed` every other of a block's, and how many the block has."""
    m = sum(counts)
    places = (2 * torch.arange(m) + 1).to(device) if placed else None
    return Share(slice(None), slice(0, m), places, counts), 2 * m + 2 if placed else m


def _bank(n: int, rank: int, wide: int, wide_first: bool, device: str) -> torch.Tensor:
    return _among_nans(n, *((wide, rank) if wide_first else (rank, wide))).to(device)


def _among_nans(*shape: int) -> torch.Tensor:
    """Random numbers with NaN behind the last of each axis but the first, where nobody may read."""
    whole = torch.full((shape[0], *(size + 1 for size in shape[1:])), torch.nan)
    part = whole[(slice(None), *map(slice, shape[1:]))]
    return part.copy_(torch.randn(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_first", [False, True], ids=["A", "B"])
@pytest.mark.parametrize("placed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("rank", "wide"), [(5, 70), (1, 3)], ids=str)
def test_products_are_those_of_torch(
    rank: int,
    wide: int,
    counts: list[int],
    placed: bool,
    wide_first: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    share, rows = _share(counts, placed, device)
    bank = _bank(len(counts), rank, wide, wide_first, device)
    x = _among_nans(rows, wide).to(dtype).to(device)
    close = {"atol": 1e-4, "rtol": 1e-5}
    made = []
    for mode in ("torch", "triton"):
        low = low_rank.narrow(x, bank, share, 0.7, wide_first, mode)
        y, out = x.float().clone(), torch.full_like(bank, torch.nan)
        low_rank.widen(y, low, bank, share, wide_first, mode)
        low_rank.fill(out, low, x, share, wide_first, mode)
        made.append((low, y, out))
    torch.testing.assert_close(*made, **close)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_over_a_tile_and_views_are_right(device: str) -> None:
    share, rows = _share([40, 0, 2], False, device)
    bank = _bank(3, 150, 67, False, device)[:, ::2]
    x = torch.randn(67, rows).to(device).T
    made = []
    for mode in ("torch", "triton"):
        low = low_rank.narrow(x, bank, share, 1.0, kernels=mode)
        y, out = torch.ones(rows, 80, device=device)[:, 13:], torch.empty(3, 67, 75, device=device)
        low_rank.widen(y, low, bank, share, kernels=mode)
        low_rank.fill(out.mT, low, x, share, kernels=mode)
        made.append((low, y, out))
    torch.testing.assert_close(*made, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_repeats_bit_for_bit(device: str) -> None:
    share, _ = _share([40, 0, 70], False, device)
    x, low = torch.randn(110, 33, device=device), torch.randn(110, 4, device=device)
    outs = [torch.empty(3, 4, 33, device=device) for _ in range(2)]
    for out in outs:
        low_rank.fill(out, low, x, share, kernels="triton")
    assert torch.equal(*outs)


E_, D, F_, K = 5, 40, 24, 2


def _layer(packed: bool, device: str, *names: str) -> LoraExperts:
    base: Any = Dsv4Experts(E_, D, F_, 1.0)
    for weight in base.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    base.requires_grad_(False)
    if packed:
        base = PackedExperts.from_plain(base)
    layer = LoraExperts(base, "default", LoraConfig(r=3), r=3, lora_alpha=2)
    for name in names:
        layer.update_layer(name, 2, 3.0, LoraConfig(r=2))
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.requires_grad_(), std=0.3)
    layer.to(device)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("way", ["written", "autograd"])
def test_a_layer_of_experts_is_the_same_layer(
    way: str, many: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _layer(way == "autograd", device, *(["other"] if many else []))
    # The last expert gets no row; with two adapters each sees the rows of its own tokens.
    index = torch.rand(6, E_ - 1).argsort(-1)[:, :K].contiguous().to(device)
    x, weights = torch.randn(6, D, device=device), torch.rand(6, K, device=device)
    names = ["default", "other", "default"] if many else None
    sent = torch.randn(6, D, device=device)
    counted: list[object] = []
    plain, by_autograd = kernels.narrow, low_rank.add_all
    monkeypatch.setattr(kernels, "narrow", lambda *a: (counted.append(plain), plain(*a))[1])
    monkeypatch.setattr(low_rank, "add_all", lambda *a: (counted.append("all"), by_autograd(*a))[1])
    results = []
    for mode in ("torch", "triton"):
        layer.base_layer.kernels = mode
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = layer(leaves[0], index, leaves[1], adapter_names=names)
        trained = [p for n, p in layer.named_parameters() if "lora_" in n]
        results.append(
            (out.detach(), *torch.autograd.grad((out * sent).sum(), [*leaves, *trained]))
        )
        assert (plain in counted) == (mode == "triton")
    assert ("all" in counted) == (way == "autograd")
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_at_real_size(dtype: torch.dtype) -> None:
    share, rows = _share([17 * i % 97 for i in range(256)], False, "cuda")
    for rank, wide, wide_first in ((16, 4096, False), (64, 4096, True)):
        bank = _bank(256, rank, wide, wide_first, "cuda") / wide**0.5
        x = torch.randn(rows, wide, device="cuda").to(dtype)
        made = []
        for mode in ("torch", "triton"):
            low = low_rank.narrow(x, bank, share, 0.5, wide_first, mode)
            y, out = torch.zeros(rows, wide, device="cuda"), torch.empty_like(bank)
            low_rank.widen(y, low, bank, share, wide_first, mode)
            low_rank.fill(out, low, x, share, wide_first, mode)
            made.append((low, y, out))
        torch.testing.assert_close(*made, atol=1e-3, rtol=1e-4)
