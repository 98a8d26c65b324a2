# SPDX-License-Identifier: Apache-2.0
"""Losses that count label tokens, not rows or batches."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data import IGNORED, Examples, PackingCollator, PaddingCollator, pad_token
from .ranks import deal, sum_ranks


@torch.no_grad()
def sum_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Sum of the loss over the label tokens of some batches, and their number."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if count:
            total += float(model(**batch, use_cache=False).loss) * count
            tokens += count
    model.train(training)
    return total, tokens


def held_out_loss(model: nn.Module, rows: Examples, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss per label token of some rows, a row at a time."""
    collate = PackingCollator() if rows.packed else PaddingCollator(pad_token(tokenizer))
    return mean_loss(model, (collate([rows[i]]) for i in deal(range(len(rows)))))


def mean_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean loss per label token of the batches of all processes together."""
    found = torch.tensor(sum_loss(model, batches), dtype=torch.float64)
    total, tokens = sum_ranks(found).tolist()
    return total / max(tokens, 1)
