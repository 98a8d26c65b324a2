# SPDX-License-Identifier: Apache-2.0
"""All that a conversion will write, known from headers alone; and in which order.

Files consist of items: a dense tensor, an expert's record, or a block of an Engram table's rows.
The order of work is that of the source's shards, so that each shard is read once and may go
afterwards. An item that lies in several shards is made when the last of them is there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modeling_dsv4.safetensors_file import DTYPES, lay_out_file

from .config import Recipe
from .dense import DensePart, TableSource, packed_entries, scale_name, split_tables
from .pack import PackLayout, pack_file_name, pack_header
from .source import Entry, ExpertsSource, Source
from .tables import blocks, table_file_name, table_header

DEFAULT_SHARD = 5 * 10**9


@dataclass(frozen=True)
class Item:
    """Bytes [start, start + nbytes) of a target file.

    Attributes:
        file: name of the file.
        key: our name of a dense tensor, or the number of an expert or a block of rows.
        start, nbytes: where it is written.
        needs: the source's shards that it is made of.
    """

    file: str
    key: str
    start: int
    nbytes: int
    needs: frozenset[str]


@dataclass(frozen=True)
class TargetFile:
    """One file of the target.

    Attributes:
        header: its first bytes.
        items: all that follows, without holes but for a pack's table of checksums at the end.
        pack: experts and layout if it is an expert pack.
        entries: {our name: (dtype, shape)} if it holds dense tensors.
        packed: what those are made of that are not as the source has them.
        table: what it is made of if it is an Engram table.
    """

    header: bytes
    items: tuple[Item, ...]
    pack: tuple[ExpertsSource, PackLayout] | None
    entries: dict[str, Entry]
    packed: Mapping[str, DensePart] = field(default_factory=dict)
    table: TableSource | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        table = 0 if self.pack is None else 8 * self.pack[1].num_experts
        return len(self.header) + sum(item.nbytes for item in self.items) + table


@dataclass(frozen=True)
class Job:
    """The files of a conversion by name."""

    files: dict[str, TargetFile]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def packs(self) -> dict[str, tuple[ExpertsSource, PackLayout]]:
        """The expert packs: {file: (experts, layout)}."""
        return {name: file.pack for name, file in self.files.items() if file.pack is not None}

    @property
    def shards(self) -> dict[str, dict[str, Entry]]:
        """The files of dense tensors: {file: {our name: (dtype, shape)}}."""
        return {name: file.entries for name, file in self.files.items() if file.entries}

    @property
    def tables(self) -> dict[str, TableSource]:
        """The Engram tables: {file: table}."""
        return {name: file.table for name, file in self.files.items() if file.table is not None}

    def steps(self, shards: list[str]) -> list[list[Item]]:
        """Items by the source's shard that completes them, in the order of `shards`."""
        place = {shard: i for i, shard in enumerate(shards)}
        steps: list[list[Item]] = [[] for _ in shards]
        for file in self.files.values():
            for item in file.items:
                steps[max((place[shard] for shard in item.needs), default=0)].append(item)
        return steps

    def units(self, items: Iterable[Item]) -> list[list[Item]]:
        """Items by what is made at once: the parts of one weight, so that it is read once."""
        units: dict[tuple[str, ...], list[Item]] = {}
        for item in items:
            part = self.files[item.file].packed.get(item.key)
            name = (item.file, item.key) if part is None else (part.weight,)
            units.setdefault(name, []).append(item)
        return list(units.values())


def plan_job(source: Source, recipe: Recipe, max_shard_size: int = DEFAULT_SHARD) -> Job:
    """Lay out the files of a conversion."""
    hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
    files = {}
    for name, experts in source.experts.items():
        layout = PackLayout.build(name, experts.num_experts, hidden, width, recipe.format_of)
        file = pack_file_name(name)
        files[file] = _pack(source, file, experts, layout)
    rest, tables = split_tables(source.dense, recipe)
    for table in tables:
        file = table_file_name(table.name)
        files[file] = _table(source, file, table)
    dense, packed = packed_entries(rest, recipe)
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in dense.items():
        if shards[-1] and size + entry_bytes(entry) > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry_bytes(entry)
    for i, entries in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, spans = lay_out_file(entries)
        items = [
            Item(file, name, start, end - start, _needs(source, name, packed.get(name)))
            for name, (start, end) in spans.items()
        ]
        made = {name: packed[name] for name in entries if name in packed}
        files[file] = TargetFile(header, tuple(items), None, entries, made)
    return Job(files)


def _needs(source: Source, name: str, part: DensePart | None) -> frozenset[str]:
    if part is None:
        return source.needs(name)
    return source.needs(part.weight) | source.needs(scale_name(part.weight))


def _pack(source: Source, file: str, experts: ExpertsSource, layout: PackLayout) -> TargetFile:
    header = pack_header(experts.name, layout)
    items = [
        Item(file, str(e), len(header) + layout.starts[e], layout.of(e).nbytes,
             source.needs(experts.name, e))
        for e in range(layout.num_experts)
    ]  # fmt: skip
    return TargetFile(header, tuple(items), (experts, layout), {})


def _table(source: Source, file: str, table: TableSource) -> TargetFile:
    header, row = table_header(table.name, table.layout, table.num_rows), table.layout.nbytes
    needs = source.needs(table.weight) | source.needs(scale_name(table.weight))
    items = [
        Item(file, str(number), len(header) + start * row, (stop - start) * row, needs)
        for number, (start, stop) in enumerate(blocks(table.num_rows))
    ]
    return TargetFile(header, tuple(items), None, {}, table=table)


def entry_bytes(entry: Entry) -> int:
    """Bytes of a tensor of a dtype and shape."""
    dtype, shape = entry
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= n
    return size


def last_uses(steps: Iterable[Iterable[Item]]) -> dict[str, int]:
    """The step behind which each of the source's shards is needed no longer."""
    last: dict[str, int] = {}
    for number, items in enumerate(steps):
        for item in items:
            last |= dict.fromkeys(item.needs, number)
    return last


def peak_disk(
    job: Job,
    shards: dict[str, int],
    fetched: bool,
    deleted: bool,
    frees: Mapping[str, int] | None = None,
) -> int:
    """Bytes of free disk that a conversion wants at most on the target's file system.

    Args:
        job: what is written.
        shards: {shard of the source: bytes}.
        fetched: shards come one by one, and are there from their step to their last use.
        deleted: shards are there, and go after their last use.
        frees: bytes that each gives back there by going; None is all of each.
    """
    frees = shards if frees is None else frees
    if not fetched and not deleted:
        return job.nbytes
    steps = job.steps(sorted(shards))
    last = last_uses(steps)
    used = peak = 0
    for number, (shard, items) in enumerate(zip(sorted(shards), steps, strict=True)):
        used += shards[shard] if fetched else 0
        used += sum(item.nbytes for item in items)
        peak = max(peak, used)
        used -= sum(frees[s] for s in shards if last.get(s, 0) == number)
    # Headers and tables of checksums are written with the files' ends.
    return peak + job.nbytes - sum(i.nbytes for f in job.files.values() for i in f.items)
