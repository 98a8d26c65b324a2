# SPDX-License-Identifier: Apache-2.0
"""A release comes back from its conversion byte for byte, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.config import Recipe, get_recipe
from quantize.convert import convert
from quantize.export import export_official

FP4 = get_recipe("fp4")


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


@pytest.mark.parametrize("case", ["v4_a_fp8", "v41_b_fp8"])
def test_an_official_release_comes_back_bit_for_bit(
    golden_dir: Path, tmp_path: Path, case: str
) -> None:
    target = convert(golden_dir / case, tmp_path / "out", FP4)
    output = export_official(target, tmp_path / "back", max_shard_size=300_000)
    wanted = load_file(golden_dir / case / "model.safetensors")
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    got = {}
    for file in sorted(set(index.values())):
        tensors = load_file(output / file)
        assert {name for name, f in index.items() if f == file} == set(tensors)
        got |= tensors
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name
    config = json.loads((golden_dir / case / "config.json").read_text())
    assert json.loads((output / "config.json").read_text()) == config


def test_rounded_experts_do_not_come_back(release: Path, tmp_path: Path) -> None:
    down = Recipe("mixed", (("*.down_proj", "fp8_block32"), ("*.mlp.experts.*", "fp4")))
    target = convert(release, tmp_path / "out", down)
    with pytest.raises(ValueError, match=r"got \['fp4', 'fp8_block32'\]; what was rounded does"):
        export_official(target, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_record_is_not_exported(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    pack = target / "experts-layers-1.safetensors"
    spoilt = bytearray(pack.read_bytes())
    spoilt[4096 + 7] ^= 1
    pack.write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"expert 0 of .*experts-layers-1.safetensors is damaged"):
        export_official(target, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


@pytest.mark.parametrize("stop", [1, 40, 80])
def test_a_stopped_export_does_not_block_the_next(release: Path, tmp_path: Path, stop: int) -> None:
    (release / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    target, calls = convert(release, tmp_path / "out", FP4), 0

    def interrupt(file: str, done: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    output = tmp_path / "back"
    with pytest.raises(KeyboardInterrupt):
        export_official(target, output, 500_000, interrupt)
    assert not output.exists()
    left = tmp_path / "back.partial"
    (left / "tokenizer.json").write_text("half")
    (left / "config.json.tmp").write_text("half")
    output.mkdir()
    export_official(target, output, 300_000)
    whole = export_official(target, tmp_path / "whole", 300_000)
    assert [p.name for p in sorted(output.iterdir())] == [p.name for p in sorted(whole.iterdir())]
    for path in whole.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert not left.exists()


def test_what_somebody_else_left_is_not_removed(release: Path, tmp_path: Path) -> None:
    target, other = convert(release, tmp_path / "out", FP4), tmp_path / "back.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"got thesis.txt in it; remove it, or give another OUT"):
        export_official(target, tmp_path / "back")
    assert (other / "thesis.txt").read_text() == "kept"


def test_a_release_or_a_full_directory_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted what dsv4-quantize convert wrote"):
        export_official(release, tmp_path / "back")
    target = convert(release, tmp_path / "out", FP4)
    with pytest.raises(ValueError, match="wanted a new or empty directory"):
        export_official(target, target)


def test_a_dense_tensor_in_another_format_is_not_taken_for_its_numbers(
    release: Path, tmp_path: Path
) -> None:
    target = convert(release, tmp_path / "out", FP4)
    (shard,) = target.glob("model-*.safetensors")
    tensors = load_file(shard)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: wanted BF16 .*, got F8_E4M3"):
        export_official(target, tmp_path / "back")
