# SPDX-License-Identifier: Apache-2.0
"""Embedding, head and Engram tables in a recipe's format; every other dense weight stays as it is.

They are the dense weights of which a step reads single rows, or that come last: what their rounding
costs is not multiplied by the layers behind. Attention, router, shared expert, indexer and mHC are
kept as shipped, whatever a pattern says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_dsv4.formats import FP8_ROWS32, WeightFormat, get_format
from modeling_dsv4.layers import Float32Head
from modeling_dsv4.safetensors_file import DTYPES
from modeling_dsv4.storage import PackedEmbedding, PackedHead, stored_name

from .config import Recipe
from .source import Entry, Source
from .tables import RowLayout, table_of

_REACHED = re.compile(r"(model\.embed_tokens|lm_head|(model\.)?.*\.engram\.embed)\.weight")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Elements that are wide at a time.
_TILE = 1 << 23


@dataclass(frozen=True)
class DensePart:
    """One stored tensor of a dense weight in a recipe's format.

    Attributes:
        weight: our name of the weight that it is a part of.
        suffix: which part of the format.
        format: of the weight.
    """

    weight: str
    suffix: str
    format: WeightFormat


@dataclass(frozen=True)
class TableSource:
    """An Engram table that becomes a file of its own.

    Attributes:
        name: module path.
        layout: of its rows.
        num_rows: how many.
        rounded: in the recipe's format instead of the source's own.
    """

    name: str
    layout: RowLayout
    num_rows: int
    rounded: bool

    @property
    def weight(self) -> str:
        """Our name of the weight in the source."""
        return f"{self.name}.weight"


def split_tables(
    entries: Mapping[str, Entry], recipe: Recipe
) -> tuple[dict[str, Entry], list[TableSource]]:
    """Take the Engram tables out of a source's dense tensors."""
    rest = {name: entry for name, entry in entries.items() if table_of(name) is None}
    tables = []
    for name, (dtype, (rows, *width)) in entries.items():
        module = table_of(name)
        if module is None or name != f"{module}.weight":
            continue
        own = FP8_ROWS32 if dtype == "F8_E4M3" else None
        wanted = dense_format(recipe, name)
        rounded = wanted is not None and wanted != own
        held = wanted if rounded else own
        layout = RowLayout(dtype if held is None else held.name, *width)
        tables.append(TableSource(module, layout, rows, rounded))
    return rest, tables


def table_tiles(
    source: Source, table: TableSource, start: int, stop: int
) -> Iterator[torch.Tensor]:
    """Make rows [start, stop) of a table's file, some at a time: [n, row bytes] uint8."""
    step = max(_TILE // table.layout.width, 1)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if table.rounded:
            fmt = get_format(table.layout.format)
            parts = fmt.pack(_rows(source, table.weight, low, high))
        else:
            names = {part: f"{table.name}.{stored_name(part)}" for part in table.layout.fields}
            parts = {part: source.rows(name, low, high) for part, name in names.items()}
        yield table.layout.encode(parts)


def dense_format(recipe: Recipe, name: str) -> WeightFormat | None:
    """Format of a dense weight, None to leave it as its source has it."""
    found = recipe.format_of(name) if _REACHED.fullmatch(name) else None
    if found is None:
        return None
    fmt = get_format(found)
    if fmt.row_block != 1:
        raise ValueError(
            f"recipe {recipe.name!r}: wanted a format whose rows can be read alone for {name}, "
            f"got {found}; take fp8_rows32 or fp4"
        )
    return fmt


def packed_entries(
    entries: Mapping[str, Entry], recipe: Recipe
) -> tuple[dict[str, Entry], dict[str, DensePart]]:
    """Replace weights that a recipe reaches by the parts of their formats, in their place.

    Args:
        entries: {our name: (dtype, shape)} of the dense tensors as the source has them.
        recipe: which formats.

    Returns:
        The entries of the target, and what those that are new are made of.
    """
    found: dict[str, Entry] = {}
    parts: dict[str, DensePart] = {}
    for name, entry in entries.items():
        # A table that is in FP8 rows already has its scales beside it.
        weight = name.removesuffix("_scale_inv")
        fmt = dense_format(recipe, weight)
        if fmt is None or (fmt == FP8_ROWS32 and entries[weight][0] == "F8_E4M3"):
            found[name] = entry
        elif name == weight:
            for suffix, (dtype, shape) in fmt.parts(entry[1]).items():
                stored = name.removesuffix("weight") + stored_name(suffix)
                found[stored] = (_NAMES[dtype], shape)
                parts[stored] = DensePart(name, suffix, fmt)
    return found, parts


def scale_name(weight: str) -> str:
    """Name of the scales beside a weight that a release stores in FP8 rows."""
    return f"{weight}_scale_inv"


def packed_tiles(source: Source, parts: Sequence[DensePart]) -> Iterator[list[torch.Tensor]]:
    """Make parts of one weight, tile by tile of its rows in their order; each is read once."""
    weight, fmt = parts[0].weight, parts[0].format
    rows, width = source.dense[weight][1]
    step = max(_TILE // width, 1)
    for start in range(0, rows, step):
        made = fmt.pack(_rows(source, weight, start, min(start + step, rows)))
        yield [made[part.suffix] for part in parts]


def _rows(source: Source, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a dense weight, float32."""
    weight = source.rows(name, start, stop)
    if weight.dtype is not torch.float8_e4m3fn:
        return weight.float()
    scale = source.rows(scale_name(name), start, stop)
    return FP8_ROWS32.unpack({"": weight, "_scale": scale}, torch.float32)


def store_dense(model: nn.Module, recipe: Recipe) -> None:
    """Replace embedding, head and tables of a Dsv4 model by empty modules of a recipe's formats."""
    # A bare backbone has the same modules without the prefix that a head's model adds.
    prefix = "" if hasattr(model, "model") else "model."
    for path, module in list(model.named_modules()):
        fmt = dense_format(recipe, f"{prefix}{path}.weight")
        if fmt is None or (isinstance(module, PackedEmbedding) and module.format == fmt):
            continue
        parent, _, name = path.rpartition(".")
        with torch.device(next(module.parameters()).device):
            setattr(model.get_submodule(parent), name, _packed(module, fmt))


def _packed(module: nn.Module, fmt: WeightFormat) -> nn.Module:
    if isinstance(module, Float32Head):
        return PackedHead(module.in_features, module.out_features, fmt)
    if isinstance(module, PackedEmbedding):
        return PackedEmbedding(module.num_embeddings, module.embedding_dim, fmt, module.dtype)
    if isinstance(module, nn.Embedding):
        dtype = module.weight.dtype
        return PackedEmbedding(module.num_embeddings, module.embedding_dim, fmt, dtype)
    raise ValueError(f"wanted an embedding or the head to pack, got {type(module).__name__}")
