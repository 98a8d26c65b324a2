# SPDX-License-Identifier: Apache-2.0
"""Splitting: every counted token once, none twice, no piece too long."""

import random

import pytest

from finetune.long_documents import Document, split_document


def _random_document(rng: random.Random) -> Document:
    """Ids are places, so that a piece tells where each token came from."""
    size = rng.randint(2, 80)
    opening = rng.randint(1, 6)
    borders = sorted(rng.sample(range(opening + 1, max(size, opening + 9)), 3))
    counts = [False, *(rng.random() < 0.6 for _ in range(size - 1))]
    return Document(list(range(size)), counts, opening, [b for b in borders if b < size])


def test_every_counted_token_is_learned_once_whatever_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(500):
        document = _random_document(rng)
        limit = rng.randint(document.opening + 2, 60)
        pieces = split_document(document, limit)
        assert all(2 <= len(ids) <= limit for ids, _ in pieces if len(document.ids) > 1)
        # A piece's first token has nothing before it, and is never learned.
        learned = [
            i for ids, counts in pieces for i, c in zip(ids[1:], counts[1:], strict=True) if c
        ]
        assert learned == [i for i in document.ids if document.counts[i]]


def test_a_learned_token_stands_behind_its_neighbour() -> None:
    """Its context is the document's own, or the opening where an exchange begins."""
    rng = random.Random(1)
    for _ in range(200):
        document = _random_document(rng)
        for ids, counts in split_document(document, document.opening + 5):
            for before, i, counted in zip(ids, ids[1:], counts[1:], strict=False):
                if counted and before != i - 1:
                    assert before == document.opening - 1
                    assert i in document.borders


def test_a_text_becomes_windows_that_share_a_token() -> None:
    pieces = split_document(Document(list(range(10)), [False] + [True] * 9), 4)
    assert pieces == [
        ([0, 1, 2, 3], [False, True, True, True]),
        ([3, 4, 5, 6], [False, True, True, True]),
        ([6, 7, 8, 9], [False, True, True, True]),
    ]


def test_a_chat_is_cut_where_exchanges_begin_and_keeps_its_opening() -> None:
    counts = [False, False, *([False, True, True] * 3)]
    pieces = split_document(Document(list(range(11)), counts, 2, [5, 8]), 8)
    assert [ids for ids, _ in pieces] == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 8, 9, 10]]
    assert pieces[1][1] == [False, False, False, True, True]


def test_an_exchange_that_does_not_fit_becomes_windows() -> None:
    counts = [False, *[True] * 11]
    pieces = split_document(Document(list(range(12)), counts, 1, [9]), 5)
    assert [ids for ids, _ in pieces] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 9, 10, 11]]


@pytest.mark.parametrize("limit", [1, 2])
def test_tiny_limits_end(limit: int) -> None:
    pieces = split_document(Document(list(range(5)), [False] + [True] * 4), limit)
    assert all(len(ids) <= limit for ids, _ in pieces)


def test_what_fits_is_left_whole_and_what_counts_nothing_is_left_out() -> None:
    document = Document([0, 1, 2], [False, False, True])
    assert split_document(document, 3) == [([0, 1, 2], [False, False, True])]
    silent = Document(list(range(9)), [*[False] * 8, True])
    assert [ids for ids, _ in split_document(silent, 4)] == [[6, 7, 8]]
