# SPDX-License-Identifier: Apache-2.0
"""What an auditor asks of a run: data, base, adapter, settings, machine, versions, times.

Files of data are hashed before a run learns from them, the rest is collected where it ends; all of
it is kept in `facts.json`. Nothing is asked of a network, and no name of
a user or a host is kept.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .deltas import CONFIG, IDENTITY_KEY, file_sha256
from .files import write_json

FACTS_FILE = "facts.json"
_PACKAGES = ("dsv4", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
_BINS = 24
# Parts of an adapter's directory that others may have to check.
_ADAPTER = ("adapter_model.safetensors", CONFIG)
# Hashed whole; of larger bases the identity has to do.
_HASHED_BASE = 1 << 30


def collect_facts(
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    argv: Sequence[str] | None = None,
    lengths: Sequence[int] = (),
    sources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Facts of a run whose adapter is in `directory`.

    Args:
        directory: with the adapter's files.
        config: the run's settings.
        argv: the command; None is this process's.
        lengths: tokens of each document, for a histogram.
        sources: what `hash_sources` said before the run; None is what it says now.
    """
    directory = Path(directory)
    file = directory / CONFIG
    # A run that trained the weights themselves has no adapter.
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mapping = told.get("auto_mapping") or {}
    return {
        "command": command_line(sys.argv if argv is None else argv),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **(hash_sources(config) if sources is None else sources),
        "lengths": histogram(lengths),
        "base": _base_facts(Path(str(config["model"])), mapping.get(IDENTITY_KEY)),
        "adapter": [
            _file_facts(directory / name)
            for name in (_ADAPTER if told else sorted(p.name for p in directory.glob("model*")))
        ],
        "versions": versions(),
        "machine": machine(),
    }


def write_facts(directory: str | Path, facts: Mapping[str, Any]) -> None:
    """Keep facts beside the adapter."""
    write_json(Path(directory, FACTS_FILE), facts)


def command_line(argv: Sequence[str]) -> str:
    """A command as it could be typed again, the program by its name."""
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def hash_sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names, sizes and hashes of the files that a run learns from, and of those that it holds out.

    Args:
        config: the run's settings.
    """
    keys = ("data", "eval_data") if config.get("eval_data") else ("data",)
    return {key: [_file_facts(Path(p)) for p in data_paths(config.get(key))] for key in keys}


def data_paths(data: Any) -> list[str]:
    """Files of a setting that names files or directories."""
    paths = [Path(p) for p in (data if isinstance(data, list | tuple) else [data]) if p]
    return [
        str(file)
        for path in paths
        for file in (sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path])
    ]


def document_lengths(rows: Iterable[Iterable[Any]]) -> list[int]:
    """Tokens of each document of some rows."""
    return [len(document.input_ids) for row in rows for document in row]


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, memory and devices."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return found


def histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(upper end, documents) of bins of equal width; nothing for no documents."""
    if not lengths:
        return []
    step = max(-(-max(lengths) // _BINS), 1)
    counts = [0] * (-(-max(lengths) // step))
    for length in lengths:
        counts[(max(length, 1) - 1) // step] += 1
    return [((i + 1) * step, count) for i, count in enumerate(counts)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _file_facts(path: Path) -> dict[str, Any]:
    """Name, size and hash of a file; its absence, if it is not there any more."""
    if not path.is_file():
        return {"name": path.name, "bytes": None, "sha256": None}
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _base_facts(model: Path, identity: str | None) -> dict[str, Any]:
    """A base by its identity, its configuration's hash, and those of its weights if small."""
    found: dict[str, Any] = {"path": str(model), "identity": identity, "files": []}
    if not model.is_dir():
        return found
    weights = sorted(model.glob("*.safetensors"))
    small = sum(path.stat().st_size for path in weights) <= _HASHED_BASE
    for path in [model / "config.json", *weights]:
        hashed = small or path.suffix == ".json"
        size = path.stat().st_size if path.is_file() else None
        found["files"].append(
            _file_facts(path) if hashed else {"name": path.name, "bytes": size, "sha256": None}
        )
    return found
