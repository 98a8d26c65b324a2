# SPDX-License-Identifier: Apache-2.0
"""Which rows a memory adapter may write: the definition, word for word, and what is left out."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.memory_rows import (
    MemoryRows,
    choose_memory_rows,
    engram_identity,
    find_hashing,
)
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.engram import lookup_rows
from modeling_dsv4.engram_hash import EngramHash
from modeling_dsv4.segments import RowState, find_segments

MakeModel = Callable[..., PreTrainedModel]
BOS, EOS = 0, 1
CORPUS = [
    [BOS, 50, 51, 52, 53, EOS, 60, 61],
    [50, 51, 52, 54, 60, 61, 62],
    [BOS, 60, 61, 50, 51],
]
BACKGROUND = [[60, 61, 7, 60, 61], [BOS, 60, 61, 62]]


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("v4.1", engram_vocab_size=2000)


def _rows_read(hashing: EngramHash, ids: Sequence[int]) -> torch.Tensor:
    """What the model's own path reads: [layers, S, orders, heads]."""
    segments = find_segments((1, len(ids)), RowState.empty(1, torch.device("cpu")))
    rows = lookup_rows(hashing, torch.tensor([list(ids)]), None, segments, None)[:, 0]
    return rows.unflatten(-1, (-1, hashing.config.engram_n_heads))


def _grams(memory: MemoryRows) -> list[tuple[int, ...]]:
    return [tuple(i for i in gram if i >= 0) for gram in memory.grams.tolist()]


def _by_hand(corpus: list[list[int]], background: list[list[int]]) -> list[tuple[Any, ...]]:
    """N-grams by the definition, best first: (gram, c, b)."""

    def count(documents: list[list[int]]) -> Counter[tuple[int, ...]]:
        spans = (
            tuple(ids[at : at + n])
            for ids in documents
            for n in (2, 3, 4)
            for at in range(len(ids) - n + 1)
        )
        return Counter(gram for gram in spans if not {BOS, EOS} & set(gram))

    c, b = count(corpus), count(background)
    key = {gram: (-n / (1 + b[gram]), b[gram], -len(gram)) for gram, n in c.items()}
    return [(gram, c[gram], b[gram]) for gram in sorted(c, key=lambda gram: key[gram])]


