# SPDX-License-Identifier: Apache-2.0
"""A run's data, from its file to encoded rows. No weight is needed for it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .config import RunConfig
from .data import DataReport, Examples, encode_records
from .records import read_records, split_records


@dataclass(frozen=True)
class Prepared:
    """Encoded data of a run."""

    train: Examples
    held_out: Examples | None
    train_report: DataReport
    held_out_report: DataReport


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, split and encode a run's data. No weight is needed for it."""
    if config.objective != "sft":
        # It builds on this module.
        from .preference import prepare_preferences

        return prepare_preferences(config, tokenizer)
    train, held = split_records(read_records(config.data), config.eval_fraction, config.seed)
    pack_to = config.max_length if config.packing else None
    some, train_report = encode_records(train, tokenizer, config.max_length, config.loss_on)
    others, held_report = encode_records(held, tokenizer, config.max_length, config.loss_on)
    return Prepared(
        Examples(some, pack_to),
        Examples(others, pack_to) if others else None,
        train_report,
        held_report,
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
    """Hashes of what a run learns from: the file's bytes, and the tokens that came of them.

    The latter also change with the tokenizer, the prompt format, the split and the packing.
    """
    file, encoded = hashlib.sha256(), hashlib.sha256()
    source = Path(config.data)
    paths = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    for path in paths:
        with path.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                file.update(chunk)
    for rows in (data.train, data.held_out):
        for row in rows.rows if rows else ():
            encoded.update(repr([(one.input_ids, one.labels) for one in row]).encode())
        encoded.update(b"held out")
    return {"data_sha256": file.hexdigest(), "examples_sha256": encoded.hexdigest()}


def check_fingerprint(found: dict[str, str], earlier: dict[str, str]) -> None:
    """Compare a run's data with what it began with.

    Raises:
        ValueError: it changed; names both hashes.
    """
    words = {
        "data_sha256": "the data file changed",
        "examples_sha256": "the same file is encoded otherwise (tokenizer or prompt format)",
    }
    for key, what in words.items():
        if found[key] != earlier.get(key):
            raise ValueError(
                f"resume: {what}: wanted {key} {earlier.get(key)}, got {found[key]}; bring the "
                "earlier one back, or start anew in another directory"
            )
