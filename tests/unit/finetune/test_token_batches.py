# SPDX-License-Identifier: Apache-2.0
"""Batches of a stream: which tokens, in which order, and what they see of each other."""

import numpy as np
import pytest
import torch

from finetune.data import IGNORED
from finetune.token_batches import TokenBatches


def test_every_epoch_reads_other_rows_of_the_same_text() -> None:
    batches = TokenBatches(np.arange(100, dtype=np.uint16), length=8, rows=2, count=12, seed=1)
    assert len(batches) == 12
    heads = [batches[i]["input_ids"][:, 0].tolist() for i in range(12)]
    first, second = ([h for pair in part for h in pair] for part in (heads[:6], heads[6:]))
    assert len(set(first)) == 12 and len(set(second)) == 12
    # Offsets of an epoch are one; the other's is another.
    assert len({h % 8 for h in first}) == len({h % 8 for h in second}) == 1
    assert set(first) != set(second)
    for i, row in enumerate(heads):
        whole = [list(range(head, head + 8)) for head in row]
        assert batches[i]["input_ids"].tolist() == whole


def test_a_seed_decides_the_order_and_a_longer_run_begins_alike() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    short, long, other = (
        TokenBatches(tokens, 8, 2, count, seed) for count, seed in ((5, 1), (20, 1), (5, 2))
    )
    assert short.starts.tolist() == long.starts[:5].tolist() != other.starts.tolist()


def test_places_restart_at_documents_and_nothing_predicts_a_beginning() -> None:
    tokens = np.array([5, 0, 6, 7, 0, 8, 9, 9] * 4, dtype=np.uint16)
    batch = TokenBatches(tokens, 8, 3, 1, seed=0, document_start=0)[0]
    for row in range(3):
        ids, labels, places = (
            batch[k][row].tolist() for k in ("input_ids", "labels", "position_ids")
        )
        place = -1
        for token, label, at in zip(ids, labels, places, strict=True):
            place = 0 if token == 0 else place + 1
            assert at == place
            assert label == (IGNORED if place == 0 else token)


def test_without_a_mark_rows_look_across_documents() -> None:
    batch = TokenBatches(np.array([0, 1] * 20, dtype=np.uint16), 8, 1, 1, 0)[0]
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_stream_that_is_too_short_is_refused() -> None:
    TokenBatches(np.arange(24, dtype=np.uint16), 8, 2, 1, 0)
    with pytest.raises(ValueError, match=r"wanted at least 24, .* got 23"):
        TokenBatches(np.arange(23, dtype=np.uint16), 8, 2, 1, 0)
