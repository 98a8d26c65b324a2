# SPDX-License-Identifier: Apache-2.0
"""Every weight learns once, in its group; tables learn row by row where that is asked for."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from finetune.pretraining_groups import Rates, group_parameters, make_optimizer

MakeModel = Callable[..., PreTrainedModel]
RATES = Rates(matrix=0.02, rest=1e-3, embed=2e-3, head=3e-3, table=5e-3, index=4e-3)


def test_every_parameter_is_in_one_group(make_model: MakeModel) -> None:
    model = make_model("v4.1")
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, RATES)
    rate = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rate) == len(names)
    layer = "model.layers.1."
    assert {
        "model.embed_tokens.weight": RATES.embed,
        "lm_head.weight": RATES.head,
        "model.norm.weight": RATES.rest,
        f"{layer}engram.embed.weight": RATES.table,
        f"{layer}engram.kv_proj.weight": RATES.matrix,
        f"{layer}self_attn.q_a_proj.weight": RATES.matrix,
        f"{layer}self_attn.indexer.q_b_proj.weight": RATES.index,
        f"{layer}mlp.gate.weight": RATES.rest,
        f"{layer}mlp.experts.gate_up_proj": RATES.matrix,
    }.items() <= rate.items()
    small = [n for n in rate if ".indexer." not in n and ("_hc." in n or n.endswith("norm.weight"))]
    assert len(small) > 10 and all(rate[n] == RATES.rest for n in small)


def test_gates_and_ups_of_experts_are_stepped_apart(make_model: MakeModel) -> None:
    model = make_model("v4.1")
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    optimizer, before = make_optimizer(model, RATES), weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    step = (before - weight.detach()) / RATES.matrix
    gate, up = step.chunk(2, dim=1)
    for half in (gate, up):
        # As wide as a matrix of its own, whose singular values are near 1.
        assert torch.linalg.svdvals(half).min() > 0.3
    stretch = torch.linalg.svdvals(step)
    assert stretch.max() > 1.2


def test_matrices_alone_decay(make_model: MakeModel) -> None:
    model = make_model("v4.1")
    optimizer = make_optimizer(model, RATES, matrix_decay=0.05)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, *[0.0] * 5]


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_nobody_read_stay_where_tables_learn_row_by_row(
    make_model: MakeModel, sparse: bool
) -> None:
    model = make_model("v4.1").train()
    optimizer = make_optimizer(model, RATES, sparse_tables=sparse)
    table = model.model.layers[1].engram.embed.weight
    for first in (20, 60):
        before, ids = table.detach().clone(), torch.arange(first, first + 6)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert table.grad is not None and table.grad.is_sparse == sparse
        rows = table.grad._indices()[0] if sparse else table.grad.abs().sum(1).nonzero()[:, 0]
        read = set(rows.tolist())
        optimizer.step()
        optimizer.zero_grad()
        moved = set((table.detach() - before).abs().sum(1).nonzero()[:, 0].tolist())
    assert read and len(read) < len(table)
    # A dense Adam goes on moving what the first step read.
    assert (moved <= read) == sparse


def test_a_frozen_model_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="wanted matrices that train"):
        group_parameters(make_model("v4.1").requires_grad_(False))
