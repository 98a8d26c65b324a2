# SPDX-License-Identifier: Apache-2.0
"""Compressors against their equations, entry by entry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4.cache_stores import Ring
from modeling_dsv4.compressor import Compressor
from modeling_dsv4.segments import RowState, Segments, find_segments

Make = Callable[[str, int], Compressor]


@pytest.fixture
def make(tiny_config: Callable[..., Any], enliven: Callable[..., None]) -> Make:
    """`make("v4" | "v41", ratio)`: a compressor with 6 channels, in float64."""

    def build(kind: str, ratio: int) -> Compressor:
        config = tiny_config(kind, rms_norm_eps=1e-6)
        module = Compressor(config, ratio, channels=6)
        enliven(module)
        return module.double()

    return build


def _segments(columns: int, **given: Any) -> Segments:
    return find_segments((1, columns), RowState.empty(1, torch.device("cpu")), **given)


def _normed(c: Compressor, e: torch.Tensor) -> torch.Tensor:
    return c.kv_norm.weight * e / (e.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _entry(c: Compressor, x: torch.Tensor, i: int) -> torch.Tensor:
    """Entry i of the tokens x [S, D] of one document, as the paper writes it."""
    w = c.ratio
    own = x[i * w : (i + 1) * w]
    if c.gate_proj is None:
        return _normed(c, own[0] @ c.kv_proj.weight.T)
    bias = torch.zeros(w, 1) if c.position_bias is None else c.position_bias
    values, gates = own @ c.kv_proj.weight.T, own @ c.gate_proj.weight.T + bias
    if c.overlap:
        # `hi` halves of the own window; `lo` halves of the one before, if there is one.
        values, gates = values[:, 6:], gates[:, 6:]
        if i:
            old = x[(i - 1) * w : i * w]
            values = torch.cat(((old @ c.kv_proj.weight.T)[:, :6], values))
            gates = torch.cat(((old @ c.gate_proj.weight.T + bias)[:, :6], gates))
    p = gates.exp() / gates.exp().sum(0)
    return _normed(c, (p * values).sum(0))


def _entries(c: Compressor, x: torch.Tensor) -> torch.Tensor:
    count = x.shape[0] // c.ratio
    return torch.stack([_entry(c, x, i) for i in range(count)]) if count else x.new_zeros(0, 6)


CASES = [("v4", 8), ("v4", 4), ("v41", 2), ("v41", 1)]


@pytest.mark.parametrize(("kind", "ratio"), CASES)
@torch.no_grad()
def test_entries_follow_the_equations(make: Make, kind: str, ratio: int) -> None:
    c, x = make(kind, ratio), torch.randn(1, 19, 32, dtype=torch.float64)
    assert c.overlap == (ratio == 4) and (c.gate_proj is None) == (ratio == 1)
    assert (c.position_bias is None) == (kind == "v41")
    torch.testing.assert_close(c(x, _segments(19), None)[0], _entries(c, x[0]))


@pytest.mark.parametrize(("kind", "ratio"), CASES)
@pytest.mark.parametrize("length", [-1, 0, 1])
@torch.no_grad()
def test_an_entry_needs_its_whole_window(make: Make, kind: str, ratio: int, length: int) -> None:
    s = max(ratio + length, 1)
    out = make(kind, ratio)(torch.randn(1, s, 32).double(), _segments(s), None)
    assert out.shape == (1, s // ratio, 6)


@pytest.mark.parametrize(("kind", "ratio"), CASES)
@torch.no_grad()
def test_documents_are_compressed_apart(make: Make, kind: str, ratio: int) -> None:
    c, lengths = make(kind, ratio), (11, 3, 9)
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([_entries(c, part) for part in x[0].split(lengths)])
    torch.testing.assert_close(c(x, _segments(23, position_ids=positions), None)[0], expected)


@pytest.mark.parametrize(("kind", "ratio"), CASES)
@torch.no_grad()
def test_unfinished_windows_wait_in_the_ring(make: Make, kind: str, ratio: int) -> None:
    c, x = make(kind, ratio), torch.randn(1, 40, 32, dtype=torch.float64)
    ring, state, found = Ring(2 * ratio + 3), RowState.empty(1, torch.device("cpu")), []
    for part in x.split([1, 1, 7, 1, 13, 2, 15], dim=1):
        segments = find_segments(part.shape[:2], state)
        found.append(c(part, segments, ring)[0])
        state = segments.after([ratio])
    torch.testing.assert_close(torch.cat(found), _entries(c, x[0]))


@torch.no_grad()
def test_the_missing_half_of_the_first_entry_has_no_weight_at_all(make: Make) -> None:
    # A gate of 0 instead of minus infinity would give the empty slots a share.
    c = make("v4", 4)
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    c.gate_proj.weight.mul_(0)
    c.position_bias.fill_(-30.0)
    mean = (x[0] @ c.kv_proj.weight.T)[:, 6:].mean(0)
    torch.testing.assert_close(c(x, _segments(4), None)[0, 0], _normed(c, mean))


@torch.no_grad()
def test_the_position_bias_reaches_both_halves(make: Make) -> None:
    c, x = make("v4", 4), torch.randn(1, 8, 32, dtype=torch.float64)
    before = c(x, _segments(8), None)[0]
    c.position_bias[:, :6] += torch.randn(4, 1)
    after = c(x, _segments(8), None)[0]
    assert torch.equal(before[0], after[0]) and (before[1] - after[1]).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [8, 4, 2])
@torch.no_grad()
def test_gated_compressors_pool_halves_in_float32_and_round_once(make: Make, ratio: int) -> None:
    c = make("v41" if ratio == 2 else "v4", ratio).float().to(torch.bfloat16)
    c.kv_norm = torch.nn.Identity()
    assert c.position_bias is None or c.position_bias.dtype is torch.float32
    x = torch.randn(1, 24, 32).to(torch.bfloat16)
    found = c(x, _segments(24), None)
    wide = c.float()(x.float(), _segments(24), None)
    assert torch.equal(found, wide.to(torch.bfloat16))
