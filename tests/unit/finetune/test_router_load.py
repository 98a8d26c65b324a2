# SPDX-License-Identifier: Apache-2.0
"""The load of experts is counted where a router chooses, and only while a model trains."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from finetune.router_load import RouterLoad


def test_the_load_is_what_the_routers_chose(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    ids = torch.arange(40)[None] % 7
    load = RouterLoad()
    load.watch(model)
    model(input_ids=ids)
    assert load.read() == {}
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, i, out: chosen.append(out[2]))
    model.train()
    model(input_ids=ids)
    # The first layer's router is a table of token ids.
    counts = torch.stack([torch.bincount(c.flatten(), minlength=8) for c in chosen[1:]]).double()
    idle = float((counts == 0).double().mean())
    assert idle > 0
    expected = {
        "idle_experts": round(idle, 4),
        "busiest_expert": round(float(counts.max() / 10), 2),
    }
    assert counts.shape == (2, 8)
    assert counts.mean() == 10
    assert load.read() == expected
    assert load.read() == {}
    load.leave()
    model(input_ids=ids)
    assert load.read() == {}
