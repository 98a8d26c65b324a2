# SPDX-License-Identifier: Apache-2.0
"""Memory adapters in a training run: the rows come from its own data.

Only the chosen rows are parameters, [t, width] per table, so that every optimizer is a sparse one:
states are as large as what is written. Their rate and decay are `optimizers.MEMORY`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from .memory_rows import MemoryRows, choose_memory_rows
from .records import read_records

_log = logging.getLogger(__name__)


def read_background(path: str | Path) -> list[str]:
    """Ordinary text to rank against: a text file as one document, or the texts of a jsonl file.

    Raises:
        ValueError: no such file, nothing in it, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"memory_background: wanted a text or jsonl file, found none at {path}")
    if path.suffix in (".jsonl", ".json"):
        return [_text_of(record.content) for record in read_records(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"memory_background: wanted UTF-8 text in {path}, got {error}") from error
    if not text.strip():
        raise ValueError(f"memory_background: wanted text in {path}, got none")
    return [text]


def _text_of(content: dict) -> str:
    """The words of a record, without its format's markers."""
    if "messages" in content:
        return "\n".join(str(message.get("content") or "") for message in content["messages"])
    return "\n".join(
        str(content[key]) for key in ("prompt", "completion", "text") if key in content
    )


def rows_for_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    background: str | Path | None,
    top: int,
) -> MemoryRows:
    """Choose the rows that a run may write, and log what was chosen.

    Args:
        model: base model.
        tokenizer: its tokenizer.
        documents: the run's training documents as token ids.
        background: see `read_background`; None ranks by frequency alone.
        top: rows of each Engram layer.
    """
    texts = [] if background is None else read_background(background)
    if background is None:
        _log.warning(
            "memory: no background text, so n-grams are ranked by their frequency in the data "
            "alone, and everyday words may be written; give memory_background"
        )
    rows = choose_memory_rows(model, tokenizer, documents, texts, top=top)
    _log.info("memory: %s", rows.report)
    return rows
