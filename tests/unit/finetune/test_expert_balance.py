# SPDX-License-Identifier: Apache-2.0
"""Biases follow the load of experts, and only the load that training makes."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from finetune.expert_balance import ExpertBalance

MakeModel = Callable[..., PreTrainedModel]


def test_an_idle_expert_gains_and_a_busy_one_loses(make_model: MakeModel) -> None:
    balance = ExpertBalance(make_model("v4.1"))
    bias = balance.routers[0].e_score_correction_bias
    experts = len(bias)
    for counts in balance.counts:
        counts.fill_(4)
    balance.counts[0][0], balance.counts[0][1] = 0, 8
    before = bias.clone()
    assert balance.step(0.1) == 2
    assert [round(float(x), 6) for x in bias - before] == [0.1, -0.1, *[0.0] * (experts - 2)]
    assert balance.last[0].tolist() == [0, 8, *[4] * (experts - 2)]
    assert not any(counts.any() for counts in balance.counts)


def test_what_learns_is_counted_and_what_is_measured_is_not(make_model: MakeModel) -> None:
    model = make_model("v4.1")
    balance, ids = ExpertBalance(model), torch.arange(12)[None]
    with torch.no_grad():
        model(input_ids=ids)
    assert not any(counts.any() for counts in balance.counts)
    model(input_ids=ids)
    chosen = 12 * model.config.num_experts_per_tok
    assert [int(counts.sum()) for counts in balance.counts] == [chosen] * len(balance.routers)
    balance.remove()
    model(input_ids=ids)
    assert int(balance.counts[0].sum()) == chosen


def test_routers_that_go_by_token_id_are_left_out(make_model: MakeModel) -> None:
    model = make_model("v4")
    hashed = model.config.num_hash_layers
    assert hashed
    assert len(ExpertBalance(model).routers) == model.config.num_hidden_layers - hashed
