# SPDX-License-Identifier: Apache-2.0
"""Products with a bank: both fast ways against a loop over its matrices."""

import pytest
import torch
import torch.nn.functional as F

from finetune import grouped
from finetune.grouped import bank_linear, outer, times, times_back

COUNTS = ([3, 0, 17, 1, 0], [0, 0, 21, 0, 0], [70, 1, 0, 0, 200], [0, 0, 0, 0, 0], [4, 4, 4, 4, 4])
SIZES = [(16, 24), (5, 24), (24, 5), (2, 7), (1, 1)]


def _loop(x: torch.Tensor, bank: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = zip(x.split(counts), bank, strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in parts])


@pytest.fixture(params=["grouped", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(grouped, "_groups", lambda *_: False)
    return request.param


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("out", "size"), SIZES)
def test_products_are_those_of_a_loop(way: str, counts: list[int], out: int, size: int) -> None:
    x, g = torch.randn(sum(counts), size), torch.randn(sum(counts), out)
    bank = torch.randn(len(counts), out, size)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(times(x, bank, counts), _loop(x, bank, counts), **close)
    torch.testing.assert_close(times_back(g, bank, counts), _loop(g, bank.mT, counts), **close)
    sums = torch.stack([a.T @ b for a, b in zip(g.split(counts), x.split(counts), strict=True)])
    torch.testing.assert_close(outer(g, x, counts), sums, atol=1e-4, rtol=1e-5)


def test_rows_and_banks_may_be_views(way: str) -> None:
    counts = [3, 0, 5]
    x, bank = torch.randn(24, 8).T.contiguous().T[::3], torch.randn(3, 8, 6).mT
    assert not x.is_contiguous()
    torch.testing.assert_close(times(x, bank, counts), _loop(x, bank, counts))
    torch.testing.assert_close(times_back(x[:, :6], bank, counts), _loop(x[:, :6], bank.mT, counts))


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_right(counts: list[int]) -> None:
    x = torch.randn(sum(counts) % 40, 3, dtype=torch.float64, requires_grad=True)
    counts = [len(x) - 1, 0, 1] if len(x) else [0, 0, 0]
    bank = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: bank_linear(x, b, counts), (x, bank))
