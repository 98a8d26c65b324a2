# SPDX-License-Identifier: Apache-2.0
"""What is exported as GGUF reads back, by the format's own package, as the same numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_dsv4.checkpoint import fit_config, load_foreign, read_index
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.formats import get_format
from modeling_dsv4.weight_map import official_inventory, pieces
from quantize.config import Recipe, get_recipe
from quantize.convert import convert
from quantize.gguf_export import _LAYER, export_gguf, gguf_name, to_mxfp4

gguf = pytest.importorskip("gguf")
FP4 = get_recipe("fp4")


def test_blocks_dequantize_to_the_same_numbers() -> None:
    parts = get_format("fp4").pack(torch.randn(2, 5, 96) * torch.logspace(-3, 3, 5)[:, None])
    blocks = to_mxfp4(parts[""], parts["_scale"])
    assert blocks.shape == (2, 5, 3, 17)
    got = gguf.quants.dequantize(blocks.flatten(-2).numpy(), gguf.GGMLQuantizationType.MXFP4)
    wanted = get_format("fp4").unpack(parts, torch.float32)
    assert torch.equal(torch.from_numpy(got), wanted)


def test_every_tensor_reads_back_exactly(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / "v4_a_fp8"
    target = convert(source, tmp_path / "out", FP4)
    file = export_gguf(target, tmp_path / "model.gguf")
    config = Dsv4Config.from_pretrained(source)
    fit_config(config, read_index(source))
    wanted = load_foreign(source, config, dequantize=True, dtype=torch.float32)
    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    seen = set()
    for piece in pieces(config):
        name = None if piece.is_scale or piece.expert else gguf_name(piece.official)
        if name is None:
            continue
        seen.add(name)
        tensor = found[name]
        numbers = tensor.data
        if tensor.tensor_type != gguf.GGMLQuantizationType.I32:
            numbers = gguf.quants.dequantize(numbers, tensor.tensor_type)
        got = torch.from_numpy(np.array(numbers, dtype=np.float64))
        ours = wanted[piece.ours].double()
        if piece.expert == 0:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
            ours = ours.unflatten(1, (piece.parts, -1))[:, piece.part]
        assert list(tensor.shape[::-1]) == list(ours.shape), name
        assert torch.equal(got.view(ours.shape), ours), name
    assert seen == set(found)


def test_the_header_says_what_llama_cpp_reads(golden_dir: Path, tmp_path: Path) -> None:
    target = convert(golden_dir / "v4_a_fp8", tmp_path / "out", FP4)
    fields = gguf.GGUFReader(export_gguf(target, tmp_path / "model.gguf")).fields
    config = json.loads((golden_dir / "v4_a_fp8" / "config.json").read_text())

    def value(key: str) -> object:
        return fields[key].contents()

    assert value("general.architecture") == "deepseek4"
    assert value("deepseek4.attention.compress_ratios") == config["compress_ratios"][:3]
    assert value("deepseek4.expert_count") == config["n_routed_experts"]
    assert value("deepseek4.attention.output_lora_rank") == config["o_lora_rank"]
    assert value("deepseek4.hyper_connection.count") == config["hc_mult"]
    assert value("deepseek4.rope.scaling.type") == "yarn"
    assert value("deepseek4.hash_layer_count") == config["num_hash_layers"]
    assert value("deepseek4.expert_weights_norm") is True


@pytest.mark.parametrize("release", ["v4-flash", "v4-pro"])
def test_every_tensor_of_a_release_has_a_name_of_its_own(golden_dir: Path, release: str) -> None:
    config = Dsv4Config.from_pretrained(golden_dir / "configs" / f"{release}.json")
    names = [
        name for name in official_inventory(config)
        if not name.endswith(".scale") and ".experts." not in name.replace(".experts.0.", ".")
    ]  # fmt: skip
    found = [gguf_name(name) for name in names if not name.startswith("mtp.")]
    assert None not in found
    assert len(set(found)) == len(found)
    assert len(set(_LAYER.values())) == len(_LAYER)


def test_what_gguf_has_no_form_for_is_refused(golden_dir: Path, tmp_path: Path) -> None:
    engram = convert(golden_dir / "v41_b_fp8", tmp_path / "v41", FP4)
    with pytest.raises(ValueError, match=r"wanted a V4 model, got V4\.1"):
        export_gguf(engram, tmp_path / "model.gguf")
    blocks = Recipe("fp8", (("*.mlp.experts.*", "fp8_block32"),))
    other = convert(golden_dir / "v4_a_fp8", tmp_path / "fp8", blocks)
    with pytest.raises(ValueError, match="wanted experts in fp4, which GGUF knows as MXFP4"):
        export_gguf(other, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
