# SPDX-License-Identifier: Apache-2.0
"""A run's data, from its file to encoded rows. No weight is needed for it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import RunConfig
from .data import DataReport, Examples
from .run_data import build_run_data


@dataclass(frozen=True)
class Prepared:
    """Encoded data of a run."""

    train: Examples
    held_out: Examples | None
    train_report: DataReport
    held_out_report: DataReport
    left_out: dict[str, Any] = field(default_factory=dict)


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, split and encode a run's data. No weight is needed for it."""
    if config.objective == "grpo":
        # It builds on this module.
        from .rewards import prepare_tasks

        return prepare_tasks(config, tokenizer)
    if config.objective != "sft":
        # Likewise.
        from .preference import prepare_preferences

        return prepare_preferences(config, tokenizer)
    data = build_run_data(config, tokenizer)
    pack_to = config.max_length if config.packing else None
    return Prepared(
        Examples(data.train, pack_to),
        Examples(data.held_out, pack_to) if data.held_out else None,
        data.train_report,
        data.held_out_report,
        {"skipped": data.skipped, "removed": data.removed},
    )


def check_vocabulary(data: Prepared, vocab_size: int) -> None:
    """Compare the data's tokens with the model's.

    Raises:
        ValueError: the tokenizer gives ids that the model does not have.
    """
    for rows in (data.train, data.held_out):
        largest = (
            max((max(i.input_ids) for row in rows.rows for i in row), default=0) if rows else 0
        )
        if largest >= vocab_size:
            raise ValueError(
                f"tokenizer: wanted ids below the model's {vocab_size}, got {largest}; this is "
                "another model's tokenizer"
            )


def fingerprint(config: RunConfig, data: Prepared) -> dict[str, str]:
    """Hashes of what a run learns from: its files' bytes, and the tokens that came of them.

    The latter also change with the tokenizer, the prompt format, the split and the packing.
    """
    encoded = hashlib.sha256()
    found = {"data_sha256": _hash_source(config.data)}
    if config.eval_data is not None:
        found["eval_data_sha256"] = _hash_source(config.eval_data)
    for rows in (data.train, data.held_out):
        for row in rows.rows if rows else ():
            encoded.update(repr([(one.input_ids, one.labels) for one in row]).encode())
        encoded.update(b"held out")
    return {**found, "examples_sha256": encoded.hexdigest()}


def _hash_source(path: str) -> str:
    """Hash of a file, or of all files in a directory, in the order of their names."""
    file, source = hashlib.sha256(), Path(path)
    paths = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    for one in paths:
        with one.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                file.update(chunk)
    return file.hexdigest()


def check_fingerprint(found: dict[str, str], earlier: dict[str, str]) -> None:
    """Compare a run's data with what it began with.

    Raises:
        ValueError: it changed; names both hashes.
    """
    words = {
        "data_sha256": "the data file changed",
        "eval_data_sha256": "the file of eval_data changed",
        "examples_sha256": "the same file is encoded otherwise (tokenizer or prompt format)",
    }
    for key, what in words.items():
        # Runs begun before held-out files were hashed have no such key.
        if key == "eval_data_sha256" and key not in earlier:
            continue
        if found.get(key) != earlier.get(key):
            raise ValueError(
                f"resume: {what}: wanted {key} {earlier.get(key)}, got {found.get(key)}; bring the "
                "earlier one back, or start anew in another directory"
            )
