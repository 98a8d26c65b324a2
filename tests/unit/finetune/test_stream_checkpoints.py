# SPDX-License-Identifier: Apache-2.0
"""Which inputs of layers are kept, in how many bytes, and what is read again for the others."""

import re

import pytest
import torch

from finetune.stream_checkpoints import CheckpointPlan, StreamCheckpoints, plan_checkpoints


def test_all_inputs_are_kept_where_they_fit() -> None:
    for budget in (None, 43 * 5):
        plan = plan_checkpoints(43, 4, 1, budget)
        assert (plan.group, plan.nbytes, plan.extra_layer_reads) == (1, 43 * 5, 0)


def test_over_the_budget_groups_grow_until_they_fit() -> None:
    plan = plan_checkpoints(43, 4, 1, 43 * 5 - 1)
    # 21 groups of two and one of one: the inputs of 20, and both layers of the next.
    assert (plan.group, plan.nbytes, plan.extra_layer_reads) == (2, 20 * 4 + 2 * 5, 21)
    plan = plan_checkpoints(43, 4, 1, 60)
    assert (plan.group, plan.nbytes) == (4, 9 * 4 + 4 * 5)
    assert plan.extra_layer_reads == 10 * 3
    covered = [i for start in plan.starts() for i in plan.group_of(start)]
    assert covered == list(range(43))


def test_a_budget_that_no_group_fits_names_the_least() -> None:
    with pytest.raises(
        ValueError, match=r"at least (\d+) B .*groups of \d+ layers\), got 9 B"
    ) as no:
        plan_checkpoints(43, 4, 1, 9)
    least = int(re.search(r"least (\d+) B", str(no.value))[1])
    assert plan_checkpoints(43, 4, 1, least).nbytes == least
    with pytest.raises(ValueError, match="got"):
        plan_checkpoints(43, 4, 1, least - 1)


def test_one_group_reads_nothing_again() -> None:
    assert CheckpointPlan(3, 3, 0).extra_layer_reads == 0
    assert plan_checkpoints(1, 4, 1, 5).group == 1


def test_what_is_kept_comes_back_and_is_counted() -> None:
    kept = StreamCheckpoints()
    x = torch.randn(3, 4, requires_grad=True)
    kept.put("a", x)
    kept.put("b", torch.arange(2))
    assert kept.nbytes == kept.peak == 48 + 16
    assert torch.equal(kept.get("a"), x)
    assert not kept.get("a").requires_grad
    kept.drop("a")
    kept.drop("a")
    assert ("a" in kept, "b" in kept, kept.nbytes, kept.peak) == (False, True, 16, 64)


def test_a_narrower_dtype_halves_the_bytes_and_leaves_the_dtype() -> None:
    kept = StreamCheckpoints(torch.bfloat16)
    x = torch.randn(8)
    kept.put(0, x)
    assert kept.nbytes == 16
    assert kept.get(0).dtype is torch.float32
    assert torch.equal(kept.get(0), x.to(torch.bfloat16).float())
