# SPDX-License-Identifier: Apache-2.0
"""The official layout, written back bit for bit, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DeepseekV4ForCausalLM as NativeModel

from modeling_dsv4.checkpoint import (
    detect_layout,
    load_foreign,
    save_official,
)
from modeling_dsv4.configuration_dsv4 import Dsv4Config

GOLDENS = ("v4_a_fp8", "v41_b_fp8")
OfficialConfig = Callable[[Path], Dsv4Config]
RawTensors = Callable[[Path], dict[str, tuple[str, tuple[int, ...], bytes]]]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _model(config: Dsv4Config, state: dict[str, torch.Tensor]) -> Any:
    return SimpleNamespace(config=config, state_dict=lambda: state)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("size", ["5GB", "300KB"])
def test_the_official_layout_is_written_back_bit_for_bit(
    official_config: OfficialConfig,
    raw_tensors: RawTensors,
    golden_dir: Path,
    tmp_path: Path,
    name: str,
    size: str,
) -> None:
    folder = golden_dir / name
    config = official_config(folder)
    save_official(_model(config, load_foreign(folder, config)), tmp_path, max_shard_size=size)
    assert raw_tensors(tmp_path) == raw_tensors(folder)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(raw_tensors(folder))
    assert index["metadata"]["total_size"] == sum(len(b) for *_, b in raw_tensors(folder).values())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert len(shards) == 1 if size == "5GB" else len(shards) > 4
    # A second directory of ours is as good as the first.
    assert detect_layout(tmp_path) == "official"
    assert (
        load_foreign(tmp_path, official_config(tmp_path)).keys()
        == load_foreign(folder, config).keys()
    )
    assert not list(tmp_path.glob(".*"))


def test_float32_copies_of_a_release_are_written_in_its_own_dtypes(
    official_config: OfficialConfig,
    raw_tensors: RawTensors,
    golden_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = golden_dir / "v4_a_fp8"
    config = official_config(folder)
    state = load_foreign(folder, config)
    wide = {k: t.float() if t.dtype is torch.bfloat16 else t for k, t in state.items()}
    save_official(_model(config, wide), tmp_path)
    assert raw_tensors(tmp_path) == raw_tensors(folder)
    assert not caplog.records
    wide["model.norm.weight"] = wide["model.norm.weight"] * 1.0001
    save_official(_model(config, wide), tmp_path)
    assert "rounded to bfloat16, e.g. norm.weight" in caplog.text


def test_an_expanded_model_is_written_as_an_unquantized_release(
    official_config: OfficialConfig, golden_dir: Path, tmp_path: Path
) -> None:
    folder = golden_dir / "v41_b_fp8"
    config = official_config(folder)
    state = load_foreign(folder, config, dequantize=True)
    del config.quantization_config
    save_official(_model(config, state), tmp_path)
    again = official_config(tmp_path)
    assert not hasattr(again, "quantization_config")
    loaded = load_foreign(tmp_path, again)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_what_transformers_trained_can_be_written_as_a_release(
    official_config: OfficialConfig, native: tuple[NativeModel, Path, Path], tmp_path: Path
) -> None:
    _, hybrid, _ = native
    config = Dsv4Config.from_pretrained(hybrid)
    state = {k: t.bfloat16().float() for k, t in load_foreign(hybrid, config).items()}
    state["model.layers.0.mlp.gate.tid2eid"] = state["model.layers.0.mlp.gate.tid2eid"].long()
    save_official(_model(config, state), tmp_path / "official")
    assert detect_layout(tmp_path / "official") == "official"
    again = load_foreign(tmp_path / "official", official_config(tmp_path / "official"))
    assert all(torch.equal(again[name].to(t.dtype), t) for name, t in state.items())


def test_a_model_with_other_weights_than_its_own_is_not_written(
    official_config: OfficialConfig, golden_dir: Path, tmp_path: Path
) -> None:
    folder = golden_dir / "v4_a_fp8"
    config = official_config(folder)
    state = load_foreign(folder, config)
    wrapped = {**state, "model.layers.0.self_attn.q_a_proj.lora_A.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="lora_A"):
        save_official(_model(config, wrapped), tmp_path / "out")
    on_disk = {k: t for k, t in state.items() if ".experts." not in k}
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.0\.mlp\.experts"):
        save_official(_model(config, on_disk), tmp_path / "out")
    meta = state | {"model.norm.weight": state["model.norm.weight"].to("meta")}
    with pytest.raises(ValueError, match="hold no values"):
        save_official(_model(config, meta), tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_size"):
        save_official(_model(config, state), tmp_path / "out", max_shard_size="five")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_write_leaves_the_old_checkpoint_and_a_finished_one_replaces_it(
    official_config: OfficialConfig,
    raw_tensors: RawTensors,
    golden_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = golden_dir / "v4_a_fp8"
    config = official_config(folder)
    model = _model(config, load_foreign(folder, config))
    save_official(model, tmp_path, max_shard_size="300KB")
    before = sorted(tmp_path.glob("*.safetensors"))

    def fail(path: Path, *args: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("modeling_dsv4.official_export.write_file", fail)
        with pytest.raises(OSError, match="no space"):
            save_official(model, tmp_path)
    assert sorted(tmp_path.glob("*.safetensors")) == before
    assert raw_tensors(tmp_path) == raw_tensors(folder)
    save_official(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [SINGLE]
    assert raw_tensors(tmp_path) == raw_tensors(folder)
