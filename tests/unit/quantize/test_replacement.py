# SPDX-License-Identifier: Apache-2.0
"""Each policy lists its residents in the order that its name promises."""

import random

import pytest

from quantize.replacement import REPLACEMENTS, AdmittedLru, Lfu, Lru, Replacement, make_replacement


def enter(policy: Replacement, *experts: int) -> None:
    for e in experts:
        policy.add((0, e))
        policy.use((0, e))


def order(policy: Replacement) -> list[int]:
    return [e for _, e in policy.order()]


def test_lru_goes_by_the_last_use() -> None:
    policy = Lru()
    enter(policy, 1, 2, 3)
    policy.use((0, 1))
    assert order(policy) == [2, 3, 1]


def test_lfu_goes_by_uses_and_remembers_those_of_who_left() -> None:
    policy = Lfu()
    enter(policy, 1, 2, 3)
    policy.use((0, 1))
    assert order(policy) == [2, 3, 1]
    policy.remove((0, 1))
    enter(policy, 4, 1)
    assert order(policy) == [2, 3, 4, 1]


def test_lfu_forgets_old_uses_by_half() -> None:
    policy = Lfu(period=8)
    enter(policy, 1)
    for _ in range(4):
        policy.use((0, 1))
    enter(policy, 2)
    for _ in range(2):
        policy.use((0, 2))
    # Five uses are two now, three are one: of the next two, both go to the younger.
    policy.use((0, 2))
    policy.use((0, 2))
    assert order(policy) == [1, 2]


def test_a_newcomer_is_admitted_once_it_is_used_more_than_who_would_leave() -> None:
    policy = AdmittedLru()
    enter(policy, 1)
    policy.use((0, 1))
    enter(policy, 2)
    assert order(policy) == [2, 1]
    policy.remove((0, 2))
    enter(policy, 2)
    assert order(policy) == [2, 1]
    policy.remove((0, 2))
    enter(policy, 2)
    assert order(policy) == [1, 2]


@pytest.mark.parametrize("name", sorted(REPLACEMENTS))
def test_every_policy_lists_exactly_its_residents(name: str) -> None:
    policy, inside, draw = make_replacement(name), set(), random.Random(0)
    for _ in range(3000):
        key = (draw.randrange(3), draw.randrange(12))
        if key not in inside:
            policy.add(key)
            inside.add(key)
            if draw.random() < 0.1:
                policy.cool(key)
                assert next(policy.order()) == key
                continue
        policy.use(key)
        while len(inside) > 9:
            victim = next(policy.order())
            policy.remove(victim)
            inside.remove(victim)
        found = list(policy.order())
        assert len(found) == len(inside)
        assert set(found) == inside


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="replacement: wanted one of"):
        make_replacement("fifo")