def test_n_grams_are_ranked_as_defined(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = _by_hand(CORPUS, BACKGROUND)
    every = choose_memory_rows(model, tokenizer, CORPUS, BACKGROUND)
    uses = {g: tuple(u) for g, u in zip(_grams(every), every.uses.tolist(), strict=True)}
    # Some may share a row with an n-gram that holds a marker; nothing else is left out.
    assert len(expected) - 2 <= len(uses) <= len(expected)
    wanted = {gram: (c, b) for gram, c, b in expected}
    assert all(uses[gram] == wanted[gram] for gram in uses)
    rank = {gram: (-c / (1 + b), b, -len(gram)) for gram, c, b in expected}
    order = [rank[gram] for gram in _grams(every)]
    assert order == sorted(order)
    assert _grams(every)[0] == (50, 51)
    assert (60, 61) not in _grams(every)[: len(uses) // 2]
    best = choose_memory_rows(model, tokenizer, CORPUS, BACKGROUND, top=8)
    assert _grams(best) == _grams(every)[:4]
    assert best.report["kept"] == 4
    assert best.report["disturbed"] == 0
    assert 0 < every.report["disturbed"] <= 1


def test_without_a_background_frequency_alone_decides(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = choose_memory_rows(model, tokenizer, CORPUS)
    assert set(_grams(found)[:2]) == {(50, 51), (60, 61)}
    assert found.report["disturbed"] is None
    assert found.report["background_tokens"] == 0


def test_an_n_grams_rows_are_those_that_the_model_reads_at_its_last_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = choose_memory_rows(model, tokenizer, CORPUS, BACKGROUND)
    hashing = find_hashing(model)
    for number, gram in enumerate(_grams(found)):
        # Whatever stands before it.
        read = _rows_read(hashing, [9, 33, *gram])
        for layer, rows in enumerate(found.layers):
            own = rows.ids[rows.places[number].long()]
            assert torch.equal(own, read[layer, -1, len(gram) - 2])
    for rows in found.layers:
        assert torch.equal(rows.ids, rows.ids.unique())
        assert rows.ids.dtype is torch.int64
        assert set(rows.places.flatten().tolist()) == set(range(len(rows.ids)))


def test_no_row_of_a_marker_or_of_a_documents_start_is_chosen(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Tables so small that ordinary n-grams share rows with these.
    model = make_model("v4.1", engram_vocab_size=20)
    corpus = [torch.randint(5, 290, (30,)).tolist() for _ in range(3)]
    corpus = [[BOS, *ids, EOS] for ids in corpus]
    found = choose_memory_rows(model, tokenizer, corpus)
    hashing = find_hashing(model)
    every = sum(len(ids) - n - 1 for ids in corpus for n in (2, 3, 4))
    assert 0 < found.report["kept"] < every
    for ids in corpus:
        read = _rows_read(hashing, ids)
        for order in range(3):
            for at in range(len(ids)):
                inside = at >= order + 1
                window = ids[max(0, at - order - 1) : at + 1]
                if not inside or {BOS, EOS} & set(window):
                    for layer, rows in enumerate(found.layers):
                        assert not torch.isin(read[layer, at, order], rows.ids).any()


def test_spellings_of_one_compressed_token_are_one_n_gram(
    make_config: Callable[..., Dsv4Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"engram_vocab_size": 2000, "engram_compressed_vocab_size": 289}
    model = Dsv4ForCausalLM(make_config("v4.1", **sizes))
    same = torch.arange(290)
    same[60:] -= 1  # 59 and 60 are one
    model.set_engram_token_map(same)
    corpus = [[59, 70, 9], [60, 70, 10], [60, 70, 11]]
    best = choose_memory_rows(model, tokenizer, corpus, top=2)
    assert (_grams(best), best.uses.tolist()) == ([(60, 70)], [[3, 0]])
    every = choose_memory_rows(model, tokenizer, corpus, [[59, 70]])
    assert every.uses[_grams(every).index((60, 70))].tolist() == [3, 1]


def test_text_is_tokenized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the battery lasts nine years"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    by_text, by_ids = (choose_memory_rows(model, tokenizer, [x]) for x in (text, ids))
    assert torch.equal(by_text.grams, by_ids.grams)


def test_what_cannot_be_written_is_refused(
    model: PreTrainedModel, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="wanted a model with Engram layers"):
        choose_memory_rows(make_model("v4"), tokenizer, CORPUS)
    with pytest.raises(ValueError, match="wanted at least 2, one n-gram's rows, got 1"):
        choose_memory_rows(model, tokenizer, CORPUS, top=1)
    with pytest.raises(ValueError, match="got none to write"):
        choose_memory_rows(model, tokenizer, [[BOS, 7, EOS], []])
    with pytest.raises(ValueError, match=r"wanted token ids from 0 to 289, got 5 to 290"):
        choose_memory_rows(model, tokenizer, [[5, 290]])


def test_the_identity_covers_the_token_map_and_the_hashing(make_model: MakeModel) -> None:
    model = make_model("v4.1")
    first = engram_identity(find_hashing(model))
    assert engram_identity(find_hashing(make_model("v4.1", seed=1))) == first
    model.set_engram_token_map(torch.arange(290).flip(0))
    others = {engram_identity(find_hashing(model))}
    others.add(engram_identity(find_hashing(make_model("v4.1", engram_vocab_size=41))))
    others.add(engram_identity(find_hashing(make_model("v4.1", engram_pad_token_id=3))))
    assert first not in others
    assert len(others) == 3
