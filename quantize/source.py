# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in any layout, read one tensor or one expert at a time under our names."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_dsv4.checkpoint import fit_config, layout_of
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.engram_hash import DEAD, build_token_map, check_token_map
from modeling_dsv4.formats import WeightFormat, fp8_block_format, get_format
from modeling_dsv4.safetensors_file import DTYPES, SINGLE, TensorInfo, join_headers, read_index
from modeling_dsv4.weight_map import (
    TOKEN_MAP,
    fused_to_ours,
    hybrid_to_official,
    our_inventory,
    pieces,
    release_storage,
)

from .direct import Direct
from .origin import LocalOrigin, Origin

Entry = tuple[str, tuple[int, ...]]
_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})


@dataclass(frozen=True)
class Slice:
    """Bytes [start, end) of a shard, as a matrix of a dtype and shape."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @classmethod
    def of(cls, shard: str, info: TensorInfo, expert: int | None, halves: int = 1) -> "Slice":
        """Cut expert `expert` [E, ...] out of a stacked tensor, or take the whole of one.

        `halves` cuts the rows once more: [2F, D] becomes [2, F, D].
        """
        shape, start, end = info.shape, info.start, info.end
        if expert is not None:
            size = (end - start) // shape[0]
            start, end, shape = start + expert * size, start + (expert + 1) * size, shape[1:]
        if halves > 1:
            shape = (halves, shape[0] // halves, *shape[1:])
        return cls(shard, info.dtype, shape, start, end)


@dataclass(frozen=True)
class ExpertsSource:
    """Routed experts of one module.

    Attributes:
        name: module path, such as model.layers.3.mlp.experts.
        num_experts: how many.
        weight_format: how the source stores them, None if plain.
    """

    name: str
    num_experts: int
    weight_format: WeightFormat | None


class Source:
    """Headers of a checkpoint, checked against its config.json; data is read when asked for.

    Args:
        source: a directory in our own layout, a release's, or either of transformers' own; or
            where else its files come from.

    Raises:
        ValueError: broken files; missing, extra or misshapen tensors; an already converted model.
    """

    def __init__(self, source: str | Path | Origin) -> None:
        self.origin = LocalOrigin(source) if isinstance(source, str | Path) else source
        self.directory = self.origin.directory
        self._direct = Direct()
        self.config = Dsv4Config.from_pretrained(self.directory)
        self._check_method(getattr(self.config, "quantization_config", None) or {})
        self._files = self._find_files()
        headers = {Path(shard): header for shard, header in self.origin.headers.items()}
        self._info = join_headers(self.directory, self._files, headers)
        layout = layout_of(self.origin.name, list(self._info))
        rename = {"transformers_hybrid": hybrid_to_official, "transformers_fused": fused_to_ours}
        self._stored = {rename.get(layout, str)(name): name for name in self._info}
        fit_config(self.config, self._stored)
        self.dense: dict[str, Entry] = {}
        self.experts: dict[str, ExpertsSource] = {}
        self._dense_names: dict[str, str] = {}
        self._slices: dict[tuple[str, int], dict[str, list[Slice]]] = {}
        self._kinds: dict[str, str] = {}
        self._find(layout)

    @property
    def fingerprint(self) -> int:
        """Changes when names, shapes, files or configuration do; the origin tells contents."""
        headers = sorted((n, i.dtype, i.shape, i.start) for n, i in self._info.items())
        sizes = sorted(self.origin.sizes.items())
        return zlib.crc32(json.dumps([headers, sizes, self.config.to_dict()], default=str).encode())

    @property
    def shards(self) -> list[str]:
        """Names of the shards in their order."""
        return sorted(self.origin.headers)

    def get(self, name: str) -> torch.Tensor:
        """Read a dense tensor under our name."""
        if name == TOKEN_MAP and name not in self._stored:
            return self._token_map()
        stored = self._dense_names[name]
        tensor = self.read(Slice.of(self._files[stored].name, self._info[stored], None))
        return tensor.float() if self._kinds.get(name) == "f32" else tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) of a dense tensor under our name, as they are stored."""
        stored = self._dense_names[name]
        info = self._info[stored]
        row = (info.end - info.start) // info.shape[0]
        shape = (stop - start, *info.shape[1:])
        at = info.start + start * row
        place = Slice(
            self._files[stored].name, info.dtype, shape, at, at + len(range(start, stop)) * row
        )
        return self.read(place)

    def raw(self, name: str) -> Slice | None:
        """Where a dense tensor's bytes are; None if they are made or changed in reading."""
        stored = self._dense_names.get(name)
        if stored is None or self._info[stored].dtype != self.dense[name][0]:
            return None
        return Slice.of(self._files[stored].name, self._info[stored], None)

    def expert(self, name: str, expert: int) -> dict[str, dict[str, torch.Tensor]]:
        """Read one expert: {"gate_up_proj" | "down_proj": {part: tensor}}.

        gate_up is [2, F, ...], down [D, ...]; a plain weight is its own part "".
        """
        found: dict[str, dict[str, torch.Tensor]] = {"gate_up_proj": {}, "down_proj": {}}
        for (projection, part), slices in self.expert_slices(name, expert).items():
            read = [self.read(s) for s in slices]
            found[projection][part] = torch.stack(read) if len(read) > 1 else read[0]
        return found

    def expert_slices(self, name: str, expert: int) -> dict[tuple[str, str], list[Slice]]:
        """Where one expert's bytes are: {(projection, part): matrices, w1 before w3}."""
        found = {}
        for part, slices in self._slices[name, expert].items():
            projection = "gate_up_proj" if part.startswith("gate_up_proj") else "down_proj"
            found[projection, part.removeprefix(projection)] = slices
        return found

    def needs(self, name: str, expert: int | None = None) -> frozenset[str]:
        """Shards that hold a dense tensor, or an expert of the experts module `name`."""
        if expert is not None:
            slices = self._slices[name, expert].values()
            return frozenset(s.shard for parts in slices for s in parts)
        stored = self._dense_names.get(name)
        return frozenset() if stored is None else frozenset({self._files[stored].name})

    def read(self, place: Slice) -> torch.Tensor:
        """Read bytes into new memory."""
        out = torch.empty(place.shape, dtype=DTYPES[place.dtype])
        self.read_into(place, out.flatten().view(torch.uint8).numpy().data)
        return out

    def read_bytes(self, shard: str, start: int, nbytes: int) -> torch.Tensor:
        """Read bytes of a shard into new memory: [nbytes] uint8."""
        return self.read(Slice(shard, "U8", (nbytes,), start, start + nbytes))

    def read_into(self, place: Slice, view: memoryview, skip: int = 0) -> None:
        """Fill a view with a slice's bytes from `skip` on; OSError if the file ends before them."""
        self._direct.read(self.origin.fetch(place.shard), view, place.start + skip)

    def _check_method(self, stored: Mapping[str, object]) -> None:
        """Refuse weights that another quantization has rounded already."""
        if stored and stored.get("quant_method") != "dsv4_release":
            raise ValueError(
                f"{self.origin.name}: wanted a plain model or a release, got one quantized by "
                f"{stored.get('quant_method')!r}; convert the model it was made from"
            )

    def _find(self, layout: str) -> None:
        """Find out where each dense tensor and each expert is."""
        if layout in ("official", "transformers_hybrid"):
            self._find_pieces()
        else:
            self._find_stacked()

    def _find_files(self) -> dict[str, Path]:
        """{tensor: shard}; the index counts even if shards that it names are gone by now."""
        headers = self.origin.headers
        if set(headers) == {SINGLE}:
            return dict.fromkeys(headers[SINGLE], Path(SINGLE))
        index = read_index(self.directory, present=False)
        return {name: Path(path.name) for name, path in index.items()}

    def _find_pieces(self) -> None:
        """One tensor per expert: the official layout, and the names of transformers' default."""
        wanted = {piece.official: piece for piece in pieces(self.config)}
        self._check({name: (p.dtype, p.shape) for name, p in wanted.items()})
        weight_format = self._experts_format()
        for official, piece in wanted.items():
            stored = self._stored[official]
            info = self._info[stored]
            if piece.expert is None:
                self._dense_names[piece.ours] = stored
                self._add_dense(piece.ours, piece.kind, info)
                continue
            module, _, part = piece.ours.rpartition(".")
            slices = self._slices.setdefault((module, piece.expert), {})
            # w1 stands before w3 in the table of names.
            slices.setdefault(part, []).append(Slice.of(self._files[stored].name, info, None))
            self.experts[module] = ExpertsSource(module, piece.expert + 1, weight_format)
        if self.config.engram_layer_ids:
            self.dense[TOKEN_MAP] = ("I64", (self.config.vocab_size,))

    def _find_stacked(self) -> None:
        """Experts stacked under our names: our own layout, and that of transformers' modules."""
        wanted = our_inventory(self.config)
        if TOKEN_MAP not in self._stored:
            wanted.pop(TOKEN_MAP, None)
        self._check(wanted)
        kinds = {piece.ours: piece.kind for piece in pieces(self.config)}
        self._dense_names = dict(self._stored)
        weight_format = self._experts_format()
        for name in wanted:
            info = self._info[self._stored[name]]
            module, _, part = name.rpartition(".")
            if not module.endswith(".mlp.experts"):
                self._add_dense(name, kinds.get(name, "i64"), info)
                continue
            self.experts[module] = ExpertsSource(module, info.shape[0], weight_format)
            shard = self._files[self._stored[name]].name
            halves = 2 if part.startswith("gate_up_proj") else 1
            for e in range(info.shape[0]):
                cut = Slice.of(shard, info, e, halves)
                self._slices.setdefault((module, e), {})[part] = [cut]
        if self.config.engram_layer_ids:
            self.dense[TOKEN_MAP] = ("I64", (self.config.vocab_size,))

    def _add_dense(self, name: str, kind: str, info: TensorInfo) -> None:
        self._kinds[name] = kind
        dtype = "F32" if kind == "f32" else info.dtype
        self.dense[name] = (dtype, info.shape)

    def _experts_format(self) -> WeightFormat | None:
        storage = release_storage(self.config)
        if storage.experts == "fp8":
            assert storage.block is not None
            return fp8_block_format(storage.block)
        return get_format(storage.experts) if storage.experts else None

    def _check(self, wanted: Mapping[str, Entry]) -> None:
        info = {name: self._info[stored] for name, stored in self._stored.items()}
        problems = {
            "missing": [n for n in wanted if n not in info],
            "not expected": [n for n in info if n not in wanted],
            "of another shape or dtype": [
                n for n, entry in wanted.items() if n in info and not _fits(info[n], entry)
            ],
        }
        told = [f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in problems.items() if n]
        if told:
            raise ValueError(
                f"{self.origin.name}: its tensors do not fit its config.json: {'; '.join(told)}"
            )

    def _token_map(self) -> torch.Tensor:
        """Build the Engram token map from the tokenizer beside the weights, unset without one."""
        if not (self.directory / "tokenizer.json").is_file():
            return torch.full((self.config.vocab_size,), DEAD, dtype=torch.int64)
        token_map = build_token_map(self.directory, self.config.vocab_size)
        check_token_map(token_map, self.config)
        return token_map


def small_files(directory: Path) -> Iterator[Path]:
    """Yield the files that belong to a model and are no weights: tokenizer, templates."""
    for path in sorted(directory.iterdir()):
        own = re.fullmatch(r"config\.json|checksums\.json|.*\.index\.json", path.name)
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.is_file() and not own:
            yield path


def small_bytes(directory: Path) -> int:
    """Bytes of a model's small files; a tokenizer alone may have many megabytes."""
    return sum(path.stat().st_size for path in small_files(directory))


def _fits(info: TensorInfo, entry: Entry) -> bool:
    dtype, shape = entry
    # A plain tensor may have been saved in another float type; a code or a scale may not.
    same = info.dtype == dtype or {info.dtype, dtype} <= _FLOATS
    return same and info.shape == tuple(shape)
