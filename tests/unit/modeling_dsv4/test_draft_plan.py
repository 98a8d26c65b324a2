# SPDX-License-Identifier: Apache-2.0
"""When drafting pays: arithmetic of bytes, and what is learned from passes that were made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from modeling_dsv4.draft_plan import _LAYER, CostModel, DraftCounts, Plan, Weights

BACKBONE = Weights(dense=0.0, expert=1e7, layers=10, experts=256, active=6)
HEAD = Weights(dense=1e6, expert=0.0, layers=0, experts=1, active=0)


def _sure(*confidence: float) -> torch.Tensor:
    return torch.tensor([confidence])


def test_tokens_that_choose_for_themselves_meet_fewer_experts_than_they_choose() -> None:
    assert BACKBONE.met(1) == pytest.approx(60)
    # 1 - (1 - 6/256)^2 of 256, in ten layers.
    assert BACKBONE.met(2) == pytest.approx(10 * (12 - 36 / 256))
    assert BACKBONE.met(1e6) == pytest.approx(2560)
    assert BACKBONE.moved(1) == pytest.approx(10 * _LAYER + 60e7)


def test_weights_are_those_of_the_modules(tiny: Callable[..., Any]) -> None:
    model = tiny("v41")
    found = Weights.of([model.model])
    assert (found.layers, found.experts, found.active) == (7, 4, 2)
    assert found.expert == pytest.approx(4 * 3 * 32 * 16)
    tables = {"embed_tokens", "embed"}
    dense = [
        t.nbytes
        for name, t in (*model.model.named_parameters(), *model.model.named_buffers())
        if ".experts." not in name and not set(name.split(".")) & tables
    ]
    assert found.dense == sum(dense)


def test_sure_guesses_are_checked_and_unsure_ones_are_not() -> None:
    # Each token more costs about as much as the first: only a guess nearly sure is worth it.
    costs = CostModel(Weights(0.0, 1e9, 10, 256, 6), HEAD)
    assert costs.best(_sure(0.999, 0.999, 0.2), spent=1e5) == 2
    assert costs.best(_sure(0.3, 0.99), spent=1e5) == 0
    # Where all tokens read the same weights every guess with a chance is worth it.
    flat = CostModel(Weights(1e9, 0.0, 10, 256, 6), HEAD)
    assert flat.best(_sure(0.3, 0.3, 0.3), spent=1e5) == 3
    # But not if making them costs more than they bring.
    assert flat.best(_sure(0.3, 0.3, 0.3), spent=1e9) == 0


def test_what_a_store_fetched_decides_under_offload() -> None:
    costs, sure = CostModel(replace(BACKBONE, expert=1e6), HEAD), _sure(0.8, 0.8)
    assert costs.best(sure, spent=1e6) == 2
    for _ in range(4):
        costs.observe(1, 1e9)
    # Two and three tokens are thought to fetch in proportion to the experts that they meet.
    assert costs.fetched(2) == pytest.approx(1e9 * BACKBONE.met(2) / BACKBONE.met(1))
    assert costs.best(sure, spent=1e6) == 0
    for tokens in (2, 3):
        for _ in range(4):
            costs.observe(tokens, 1.05e9)
    # They were measured to fetch hardly more: experts overlap.
    assert costs.fetched(3) == pytest.approx(1.05e9)
    assert costs.best(sure, spent=1e6) == 2


def test_a_head_that_promises_too_much_is_believed_less_and_less() -> None:
    plan = Plan(3, CostModel(Weights(0.0, 1e9, 10, 256, 6), HEAD))
    sure, checked = _sure(0.99, 0.99, 0.99), 0
    for _ in range(40):
        if plan.ask(1):
            kept = plan.keep(sure)
            checked += kept > 0
            plan.observe(sure[:, :kept], torch.tensor([0]))
    assert 0 < checked < 20
    kept_word = Plan(3, CostModel(Weights(0.0, 1e9, 10, 256, 6), HEAD))
    for _ in range(40):
        assert kept_word.ask(1) == 3 and kept_word.keep(sure) == 3
        kept_word.observe(sure, torch.tensor([3]))


def test_pauses_grow_while_nothing_is_worth_checking() -> None:
    plan = Plan(2, CostModel(Weights(0.0, 1e9, 10, 256, 6), HEAD))
    asked = []
    for step in range(120):
        if plan.ask(1):
            asked.append(step)
            assert plan.keep(_sure(0.1, 0.1)) == 0
    assert asked == [*range(4), *range(12, 16), *range(32, 36), *range(68, 72)]


def test_a_sampling_pass_is_planned_from_the_past_and_not_from_its_draws() -> None:
    # Two guesses cost next to nothing, and each brings what it brought before.
    costs = CostModel(Weights(1e9, 2e6, 10, 256, 6), HEAD)
    plan = Plan(3, costs, samples=True)
    assert plan.ask(1) == 3
    for sure in (_sure(0.0, 0.0, 0.0), _sure(1.0, 1.0, 1.0)):
        assert plan.keep(sure) == 3
    for _ in range(60):
        k = plan.ask(2)
        plan.observe(torch.full((2, k), 0.9), torch.tensor([1, 1]).clamp(max=k))
    # The first place was always right and the second never.
    assert plan.ask(2) == 1


def test_a_head_that_samples_wrong_is_tried_seldom_and_taken_back_when_it_is_right() -> None:
    plan = Plan(2, CostModel(Weights(0.0, 1e8, 10, 256, 6), HEAD), samples=True)

    def run(steps: int, right: int) -> int:
        tried = 0
        for _ in range(steps):
            k = plan.ask(1)
            tried += k > 0
            plan.observe(torch.full((1, k), 0.5), torch.tensor([min(right, k)]))
        return tried

    assert 0 < run(400, right=0) < 40
    run(600, right=2)
    assert run(100, right=2) == 100


def test_a_number_is_checked_whatever_it_costs() -> None:
    plan = Plan(3, None)
    assert plan.ask(1) == 3 and plan.keep(_sure(0.01, 0.01, 0.01)) == 3


def test_guesses_behind_a_wrong_one_say_nothing() -> None:
    plan = Plan(3, None)
    plan.observe(torch.tensor([[0.5, 0.25, 0.125]]), torch.tensor([1]))
    assert (plan._promised, plan._kept) == (0.75, 1.0)


def test_counts_add_up_by_place() -> None:
    counts, other = DraftCounts(passes=1), DraftCounts(passes=2, fetched=10.0)
    counts.add(made=2, right=1, tokens=2)
    other.add(made=3, right=3, tokens=4)
    counts.merge(other)
    assert (counts.made, counts.right) == ([2, 2, 1], [2, 1, 1])
    stats = counts.stats()
    assert stats["draft_tokens_per_pass"] == 2 and stats["draft_bytes_per_token"] == 10 / 6
    assert stats["draft_made_3"] == 1 and stats["draft_right_2"] == 1
