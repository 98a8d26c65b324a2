# SPDX-License-Identifier: Apache-2.0
"""Safetensors files and indices: strict reading, complete writing."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_dsv4 import checkpoint
from modeling_dsv4.checkpoint import (
    read_header,
    read_index,
)
from modeling_dsv4.safetensors_file import DTYPES, Shards, write_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _write_index(folder: Path, names: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _read_index_names(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_bytes_after_the_last_tensor_are_refused(release: Path) -> None:
    with (release / SINGLE).open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match="its tensors end at byte"):
        read_header(release / SINGLE)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"a": 1, "a": 2}', "twice"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": ENTRY | {"dtype": "F3"}}, "unknown dtype"),
        ({"a": ENTRY | {"shape": [-2]}}, "no sizes"),
        ({"a": ENTRY | {"shape": [3]}}, "its shape needs 12"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "starts at byte"),
        ({"a": ENTRY, "b": ENTRY}, "'b' starts at byte"),
        ({}, "its tensors end at byte"),
    ],
)
def test_a_corrupted_header_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="does not fit"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "..",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "sub\\a.safetensors",
        "C:a.safetensors",
        ".a.safetensors",
        "a.bin",
        "",
    ],
)
def test_an_index_that_names_files_elsewhere_is_refused(sharded: Path, name: str) -> None:
    (sharded.parent / "a.safetensors").write_bytes((sharded / "a.safetensors").read_bytes())
    names = _read_index_names(sharded)
    _write_index(sharded, names | {"norm.weight": name})
    with pytest.raises(ValueError, match="wanted plain names"):
        read_index(sharded)


def test_a_tensor_of_the_wrong_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a: wanted F32 \(2,\) to write, got torch.float32 \(3,\)"
    ):
        write_file(tmp_path / SINGLE, {"a": ("F32", (2,))}, lambda name: torch.zeros(3))


def test_every_dtype_survives_writing_and_reading(tmp_path: Path) -> None:
    tensors = {
        name: torch.randint(0, 2, (3, 5), dtype=torch.uint8).to(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith("F8")
    }
    tensors |= {
        name: torch.randint(1, 100, (3, 5), dtype=torch.uint8).view(DTYPES[name])
        for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0")
    }
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 4)
    entries = {n: (n if n in DTYPES else "F32", tuple(t.shape)) for n, t in tensors.items()}
    write_file(tmp_path / SINGLE, entries, tensors.__getitem__)
    for name, tensor in load_file(tmp_path / SINGLE).items():
        assert tensor.dtype is tensors[name].dtype
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)
        )
    shards = checkpoint.Shards(tmp_path)
    copied = torch.empty(3, 5, dtype=torch.float8_e4m3fn)
    shards.read_into("F8_E4M3", copied)
    assert torch.equal(_bits(copied), _bits(tensors["F8_E4M3"]))
    with pytest.raises(ValueError, match="cannot read F32"):
        shards.read_into("F32", copied)


def test_a_file_cut_after_it_was_opened_is_an_error(release: Path) -> None:
    shards, path = Shards(release), release / SINGLE
    name = max(shards.info, key=lambda name: shards.info[name].start)
    info = shards.info[name]
    out = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    shards.read_into(name, out)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"'{name}' ended after {out.nbytes - 1} bytes"):
        shards.read_into(name, out)
