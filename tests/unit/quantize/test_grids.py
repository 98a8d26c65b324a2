# SPDX-License-Identifier: Apache-2.0
"""Whole-number formats against a reference that reads one weight at a time, and against theory."""

import math

import pytest
import torch

import quantize  # noqa: F401
from modeling_dsv4.formats import get_format
from quantize.grids import Grid

# Squared error of the best uniform grid for a Gaussian (Max, 1960): groups that choose their own
# scale and zero must do better, and these plain min-max grids worse.
UNIFORM = {2: 0.1188, 3: 0.0374, 4: 0.0115}
BITS = sorted(UNIFORM)


def read_one(parts: dict[str, torch.Tensor], bits: int, row: int, column: int) -> float:
    """One weight, from the definition."""
    stream = int.from_bytes(bytes(parts[""][row].tolist()), "little")
    code = stream >> column * bits & (1 << bits) - 1
    k = parts[""].shape[-1] * 8 // bits
    group = column * parts["_scale"].shape[-1] // k
    zero = int(parts["_zero"][row, group]) * 2**bits / 256
    return (code - zero) * float(parts["_scale"][row, group])


def error(w: torch.Tensor, got: torch.Tensor) -> float:
    return float((got - w).square().mean() / w.square().mean())


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_is_the_definition(bits: int) -> None:
    fmt = get_format(f"int{bits}")
    parts = fmt.pack(torch.randn(3, 192))
    w = fmt.unpack(parts, torch.float32)
    for row, column in [(0, 0), (1, 65), (2, 191), (2, 63)]:
        assert float(w[row, column]) == pytest.approx(read_one(parts, bits, row, column), rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_a_gaussian_is_rounded_better_than_the_best_fixed_grid(bits: int) -> None:
    fmt, w = get_format(f"int{bits}"), torch.randn(64, 1024)
    got = error(w, fmt.unpack(fmt.pack(w), torch.float32))
    assert 0.5 * UNIFORM[bits] < got < 0.95 * UNIFORM[bits]
    assert fmt.nbytes((64, 1024)) * 8 / w.numel() == bits + 0.375


@pytest.mark.parametrize("bits", BITS)
def test_the_fit_beats_minimum_and_maximum(bits: int) -> None:
    grid, x = Grid(bits), torch.randn(256, 64)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / grid.top
    plain = (grid.codes(x, scale, -low / scale) + low / scale) * scale
    scale, zero = grid.fit(x)
    fitted = (grid.codes(x, scale, zero) - zero) * scale
    assert error(x, fitted) < 0.9 * error(x, plain)


def test_weights_that_count_more_are_kept_better() -> None:
    grid, x = Grid(2), torch.randn(256, 64)
    count = torch.ones(64)
    count[:8] = 100.0

    def wrong(weight: torch.Tensor | None) -> float:
        scale, zero = grid.fit(x, weight)
        return float((((grid.codes(x, scale, zero) - zero) * scale - x).square() * count).mean())

    assert wrong(count) < 0.6 * wrong(None)


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_that_were_stored_come_back(bits: int) -> None:
    grid = Grid(bits)
    codes = torch.randint(0, 2**bits, (5, 3, 192))
    scale = torch.rand(5, 3, 3).add(0.1).bfloat16()
    zero = torch.randint(0, 256, (5, 3, 3)) * 2.0 ** (bits - 8)
    parts = grid.store(codes, scale, zero)
    w = grid.unpack(parts, torch.float32).unflatten(-1, (3, 64))
    assert torch.equal(w, (codes.unflatten(-1, (3, 64)) - zero[..., None]) * scale[..., None])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stacks_and_rows_are_the_same_weight(bits: int, dtype: torch.dtype) -> None:
    fmt, w = get_format(f"int{bits}"), torch.randn(2, 3, 96)
    parts = fmt.pack(w)
    assert {k: (p.dtype, tuple(p.shape)) for k, p in parts.items()} == fmt.parts((2, 3, 96))
    whole = fmt.unpack(parts, dtype)
    assert whole.dtype is dtype
    assert torch.equal(whole, fmt.unpack(parts, torch.float32).to(dtype))
    one = fmt.pack(w[1])
    assert torch.equal(fmt.unpack(one, dtype), whole[1])
    assert torch.equal(fmt.unpack_rows(parts, 1, 3, dtype), whole[:, 1:3])


@pytest.mark.parametrize("constant", [0.0, 1.5, -3e-30, 1e30])
def test_a_constant_row_is_no_accident(constant: float) -> None:
    fmt = get_format("int3")
    got = fmt.unpack(fmt.pack(torch.full((2, 64), constant)), torch.float32)
    assert got.isfinite().all()
    assert (got - constant).abs().max() <= 0.01 * abs(constant) + 1e-36


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    w = torch.zeros(2, 64)
    w[1, 3] = bad
    with pytest.raises(ValueError, match="wanted finite numbers to quantize"):
        get_format("int4").pack(w)


def test_rows_without_whole_groups_are_refused() -> None:
    for shape in ((2, 40), (2, 8)):
        with pytest.raises(ValueError, match="wanted rows of a multiple of 16 weights"):
            get_format("int4").parts(shape)
        with pytest.raises(ValueError, match="wanted rows of a multiple of 16 weights"):
            get_format("int4").pack(torch.randn(shape))
