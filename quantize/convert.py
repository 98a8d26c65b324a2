# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint: routed experts into packs, everything else as its source has it.

The source is streamed: one expert, or one dense tensor mapped from its file, is held at a time.
Every file is written beside its name and renamed when complete, and `config.json` comes last, so a
directory that loads is whole. The same call again continues after the last finished file.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.formats import get_format
from modeling_dsv4.safetensors_file import DTYPES, INDEX, write_file

from .checksums import Checksums, tensor_checksum, write_text
from .config import METHOD, Recipe
from .pack import PackLayout, PackWriter, RecordLayout, pack_file_name
from .sizes import format_size
from .source import ExpertsSource, Source

Progress = Callable[[str, int], None]
DEFAULT_SHARD = 5 * 10**9


@dataclass(frozen=True)
class Job:
    """All that a conversion will write, known from headers alone.

    Attributes:
        shards: {file: {our name: (dtype, shape)}} of dense tensors.
        packs: {file: (experts, layout)}.
        nbytes: tensor bytes of all of it.
    """

    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]]
    packs: dict[str, tuple[ExpertsSource, PackLayout]]

    @property
    def nbytes(self) -> int:
        dense = sum(_nbytes(entry) for shard in self.shards.values() for entry in shard.values())
        return dense + sum(layout.nbytes for _, layout in self.packs.values())


def plan_job(source: Source, recipe: Recipe, max_shard_size: int = DEFAULT_SHARD) -> Job:
    """Lay out the files of a conversion."""
    hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
    packs = {
        pack_file_name(name): (
            experts,
            PackLayout.build(name, experts.num_experts, hidden, width, recipe.format_of),
        )
        for name, experts in source.experts.items()
    }
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, entry in source.dense.items():
        if shards[-1] and size + _nbytes(entry) > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += _nbytes(entry)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return Job(dict(zip(names, shards, strict=True)), packs)


def convert(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    max_shard_size: int = DEFAULT_SHARD,
    progress: Progress | None = None,
) -> Path:
    """Convert a model directory; a second call with the same arguments continues the first.

    Args:
        source: our own layout, a release's, or either of transformers' own.
        target: new, empty, or an unfinished conversion of the same source.
        recipe: formats of the routed experts.
        max_shard_size: bytes of a file of dense tensors.
        progress: called with (file, bytes finished) as work goes on.

    Raises:
        ValueError: unusable source, a target that holds something else, a full disk.
    """
    target = Path(target)
    opened = Source(source)
    job = plan_job(opened, recipe, max_shard_size)
    sums = _open_target(opened, target, recipe, max_shard_size)
    _check_space(job, sums, target)
    progress = progress or (lambda file, done: None)
    for file, (experts, layout) in job.packs.items():
        if not sums.has(target / file):
            _write_pack(opened, experts, layout, target / file, partial(progress, file))
            sums.add(target / file)
            sums.save(target)
        else:
            progress(file, layout.nbytes)
    for file, entries in job.shards.items():
        if not sums.has(target / file):
            sums.add(target / file, _write_shard(opened, entries, target / file, progress))
            sums.save(target)
        else:
            progress(file, sum(map(_nbytes, entries.values())))
    _write_small_files(opened, target, recipe, job, sums)
    return target


def _open_target(source: Source, target: Path, recipe: Recipe, max_shard_size: int) -> Checksums:
    """Find what an earlier run finished, or refuse a directory that is not this conversion's."""
    job: dict[str, Any] = {
        "source": source.fingerprint,
        "recipe": recipe.to_dict(),
        "max_shard_size": max_shard_size,
    }
    if target.exists() and target.samefile(source.directory):
        raise ValueError(f"{target}: source and target are the same directory; name another target")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: wanted a directory to convert into, got a file")
    sums = Checksums.load(target) if target.exists() else None
    if sums is None and target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty; give a new directory, or remove what is there")
    if sums is not None and sums.job != job:
        raise ValueError(
            f"{target}: holds the conversion of another source or with other options; give a new "
            "directory, or repeat the options it was begun with"
        )
    if sums is None:
        target.mkdir(parents=True, exist_ok=True)
        sums = Checksums(job)
        sums.save(target)
    return sums


