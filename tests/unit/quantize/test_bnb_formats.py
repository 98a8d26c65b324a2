# SPDX-License-Identifier: Apache-2.0
"""nf4 and int8 are bitsandbytes' own numbers, in a recipe, readable without it."""

import sys

import pytest
import torch

from modeling_dsv4.formats import get_format
from quantize.pack import PackLayout

functional = pytest.importorskip("bitsandbytes.functional")
SHAPE = (2, 3, 5, 192)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(SHAPE) * 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_bitsandbytes_bit_for_bit(weight: torch.Tensor, dtype: torch.dtype) -> None:
    codes, state = functional.quantize_4bit(
        weight.to(dtype).reshape(-1, 192), blocksize=64, quant_type="nf4",
        compress_statistics=False,
    )  # fmt: skip
    nf4 = get_format("nf4")
    parts = nf4.pack(weight.to(dtype))
    assert torch.equal(parts[""].flatten(), codes.flatten())
    assert torch.equal(parts["_scale"].flatten(), state.absmax)
    wanted = functional.dequantize_4bit(codes, state).view(SHAPE)
    assert torch.equal(nf4.unpack(parts, dtype), wanted)


def test_int8_is_bitsandbytes_bit_for_bit(weight: torch.Tensor) -> None:
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half().view(-1, 192))
    int8 = get_format("int8_bnb")
    parts = int8.pack(weight)
    assert torch.equal(parts[""].view(-1, 192), codes)
    wanted = functional.int8_vectorwise_dequant(codes, largest).view(SHAPE)
    assert torch.equal(int8.unpack(parts, torch.float32), wanted)


@pytest.mark.parametrize(("name", "bits", "error"), [("nf4", 4.5, 0.1), ("int8_bnb", 8.17, 0.01)])
def test_sizes_and_errors_are_as_stated(weight, name: str, bits: float, error: float) -> None:
    found = get_format(name)
    parts = found.pack(weight)
    for suffix, (dtype, shape) in found.parts(SHAPE).items():
        assert (parts[suffix].dtype, parts[suffix].shape) == (dtype, shape)
    assert 8 * found.nbytes(SHAPE) / weight.numel() == pytest.approx(bits, abs=0.01)
    wide = found.unpack(parts, torch.float32)
    assert (wide - weight).norm() / weight.norm() < error
    rows = found.unpack_rows(parts, 1, 4, torch.float32)
    assert torch.equal(rows, wide[..., 1:4, :])
    assert all(torch.equal(found.pack(wide)[k], parts[k]) for k in parts if k == "")


@pytest.mark.parametrize("name", ["nf4", "int8_bnb"])
def test_what_cannot_be_rounded_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="wanted finite numbers"):
        get_format(name).pack(torch.full((2, 64), torch.nan))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"pip install 'dsv4\[bitsandbytes\]'"):
        get_format(name).pack(torch.ones(2, 64))


def test_nf4_groups_never_reach_into_the_next_row() -> None:
    with pytest.raises(ValueError, match="whole groups of 64 weights for nf4"):
        get_format("nf4").parts((4, 96))
    with pytest.raises(ValueError, match="whole groups of 64"):
        PackLayout.build("model.layers.0.mlp.experts", 2, 64, 96, lambda name: "nf4")
