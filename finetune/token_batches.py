# SPDX-License-Identifier: Apache-2.0
"""Batches of a stream of tokens: documents end to end, cut every so many tokens.

Every epoch starts at another offset and goes in another order. With `document_start` no token sees
another document: positions restart at it, which is what the model tells documents by, and nothing
before it is asked to predict it. Every place of a row holds a token.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from .data import IGNORED


class TokenBatches(Dataset[dict[str, torch.Tensor]]):
    """Batches in the order in which a run reads them; the same seed gives the same ones.

    Args:
        tokens: [n] ids.
        length: tokens of a row.
        rows: of a batch; an epoch ends with its last whole batch.
        count: batches of the run.
        seed: of offsets and orders.
        document_start: id that begins every document; None lets rows look across documents.

    Raises:
        ValueError: no ids in one axis, a stream shorter than a batch and the offset of an epoch,
            or a `document_start` that never comes.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        rows: int,
        count: int,
        seed: int,
        document_start: int | None = None,
    ) -> None:
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens: wanted [n] ids, got {tokens.dtype} {list(tokens.shape)}")
        if document_start is not None and not (tokens == document_start).any():
            raise ValueError(
                f"document_start: wanted an id of the stream, got {document_start}, which never "
                "comes; None lets rows look across documents"
            )
        if len(tokens) < length * (rows + 1):
            raise ValueError(
                f"tokens: wanted at least {length * (rows + 1):,}, a batch and the offset of an "
                f"epoch, got {len(tokens):,}; take shorter or fewer rows"
            )
        self.tokens, self.length, self.rows = tokens, length, rows
        self.document_start = document_start
        self.starts = self._starts(count, np.random.default_rng(seed))

    def _starts(self, count: int, dice: np.random.Generator) -> np.ndarray:
        """Where the rows of each batch begin in the stream: [count, rows]."""
        found: list[np.ndarray] = []
        while sum(map(len, found)) < count:
            offset = int(dice.integers(self.length))
            fit = (len(self.tokens) - offset) // self.length
            order = dice.permutation(fit)[: fit // self.rows * self.rows]
            found.append(offset + self.length * order.reshape(-1, self.rows))
        return np.concatenate(found)[:count]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """[rows, length] `input_ids`, `labels`, `position_ids` where documents are kept apart."""
        rows = [self.tokens[at : at + self.length] for at in self.starts[number]]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self.document_start is None:
            return {"input_ids": ids, "labels": ids}
        place = torch.arange(self.length).expand_as(ids)
        own = place - torch.where(ids == self.document_start, place, 0).cummax(1).values
        labels = ids.masked_fill(own == 0, IGNORED)
        return {"input_ids": ids, "labels": labels, "position_ids": own}
