# SPDX-License-Identifier: Apache-2.0
"""The weight map against every tensor of five releases, and against transformers' own names."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4ForCausalLM as NativeModel

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.weight_map import (
    fused_to_ours,
    hybrid_to_official,
    official_inventory,
    opaque_inventory,
    our_inventory,
    pieces,
    storage_kinds,
    to_ours,
)

RELEASES = ("v4-flash", "v4-flash-0731", "v4-pro", "v4-pro-0813", "v4.1-flash")
ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def _config(golden_dir: Path, name: str) -> Dsv4Config:
    config = Dsv4Config.from_pretrained(golden_dir / "configs" / f"{name}.json")
    config.carries_vision = config.vision_config is not None  # as its files say
    return config


def _nbytes(inventory: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(ITEM_BYTES[dtype] * torch.Size(shape).numel() for dtype, shape in inventory.values())


@pytest.mark.parametrize("name", RELEASES)
def test_every_tensor_of_a_release_is_claimed_by_exactly_one_row(
    golden_dir: Path, name: str
) -> None:
    with gzip.open(golden_dir / "inventories" / f"{name}.json.gz") as file:
        published = {k: (dtype, tuple(shape)) for k, (dtype, shape) in json.load(file).items()}
    config = _config(golden_dir, name)
    claims = Counter(piece.official for piece in pieces(config))
    assert official_inventory(config) == published
    assert set(claims.values()) == {1}
    totals = json.loads((golden_dir / "inventories" / "totals.json").read_text())[name]
    assert (len(claims), _nbytes(published)) == (totals["tensors"], totals["bytes"])


@pytest.mark.parametrize("name", RELEASES)
def test_our_names_hold_every_byte_of_a_release(golden_dir: Path, name: str) -> None:
    config = _config(golden_dir, name)
    ours = our_inventory(config)
    token_map = ours.pop("model.engram_hash.token_map", None)
    assert (token_map is not None) == bool(config.engram_layer_ids)
    assert _nbytes(ours) == _nbytes(official_inventory(config))


def test_experts_are_stacked_gate_above_up(golden_dir: Path) -> None:
    config = _config(golden_dir, "v4-flash")
    up = to_ours("layers.5.ffn.experts.255.w3.weight", config)
    assert up.ours == "model.layers.5.mlp.experts.gate_up_proj"
    assert (up.expert, up.part, up.parts) == (255, 1, 2)
    ours = our_inventory(config)
    experts = "model.layers.5.mlp.experts."
    assert ours[experts + "gate_up_proj"] == ("U8", (256, 4096, 2048))
    assert ours[experts + "gate_up_proj_scale"] == ("F8_E8M0", (256, 4096, 128))
    assert ours[experts + "down_proj"] == ("U8", (256, 4096, 1024))
    assert ours[experts + "down_proj_scale"] == ("F8_E8M0", (256, 4096, 64))


def test_base_releases_have_experts_in_fp8_blocks(golden_dir: Path) -> None:
    official = json.loads((golden_dir / "configs" / "v4-flash.json").read_text())
    del official["expert_dtype"]
    config = Dsv4Config.from_dict(official)
    inventory, ours = official_inventory(config), our_inventory(config)
    expert = "layers.5.ffn.experts.7.w1."
    assert inventory[expert + "weight"] == ("F8_E4M3", (2048, 4096))
    assert inventory[expert + "scale"] == ("F8_E8M0", (16, 32))
    scale = ours["model.layers.5.mlp.experts.gate_up_proj_scale"]
    assert scale == ("F8_E8M0", (256, 32, 32))


def test_without_quantization_everything_is_plain(golden_dir: Path) -> None:
    config = _config(golden_dir, "v4.1-flash")
    quantized = set(official_inventory(config))
    del config.quantization_config
    inventory = official_inventory(config)
    assert {dtype for dtype, _ in inventory.values()} == {"BF16", "F32"}
    assert set(inventory) == {name for name in quantized if not name.endswith(".scale")}
    assert inventory["layers.1.engram.embed.weight"] == ("BF16", (384006168, 256))
    assert storage_kinds(config) == {}


def test_modules_are_named_with_the_format_they_are_stored_in(golden_dir: Path) -> None:
    kinds = storage_kinds(_config(golden_dir, "v4.1-flash"))
    assert kinds["model.layers.0.self_attn.o_a_proj"] == "fp8"
    assert kinds["model.layers.2.self_attn.indexer.q_b_proj"] == "fp8"
    assert kinds["model.layers.39.mlp.experts"] == "fp4"
    assert kinds["model.layers.14.engram.embed"] == "rows"
    assert kinds["mtp.0.main_proj"] == "fp8"
    assert "model.layers.2.self_attn.compressor.kv_proj" not in kinds
    assert "lm_head" not in kinds


def test_vision_and_nothing_else_is_carried_unused(golden_dir: Path) -> None:
    config = _config(golden_dir, "v4.1-flash")
    opaque = opaque_inventory(config)
    assert {name.partition(".")[0] for name in opaque} == {
        "vision",
        "aligner",
        "image_start",
        "image_end",
        "image_newline",
    }
    ours = to_ours("vision.blocks.3.attn.wqkv.bias", config).ours
    assert ours == "vision.vision__blocks__3__attn__wqkv__bias"
    assert opaque_inventory(_config(golden_dir, "v4-pro")) == {}


def test_both_spellings_of_the_markov_head_are_one_module(golden_dir: Path) -> None:
    v4, v41 = _config(golden_dir, "v4-pro-0813"), _config(golden_dir, "v4.1-flash")
    old = to_ours("mtp.2.markov_head.markov_w2.weight", v4)
    new = to_ours("mtp.2.markov_head.head.weight", v41)
    assert old.ours == new.ours == "mtp.2.markov_head.head.weight"
    assert (old.shape, new.shape) == ((129280, 512), (129280, 256))


def test_an_unknown_official_name_is_refused(golden_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wq\.weight"):
        to_ours("layers.0.attn.wq.weight", _config(golden_dir, "v4-flash"))


def test_the_names_of_transformers_modules_become_ours(
    tmp_path: Path, native_config: Callable[..., Any]
) -> None:
    native = native_config()
    native.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = NativeModel(native).state_dict()
    renamed = {fused_to_ours(name): tuple(tensor.shape) for name, tensor in state.items()}
    ours = our_inventory(Dsv4Config.from_pretrained(tmp_path))
    assert renamed == {name: shape for name, (_, shape) in ours.items()}


@pytest.mark.parametrize(
    ("hybrid", "official"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.norm.weight", "norm.weight"),
        ("head.weight", "head.weight"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.compressor.norm.weight", "layers.3.attn.compressor.norm.weight"),
        ("layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.ffn.experts.7.w2.weight", "layers.3.ffn.experts.7.w2.weight"),
    ],
)
def test_the_mixed_names_of_transformers_become_official(hybrid: str, official: str) -> None:
    assert hybrid_to_official(hybrid) == official
