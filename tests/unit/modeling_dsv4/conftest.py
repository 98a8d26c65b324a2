# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints that tests may break."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from modeling_dsv4.checkpoint import fit_config, read_header, read_index
from modeling_dsv4.configuration_dsv4 import Dsv4Config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="session")
def official_config() -> Callable[[Path], Dsv4Config]:
    """The configuration of an official checkpoint, as loading completes it."""

    def read(directory: Path) -> Dsv4Config:
        config = Dsv4Config.from_pretrained(directory)
        fit_config(config, read_index(directory))
        return config

    return read


@pytest.fixture(scope="session")
def raw_tensors() -> Callable[[Path], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Every tensor of a directory as dtype, shape and bytes."""

    def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        found = {}
        for path in sorted(set(read_index(directory).values())):
            data = path.read_bytes()
            for name, info in read_header(path).items():
                found[name] = (info.dtype, info.shape, data[info.start : info.end])
        return found

    return read


@pytest.fixture
def release(golden_dir: Path, tmp_path: Path) -> Path:
    """A tiny official V4 checkpoint that a test may break."""
    folder = tmp_path / "release"
    shutil.copytree(golden_dir / "v4_a_fp8", folder)
    return folder


@pytest.fixture
def sharded(release: Path) -> Path:
    """The same in two shards."""
    tensors = load_file(release / SINGLE)
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, release / file)
    (release / SINGLE).unlink()
    names = {name: file for file, half in halves.items() for name in half}
    (release / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return release


@pytest.fixture
def native(
    tmp_path: Path, native_config: Callable[..., DeepseekV4Config]
) -> tuple[DeepseekV4ForCausalLM, Path, Path]:
    """A model of transformers' own, saved under its mixed and under its fused names."""
    model = DeepseekV4ForCausalLM(native_config())
    model.save_pretrained(tmp_path / "hybrid")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    return model, tmp_path / "hybrid", tmp_path / "fused"
