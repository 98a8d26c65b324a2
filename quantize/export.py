# SPDX-License-Identifier: Apache-2.0
"""A converted model back in the release's layout, one expert at a time and without rounding."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.official_export import official_config
from modeling_dsv4.safetensors_file import DTYPES, INDEX, Shards, TensorInfo, write_file
from modeling_dsv4.storage import stored_name
from modeling_dsv4.weight_map import Piece, pieces

from .checksums import write_text
from .config import METHOD, Recipe
from .job import DEFAULT_SHARD, entry_bytes
from .pack import PackFile, pack_file_name
from .source import small_files
from .tables import TableFile, table_file_name, table_of

Progress = Callable[[str, int], None]
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Converted:
    """A converted directory, read one tensor or one expert at a time.

    Args:
        directory: what `convert` wrote.

    Raises:
        ValueError: no converted directory, or broken files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise ValueError(f"{directory}: wanted a converted directory, found no config.json")
        self.config = Dsv4Config.from_pretrained(self.directory)
        stored = getattr(self.config, "quantization_config", None) or {}
        if stored.get("quant_method") != METHOD:
            raise ValueError(
                f"{directory}: wanted what dsv4-quantize convert wrote, got "
                f"{stored.get('quant_method') or 'a plain model'}"
            )
        self.recipe = Recipe.from_dict(stored["recipe"])
        self._shards = Shards(self.directory)
        self._packs: dict[str, PackFile] = {}
        self._record: tuple[str, int, torch.Tensor] | None = None

    def dense(self, piece: Piece) -> torch.Tensor:
        """A tensor that is in no pack, mapped from its file; ValueError if a recipe changed it."""
        table = self._table(piece.ours)
        info = self._shards.info.get(piece.ours) if table is None else table[0]
        plain = info is not None and {info.dtype, piece.dtype} <= _FLOATS
        if info is None or info.shape != piece.shape or not (info.dtype == piece.dtype or plain):
            raise ValueError(
                f"{piece.ours}: wanted {piece.dtype} {list(piece.shape)} as in a release, got "
                f"{'nothing' if info is None else f'{info.dtype} {list(info.shape)}'}; what a "
                "recipe changed does not come back, convert by fp4"
            )
        return self._shards.get(piece.ours) if table is None else table[1]

    def _table(self, name: str) -> tuple[TensorInfo, torch.Tensor] | None:
        """A part of an Engram table that is a file of its own, mapped; None for other tensors."""
        module = table_of(name)
        if module is None or module not in self.config.quantization_config.get("engram_tables", {}):
            return None
        opened = TableFile.open(self.directory / table_file_name(module))
        parts = {f"{module}.{stored_name(part)}": part for part in opened.layout.fields}
        if name not in parts:
            return None
        tensor = opened.part(parts[name])
        return TensorInfo(_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes), tensor

    def pack(self, module: str) -> PackFile:
        """The pack of an experts module, opened once."""
        if module not in self._packs:
            self._packs[module] = PackFile.open(self.directory / pack_file_name(module))
        return self._packs[module]

    def expert(self, module: str, expert: int) -> dict[str, dict[str, torch.Tensor]]:
        """Read one expert's record, checked: {projection: {part: tensor}}; the last one is kept."""
        pack = self.pack(module)
        if self._record is None or self._record[:2] != (module, expert):
            record = pack.read_record(expert)
            pack.check_record(expert, record.numpy().data, pack.checksums()[expert])
            self._record = module, expert, record
        return pack.layout.of(expert).decode(self._record[2])

    def formats(self) -> set[str]:
        """Names of the formats that the experts are in."""
        modules = {p.ours.rpartition(".")[0] for p in self.pieces() if p.expert is not None}
        layouts = (layout for module in modules for layout in self.pack(module).layout.layouts)
        return {name for layout in layouts for _, name in layout.formats}

    def pieces(self) -> list[Piece]:
        """The release's tensors, if the experts were in FP4."""
        return list(pieces(self.release_config("fp4")))

    def release_config(self, experts: str) -> Dsv4Config:
        """The configuration as of a release whose experts are in the format `experts`."""
        config = copy.deepcopy(self.config)
        stored = dict(config.quantization_config)
        for key in ("recipe", "packs", "calibrated", "engram_tables"):
            stored.pop(key, None)
        stored["quant_method"] = "dsv4_release"
        # Releases with FP8 experts do not say so.
        block = stored.get("weight_block_size")
        if block is None or experts != f"fp8_block{block[0]}":
            stored["expert_dtype"] = experts
        config.quantization_config = stored
        return config


