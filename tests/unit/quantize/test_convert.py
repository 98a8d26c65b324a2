# SPDX-License-Identifier: Apache-2.0
"""A conversion keeps bytes, continues where it stopped, and never leaves half a file."""

import json
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from modeling_dsv4.checkpoint import fit_config, load_foreign, read_index
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.formats import get_format
from quantize.checksums import Checksums, FileSums, damages
from quantize.config import Recipe, get_recipe
from quantize.convert import convert
from quantize.pack import PackFile
from quantize.tables import TableFile

FP4 = get_recipe("fp4")


@pytest.fixture
def native(native_config: Callable[..., Any]) -> DeepseekV4ForCausalLM:
    wide = {"hidden_size": 64, "moe_intermediate_size": 32}
    return DeepseekV4ForCausalLM(native_config(n_routed_experts=4, num_experts_per_tok=2, **wide))


def expected(directory: Path, dequantize: bool = False) -> dict[str, torch.Tensor]:
    """The source as the model itself would load it."""
    config = Dsv4Config.from_pretrained(directory)
    fit_config(config, read_index(directory))
    return load_foreign(directory, config, dequantize)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("case", ["v4_a_fp8", "v41_b_fp8"])
def test_a_release_keeps_every_byte(golden_dir: Path, tmp_path: Path, case: str) -> None:
    target = convert(golden_dir / case, tmp_path / "out", FP4)
    wanted = expected(golden_dir / case)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    dense = {}
    for file in sorted(set(index.values())):
        dense |= load_file(target / file)
    assert set(dense) == set(index)
    for path in target.glob("engram-*.safetensors"):
        table = TableFile.open(path)
        for part, stored in (("", "weight"), ("_scale", "weight_scale_inv")):
            source = wanted.pop(f"{table.name}.{stored}")
            assert torch.equal(raw(table.part(part).contiguous()), raw(source))
    for name, tensor in wanted.items():
        if ".mlp.experts." in name:
            continue
        assert dense.pop(name).dtype == tensor.dtype, name
    assert set(dense) <= {"model.engram_hash.token_map"}
    for path in target.glob("experts-*.safetensors"):
        pack = PackFile.open(path)
        for e, record in enumerate(pack.read_all()):
            for projection, parts in pack.layout.of(e).decode(record).items():
                for part, tensor in parts.items():
                    source = wanted[f"{pack.name}.{projection}{part}"][e]
                    assert torch.equal(raw(tensor), raw(source)), (pack.name, projection, part)


