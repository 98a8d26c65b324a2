# SPDX-License-Identifier: Apache-2.0
"""Where a source's shards come from: files that stay, or that go once they are converted.

Headers are known before any shard is touched. Where shards may go, the headers are kept in the
target's `.source` until the conversion is complete, so that it can continue without them.
"""

import json
import os
import stat
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from modeling_dsv4.safetensors_file import INDEX, SINGLE, TensorInfo, read_header, read_index

from .checksums import write_text

STAGING = ".source"
_KEPT = "headers.json"
# Of each tensor, the bytes by which a shard is told from one of other weights.
_SAMPLE = 512
Header = dict[str, TensorInfo]


class Origin(Protocol):
    """A checkpoint's files.

    Attributes:
        name: what it is called in messages.
        directory: where config.json and the tokenizer are.
        headers: {shard: {tensor: place}} of all shards.
        sizes: {shard: bytes}.
        keeps: shards stay where they are.
        fetched: shards are on this disk only from their first use to their last.
    """

    name: str
    directory: Path
    headers: dict[str, Header]
    sizes: dict[str, int]
    keeps: bool
    fetched: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What the conversion says of its source, beside the fingerprint of its headers."""

    def prepare(self) -> None:
        """Hear that the conversion begins."""

    def fetch(self, shard: str) -> Path:
        """Return a shard's file, there in full."""

    def holds(self, shard: str) -> bool:
        """Whether a shard is on this disk."""

    def release(self, shard: str) -> None:
        """Hear that a shard is needed no longer."""


class LocalOrigin:
    """A directory.

    Args:
        directory: with config.json and shards.
        staging: directory in which an earlier run kept the headers of shards that may be gone.
        delete: remove shards that are released.

    Raises:
        ValueError: no directory, broken files, absent shards whose headers were not kept.
    """

    def __init__(
        self, directory: str | Path, staging: Path | None = None, delete: bool = False
    ) -> None:
        self.name, self.directory = str(directory), Path(directory)
        if not (self.directory / "config.json").is_file():
            raise ValueError(f"{directory}: wanted a directory with config.json, found none")
        kept = read_kept(staging) if staging is not None else None
        self.headers, self.sizes, self._gone = kept or ({}, {}, {})
        # Shards that are here speak for themselves: they may be another model's.
        paths = map(self._path, self.headers) if kept else read_index(self.directory).values()
        for path in dict.fromkeys(paths):
            if kept is None or path.is_file():
                self._gone.pop(path.name, None)
                self.headers[path.name] = read_header(path)
                self.sizes[path.name] = path.stat().st_size
        self.keeps = not delete
        self.fetched = False
        self._staging = staging

    @property
    def identity(self) -> dict[str, Any]:
        """What is in the shards, not where they are: a directory may be moved."""
        return {"config": _config_checksum(self.directory), "shards": self._samples}

    @cached_property
    def _samples(self) -> dict[str, int]:
        return {
            shard: self._gone[shard] if shard in self._gone else sample(self._path(shard), header)
            for shard, header in sorted(self.headers.items())
        }

    def prepare(self) -> None:
        """Keep the headers if shards are to go."""
        if self._staging is not None and not self.keeps:
            keep(self._staging, self.headers, self.sizes, self._samples)

    def fetch(self, shard: str) -> Path:
        """Return a shard's path; ValueError if it is absent or has another size than before."""
        path = self._path(shard)
        if not path.is_file():
            raise ValueError(f"{path}: this shard is missing and still needed; fetch it again")
        if path.stat().st_size != self.sizes[shard]:
            raise ValueError(
                f"{path}: wanted {self.sizes[shard]} bytes, got {path.stat().st_size}; the file is "
                "truncated or corrupted, fetch it again"
            )
        return path

    def holds(self, shard: str) -> bool:
        """Whether a shard is there."""
        return self._path(shard).is_file()

    def release(self, shard: str) -> None:
        """Delete a shard, if that was asked for."""
        if not self.keeps:
            self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: str) -> Path:
        return self.directory / shard


def freed(path: Path, device: int) -> int:
    """Bytes that a file system gets back when a name is removed.

    None of a link, of a file that has other names, or of one that lies elsewhere.

    Args:
        path: the name.
        device: number of the file system (`st_dev`).
    """
    if not path.is_file():
        return 0
    found = path.lstat()
    alone = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return found.st_size if alone and found.st_dev == device else 0


def remains(directory: Path) -> dict[str, Any]:
    """What `LocalOrigin.identity` was, as far as is left of it: shards that are gone are None."""
    names = {SINGLE}
    if (directory / INDEX).is_file():
        names = {path.name for path in read_index(directory, present=False).values()}
    paths = [directory / name for name in sorted(names)]
    shards = {p.name: sample(p, read_header(p)) if p.is_file() else None for p in paths}
    return {"config": _config_checksum(directory), "shards": shards}


def _config_checksum(directory: Path) -> int:
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def sample(path: Path, header: Header) -> int:
    """Checksum of some bytes in the middle of each tensor: other weights give another."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        for info in sorted(header.values(), key=lambda info: info.start):
            at = max(info.start, (info.start + info.end - _SAMPLE) // 2)
            size = min(_SAMPLE, info.end - info.start)
            crc = zlib.crc32(os.pread(file.fileno(), size, at), crc)
    return crc


def keep(
    staging: Path,
    headers: dict[str, Header],
    sizes: dict[str, int],
    samples: dict[str, int] | None = None,
) -> None:
    """Write headers and samples down for the time when their shards are gone."""
    data = {
        shard: {
            "size": sizes[shard],
            "sample": samples[shard] if samples else 0,
            "tensors": {n: [i.dtype, i.shape, i.start, i.end] for n, i in header.items()},
        }
        for shard, header in headers.items()
    }
    staging.mkdir(parents=True, exist_ok=True)
    write_text(staging / _KEPT, json.dumps(data))


def read_kept(
    staging: Path,
) -> tuple[dict[str, Header], dict[str, int], dict[str, int]] | None:
    """Read what `keep` wrote; None if it wrote nothing."""
    path = staging / _KEPT
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    headers = {
        shard: {
            name: TensorInfo(dtype, tuple(shape), start, end)
            for name, (dtype, shape, start, end) in entry["tensors"].items()
        }
        for shard, entry in data.items()
    }
    sizes = {shard: entry["size"] for shard, entry in data.items()}
    return headers, sizes, {shard: entry["sample"] for shard, entry in data.items()}
