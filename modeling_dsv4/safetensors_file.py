# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read strictly, mapped or copied, and written whole or not at all.

A header is eight bytes of length, then JSON {name: {dtype, shape, data_offsets}}, then the tensors
without holes. Every departure is refused by name of the file, before a byte of it is used.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# The limit of the safetensors library itself.
_MAX_HEADER = 100_000_000
# Bytes of a tensor with gaps that are copied at a time.
_COPIED = 1 << 26
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (as safetensors writes it), shape, and bytes [start, end) of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read and check the header of one file; no tensor is touched.

    Raises:
        ValueError: truncated file, malformed JSON, unknown dtype, offsets that overlap, leave holes
            or do not match shapes.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _broken(path, f"a header of {length} bytes does not fit its {size} bytes")
        raw = file.read(length)
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, TensorInfo]:
    """Check a header's JSON `raw` of a file that has `size` bytes; raises as `read_header` does."""
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:
        raise _broken(path, f"its header is no JSON object ({error})") from None
    if not isinstance(entries, dict):
        raise _broken(path, "its header is no JSON object")
    entries.pop("__metadata__", None)
    start = 8 + len(raw)
    header = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    position = start
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise _broken(path, f"{name!r} starts at byte {info.start}, wanted {position}")
        position = info.end
    if position != size:
        raise _broken(path, f"its tensors end at byte {position}, the file at {size}")
    return header


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; the file is truncated or corrupted, fetch it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"the header's entry of {name!r} is malformed") from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise _broken(path, f"the header's entry of {name!r} has numbers that are no sizes")
    if dtype not in DTYPES:
        raise _broken(path, f"{name!r} has the unknown dtype {dtype!r}")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != wanted:
        raise _broken(path, f"{name!r} holds {end - start} bytes, its shape needs {wanted}")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def read_index(directory: str | Path, present: bool = True) -> dict[str, Path]:
    """Return {tensor name: file} of a checkpoint's directory.

    Names inside the index must be plain file names; the files may be symbolic links anywhere, as in
    the cache of the Hub.

    Args:
        directory: of the checkpoint.
        present: the files an index names have to be there.

    Raises:
        ValueError: no checkpoint, a malformed index, a name outside the directory, an absent shard.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return dict.fromkeys(read_header(directory / SINGLE), directory / SINGLE)
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory}: wanted {SINGLE} or {INDEX}, found neither")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(names.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{index}: wanted {{"weight_map": {{tensor: file}}}}') from None
    for shard in shards:
        _check_shard_name(index, shard)
    files = {shard: directory / shard for shard in shards}
    for shard, file in files.items():
        if present and not file.is_file():
            raise ValueError(f"{index} names {shard}, which is not there; fetch the missing shard")
    return {name: files[shard] for name, shard in names.items()}


def _check_shard_name(index: Path, shard: str) -> None:
    plain = shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
    if not plain or shard.startswith("."):
        raise ValueError(
            f"{index} names the file {shard!r}; wanted plain names of .safetensors files beside it"
        )


def join_headers(
    directory: Path, files: Mapping[str, Path], headers: Mapping[Path, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Return {tensor name: where it is} of all shards; ValueError where the index says otherwise.

    Args:
        directory: the checkpoint, for the message.
        files: {tensor name: file}, the index.
        headers: of every file.
    """
    absent = [name for name, path in files.items() if name not in headers[path]]
    listed = {(name, path) for name, path in files.items()}
    unlisted = [n for path, header in headers.items() for n in header if (n, path) not in listed]
    if absent or unlisted:
        raise ValueError(
            f"{directory}: index and shards disagree; {len(absent)} tensors are only in the index "
            f"{absent[:3]}, {len(unlisted)} only in the shards {unlisted[:3]}"
        )
    return {name: headers[path][name] for name, path in files.items()}


class Shards:
    """The tensors of one checkpoint directory: headers checked now, data read when asked for."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = read_index(directory)
        headers = {path: read_header(path) for path in dict.fromkeys(self.files.values())}
        self.info = join_headers(self.directory, self.files, headers)
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor mapped from its file: its bytes are read when they are first used."""
        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(name)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor's bytes into a contiguous one of the same shape, without a second copy."""
        info = self.info[name]
        if DTYPES[info.dtype].itemsize != out.element_size() or not out.is_contiguous():
            raise ValueError(f"{name}: cannot read {info.dtype} into {out.dtype}")
        view = memoryview(_as_bytes(out))
        with self.files[name].open("rb", buffering=0) as file:
            file.seek(info.start)
            position = 0
            while position < len(view):
                count = file.readinto(view[position:])
                if not count:
                    raise _broken(self.files[name], f"{name!r} ended after {position} bytes")
                position += count


def lay_out_file(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a file's first bytes, and {name: (start, end)} of its tensors in their order in it.

    Args:
        entries: {name: (safetensors dtype, shape)}.
        metadata: what else the header says.
    """
    # Wide types first, so that every tensor is aligned to its own element size.
    names = sorted(entries, key=lambda name: (-DTYPES[entries[name][0]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in names:
        dtype, shape = entries[name]
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    offsets = {name: header[name]["data_offsets"] for name in names}
    return raw, {name: (len(raw) + start, len(raw) + end) for name, (start, end) in offsets.items()}


def write_file(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    get: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, asking for its tensors one after the other.

    Args:
        path: the file; it is written in place, so give a temporary name and rename.
        entries: {name: (safetensors dtype, shape)}.
        get: name -> tensor of that dtype and shape.
        metadata: what else the header says.
    """
    raw, spans = lay_out_file(entries, metadata)
    with path.open("wb") as file:
        file.write(raw)
        for name in spans:
            for part in _tensor_bytes(name, get(name), entries[name]):
                file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _tensor_bytes(
    name: str, tensor: torch.Tensor, entry: tuple[str, tuple[int, ...]]
) -> Iterator[memoryview]:
    dtype, shape = entry
    if tensor.dtype is not DTYPES[dtype] or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: wanted {dtype} {shape} to write, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    tensor = tensor.detach()
    whole = tensor.is_contiguous() or not tensor.dim() or not tensor.numel()
    # A tensor with gaps may be mapped from a file larger than memory: never copied as a whole.
    row = 1 if whole else tensor.nbytes // tensor.shape[0]
    for part in (tensor,) if whole else tensor.split(max(_COPIED // max(row, 1), 1)):
        yield memoryview(_as_bytes(part.cpu().contiguous()))


def _as_bytes(tensor: torch.Tensor) -> Any:
    """View a contiguous tensor as a numpy array of bytes: numpy does not know every dtype."""
    return tensor.view(-1).view(torch.uint8).numpy()
