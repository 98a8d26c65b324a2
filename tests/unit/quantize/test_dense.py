# SPDX-License-Identifier: Apache-2.0
"""Embedding, head and Engram tables in a recipe's format: rounded once, loaded as they are."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import quantize  # noqa: F401
from modeling_dsv4.formats import get_format
from modeling_dsv4.storage import PackedEmbedding, PackedHead, stored_name
from quantize import Recipe
from quantize.checksums import Checksums, damages
from quantize.convert import convert
from quantize.dense import dense_format, packed_tiles
from quantize.source import Source
from quantize.stored_table import StoredTable
from quantize.tables import TableFile

NANO = Path(__file__).parents[3] / "models" / "nano-v41"
RULES = (
    ("*.mlp.experts.*", "fp4"),
    ("*.engram.embed.weight", "fp4"),
    ("model.embed_tokens.weight", "fp8_rows32"),
    ("lm_head.weight", "int4"),
)
TABLE = "model.layers.1.engram.embed.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(NANO, tmp_path_factory.mktemp("dense") / "out", Recipe("dense", RULES))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("model-*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for path in directory.glob("engram-*.safetensors"):
        table = TableFile.open(path)
        for part in table.layout.fields:
            found[f"{table.name}.{stored_name(part)}"] = table.part(part).contiguous()
    return found


def test_rules_reach_tables_and_head_and_nothing_else() -> None:
    recipe = Recipe("all", (("*", "fp4"),))
    for name in ("model.embed_tokens.weight", "lm_head.weight", TABLE):
        assert dense_format(recipe, name) == get_format("fp4")
    for name in (
        "model.norm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.self_attn.q_a_proj.weight",
        "mtp.0.markov_head.embed.weight",
    ):
        assert dense_format(recipe, name) is None


def test_a_format_of_blocks_is_refused() -> None:
    recipe = Recipe("mine", (("lm_head.weight", "fp8_block32"),))
    with pytest.raises(ValueError, match="wanted a format whose rows can be read alone for lm_he"):
        dense_format(recipe, "lm_head.weight")


def test_tensors_are_those_of_the_format(converted: Path) -> None:
    got, source = stored(converted), Source(NANO)
    for name, found in (("lm_head.weight", "int4"), ("model.embed_tokens.weight", "fp8_rows32"),
                        (TABLE, "fp4")):  # fmt: skip
        want = get_format(found).pack(source.get(name).float())
        for suffix, part in want.items():
            key = name + ("_scale_inv" if suffix == "_scale" else suffix)
            assert torch.equal(got[key].view(torch.uint8), part.view(torch.uint8)), key
    assert not list(damages(converted, Checksums.load(converted)))


def test_tiles_of_rows_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(NANO)
    parts = [part for _, part in packed_parts(source) if part.weight == TABLE]
    assert [part.suffix for part in parts] == ["", "_scale"]
    whole = list(packed_tiles(source, parts))
    monkeypatch.setattr("quantize.dense._TILE", 32 * 1000)
    tiles = list(packed_tiles(source, parts))
    assert len(tiles) > 10
    for rows, wanted in zip(zip(*tiles, strict=True), zip(*whole, strict=True), strict=True):
        assert torch.equal(torch.cat(rows), torch.cat(wanted))


def test_a_weight_is_read_once_for_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[str, int]] = Counter()
    rows = Source.rows

    def counted(self: Source, name: str, start: int, stop: int) -> torch.Tensor:
        read.update((name, row) for row in range(start, stop))
        return rows(self, name, start, stop)

    monkeypatch.setattr(Source, "rows", counted)
    convert(NANO, tmp_path / "out", Recipe("dense", RULES))
    assert {name for name, _ in read} >= {"lm_head.weight", "model.embed_tokens.weight"}
    assert set(read.values()) == {1}


def packed_parts(source: Source) -> list:
    from quantize.dense import packed_entries

    return list(packed_entries(source.dense, Recipe("dense", RULES))[1].items())


def test_a_model_computes_with_what_was_rounded(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert isinstance(model.lm_head, PackedHead)
    assert model.model.embed_tokens.format.name == "fp8_rows32"
    tables = [m for m in model.modules() if isinstance(m, StoredTable)]
    assert [t.layout.format for t in tables] == ["fp4", "fp4"]
    twin = AutoModelForCausalLM.from_pretrained(converted, dequantize=True)
    kinds = PackedEmbedding | PackedHead | StoredTable
    assert not any(isinstance(m, kinds) for m in twin.modules())
    ids = torch.arange(12)[None] + 7
    want = model(ids).logits
    torch.testing.assert_close(twin(ids).logits, want, rtol=0, atol=0.15)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, want)
    with pytest.raises(ValueError, match="wanted plain embeddings in memory, got PackedEmbedding"):
        model.resize_token_embeddings(model.config.vocab_size - 1)


def test_rows_of_a_release_stay_or_are_rounded_from_what_they_mean(
    golden_dir: Path, tmp_path: Path
) -> None:
    release = Path(shutil.copytree(golden_dir / "v41_b_fp8", tmp_path / "release"))
    source = Source(release)
    name = next(n for n in source.dense if n.endswith(".engram.embed.weight"))
    assert source.dense[name][0] == "F8_E4M3"
    experts = ("*.mlp.experts.*", "fp4")
    for found in ("fp8_rows32", "fp4"):
        recipe = Recipe("mine", (experts, (name, found)))
        got = stored(convert(release, tmp_path / found, recipe))
        parts = {"": source.get(name), "_scale": source.get(f"{name}_scale_inv")}
        if found == "fp4":
            wide = get_format("fp8_rows32").unpack(parts, torch.float32)
            parts = get_format("fp4").pack(wide)
        for suffix, part in parts.items():
            key = name + ("_scale_inv" if suffix == "_scale" else suffix)
            assert torch.equal(got[key].view(torch.uint8), part.view(torch.uint8))