def export_official(
    directory: str | Path,
    output: str | Path,
    max_shard_size: int = DEFAULT_SHARD,
    progress: Progress | None = None,
) -> Path:
    """Write a converted model in the release's layout: names, dtypes, shapes and bytes.

    Args:
        directory: what `convert` wrote, with experts as a release has them: `fp4`, or FP8 blocks.
        output: new directory.
        max_shard_size: bytes of a file.
        progress: called with (file, bytes finished).

    Raises:
        ValueError: experts in a format that no release has, a damaged record, an output that is
            not empty.
    """
    model, output = Converted(directory), Path(output)
    found = model.formats()
    block = model.config.quantization_config.get("weight_block_size")
    known = {"fp4", *([f"fp8_block{block[0]}"] if block else [])}
    if len(found) > 1 or not found <= known:
        raise ValueError(
            f"{directory}: wanted experts in one format of a release ({' or '.join(sorted(known))})"
            f", got {sorted(found)}; what was rounded does not come back, convert by fp4"
        )
    config = model.release_config(*found)
    settings = official_config(config)
    wanted = {piece.official: piece for piece in pieces(config)}
    beside = _prepare(output, {path.name for path in small_files(model.directory)})
    index: dict[str, str] = {}
    shards = _fill_shards(wanted, max_shard_size)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = {name: (wanted[name].dtype, wanted[name].shape) for name in names}

        def get(name: str, file: str = file) -> torch.Tensor:
            tensor = _official_tensor(model, wanted[name])
            if progress is not None:
                progress(file, tensor.nbytes)
            return tensor

        write_file(beside / file, entries, get)
        index |= dict.fromkeys(names, file)
    for path in small_files(model.directory):
        shutil.copyfile(path, beside / path.name)
    total = sum(entry_bytes((p.dtype, p.shape)) for p in wanted.values())
    text = {"metadata": {"total_size": total}, "weight_map": index}
    write_text(beside / INDEX, json.dumps(text, indent=2))
    write_text(beside / "config.json", json.dumps(settings, indent=2))
    # Takes the place of an empty directory as well.
    beside.replace(output)
    return output


def _prepare(output: Path, small: set[str]) -> Path:
    """Make the directory beside `output` that gets its name in the end, without leftovers."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: wanted a new or empty directory, got something else")
    beside = output.absolute().with_name(f"{output.absolute().name}.partial")
    found = {path.name for path in beside.iterdir()} if beside.is_dir() else set()
    own = small | {name + end for name in (INDEX, "config.json") for end in ("", ".tmp")}
    if strange := sorted(name for name in found - own if not _SHARD.fullmatch(name)):
        raise ValueError(
            f"{beside}: wanted what an export that was stopped left, got {strange[0]} in it; "
            "remove it, or give another OUT"
        )
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def _fill_shards(wanted: dict[str, Piece], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, piece in wanted.items():
        nbytes = entry_bytes((piece.dtype, piece.shape))
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _official_tensor(model: Converted, piece: Piece) -> torch.Tensor:
    """A tensor as the release stores it."""
    if piece.expert is None:
        tensor = model.dense(piece)
    else:
        module, _, part = piece.ours.rpartition(".")
        projection = "gate_up_proj" if part.startswith("gate_up_proj") else "down_proj"
        tensor = model.expert(module, piece.expert)[projection][part.removeprefix(projection)]
        if projection == "gate_up_proj":
            tensor = tensor[piece.part]
    dtype = DTYPES[piece.dtype]
    if piece.dtype == "I8":
        return tensor.view(torch.int8)
    if tensor.dtype is dtype:
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(converted.to(tensor.dtype), tensor):
        raise ValueError(
            f"{piece.ours}: is {tensor.dtype} here and {dtype} in a release, and does not fit "
            "without rounding; export a conversion of a release"
        )
    return converted
