# SPDX-License-Identifier: Apache-2.0
"""Range tests: curves are read rightly, and the model is put back."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.config import RunConfig
from finetune.data import Examples, encode_records
from finetune.lr_find import draw, judge, range_test, smooth, table
from finetune.optimizers import make_optimizer, make_rules
from finetune.prepare import Prepared
from finetune.records import Record
from finetune.trainer import make_trainer

RATES = [10 ** (-6 + i / 8) for i in range(49)]


def _curve(rate: float) -> float:
    """Falls by a logistic around 1e-3 and rises from 1e-1 on."""
    return 3 - 2 / (1 + math.exp(-3 * math.log10(rate / 1e-3))) + 3 * (rate / 0.3) ** 2


def test_the_suggestion_lies_where_the_loss_falls() -> None:
    found = judge(RATES, [_curve(rate) for rate in RATES])
    assert found.steepest is not None
    assert found.lowest is not None
    assert 5e-4 < found.steepest < 1e-2
    assert found.steepest < found.lowest < 0.5
    assert found.suggestion == min(found.steepest, found.lowest / 10)


# What batches of four short rows gave, at ten rates a decade: noise before a fall, then divergence.
NOISY = [
    *(5.694, 5.388, 5.332, 5.730, 5.648, 5.990, 6.017, 5.602, 5.758, 5.786, 5.706, 5.587, 5.803),
    *(5.650, 5.755, 5.672, 5.779, 5.671, 5.767, 5.636, 5.731, 5.606, 5.706, 5.623, 5.728, 5.639),
    *(5.711, 5.735, 5.597, 5.691, 5.645, 5.575, 5.452, 5.437, 5.362, 5.282, 5.150, 5.020, 5.064),
    *(4.964, 4.877, 4.905, 4.965, 5.391, 5.804, 5.956, 7.374, 9.954, 12.684),
]


def test_noise_at_the_start_is_no_fall() -> None:
    rates = [10 ** (-6 + i / 10) for i in range(61)]
    found = judge(rates, NOISY)
    assert found.suggestion is not None
    assert 7e-4 < found.suggestion < 5e-3
    assert found.suggestion == min(found.steepest, found.lowest / 10)
    assert found.rates == rates[: len(NOISY)]
    # The same noise without a fall behind it.
    found = judge(rates, NOISY[:31])
    assert (found.suggestion, found.reason[:13]) == (None, "no clear fall")
    assert "larger batches" in found.reason


def test_the_edges_of_the_range_are_no_suggestion() -> None:
    from_the_start = judge(RATES[28:], [_curve(rate) for rate in RATES[28:]])
    assert from_the_start.suggestion is None
    assert "begin lower" in from_the_start.reason
    to_the_end = judge(RATES[:22], [_curve(rate) for rate in RATES[:22]])
    assert to_the_end.suggestion is None
    assert "end higher" in to_the_end.reason


@pytest.mark.parametrize("losses", [[2.0] * 20, [2.0 + i / 10 for i in range(20)], [2.0], []])
def test_a_curve_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    assert judge(RATES[: len(losses)], losses).suggestion is None


def test_the_smoothed_loss_is_a_weighted_mean_from_the_first_step_on() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 2.0])[1] == pytest.approx((0.8 * 1 + 2) / 1.8)


@pytest.mark.parametrize(("worst", "seen"), [(math.inf, 10), (math.nan, 10), (40.0, 11)])
def test_a_test_ends_where_the_loss_has_left(worst: float, seen: int) -> None:
    class Scripted:
        """A trainer whose loss falls, and then does not."""

        model = torch.nn.Linear(2, 2)
        calls = 0

        def learn_alone(self, batch: dict) -> float:
            self.calls += 1
            self.model.weight.grad = torch.ones(2, 2)
            return 3 - self.calls / 10 if self.calls <= 10 else worst

    trainer = Scripted()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    before = trainer.model.weight.detach().clone()
    found = range_test(trainer, itertools.repeat({}), optimizer, RATES)
    assert len(found.losses) == len(found.rates) == seen
    assert found.suggestion is not None
    assert torch.equal(trainer.model.weight, before)


def test_a_test_steps_through_the_rates_and_puts_the_model_back(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    records = [Record(i, "text", {"text": f"meter {i} lasts {i} years"}) for i in range(4)]
    examples, report = encode_records(records, tokenizer, 64)
    data = Prepared(Examples(examples), None, report, report)
    config = RunConfig("m", "d", str(tmp_path), report_to="none", batch_size=2)
    model = attach_adapters(make_model(), r=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer(model, config, data, tokenizer)
    optimizer = make_optimizer("adamw", model, 1.0, 0.0, make_rules({}, 4.0))
    batches = itertools.cycle(
        [trainer.data_collator([data.train[i], data.train[i + 1]]) for i in (0, 2)]
    )
    rates = [10 ** (-5 + i / 4) for i in range(29)]
    found = range_test(trainer, batches, optimizer, rates)
    assert found.suggestion is not None
    assert 1e-4 < found.suggestion < 1e-1
    assert {g["lr"] for g in optimizer.param_groups} == {rates[-1], 4 * rates[-1]}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    lines = table(found)
    assert len(lines) <= 13
    assert lines[1].split()[0] == "1.00e-05"
    pytest.importorskip("matplotlib")
    draw(found, tmp_path)
    assert {p.name for p in tmp_path.glob("lr_find.*")} == {"lr_find.svg", "lr_find.png"}
