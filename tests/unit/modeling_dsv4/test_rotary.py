# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: which frequencies, which channels, which pairs."""

from collections.abc import Callable

import pytest
import torch

from modeling_dsv4 import Dsv4Config
from modeling_dsv4.rotary import (
    inverse_frequencies,
    rotate,
    rotation,
    turn_pairs,
    turn_pairs_ref,
)


def angle(turn: torch.Tensor) -> torch.Tensor:
    return torch.atan2(turn[..., 1], turn[..., 0])


def test_frequencies_of_the_release() -> None:
    config = Dsv4Config()
    one = torch.ones((), dtype=torch.long)
    compressed = angle(rotation(one, config, compressed=True))
    golden = {0: 1.0, 15: 3.6355386e-3, 20: 2.9697778e-4, 25: 5.3723127e-6, 31: 5.680529e-7}
    for i, value in golden.items():
        assert float(compressed[i]) == pytest.approx(value, rel=1e-5)
    window = angle(rotation(one, config, compressed=False))
    expected = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(window, expected, atol=0, rtol=1e-5)


def test_yarn_blends_between_its_correction_dims() -> None:
    yarn = {
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    }
    plain = inverse_frequencies(64, 160000.0, None)
    ramp = ((torch.arange(32) - 15) / 10).clamp(0, 1)
    expected = plain * ((1 - ramp) + ramp / 16)
    torch.testing.assert_close(inverse_frequencies(64, 160000.0, yarn), expected)


def test_without_yarn_both_kinds_differ_by_theta_alone(tiny_config: Callable) -> None:
    config = tiny_config("v4", yarn=None)
    one = torch.ones((), dtype=torch.long)
    expected = inverse_frequencies(8, 160000.0, None)
    torch.testing.assert_close(angle(rotation(one, config, True)), expected)


@pytest.mark.parametrize("position", [0, 1, 65, 127, 1000, 40001])
def test_neighbouring_channels_turn_together(tiny_config: Callable, position: int) -> None:
    config, x = tiny_config("v4"), torch.randn(16, dtype=torch.float64)
    turned = rotate(x, rotation(torch.tensor(position), config, False))
    assert torch.equal(turned[:8], x[:8])
    for i in range(4):
        angle = torch.tensor(float(position)) * 10000.0 ** torch.tensor(-2 * i / 8)
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[8 + 2 * i], x[9 + 2 * i]
        pair = torch.stack((a * cos - b * sin, a * sin + b * cos))
        torch.testing.assert_close(turned[8 + 2 * i : 10 + 2 * i], pair, atol=1e-5, rtol=0)


def test_turning_keeps_lengths_and_turns_back(tiny_config: Callable) -> None:
    # No attention factor: cos^2 + sin^2 is 1 also with YaRN.
    position = torch.tensor([[0, 64, 65, 5000, 1048575]])
    for compressed in (False, True):
        turn = rotation(position, Dsv4Config(), compressed)
        assert turn.shape == (1, 5, 32, 2)
        torch.testing.assert_close(turn.norm(dim=-1), torch.ones(1, 5, 32))
        x = torch.randn(1, 5, 3, 512)
        turned = rotate(x, turn[:, :, None])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        back = rotate(turned, turn[:, :, None], inverse=True)
        torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_products_depend_on_distance_alone(tiny_config: Callable) -> None:
    config = tiny_config("v4")
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def product(s: int, t: int) -> torch.Tensor:
        turns = (rotation(torch.tensor(p), config, True) for p in (s, t))
        return torch.dot(*(rotate(x, turn) for x, turn in zip((q, k), turns, strict=True)))

    torch.testing.assert_close(product(70, 66), product(704, 700), atol=1e-4, rtol=0)
    assert (product(70, 66) - product(66, 70)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("back", [False, True])
def test_real_and_complex_products_are_the_same_number(dtype: torch.dtype, back: bool) -> None:
    turn = rotation(torch.arange(0, 70000, 999), Dsv4Config(), compressed=True)
    pairs = torch.randn(len(turn), 32, 2, dtype=dtype, requires_grad=True)
    results = [turn_pairs(pairs, turn, back), turn_pairs_ref(pairs, turn, back)]
    # Not bit for bit: compilers of torch may fuse a multiplication with an addition.
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(*results, **close)
    seed = torch.randn_like(pairs)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, pairs, seed)[0] for y in results), **close
    )


def test_half_precision_is_turned_in_float32_and_rounded_once(tiny_config: Callable) -> None:
    x = torch.randn(9, 16).to(torch.bfloat16)
    turn = rotation(torch.arange(9), tiny_config("v4"), False)
    assert torch.equal(rotate(x, turn), rotate(x.float(), turn).to(torch.bfloat16))
