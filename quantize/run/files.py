# SPDX-License-Identifier: Apache-2.0
"""Files and folders as one text to ask about, and the cache of a text that was read before."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_dsv4 import Dsv4Cache, Dsv4Config

from .reuse import Kept

# A file whose first bytes hold a zero, or that is no UTF-8, is no text.
_SAMPLE = 8192
_MAX_FILE = 64 * 2**20


@dataclass(frozen=True)
class Gathered:
    """Text files in a row.

    Attributes:
        text: each with its path before it.
        sizes: bytes by path, in that order.
        left_out: paths that are no text, or hidden ones asked for by nobody.
    """

    text: str
    sizes: dict[str, int]
    left_out: list[str]


def gather(paths: Sequence[Path]) -> Gathered:
    """Read whole files, and of folders every text file that is not hidden, sorted by path.

    Raises:
        ValueError: a path that is not there, a named file that is no text, or nothing to read.
    """
    parts: list[str] = []
    sizes: dict[str, int] = {}
    left_out: list[str] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"--file: wanted a file or folder, found none at {path}")
        inside = _inside(path, left_out) if path.is_dir() else [(path.name, path)]
        for name, file in inside:
            text = _read_text(file)
            if text is None and not path.is_dir():
                raise ValueError(f"--file: wanted UTF-8 text, got other bytes in {path}")
            if text is None:
                left_out.append(name)
                continue
            sizes[name] = file.stat().st_size
            parts.append(f"--- {name} ---\n{text}" + ("" if text.endswith("\n") else "\n"))
    if not parts:
        named = ", ".join(map(str, paths))
        raise ValueError(f"--file: wanted at least one text file, found none in {named}")
    return Gathered("\n".join(parts) + "\n", sizes, left_out)


def _inside(folder: Path, left_out: list[str]) -> list[tuple[str, Path]]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(here, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                left_out.append(relative)
            elif path.is_file():
                found.append((relative, path))
    return sorted(found)


def _read_text(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_SAMPLE)
        if b"\0" in head:
            return None
        if size > _MAX_FILE:
            raise ValueError(f"--file: wanted at most {_MAX_FILE} bytes a file, {path} has {size}")
        raw = head + file.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def identity(directory: Path, dtype: object) -> str:
    """What tells one model from another: names, sizes and times of its files, and its dtype."""
    files = sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors"))
    facts = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    return hashlib.sha256(repr((facts, str(dtype))).encode()).hexdigest()


def cache_path(folder: Path, model: str, ids: Sequence[int]) -> Path:
    """Where the cache of these ids is kept, of the model with that identity."""
    name = hashlib.sha256(f"{model}:{list(ids)!r}".encode()).hexdigest()[:32]
    return folder / f"prompt-{name}.safetensors"


def load_cache(
    path: Path,
    config: Dsv4Config,
    ids: list[int],
    device: Sequence[torch.device] | torch.device | str,
    offload: str | Path | None = None,
) -> Kept | None:
    """The cache that was kept of these ids, its entries where `offload` says, or None.

    `device` as `Dsv4Cache.load` takes it.
    """
    if not path.is_file():
        return None
    cache = Dsv4Cache.load(path, config, torch.tensor([ids]), device, offload)
    return Kept(list(ids), cache)


def save_cache(path: Path, kept: Kept) -> None:
    """Keep it for the next time; nothing half-written is ever found there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept.cache.save(path, torch.tensor([kept.ids]))
