# SPDX-License-Identifier: Apache-2.0
"""The float32 list stays float32, whatever is done to a model; losing it costs 1.65 % of logits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.checkpoint import save_official
from modeling_dsv4.precision import FLOAT32_NAMES, Float32Parameters
from modeling_dsv4.weight_map import our_inventory

HALVES = [torch.bfloat16, torch.float16]
GOLDENS = ["v4_a_fp8", "v4_b_bf16_mtp", "v41_a_bf16", "v41_b_fp8"]


def _wide(model: nn.Module) -> set[str]:
    return {n for n, t in model.state_dict().items() if t.dtype is torch.float32}


def _listed(model: Any) -> set[str]:
    return {n for n, (dtype, _) in our_inventory(model.config).items() if dtype == "F32"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_a_cast_leaves_the_list_and_takes_the_rest(
    tiny: Callable[..., Any], kind: str, dtype: torch.dtype
) -> None:
    model = tiny(kind)
    listed, before = _listed(model), copy.deepcopy(model.state_dict())
    short = {torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    casts = [
        lambda m: m.to(dtype),
        lambda m: getattr(m, short)(),
        lambda m: m.to("cpu", dtype),
        lambda m: m.to(torch.zeros(1, dtype=dtype)),
    ]
    for cast in casts:
        cast_model = cast(copy.deepcopy(model))
        assert _wide(cast_model) == listed
        state = cast_model.state_dict()
        # Not only kept in name: no bit went through a half on the way.
        assert all(torch.equal(state[n], before[n]) for n in listed)
        rest = {n for n, t in state.items() if t.is_floating_point()} - listed
        assert {state[n].dtype for n in rest} == {dtype}
    # What is left of it and what is not is written down once.
    assert {n.split(".")[-1] for n in listed} >= {"fn", "base", "scale", "sinks"}
    assert all(any(part in FLOAT32_NAMES for part in n.split(".")) for n in listed)


def test_wider_casts_reach_everything(tiny: Callable[..., Any]) -> None:
    state = tiny("v4").double().state_dict()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float64}


def test_gradients_keep_the_dtype_of_their_parameters(tiny: Callable[..., Any]) -> None:
    model = tiny("v4").train()
    ids = torch.randint(3, 64, (1, 20))
    model(ids, labels=ids).loss.backward()
    model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.dtype is p.dtype, name


def test_moving_between_devices_still_moves() -> None:
    class Site(Float32Parameters):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.randn(3))
            self.other = nn.Parameter(torch.randn(3))

    site = Site().to("meta", torch.bfloat16)
    assert site.sinks.is_meta and site.sinks.dtype is torch.float32
    assert site.other.is_meta and site.other.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [*HALVES, "auto", None], ids=str)
@pytest.mark.parametrize("name", GOLDENS)
def test_loading_a_release_in_any_dtype_leaves_the_list(
    golden_dir: Path, name: str, dtype: Any
) -> None:
    more = {} if dtype is None else {"dtype": dtype}
    model = Dsv4ForCausalLM.from_pretrained(golden_dir / name, **more)
    assert _wide(model) == _listed(model)
    plain = torch.bfloat16 if dtype in ("auto", None) else dtype
    assert model.dtype is plain and model.lm_head.weight.dtype is plain


@pytest.mark.parametrize("name", ["v4_a_fp8", "v41_a_bf16"])
def test_the_list_survives_saving_and_loading(golden_dir: Path, tmp_path: Path, name: str) -> None:
    model = Dsv4ForCausalLM.from_pretrained(golden_dir / name)
    before = model.state_dict()
    model.save_pretrained(tmp_path / "own")
    save_official(model, tmp_path / "official")
    for folder in ("own", "official"):
        again = Dsv4ForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert _wide(again) == _listed(again)
        state = again.state_dict()
        assert all(torch.equal(state[n], before[n]) for n in _listed(again))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", ["v4", "v41"])
@torch.no_grad()
def test_weights_on_disk_keep_the_list_and_give_the_same_bits(
    tiny: Callable[..., Any], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    tiny(kind).save_pretrained(tmp_path / "own")
    resident = Dsv4ForCausalLM.from_pretrained(tmp_path / "own", dtype=dtype)
    ids = torch.randint(3, 64, (2, 30))
    count = resident.config.num_hidden_layers
    layers = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    rest = {name: "cpu" for name, _ in resident.model.named_children() if name != "layers"}
    mixed = layers | {f"model.{name}": place for name, place in rest.items()} | {"lm_head": "disk"}
    for place in ({"": "disk"}, mixed):
        model = Dsv4ForCausalLM.from_pretrained(
            tmp_path / "own", dtype=dtype, device_map=place, offload_folder=tmp_path / "disk"
        )
        assert any(p.is_meta for p in model.parameters())
        assert {n: t.dtype for n, t in model.state_dict().items()} == {
            n: t.dtype for n, t in resident.state_dict().items()
        }
        assert _listed(model) <= _wide(model)
        assert torch.equal(model(ids).logits, resident(ids).logits)
    # What lies on disk is written out again as it was.
    model.save_pretrained(tmp_path / "again")
    again = Dsv4ForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype).state_dict()
    assert all(torch.equal(again[n], t) for n, t in resident.state_dict().items())


@torch.no_grad()
def test_a_release_on_disk_gives_the_same_bits(
    golden: Callable[[str], Any], tmp_path: Path
) -> None:
    case = golden("v4_a_fp8")
    model = Dsv4ForCausalLM.from_pretrained(
        case.folder, dtype=torch.float32, device_map={"": "disk"}, offload_folder=tmp_path
    )
    ids = torch.randint(3, 64, (2, 30))
    assert all(p.is_meta for p in model.parameters()) and _wide(model) == _wide(case.model)
    assert torch.equal(model(ids).logits, case.model(ids).logits)


def test_only_names_that_a_model_has_are_listed(tiny: Callable[..., Any]) -> None:
    listed = {kind: tiny(kind)._keep_in_fp32_modules_strict for kind in ("v4", "v41")}
    assert "hc_head" in listed["v4"] and "hc_head" not in listed["v41"]
    assert listed["v4"] | listed["v41"] == set(FLOAT32_NAMES)


def test_the_list_matters(golden: Callable[[str], Any]) -> None:
    # Were the rounding of these few tensors invisible, no test could guard them.
    case = golden("v4_b_bf16_mtp")
    model, ids = copy.deepcopy(case.model), case.inputs["input_ids_b"]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in _listed(model):
                tensor.copy_(tensor.to(torch.bfloat16))
        error = (model(ids).logits[0] - case.expected["logits_b_f32"]).abs().max()
    assert error > 5e-3


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_autocast_around_a_model_changes_nothing(tiny: Callable[..., Any], kind: str) -> None:
    """Trainers switch it on; the float32 rows would become bfloat16, and gradients fail."""
    model = tiny(kind)
    ids = torch.arange(24)[None] % model.config.vocab_size
    results = []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = model(input_ids=ids, labels=ids)
            hidden = model.model(input_ids=ids).last_hidden_state
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.logits, hidden, grads))
    (logits, hidden, grads), (logits_too, hidden_too, grads_too) = results
    assert torch.equal(logits, logits_too)
    assert torch.equal(hidden, hidden_too)
    assert grads.keys() == grads_too.keys()
    assert all(torch.equal(grads[name], grads_too[name]) for name in grads)
