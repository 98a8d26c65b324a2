# SPDX-License-Identifier: Apache-2.0
"""Settings of a run in transformers' words."""

import pytest

from finetune.arguments import warmup_steps
from finetune.config import RunConfig


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (33, 0), (34, 1), (100, 3)])
def test_a_run_too_short_for_a_step_of_warm_up_has_none(steps: int, expected: int) -> None:
    run = RunConfig(model="m", data="d", output="o", max_steps=steps)
    assert run.warmup_ratio == 0.03
    assert warmup_steps(run, epoch_steps=7) == expected


def test_warm_up_counts_the_steps_of_all_epochs() -> None:
    run = RunConfig(model="m", data="d", output="o", epochs=2.5, warmup_ratio=0.1)
    assert warmup_steps(run, epoch_steps=10) == 2
