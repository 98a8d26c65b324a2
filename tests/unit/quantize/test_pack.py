# SPDX-License-Identifier: Apache-2.0
"""A pack is a safetensors file of aligned records, complete or absent, and checked when opened."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_dsv4.formats import get_format
from quantize.pack import (
    ALIGNMENT,
    PROJECTIONS,
    PackFile,
    PackLayout,
    PackWriter,
    RecordLayout,
    pack_file_name,
)
from quantize.trellis import TRELLIS2

MakePack = Callable[..., tuple[PackFile, torch.Tensor]]


def test_any_safetensors_reader_opens_a_pack(make_pack: MakePack) -> None:
    pack, records = make_pack(5, layer=3)
    with safe_open(pack.path, "pt") as file:
        assert set(file.keys()) == {f"{pack.name}.packed", f"{pack.name}.crc32"}
        assert torch.equal(file.get_tensor(f"{pack.name}.packed"), records)
        checksums = file.get_tensor(f"{pack.name}.crc32")
    assert checksums.tolist() == [zlib.crc32(r.numpy()) for r in records]
    assert pack.checksums() == checksums.tolist()


def test_every_record_is_one_aligned_range(make_pack: MakePack) -> None:
    pack, records = make_pack(5)
    assert pack.offset % ALIGNMENT == 0
    assert pack.layout.largest % ALIGNMENT == 0
    raw = pack.path.read_bytes()
    for e, record in enumerate(records):
        start = pack.offset + e * pack.layout.largest
        assert raw[start : start + pack.layout.largest] == bytes(record.numpy())


def test_all_records_are_read_at_once(make_pack: MakePack) -> None:
    pack, records = make_pack(4)
    assert torch.equal(pack.read_all(), records)


def test_decoding_a_record_gives_back_what_was_encoded(layout: RecordLayout) -> None:
    fp4 = get_format("fp4")
    shapes = {"gate_up_proj": (2, 32, 64), "down_proj": (64, 32)}
    parts = {name: fp4.pack(torch.randn(shape)) for name, shape in shapes.items()}
    decoded = layout.decode(layout.encode(parts))
    for projection, given in parts.items():
        for part, tensor in given.items():
            got = decoded[projection][part]
            assert got.dtype == tensor.dtype
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_codes_come_before_scales_and_nothing_overlaps(layout: RecordLayout) -> None:
    names = [f.projection + f.part for f in layout.fields]
    assert names == ["gate_up_proj", "down_proj", "gate_up_proj_scale", "down_proj_scale"]
    for a, b in zip(layout.fields, layout.fields[1:], strict=False):
        assert a.offset + a.nbytes <= b.offset
    assert layout.fields[-1].offset + layout.fields[-1].nbytes <= layout.nbytes


def test_a_flash_expert_takes_4_and_a_quarter_bits_a_weight() -> None:
    layout = RecordLayout.build(4096, 2048, "fp4", "fp4")
    assert layout.nbytes * 8 / (3 * 4096 * 2048) == 4.25


def test_the_layout_survives_json(layout: RecordLayout) -> None:
    assert RecordLayout.from_dict(layout.to_dict()) == layout


def test_a_record_of_another_shape_is_refused(layout: RecordLayout) -> None:
    wrong = get_format("fp4").pack(torch.randn(64, 64))
    with pytest.raises(ValueError, match=r"gate_up_proj: wanted .*\[2, 32, 32\], got .*\[64, 32\]"):
        layout.encode({"gate_up_proj": wrong})


@pytest.mark.parametrize("written", [0, 2])
def test_an_incomplete_pack_leaves_nothing_behind(
    tmp_path: Path, layout: RecordLayout, written: int
) -> None:
    path = tmp_path / "experts-layers-0.safetensors"
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)

    def write() -> None:
        with PackWriter(path, "model.layers.0.mlp.experts", PackLayout.repeat(layout, 3)) as writer:
            for _ in range(written):
                writer.write(record)

    with pytest.raises(ValueError, match=f"wanted 3 experts, got {written}"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_fails_halfway_leaves_the_old_one(make_pack: MakePack) -> None:
    pack, records = make_pack(2)

    def fail() -> None:
        with PackWriter(pack.path, pack.name, pack.layout) as writer:
            writer.write(records[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(PackFile.open(pack.path).read_all(), records)
    assert len(list(pack.path.parent.iterdir())) == 1


def test_a_flipped_byte_names_its_expert(make_pack: MakePack) -> None:
    pack, _ = make_pack(6)
    assert pack.damaged_experts() == []
    raw = bytearray(pack.path.read_bytes())
    raw[pack.offset + 4 * pack.layout.largest + 17] ^= 1
    pack.path.write_bytes(raw)
    assert pack.damaged_experts() == [4]


def test_a_truncated_pack_says_so(make_pack: MakePack) -> None:
    pack, _ = make_pack()
    raw = pack.path.read_bytes()
    pack.path.write_bytes(raw[:-9])
    with pytest.raises(ValueError, match=f"wanted {len(raw)} bytes, got {len(raw) - 9}"):
        PackFile.open(pack.path)


def test_a_missing_pack_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this expert pack is missing"):
        PackFile.open(tmp_path / "experts-layers-0.safetensors")


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"]]"]
)
def test_what_is_no_pack_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "experts-layers-0.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="not a readable expert pack"):
        PackFile.open(path)


def test_a_pack_of_a_later_version_is_refused(layout: RecordLayout) -> None:
    data = PackLayout.repeat(layout, 2).to_dict()
    with pytest.raises(ValueError, match="wanted an expert pack of version 1 to 2, got 3"):
        PackLayout.from_dict({**data, "version": 3}, 2)


def test_a_pack_of_the_first_version_stays_readable(golden_dir: Path) -> None:
    pack = PackFile.open(golden_dir / "pack_v1" / "experts-layers-3.safetensors")
    assert (pack.name, pack.num_experts) == ("model.layers.3.mlp.experts", 3)
    assert pack.damaged_experts() == []
    records = pack.read_all()
    for e in range(3):
        weights = torch.arange(3 * 64 * 32, dtype=torch.float32).mul(0.37).add(e).sin()
        gate_up, down = weights.split((2 * 32 * 64, 64 * 32))
        given = dict(zip(PROJECTIONS, (gate_up.view(2, 32, 64), down.view(64, 32)), strict=True))
        decoded = pack.layout.of(e).decode(pack.layout.record(records, e))
        for projection, weight in given.items():
            weight_format = get_format(pack.layout.of(e).format(projection))
            for part, tensor in weight_format.pack(weight).items():
                got = decoded[projection][part]
                assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)), (e, part)


def by_parity(weight: str) -> str:
    return "fp4" if int(weight.rsplit(".", 2)[1]) % 2 else "fp8_block32"


def test_records_of_several_sizes_lie_one_after_the_other(tmp_path: Path) -> None:
    layout = PackLayout.build("model.layers.0.mlp.experts", 5, 64, 32, by_parity)
    assert layout.uniform is None
    assert len(layout.layouts) == 2
    records = [torch.randint(256, (layout.of(e).nbytes,), dtype=torch.uint8) for e in range(5)]
    path = tmp_path / "experts-layers-0.safetensors"
    with PackWriter(path, "model.layers.0.mlp.experts", layout) as writer:
        for record in records:
            writer.write(record)
    pack = PackFile.open(path)
    assert pack.layout == layout
    assert pack.nbytes == sum(record.nbytes for record in records)
    whole = pack.read_all()
    for e, record in enumerate(records):
        start, size = pack.span(e)
        assert (start % ALIGNMENT, size) == (0, record.nbytes)
        assert torch.equal(layout.record(whole, e), record)
        assert torch.equal(pack.read_record(e), record)


@pytest.mark.parametrize("kinds", [[0], [0, 0, 0], [0, 7], [0, -1]])
def test_a_table_of_layouts_that_does_not_fit_is_refused(
    layout: RecordLayout, kinds: list[int]
) -> None:
    data = {**PackLayout.repeat(layout, 2).to_dict(), "kinds": kinds}
    with pytest.raises(ValueError, match="wanted a layout for each of 2 experts"):
        PackLayout.from_dict(data, 2)


def test_an_expert_without_a_format_is_named() -> None:
    rule = {"m.0.gate_up_proj": "fp4", "m.0.down_proj": "fp4", "m.1.gate_up_proj": "fp4"}
    with pytest.raises(ValueError, match=r"wanted a format for m\.1\.down_proj, got none"):
        PackLayout.build("m", 2, 64, 32, rule.get)


def test_a_field_beyond_its_record_is_refused(layout: RecordLayout) -> None:
    data = layout.to_dict()
    data["fields"][0]["offset"] = layout.nbytes
    with pytest.raises(ValueError, match="beyond its record"):
        RecordLayout.from_dict(data)


def test_files_are_named_after_their_modules() -> None:
    assert pack_file_name("model.layers.12.mlp.experts") == "experts-layers-12.safetensors"
    assert pack_file_name("mtp.0.mlp.experts") == "experts-mtp-0.safetensors"


def test_a_damaged_record_is_not_read_resident(make_pack: MakePack) -> None:
    pack, _ = make_pack(3)
    raw = bytearray(pack.path.read_bytes())
    raw[pack.offset + pack.layout.largest + 7] ^= 1
    pack.path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"expert 1 of .* is damaged; convert or"):
        pack.read_all()


def test_codes_of_other_tables_are_refused() -> None:
    layout = RecordLayout.build(64, 32, "trellis2", "fp4")
    data = layout.to_dict()
    assert data["tables"] == {"trellis2": TRELLIS2.tables}
    assert RecordLayout.from_dict(data) == layout
    older = {key: value for key, value in data.items() if key != "tables"}
    assert RecordLayout.from_dict(older) == layout
    with pytest.raises(ValueError, match=r"codes of trellis2 for tables with .* convert again"):
        RecordLayout.from_dict({**data, "tables": {"trellis2": TRELLIS2.tables ^ 1}})
    assert "tables" not in RecordLayout.build(64, 32, "fp4", "fp4").to_dict()