def test_dense_tensors_are_copied_byte_for_byte(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    wanted = expected(release)
    got = load_file(target / "model-00001-of-00001.safetensors")
    assert len(got) > 50
    assert {t.dtype for t in got.values()} >= {torch.float8_e4m3fn, torch.float8_e8m0fnu}
    for name, tensor in got.items():
        assert torch.equal(raw(tensor), raw(wanted[name])), name


def test_plain_experts_are_rounded_as_the_packer_rounds(
    native: DeepseekV4ForCausalLM, tmp_path: Path
) -> None:
    native.save_pretrained(tmp_path / "native")
    target = convert(tmp_path / "native", tmp_path / "out", FP4)
    state = expected(tmp_path / "native")
    pack = PackFile.open(target / "experts-layers-2.safetensors")
    records = pack.read_all()
    fp4 = get_format("fp4")
    for e in range(4):
        parts = pack.layout.of(e).decode(records[e])
        gate_up = state["model.layers.2.mlp.experts.gate_up_proj"][e].unflatten(0, (2, -1))
        down = state["model.layers.2.mlp.experts.down_proj"][e]
        for projection, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            for part, tensor in fp4.pack(weight).items():
                assert torch.equal(raw(parts[projection][part]), raw(tensor))


def test_both_layouts_of_transformers_give_the_same_model(
    native: DeepseekV4ForCausalLM, tmp_path: Path
) -> None:
    native.save_pretrained(tmp_path / "hybrid")
    native.save_pretrained(tmp_path / "fused", save_original_format=False)
    a = contents(convert(tmp_path / "hybrid", tmp_path / "a", FP4))
    b = contents(convert(tmp_path / "fused", tmp_path / "b", FP4))
    assert set(a) == set(b)
    assert all(a[name] == b[name] for name in a if name.startswith("experts"))
    dense = [load_file(tmp_path / d / "model-00001-of-00001.safetensors") for d in "ab"]
    assert set(dense[0]) == set(dense[1])
    assert all(torch.equal(t, dense[1][name]) for name, t in dense[0].items())


def test_experts_in_fp8_blocks_can_become_fp4(tmp_path: Path, release: Path) -> None:
    blocks = Recipe("fp8", (("*.mlp.experts.*", "fp8_block128"),))
    target = convert(release, tmp_path / "out", blocks)
    pack = PackFile.open(target / "experts-layers-0.safetensors")
    parts = pack.layout.of(1).decode(pack.read_all()[1])["down_proj"]
    wanted = expected(release, dequantize=True)
    weight = wanted["model.layers.0.mlp.experts.down_proj"][1].float()
    got = get_format("fp8_block128").unpack(parts, torch.float32)
    # E4M3 holds E2M1 exactly unless the scales of a block lie far apart; here they do not.
    assert (got - weight).abs().max() <= 2**-4 * weight.abs().max()


@pytest.mark.parametrize("stop", [0, 1, 5, 9, 20, 40])
def test_an_interrupted_conversion_continues_to_the_same_bytes(
    release: Path, tmp_path: Path, stop: int
) -> None:
    calls = 0

    def interrupt(file: str, done: int) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt

    whole = convert(release, tmp_path / "whole", FP4, max_shard_size=300_000)
    with pytest.raises(KeyboardInterrupt):
        convert(release, tmp_path / "out", FP4, 300_000, interrupt)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    done = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")}
    convert(release, tmp_path / "out", FP4, max_shard_size=300_000)
    for name, inode in done.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode, f"{name} was written again"
    assert contents(tmp_path / "out") == contents(whole)


def test_what_a_killed_run_left_half_written_is_replaced(release: Path, tmp_path: Path) -> None:
    whole = convert(release, tmp_path / "whole", FP4)
    target = convert(release, tmp_path / "out", FP4)
    # As after a kill between two writes: files without their entry, one cut, one half-written.
    sums = Checksums.load(target)
    assert sums is not None
    sums.complete = False
    del sums.files["experts-layers-1.safetensors"]
    sums.save(target)
    cut = target / "experts-layers-2.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (target / "experts-layers-1.safetensors.partial").write_bytes(b"half")
    (target / "config.json").unlink()
    convert(release, target, FP4)
    assert contents(target) == contents(whole)


def test_a_finished_conversion_is_left_alone(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    before = {p.name: p.stat().st_ino for p in target.glob("*.safetensors")}
    told = []
    convert(release, target, FP4, progress=lambda file, done: told.append(done))
    assert {p.name: p.stat().st_ino for p in target.glob("*.safetensors")} == before
    assert len(told) == len(before)


def test_shards_keep_to_their_size(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4, max_shard_size=300_000)
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = load_file(shard)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 300_000 or len(tensors) == 1


def test_the_tokenizer_comes_along(release: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (release / name).write_text(f'"{name}"')
    target = convert(release, tmp_path / "out", FP4)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (target / name).read_text() == f'"{name}"'


def test_a_target_that_holds_something_else_is_refused(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert(release, target, FP4)
    assert contents(target) == {"thesis.txt": b"mine"}


def test_a_run_that_was_killed_as_it_began_is_continued(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "checksums.json.tmp").write_text("{")
    convert(release, target, FP4)
    assert contents(target) == contents(convert(release, tmp_path / "again", FP4))


def test_a_target_of_another_conversion_is_refused(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    with pytest.raises(ValueError, match="another source or with other options"):
        convert(release, target, FP4, max_shard_size=1000)


def test_source_and_target_must_differ(release: Path) -> None:
    with pytest.raises(ValueError, match="source and target are the same directory"):
        convert(release, release, FP4)


def test_a_file_is_no_target(release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="wanted a directory to convert into, got a file"):
        convert(release, tmp_path / "out", FP4)


def test_a_converted_model_is_no_source(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    with pytest.raises(ValueError, match="got one quantized by 'dsv4'"):
        convert(target, tmp_path / "again", FP4)


def test_a_full_disk_is_told_before_anything_is_written(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 9 * 10**5, 10**5)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"wanted .* of free disk, got 100 kB"):
        convert(release, tmp_path / "out", FP4)
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_a_truncated_source_is_an_error_before_anything_is_written(
    release: Path, tmp_path: Path
) -> None:
    shard = release / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        convert(release, tmp_path / "out", FP4)
    assert not (tmp_path / "out").exists()


def test_a_source_with_a_missing_or_misshapen_tensor_is_refused(
    release: Path, tmp_path: Path
) -> None:
    tensors = load_file(release / "model.safetensors")
    tensors.pop("layers.1.ffn.experts.0.w2.scale")
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    tensors["layers.0.surprise"] = torch.zeros(1)
    save_file(tensors, release / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 missing \(layers.1.*1 not expected.*1 of another shape"
    ):
        convert(release, tmp_path / "out", FP4)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted a directory with config.json"):
        convert(tmp_path, tmp_path / "out", FP4)


def test_every_flipped_byte_is_found_and_its_tensor_named(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    sums = Checksums.load(target)
    assert sums is not None
    assert list(damages(target, sums)) == []
    for path in [*sorted(target.glob("*.safetensors")), target / "config.json"]:
        whole = path.read_bytes()
        for at in [*torch.randint(len(whole), (12,)).tolist(), 0, 9, len(whole) - 1]:
            broken = bytearray(whole)
            broken[at] ^= 1 << (at % 8)
            path.write_bytes(broken)
            (line,) = damages(target, sums)
            assert line.startswith(f"{path.name}: ")
            assert "damaged" in line
        path.write_bytes(whole)


def test_missing_and_cut_files_are_found(release: Path, tmp_path: Path) -> None:
    target = convert(release, tmp_path / "out", FP4)
    sums = Checksums.load(target)
    assert sums is not None
    pack = target / "experts-layers-0.safetensors"
    size = pack.stat().st_size
    pack.write_bytes(pack.read_bytes()[:-1])
    (target / "experts-layers-1.safetensors").unlink()
    assert list(damages(target, sums)) == [
        f"experts-layers-0.safetensors: wanted {size} bytes, got {size - 1}",
        "experts-layers-1.safetensors: missing",
    ]


def test_a_malformed_checksum_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text('{"files": []}')
    with pytest.raises(ValueError, match=r"checksums.json: damaged or not readable"):
        Checksums.load(tmp_path)


@pytest.mark.parametrize("what", ["source", "max_shard_size", "header", "crc32"])
def test_no_number_in_the_checksums_can_change_unnoticed(
    release: Path, tmp_path: Path, what: str
) -> None:
    path = convert(release, tmp_path / "out", FP4) / "checksums.json"
    text = path.read_text()
    at = text.index(f'"{what}": ') + len(what) + 4
    path.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")
    with pytest.raises(ValueError, match="does not have its own checksum"):
        Checksums.load(tmp_path / "out")


def test_a_damaged_small_file_is_found(release: Path, tmp_path: Path) -> None:
    (release / "tokenizer_config.json").write_text("{}")
    target = convert(release, tmp_path / "out", FP4)
    (target / "tokenizer_config.json").write_text("[]")
    sums = Checksums.load(target)
    assert sums is not None
    assert set(sums.files) == {p.name for p in target.iterdir()} - {"checksums.json"}
    assert list(damages(target, sums)) == ["tokenizer_config.json: damaged"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_small_file_that_was_lost_or_cut_is_written_again(
    release: Path, tmp_path: Path, name: str, lost: bool
) -> None:
    (release / "tokenizer.json").write_text('{"a": 0}')
    target = convert(release, tmp_path / "out", FP4)
    whole = contents(target)
    if lost:
        (target / name).unlink()
    else:
        (target / name).write_bytes(b"")
    convert(release, target, FP4)
    assert contents(target) == whole


def test_all_files_are_synced_before_they_have_their_names(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (release / "tokenizer.json").write_text('{"a": 0}')
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    target = convert(release, tmp_path / "out", FP4)
    assert [p.name for p in target.iterdir() if p.stat().st_ino not in synced] == []


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/b.json", "..", ""])
def test_checksums_of_files_outside_are_refused(tmp_path: Path, name: str) -> None:
    Checksums({}, True, {name: FileSums(1, 1)}).save(tmp_path)
    with pytest.raises(ValueError, match="is no plain file name"):
        Checksums.load(tmp_path)
