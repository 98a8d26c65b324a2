# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, and groups with rates of their own."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from transformers import PreTrainedModel

from finetune import attach_adapters, optimizers
from finetune.config import Optimizer
from finetune.optimizers import (
    BITSANDBYTES,
    TORCH,
    Rule,
    group_parameters,
    make_optimizer,
    make_rules,
    optimizer_class,
)

MakeModel = Callable[..., PreTrainedModel]


def _by_name(model: torch.nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    place = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = place[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


def test_settings_and_tables_name_the_same_optimizers() -> None:
    assert set(get_args(Optimizer)) == {*TORCH, *BITSANDBYTES}


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_takes_a_step(make_model: MakeModel, name: str) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    model = attach_adapters(make_model(), "attention", r=2)
    optimizer = make_optimizer(name, model, 1e-2, 0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)


def test_8_bit_states_take_a_quarter_of_the_memory(make_model: MakeModel) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        model = torch.nn.Linear(512, 128, bias=False)
        optimizer = make_optimizer(name, model, 1e-2)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        (state,) = optimizer.state.values()
        sizes[name] = sum(v.nbytes for v in state.values() if torch.is_tensor(v) and v.dim() > 1)
    assert sizes["adamw_8bit"] == sizes["adamw"] / 4


def test_rules_give_rates_and_decays_of_their_own(make_model: MakeModel) -> None:
    model = attach_adapters(make_model(), r=2)
    rules = [Rule(r".*o_a_proj.*", 5.0, 0.0), *make_rules({}, 16.0)]
    found = _by_name(model, group_parameters(model, 1e-3, 0.1, rules))
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, values in found.items():
        if "o_a_proj" in name:
            assert values == (5e-3, 0.0), name
        elif "_B." in name:
            assert values == (1.6e-2, 0.1), name
        else:
            assert values == (1e-3, 0.1), name
    assert any("lora_down_B" in name for name in found)


def test_a_rule_for_nothing_and_a_frozen_model_are_refused(make_model: MakeModel) -> None:
    model = attach_adapters(make_model(), r=2)
    with pytest.raises(ValueError, match=r"wanted trained parameters like q_a_proj, got none"):
        group_parameters(model, 1e-3, 0.0, make_rules({"q_a_proj": 2.0}, None))
    with pytest.raises(ValueError, match="wanted parameters that train, got none"):
        group_parameters(model.requires_grad_(False), 1e-3, 0.0)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(optimizers.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"adamw_8bit: wanted bitsandbytes, .* pip install"):
        optimizer_class("adamw_8bit")
    assert optimizer_class("adamw") is torch.optim.AdamW
