# SPDX-License-Identifier: Apache-2.0
"""However a text is cut, one answer: random chunks, token by token, and among exact ties."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, ops, trace

EXACT = {"atol": 1e-10, "rtol": 0}
LENGTH = 190
KINDS = ["v4", "v41"]
Make = Callable[..., Any]
Chosen = dict[str, list[set[int]]]


def _cut(seed: int) -> list[int]:
    """Sizes that sum to LENGTH; the first one is the sequence everybody trips over."""
    if seed == 0:
        return [1, 1, 7, 1, 130, LENGTH - 140]
    dice, sizes = random.Random(seed), []
    while sum(sizes) < LENGTH:
        size = dice.choice([1, 1, 2, 3, 7, 8, 9, 16, 31, 64, 71, 72])
        sizes.append(min(size, LENGTH - sum(sizes)))
    return sizes


def _sets(found: dict[str, torch.Tensor]) -> Chosen:
    chosen: Chosen = {}
    for name, x in found.items():
        if name.endswith(("indexer.ids", "indexer.candidates")):
            chosen[name] = [{int(i) for i in ids if i >= 0} for row in x for ids in row]
    return chosen


@torch.no_grad()
def _feed(model: Any, ids: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, list[Chosen]]:
    """Logits of the whole text, and what the tokens of each chunk chose."""
    cache, logits, chosen = Dsv4Cache(model.config), [], []
    for part in ids.split(sizes, dim=1):
        found = trace(model, input_ids=part, past_key_values=cache)
        logits.append(found["logits"])
        chosen.append(_sets(found))
    return torch.cat(logits, 1), chosen


def _compare(model: Any, ids: torch.Tensor, sizes: list[int], full: dict[str, Any]) -> None:
    logits, chosen = _feed(model, ids, sizes)
    torch.testing.assert_close(logits, full["logits"], **EXACT)
    at, whole = 0, _sets(full)
    for size, some in zip(sizes, chosen, strict=True):
        for name, sets in some.items():
            # Early chunks see so few entries that there is nothing to choose.
            assert sets == whole[name][at : at + size], (name, at)
        at += size


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Make) -> Any:
    return tiny(request.param, torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_give_the_logits_and_choices_of_one_pass(model: Any, seed: int) -> None:
    ids = torch.randint(3, 64, (1, LENGTH))
    _compare(model, ids, _cut(seed), trace(model, input_ids=ids))


def test_token_by_token_gives_the_logits_and_choices_of_one_pass(model: Any) -> None:
    ids = torch.randint(3, 64, (1, 50))
    _compare(model, ids, [1] * 50, trace(model, input_ids=ids))


# --- ties ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def tied(request: pytest.FixtureRequest, tiny: Make) -> Any:
    """One indexer head: half of all scores are rectified to exactly 0, before any weight."""
    return tiny(request.param, torch.float64, index_n_heads=1, index_topk=6)


def test_exact_ties_are_broken_alike_in_chunks_and_in_longer_texts(
    tied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided: list[torch.Tensor] = []
    choose = ops.top_k_ascending

    def watched(scores: torch.Tensor, k: int) -> torch.Tensor:
        ids = choose(scores, k)
        least = scores.gather(-1, ids).amin(-1, keepdim=True)
        several = (scores == least).sum(-1) > (scores.gather(-1, ids) == least).sum(-1)
        undecided.append(several & (least[..., 0] == 0))
        return ids

    ids = torch.randint(3, 64, (1, LENGTH))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "top_k_ascending", watched)
        full = trace(tied, input_ids=ids)
    share = torch.cat([x.flatten() for x in undecided]).double().mean()
    assert share > 0.2, "the test wants queries whose last place is contested at exactly 0"
    for seed in (0, 3):
        _compare(tied, ids, _cut(seed), full)
    whole = _sets(full)
    for length in (40, 101, 150):
        found = trace(tied, input_ids=ids[:, :length])
        torch.testing.assert_close(found["logits"], full["logits"][:, :length], **EXACT)
        for name, sets in _sets(found).items():
            assert sets == whole[name][:length], name
