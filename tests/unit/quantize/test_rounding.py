# SPDX-License-Identifier: Apache-2.0
"""Rounding with statistics lowers the error of outputs, and changes nothing where it cannot."""

import math

import pytest
import torch

import quantize  # noqa: F401
from modeling_dsv4.formats import get_format
from quantize.rounding import feedback, quantize_weight, weighted_error

FORMATS = ["int2", "int3", "int4", "trellis2", "trellis3"]


def correlated(size: int) -> torch.Tensor:
    """Second moments of neighbours that correlate by 0.9 and differ in size."""
    place, scale = torch.arange(size), torch.rand(size) * 2 + 0.1
    return scale[:, None] * 0.9 ** (place[:, None] - place).abs().float() * scale


def errors(name: str, w: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Error of the outputs with statistics and without."""
    fmt = get_format(name)
    found = (quantize_weight(w, name, s) for s in (second, None))
    with_, without = (weighted_error(w, fmt.unpack(p, torch.float32), second) for p in found)
    return with_, without


@pytest.mark.parametrize("name", FORMATS)
def test_correlated_inputs_lose_less_than_half(name: str) -> None:
    with_, without = errors(name, torch.randn(48, 256), correlated(256))
    assert with_ < without / 2.5


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_of_different_size_lose_less(name: str) -> None:
    second = torch.randn(256).exp().square()
    with_, without = errors(name, torch.randn(48, 256), second)
    assert with_ < without / 1.5
    # The same statistics as a matrix count the same.
    same = errors(name, torch.randn(48, 256), torch.diag(second))[0]
    assert same == pytest.approx(with_, rel=0.15)


def test_the_error_is_that_of_the_outputs() -> None:
    x, w = torch.randn(500, 64) @ torch.randn(64, 64), torch.randn(16, 64)
    q = w + 0.1 * torch.randn_like(w)
    want = float((x @ (q - w).T).square().sum() / (x @ w.T).square().sum())
    assert weighted_error(w, q, x.T @ x / len(x)) == pytest.approx(want, rel=1e-4)
    assert weighted_error(w, q, torch.full((64,), 3.0)) == pytest.approx(weighted_error(w, q))


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
@pytest.mark.parametrize("second", [torch.ones(192), 5 * torch.eye(192)])
def test_equal_inputs_are_rounded_to_the_nearest(name: str, second: torch.Tensor) -> None:
    w = torch.randn(8, 192)
    got, want = quantize_weight(w, name, second), quantize_weight(w, name)
    for part, tensor in want.items():
        assert torch.equal(got[part], tensor)


@pytest.mark.parametrize("name", ["trellis2", "trellis3"])
def test_equal_inputs_leave_a_trellis_as_good(name: str) -> None:
    w, fmt = torch.randn(32, 256), get_format(name)
    got, want = (
        weighted_error(w, fmt.unpack(quantize_weight(w, name, s), torch.float32))
        for s in (torch.eye(256), None)
    )
    assert got == pytest.approx(want, rel=0.03)


def test_feedback_is_the_root_of_the_inverse() -> None:
    second = correlated(32) + 0.1 * torch.eye(32)
    upper = feedback(second)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ second, torch.eye(32), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["int3", "trellis2"])
def test_stacked_weights_share_their_statistics(name: str) -> None:
    w, second = torch.randn(2, 3, 96), correlated(96)
    whole = quantize_weight(w, name, second)
    assert {k: tuple(p.shape) for k, p in whole.items()} == {
        k: shape for k, (_, shape) in get_format(name).parts((2, 3, 96)).items()
    }
    one = quantize_weight(w[1], name, second)
    fmt = get_format(name)
    torch.testing.assert_close(
        fmt.unpack(one, torch.float32), fmt.unpack(whole, torch.float32)[1], rtol=0, atol=0.05
    )


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_were_never_seen_do_not_break_it(name: str) -> None:
    second = torch.zeros(64, 64)
    second[3, 3] = 2.0
    w = torch.randn(4, 64)
    got = get_format(name).unpack(quantize_weight(w, name, second), torch.float32)
    assert got.isfinite().all()
    assert weighted_error(w, got) < 1


@pytest.mark.parametrize("name", ["fp4", "fp8_rows32"])
def test_formats_with_grids_of_their_own_are_rounded_to_the_nearest(name: str) -> None:
    w = torch.randn(4, 64)
    got, want = quantize_weight(w, name, correlated(64)), get_format(name).pack(w)
    assert all(torch.equal(got[k].view(torch.uint8), want[k].view(torch.uint8)) for k in want)


def test_statistics_that_cannot_belong_are_refused() -> None:
    w = torch.randn(4, 64)
    for bad, told in [
        (torch.ones(32), r"wanted second moments \[64\] or \[64, 64\] .* got \[32\]"),
        (torch.full((64,), math.nan), "wanted finite second moments"),
        (torch.zeros(64), "wanted second moments of inputs that were seen"),
    ]:
        with pytest.raises(ValueError, match=told):
            quantize_weight(w, "int3", bad)
