# SPDX-License-Identifier: Apache-2.0
"""Foreign checkpoints: recognised, read bit for bit, refused where they are broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM as NativeModel

from modeling_dsv4 import formats
from modeling_dsv4.checkpoint import (
    check_own,
    count_draft_layers,
    detect_layout,
    load_foreign,
    read_index,
    save_official,
)
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.safetensors_file import DTYPES
from modeling_dsv4.weight_map import TOKEN_MAP, official_inventory, our_inventory

GOLDENS = ("v4_a_fp8", "v41_b_fp8")
OfficialConfig = Callable[[Path], Dsv4Config]
RawTensors = Callable[[Path], dict[str, tuple[str, tuple[int, ...], bytes]]]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _model(config: Dsv4Config, state: dict[str, torch.Tensor]) -> Any:
    return SimpleNamespace(config=config, state_dict=lambda: state)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _write_index(folder: Path, names: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _read_index_names(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


# --- reading ------------------------------------------------------------------------------------


def test_the_four_layouts_are_told_apart(
    golden_dir: Path, native: tuple[NativeModel, Path, Path], tmp_path: Path
) -> None:
    _, hybrid, fused = native
    own = tmp_path / "own"
    own.mkdir()
    config = Dsv4Config.from_pretrained(hybrid)
    config.save_pretrained(own)
    save_file(load_foreign(hybrid, config), own / SINGLE)
    assert detect_layout(golden_dir / "v4_a_fp8") == "official"
    assert detect_layout(golden_dir / "v41_b_fp8") == "official"
    assert detect_layout(hybrid) == "transformers_hybrid"
    assert detect_layout(fused) == "transformers_fused"
    assert detect_layout(own) == "dsv4"
    with pytest.raises(ValueError, match="our own layout"):
        load_foreign(own, config)


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        detect_layout(tmp_path)


def test_draft_stages_are_counted_in_the_files() -> None:
    assert count_draft_layers(["norm.weight", "layers.0.mtp.7.x"]) == 0
    assert count_draft_layers(["mtp.1.norm.weight", "mtp.0.norm.weight", "mtp.0.x"]) == 2
    with pytest.raises(ValueError, match="without gaps"):
        count_draft_layers(["mtp.0.x", "mtp.2.x"])


@pytest.mark.parametrize("name", GOLDENS)
def test_a_release_is_loaded_in_its_storage_formats(
    official_config: OfficialConfig, golden_dir: Path, name: str
) -> None:
    config = official_config(golden_dir / name)
    state = load_foreign(golden_dir / name, config)
    expected = our_inventory(config)
    expected.pop(TOKEN_MAP, None)
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    assert found == {key: (DTYPES[dtype], shape) for key, (dtype, shape) in expected.items()}
    assert list(state) == list(load_foreign(golden_dir / name, config))


def test_experts_are_stacked_byte_for_byte(
    official_config: OfficialConfig, golden_dir: Path
) -> None:
    folder = golden_dir / "v4_a_fp8"
    raw, state = load_file(folder / SINGLE), load_foreign(folder, official_config(folder))
    for suffix, own in (("weight", ""), ("scale", "_scale")):
        gate_up = state[f"model.layers.1.mlp.experts.gate_up_proj{own}"]
        down = state[f"model.layers.1.mlp.experts.down_proj{own}"]
        for e in range(4):
            w1, w3, w2 = (raw[f"layers.1.ffn.experts.{e}.{w}.{suffix}"] for w in ("w1", "w3", "w2"))
            assert torch.equal(_bits(gate_up[e]), _bits(torch.cat((_bits(w1), _bits(w3)))))
            assert torch.equal(_bits(down[e]), _bits(w2))


@pytest.mark.parametrize("name", GOLDENS)
def test_expanding_is_exact_and_what_the_packed_weights_say(
    official_config: OfficialConfig, golden_dir: Path, name: str
) -> None:
    folder = golden_dir / name
    config = official_config(folder)
    block = config.quantization_config["weight_block_size"][0]
    packed = load_foreign(folder, config)
    half = load_foreign(folder, config, dequantize=True)
    single = load_foreign(folder, config, dequantize=True, dtype=torch.float32)
    assert {key: t.shape for key, t in half.items()} == {key: t.shape for key, t in single.items()}
    assert all(torch.equal(half[key].float(), single[key].float()) for key in half)
    del config.quantization_config
    plain = our_inventory(config)
    plain.pop(TOKEN_MAP, None)
    assert {key: (DTYPES[d], s) for key, (d, s) in plain.items()} == {
        key: (t.dtype, tuple(t.shape)) for key, t in half.items()
    }
    experts = "model.layers.2.mlp.experts.down_proj"
    unpacked = formats.unpack_fp4(packed[experts], packed[f"{experts}_scale"], torch.float32)
    assert torch.equal(single[experts], unpacked)
    linear = "model.layers.2.self_attn.q_b_proj.weight"
    scale = packed[f"{linear}_scale_inv"]
    expanded = formats.dequantize_fp8_block(packed[linear], scale, block, torch.float32)
    assert torch.equal(single[linear], expanded)


def test_base_releases_are_loaded_with_experts_in_fp8_blocks(
    official_config: OfficialConfig, raw_tensors: RawTensors, release: Path
) -> None:
    settings = json.loads((release / "config.json").read_text())
    del settings["expert_dtype"]
    (release / "config.json").write_text(json.dumps(settings))
    config = official_config(release)
    tensors = {}
    for name, (dtype, shape) in official_inventory(config).items():
        data = torch.randint(1, 120, shape, dtype=torch.uint8)
        plain = dtype in ("BF16", "F32", "I64")
        tensors[name] = data.to(DTYPES[dtype]) if plain else data.view(DTYPES[dtype])
    save_file(tensors, release / SINGLE)
    state = load_foreign(release, config)
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dtype is torch.float8_e4m3fn
    expanded = load_foreign(release, config, dequantize=True, dtype=torch.float32)
    up = tensors["layers.0.ffn.experts.3.w3.weight"], tensors["layers.0.ffn.experts.3.w3.scale"]
    gate_up = expanded["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[3, 128:], formats.dequantize_fp8_block(*up, 128, torch.float32))
    save_official(_model(config, state), release / "again")
    assert raw_tensors(release / "again") == raw_tensors(release)


def test_both_layouts_of_transformers_give_its_own_weights(
    native: tuple[NativeModel, Path, Path],
) -> None:
    model, hybrid, fused = native
    theirs = {name.replace(".scorer", ""): t for name, t in model.state_dict().items()}
    one, two = (load_foreign(d, Dsv4Config.from_pretrained(d)) for d in (hybrid, fused))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(one[gate_up], theirs[gate_up])
    weights = one["model.layers.1.self_attn.indexer.weights_proj.weight"]
    assert torch.equal(
        weights, theirs["model.layers.1.self_attn.compressor.indexer.weights_proj.weight"]
    )


def test_a_half_precision_save_of_transformers_regains_float32_where_the_release_has_it(
    native: tuple[NativeModel, Path, Path], tmp_path: Path
) -> None:
    native[0].to(torch.bfloat16).save_pretrained(tmp_path / "half")
    state = load_foreign(tmp_path / "half", Dsv4Config.from_pretrained(tmp_path / "half"))
    assert state["model.layers.0.attn_hc.fn"].dtype is torch.float32
    assert state["model.layers.0.self_attn.sinks"].dtype is torch.float32
    assert state["lm_head.weight"].dtype is torch.bfloat16


def test_a_backbone_is_loaded_with_or_without_a_head(
    native: tuple[NativeModel, Path, Path], tmp_path: Path
) -> None:
    model, hybrid, _ = native
    model.model.save_pretrained(tmp_path / "base")
    config = Dsv4Config.from_pretrained(hybrid)
    with pytest.raises(ValueError, match=r"1 missing \(head\.weight\)"):
        load_foreign(tmp_path / "base", config)
    with_head = load_foreign(hybrid, config, backbone=True)
    without = load_foreign(tmp_path / "base", config, backbone=True)
    assert with_head.keys() == without.keys()
    assert all(name.startswith("model.") for name in without)


# --- refusing -----------------------------------------------------------------------------------


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.1.attn.wq_a.scale"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.attn.short_conv.weight"] = torch.zeros(4)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()


def _requantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.attn.wkv.weight"] = tensors["layers.0.attn.wkv.weight"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"1 missing \(layers\.1\.attn\.wq_a\.scale\)"),
        (_add, r"1 not expected \(layers\.1\.attn\.short_conv\.weight\)"),
        (_reshape, r"norm\.weight: wanted BF16 \[128\], got BF16 \[127\]"),
        (_requantize, r"wkv\.weight: wanted F8_E4M3 \[96, 128\], got F32"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_listed(
    official_config: OfficialConfig,
    release: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    config, tensors = official_config(release), load_file(release / SINGLE)
    change(tensors)
    save_file(tensors, release / SINGLE)
    with pytest.raises(ValueError, match=message):
        load_foreign(release, config)


def test_an_engram_table_of_another_size_is_refused(
    official_config: OfficialConfig, golden_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "v41"
    shutil.copytree(golden_dir / "v41_b_fp8", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["engram_vocab_size"] = 60
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"layers\.1\.engram\.embed\.weight: wanted"):
        load_foreign(folder, official_config(folder))


def test_a_truncated_shard_is_refused(release: Path) -> None:
    data = (release / SINGLE).read_bytes()
    for length in (4, 100, len(data) // 2, len(data) - 1):
        (release / SINGLE).write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated or corrupted"):
            load_foreign(release, Dsv4Config.from_pretrained(release))


def test_shards_load_like_one_file(
    official_config: OfficialConfig, golden_dir: Path, sharded: Path
) -> None:
    whole = golden_dir / "v4_a_fp8"
    one, two = (load_foreign(d, official_config(d)) for d in (whole, sharded))
    assert one.keys() == two.keys()
    assert all(torch.equal(_bits(one[name]), _bits(two[name])) for name in one)


def test_an_index_that_names_an_absent_shard_is_refused(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b\.safetensors, which is not there"):
        load_foreign(sharded, Dsv4Config.from_pretrained(sharded))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_malformed_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match="weight_map"):
        read_index(sharded)


def test_an_index_and_shards_that_disagree_are_refused(sharded: Path) -> None:
    names = _read_index_names(sharded)
    del names["norm.weight"]
    _write_index(sharded, names | {"ghost.weight": "a.safetensors"})
    with pytest.raises(ValueError, match=r"ghost\.weight.*norm\.weight"):
        load_foreign(sharded, Dsv4Config.from_pretrained(sharded))


def test_symlinked_shards_of_the_hub_cache_load(
    official_config: OfficialConfig, golden_dir: Path, sharded: Path
) -> None:
    blobs, snapshot = sharded.parent / "blobs", sharded.parent / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    sharded.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    state = load_foreign(snapshot, official_config(snapshot))
    assert len(state) == len(our_inventory(official_config(golden_dir / "v4_a_fp8")))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found neither"):
        read_index(tmp_path)


def test_our_own_layout_is_checked_before_it_is_loaded(
    official_config: OfficialConfig, golden_dir: Path, tmp_path: Path
) -> None:
    folder = golden_dir / "v4_a_fp8"
    config = official_config(folder)
    state = load_foreign(folder, config)
    save_file(state, tmp_path / SINGLE)
    check_own(tmp_path, our_inventory(config))
    save_file({**state, "lm_head.weight": state["lm_head.weight"].float()}, tmp_path / SINGLE)
    check_own(tmp_path, our_inventory(config))
    experts = "model.layers.0.mlp.experts.down_proj"
    save_file({**state, experts: state[experts].clone().view(torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"down_proj: wanted U8 .* got I8"):
        check_own(tmp_path, our_inventory(config))
    del state["model.norm.weight"]
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"1 missing \(model\.norm\.weight\)"):
        check_own(tmp_path, our_inventory(config))
