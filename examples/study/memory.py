# SPDX-License-Identifier: Apache-2.0
"""Engram for comparison: present, absent, fed with meaningless ids, or traded for experts."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from modeling_dsv4 import Dsv4ForCausalLM


def shuffle_ids(model: Dsv4ForCausalLM, seed: int) -> None:
    """Control: rows are looked up under ids that say nothing of the text, drawn for each call.

    Tables, projections and gates stay, so that what they add in parameters and noise stays too.
    """
    hashing = model.model.engram_hash
    dice = torch.Generator().manual_seed(seed)
    rows = hashing.rows

    def drawn(layer: int, context: torch.Tensor) -> torch.Tensor:
        noise = torch.randint(0, int(hashing.token_map.max()) + 1, context.shape, generator=dice)
        return rows(layer, torch.where(context < 0, context, noise))

    hashing.rows = drawn


@contextmanager
def without_memory(model: Dsv4ForCausalLM) -> Iterator[None]:
    """Knock Engram out: nothing is added to the streams."""
    handles = [
        layer.engram.register_forward_hook(lambda _m, args, _o: args[0])
        for layer in model.model.layers
        if getattr(layer, "engram", None) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ngram_kinds(train: np.ndarray, rows: np.ndarray, frequent: int = 50) -> np.ndarray:
    """What kind of trigram each predicted token of held-out rows completes: [r, s - 1] of 0, 1, 2.

    0: never seen in training; 1: "entity-like", seen, but less than `frequent` times; 2: frequent.
    """
    count: Counter[tuple[int, int, int]] = Counter(
        zip(train[:-2].tolist(), train[1:-1].tolist(), train[2:].tolist(), strict=True)
    )
    kinds = np.zeros((rows.shape[0], rows.shape[1] - 1), dtype=np.int64)
    for r, row in enumerate(rows.tolist()):
        for i in range(2, len(row)):
            seen = count[row[i - 2], row[i - 1], row[i]]
            kinds[r, i - 1] = 0 if not seen else 1 + (seen >= frequent)
    return kinds


@torch.no_grad()
def token_losses(model: Dsv4ForCausalLM, rows: np.ndarray, batch: int = 8) -> np.ndarray:
    """Cross entropy of each predicted token of rows [r, s] in nats: [r, s - 1]."""
    model.eval()
    found = []
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        found.append(loss.numpy())
    return np.concatenate(found)