def _check_space(job: Job, sums: Checksums, target: Path) -> None:
    # A pack also has a header and checksums; a megabyte covers both for any model.
    done = sum(s.nbytes for name, s in sums.files.items() if sums.has(target / name))
    wanted = job.nbytes + 2**20 * len(job.packs) - done
    free = shutil.disk_usage(target).free
    if wanted > free:
        raise ValueError(
            f"{target}: wanted {format_size(wanted)} of free disk, got {format_size(free)}; "
            "free some, or convert to another disk"
        )


def _write_pack(
    source: Source,
    experts: ExpertsSource,
    layout: PackLayout,
    path: Path,
    progress: Callable[[int], None],
) -> None:
    with PackWriter(path, experts.name, layout) as writer:
        for e in range(experts.num_experts):
            writer.write(encode_expert(source, experts, e, layout.of(e)))
            progress(layout.of(e).nbytes)


def encode_expert(
    source: Source, experts: ExpertsSource, expert: int, layout: RecordLayout
) -> torch.Tensor:
    """One expert's record: bytes as they are where the format stays, else rounded anew."""
    parts = {}
    for projection, given in source.expert(experts.name, expert).items():
        wanted = get_format(layout.format(projection))
        held = experts.weight_format
        if held is not None and held.name == wanted.name:
            parts[projection] = given
        else:
            weight = given[""] if held is None else held.unpack(given, torch.float32)
            parts[projection] = wanted.pack(weight)
    return layout.encode(parts)


def _write_shard(
    source: Source,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    path: Path,
    progress: Progress,
) -> dict[str, int]:
    """Write one file of dense tensors; returns their checksums."""
    tensors: dict[str, int] = {}

    def get(name: str) -> torch.Tensor:
        tensor = source.get(name)
        tensors[name] = tensor_checksum(tensor)
        progress(path.name, tensor.nbytes)
        return tensor

    beside = path.with_name(path.name + ".tmp")
    try:
        write_file(beside, entries, get)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)
    return tensors


def _write_small_files(
    source: Source, target: Path, recipe: Recipe, job: Job, sums: Checksums
) -> None:
    weight_map = {name: file for file, entries in job.shards.items() for name in entries}
    total = sum(_nbytes(entry) for entries in job.shards.values() for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(target / INDEX, json.dumps(index, indent=1))
    for path in source.beside():
        beside = target / f"{path.name}.tmp"
        shutil.copyfile(path, beside)
        beside.replace(target / path.name)
        sums.add(target / path.name)
    config = quantized_config(source.config, recipe, job)
    write_text(target / "config.json", config.to_json_string(use_diff=False))
    for name in (INDEX, "config.json"):
        sums.add(target / name)
    sums.complete = True
    sums.save(target)
    _sync(target)


def quantized_config(config: Dsv4Config, recipe: Recipe, job: Job) -> Dsv4Config:
    """The source's configuration with how its weights are stored now."""
    config = copy.deepcopy(config)
    dense = dict(getattr(config, "quantization_config", None) or {})
    dense.pop("expert_dtype", None)
    found = dict.fromkeys(layout for _, pack in job.packs.values() for layout in pack.layouts)
    layouts = [layout.to_dict() for layout in found]
    config.quantization_config = {
        **dense,
        "quant_method": METHOD,
        "recipe": recipe.to_dict(),
        "packs": layouts,
    }
    return config


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = entry
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= n
    return size


def _sync(directory: Path) -> None:
    """Make the renames themselves lasting."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["Job", "convert", "encode_expert", "plan_job", "quantized_config"]
