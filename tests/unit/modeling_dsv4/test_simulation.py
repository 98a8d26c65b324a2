# SPDX-License-Identifier: Apache-2.0
"""Which vectors the release rounds, in which groups, by family."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Config
from modeling_dsv4.formats import hadamard, simulate_fp4, simulate_fp4_e4m3, simulate_fp8
from modeling_dsv4.simulation import Rounding


@pytest.fixture
def v4(golden_dir: Path) -> Rounding:
    return Rounding.of(Dsv4Config.from_pretrained(golden_dir / "configs" / "v4-pro.json"))


@pytest.fixture
def v41(golden_dir: Path) -> Rounding:
    return Rounding.of(Dsv4Config.from_pretrained(golden_dir / "configs" / "v4.1-flash.json"))


def _steep(channels: int) -> torch.Tensor:
    """Channels that fall by 2^-0.4 each: how many share a scale decides which become zero."""
    return 1e6 * 2.0 ** (-0.4 * (torch.arange(channels) % 128)) * torch.randn(3, channels).sign()


def test_v4_rounds_inputs_by_128_and_keys_by_64_up_to_the_rotary_channels(v4: Rounding) -> None:
    x = _steep(512)
    assert torch.equal(v4.activation(x), simulate_fp8(x, 128))
    expected = torch.cat((simulate_fp8(x[:, :448], 64), x[:, 448:]), dim=1)
    assert torch.equal(v4.key(x), expected) and torch.equal(v4.entry(x), expected)
    x = _steep(128)
    assert torch.equal(v4.index(x), simulate_fp4(hadamard(x), 32))


def test_v41_rounds_by_32_all_channels_and_entries_to_fp4(v41: Rounding) -> None:
    x = _steep(512)
    for rounded in (v41.activation(x), v41.key(x)):
        assert torch.equal(rounded, simulate_fp8(x, 32))
    assert torch.equal(v41.entry(x), simulate_fp4_e4m3(x, 16))
    x = _steep(128)
    assert torch.equal(v41.index(x), simulate_fp4(x, 32))


def test_the_size_of_a_group_shows(v4: Rounding) -> None:
    # A power-of-two scale moves the exponent alone: only values that fall below it tell.
    x = _steep(512)
    groups = [simulate_fp8(x, group) for group in (32, 64, 128)]
    assert not torch.equal(groups[0], groups[1]) and not torch.equal(groups[1], groups[2])


@torch.no_grad()
def test_the_switch_leaves_nothing_behind(golden: Callable[[str], Any]) -> None:
    case = golden("v4_a_fp8")
    model, ids = copy.deepcopy(case.model), case.inputs["input_ids"][:, :40]
    before = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_simulation("official")
    rounded = model(ids).logits
    assert model.state_dict().keys() == state.keys()
    model.set_simulation("off")
    assert torch.equal(model(ids).logits, before) and not torch.equal(rounded, before)
    for name, tensor in model.state_dict().items():
        same = (x.contiguous().view(-1).view(torch.uint8) for x in (tensor, state[name]))
        assert torch.equal(*same), name
