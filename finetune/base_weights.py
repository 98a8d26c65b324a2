# SPDX-License-Identifier: Apache-2.0
"""The weights of any base, a tile or an expert at a time, as numbers: plain, release or converted.

`quantize.source.Source` reads what may be converted. Here it also reads what was converted: packs
and tables are files like others, their fields ranges of bytes like others.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from modeling_dsv4.formats import FP8_ROWS32, WeightFormat, fp8_block_format, get_format
from modeling_dsv4.safetensors_file import read_header
from modeling_dsv4.storage import stored_name
from modeling_dsv4.weight_map import TOKEN_MAP, pieces, release_storage
from quantize.config import METHOD, Recipe
from quantize.dense import dense_format, scale_name
from quantize.pack import PackFile, pack_file_name
from quantize.source import ExpertsSource, Slice, Source
from quantize.tables import TableFile, table_file_name

from .identity import digest_identity

# Elements that are wide at a time.
TILE = 1 << 22


class ConvertedSource(Source):
    """What `dsv4-quantize convert` wrote, read like a source."""

    packs: dict[str, PackFile]
    tables: dict[str, TableFile]
    recipe: Recipe

    def _check_method(self, stored: Mapping[str, object]) -> None:
        self.recipe = Recipe.from_dict(stored["recipe"])  # type: ignore[arg-type]

    def _find(self, layout: str) -> None:
        kinds = {piece.ours: piece.kind for piece in pieces(self.config)}
        for name, info in self._info.items():
            self._dense_names[name] = name
            self._add_dense(name, kinds.get(name, "i64" if name == TOKEN_MAP else ""), info)
        self.packs, self.tables = {}, {}
        modules = {p.ours.rpartition(".")[0] for p in pieces(self.config) if p.expert is not None}
        for module in sorted(modules):
            self._find_pack(module, PackFile.open(self.directory / pack_file_name(module)))
        for module in self.config.quantization_config.get("engram_tables", {}):
            table = TableFile.open(self.directory / table_file_name(module))
            self.tables[module] = table
            self._take_file(table.path)

    def _find_pack(self, module: str, pack: PackFile) -> None:
        self.packs[module] = pack
        self.experts[module] = ExpertsSource(module, pack.num_experts, None)
        self._take_file(pack.path)
        for expert in range(pack.num_experts):
            start, _ = pack.span(expert)
            self._slices[module, expert] = {
                f.projection + f.part: [
                    Slice(pack.path.name, f.dtype, f.shape, start + f.offset,
                          start + f.offset + f.nbytes)
                ]
                for f in pack.layout.of(expert).fields
            }  # fmt: skip

    def _take_file(self, path: Path) -> None:
        self.origin.headers[path.name] = read_header(path)
        self.origin.sizes[path.name] = path.stat().st_size


def open_base(directory: str | Path) -> Source:
    """Open a base's files; only headers are read.

    Raises:
        ValueError: no model of this family, or broken files.
    """
    config = Path(directory, "config.json")
    if not config.is_file():
        raise ValueError(f"{directory}: wanted a model's directory with config.json, found none")
    stored = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    kind = ConvertedSource if stored.get("quant_method") == METHOD else Source
    return kind(directory)


def is_plain(source: Source) -> bool:
    """Whether a base's weights are numbers, none in a storage format."""
    return not getattr(source.config, "quantization_config", None)


def dense_held(source: Source, name: str) -> WeightFormat | None:
    """Format of a dense weight under our name; None if it is plain."""
    if isinstance(source, ConvertedSource):
        reached = dense_format(source.recipe, name)
        if reached is not None:
            return reached
    if name not in source.dense or source.dense[name][0] != "F8_E4M3":
        return None
    if dense_is_rows(source, name):
        return FP8_ROWS32
    block = release_storage(source.config).block
    assert block is not None
    return fp8_block_format(block)


def dense_is_rows(source: Source, name: str) -> bool:
    """Whether a weight in FP8 has scales of its rows: Engram tables have."""
    rows, width = source.dense[name][1]
    return source.dense[scale_name(name)][1] == (rows, width // FP8_ROWS32.group)


def expert_held(source: Source, module: str, expert: int, projection: str) -> WeightFormat | None:
    """Format of an expert's projection; None if it is plain."""
    if isinstance(source, ConvertedSource):
        return get_format(source.packs[module].layout.of(expert).format(projection))
    return source.experts[module].weight_format


def expert_parts(
    source: Source, module: str, expert: int, projection: str
) -> dict[str, torch.Tensor]:
    """An expert's projection as it is stored: {part: tensor}, w1 before w3 in an axis of two."""
    found = {}
    for (owner, part), places in source.expert_slices(module, expert).items():
        if owner == projection:
            read = [source.read(place) for place in places]
            found[part] = torch.stack(read) if len(read) > 1 else read[0]
    return found


def expert_weight(source: Source, module: str, expert: int, projection: str) -> torch.Tensor:
    """An expert's projection as numbers: [2, F, D] or [D, F] float32."""
    parts = expert_parts(source, module, expert, projection)
    held = expert_held(source, module, expert, projection)
    return parts[""].float() if held is None else held.unpack(parts, torch.float32)


def dense_rows(source: Source, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a dense weight under our name, float32.

    Of a weight in blocks, `start` must begin one.
    """
    table = getattr(source, "tables", {}).get(name.removesuffix(".weight"))
    if table is not None:
        row = table.layout.nbytes
        at, shape = table.start + start * row, (stop - start, row)
        place = Slice(table.path.name, "U8", shape, at, at + (stop - start) * row)
        return table.layout.unpack(source.read(place), torch.float32)
    held = dense_held(source, name)
    if held is None:
        return source.rows(name, start, stop).float()
    block, parts = held.row_block, {}
    assert start % block == 0, (name, start, block)
    for part in held.parts((block, block * held.group)):
        size = 1 if part == "" else block
        stored = name.removesuffix("weight") + stored_name(part)
        parts[part] = source.rows(stored, start // size, -(-stop // size))
    return held.unpack(parts, torch.float32)


def row_tiles(source: Source, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of a dense weight, some millions of elements each, in whole blocks."""
    held = dense_held(source, name)
    block = 1 if held is None else held.row_block
    width = 1
    for n in shape[1:]:
        width *= n
    step = max(TILE // max(width, 1) // block, 1) * block
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def weight_shape(source: Source, name: str) -> tuple[int, ...] | None:
    """Shape of a weight under our name, [out, in] or one expert's; None if there is none."""
    module, _, projection = name.rpartition(".")
    if module in source.experts:
        hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
        return {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.get(projection)
    return source.dense[name][1] if name in source.dense else None


def identity_of(source: Source) -> str:
    """Identity of a base, as `base_identity` gives it for the loaded model."""

    def getter(name: str) -> Callable[[], torch.Tensor]:
        return lambda: source.get(name)

    return digest_identity(source.config, ((name, getter(name)) for name in source.dense))
