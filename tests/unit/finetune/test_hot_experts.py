# SPDX-License-Identifier: Apache-2.0
"""Hot experts: counted as the model routes, the fewest that cover a share, adapters on those."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune import attach_adapters, merge_adapters
from finetune.hot_experts import (
    HotExperts,
    RoutingMass,
    choose_hot_experts,
    find_hot_experts,
    hot_table,
    measure_routing,
)
from modeling_dsv4.storage import PackedExperts

MakeModel = Callable[..., PreTrainedModel]
Stir = Callable[[torch.nn.Module], None]
SOME = {f"model.layers.{i}.mlp.experts": ids for i, ids in enumerate([[1, 5], [0], [2, 3, 7]])}


def _ids(batch: int = 4, size: int = 40) -> torch.Tensor:
    return torch.randint(5, 290, (batch, size))


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _pack(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp.experts = PackedExperts.from_plain(layer.mlp.experts)
    return model


def test_the_fewest_experts_that_cover_the_share_are_chosen() -> None:
    score = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    mass = RoutingMass({"layers.0.mlp.experts": score}, {}, 100)
    for share, ids in (
        (0.3, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.9, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        hot = choose_hot_experts(mass, share)
        assert hot.ids["layers.0.mlp.experts"] == ids
        assert hot.mass["layers.0.mlp.experts"] == pytest.approx(float(score[ids].sum()))
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="hot_share: wanted more than 0"):
            choose_hot_experts(mass, wrong)
    with pytest.raises(ValueError, match="hot_score"):
        choose_hot_experts(mass, 0.5, "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
def test_routing_is_counted_as_the_router_decides(make_model: MakeModel, kind: str) -> None:
    model, ids = make_model(kind), _ids(1, 30)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda m, a, out: seen.append((out[1], out[2])))
        for layer in model.model.layers
    ]
    _logits(model, ids)
    for handle in handles:
        handle.remove()
    mass = measure_routing(model.train(), [{"input_ids": ids, "labels": ids}])
    assert model.training
    assert mass.tokens == 30
    for i, (weights, indices) in enumerate(seen):
        name = f"layers.{i}.mlp.experts"
        for e in range(8):
            hit = indices == e
            assert float(mass.token[name][e]) == pytest.approx(float(hit.sum()) / hit.numel())
            assert float(mass.gate[name][e]) == pytest.approx(
                float(weights[hit].sum() / weights.sum()), abs=1e-6
            )


def test_pads_are_not_counted_and_reading_stops_at_the_budget(make_model: MakeModel) -> None:
    model, ids = make_model(), _ids(2, 20)
    short, mask = ids.clone(), torch.ones_like(ids)
    short[0, :8], mask[0, :8] = 3, 0
    both = measure_routing(model, [{"input_ids": short, "attention_mask": mask}])
    assert both.tokens == 32
    alone = [measure_routing(model, [{"input_ids": row}]) for row in (ids[:1, 8:], ids[1:])]
    for name, score in both.gate.items():
        counts = 12 * alone[0].token[name] + 20 * alone[1].token[name]
        torch.testing.assert_close(both.token[name] * 32, counts)
        assert score.sum() == pytest.approx(1)
    assert measure_routing(model, [{"input_ids": ids[:1]}] * 5, tokens=50).tokens == 60
    with pytest.raises(ValueError, match="wanted some tokens"):
        measure_routing(model, [])


def test_a_runs_rows_are_read_in_the_seeds_order(make_model: MakeModel) -> None:
    model = make_model()
    rows = [{"input_ids": row, "labels": row} for row in _ids(6, 25).tolist()]
    hot = find_hot_experts(model, rows, share=0.6, score="gate", tokens=60, seed=3)
    assert hot.tokens == 75
    assert hot == find_hot_experts(model, rows, share=0.6, score="gate", tokens=60, seed=3)
    assert all(value >= 0.6 for value in hot.mass.values())
    assert HotExperts(**hot.to_dict()) == hot
    # Of preferences, the prompt with the wanted answer is read.
    pairs = [
        {"prompt_ids": r["input_ids"][:9], "chosen_ids": r["input_ids"][9:], "rejected_ids": [7]}
        for r in rows
    ]
    assert find_hot_experts(model, pairs, share=0.6, score="gate", tokens=60, seed=3) == hot
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(hot_table(hot, 1000))
    text = console.export_text()
    chosen = sum(len(ids) for ids in hot.ids.values())
    assert f"{chosen * 1000:,}" in text
    assert "75 tokens" in text


@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize("kind", ["v4", "v4.1"])
def test_it_equals_an_adapter_on_all_experts_whose_others_are_zero(
    make_model: MakeModel, stir: Stir, kind: str, storage: str
) -> None:
    make = lambda: _pack(make_model(kind)) if storage == "packed" else make_model(kind)
    some, ids = attach_adapters(make(), "hot-experts", r=4, experts=SOME), _ids()
    stir(some)
    every = attach_adapters(make(), "all", r=4)
    wide = dict(every.named_parameters())
    for name, parameter in some.named_parameters():
        if "lora_" in name:
            layer = name.split("layers.")[1].split(".")[0]
            chosen = SOME[f"model.layers.{layer}.mlp.experts"]
            assert len(parameter) == len(chosen)
            wide[name].data.zero_()[chosen] = parameter.data
    torch.testing.assert_close(_logits(some, ids), _logits(every, ids), atol=1e-6, rtol=0)
    assert (_logits(some, ids) - _logits(make(), ids)).abs().max() > 1e-2


def test_it_saves_only_the_chosen_and_loads_by_peft_alone(
    make_model: MakeModel, stir: Stir, tmp_path: Path
) -> None:
    some, ids = attach_adapters(make_model(), "hot-experts", r=4, experts=SOME), _ids()
    stir(some)
    some.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 4 * 3
    assert sum(t.numel() for t in tensors.values()) == 6 * 2 * (64 + 64 + 32 + 64)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(_logits(loaded, ids), _logits(some, ids))
    packed = PeftModel.from_pretrained(_pack(make_model()), tmp_path)
    assert packed.base_model.model.model.layers[0].mlp.experts.hot == {"default": [1, 5]}


def test_it_merges_and_unmerges(make_model: MakeModel, stir: Stir) -> None:
    some, ids = attach_adapters(make_model(), "hot-experts", r=4, experts=SOME), _ids()
    stir(some)
    attached = _logits(some, ids)
    some.merge_adapter()
    torch.testing.assert_close(_logits(some, ids), attached, atol=1e-4, rtol=0)
    some.unmerge_adapter()
    torch.testing.assert_close(_logits(some, ids), attached, atol=1e-4, rtol=0)
    merged = merge_adapters(some)
    torch.testing.assert_close(_logits(merged, ids), attached, atol=1e-4, rtol=0)
    base = make_model().model.layers[1].mlp.experts.down_proj
    moved = (merged.model.layers[1].mlp.experts.down_proj - base).flatten(1).abs().amax(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == [0]


def test_adapters_with_other_experts_live_side_by_side(
    make_model: MakeModel, stir: Stir, tmp_path: Path
) -> None:
    ids, alone = _ids(), []
    others = {name: [4, 6] for name in SOME}
    for i, chosen in enumerate((SOME, others, None)):
        preset = "all" if chosen is None else "hot-experts"
        tuned = attach_adapters(make_model(), preset, r=2 + i, experts=chosen)
        stir(tuned)
        tuned.save_pretrained(tmp_path / str(i))
        alone.append(_logits(tuned, ids))
    model = PeftModel.from_pretrained(make_model(), tmp_path / "0", adapter_name="a0")
    for i in (1, 2):
        model.load_adapter(tmp_path / str(i), adapter_name=f"a{i}")
    for i in (2, 0, 1):
        model.set_adapter(f"a{i}")
        torch.testing.assert_close(_logits(model, ids), alone[i], atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert torch.equal(_logits(model, ids), _logits(make_model(), ids))
    model.base_model.set_adapter(["a0", "a1"])
    layer = model.base_model.model.model.layers[1].mlp.experts
    index = torch.arange(8)[:, None]
    x, weights = torch.randn(8, 64), torch.ones(8, 1)
    outputs = []
    for names in ([], ["a0"], ["a1"], ["a0", "a1"]):
        layer.set_adapter(names)
        outputs.append(layer(x, index, weights))
    base, first, second, both = outputs
    # Token e is expert e's; the adapters stand beside 0, and beside 4 and 6.
    for found, chosen in ((first, {0}), (second, {4, 6}), (both, {0, 4, 6})):
        moved = (found - base).abs().amax(1) > 1e-4
        assert set(moved.nonzero().flatten().tolist()) == chosen


def test_a_batch_that_reaches_no_chosen_expert_still_has_a_graph(make_model: MakeModel) -> None:
    tuned = attach_adapters(make_model(), "hot-experts", r=2, experts={n: [0] for n in SOME})
    layer = tuned.base_model.model.model.layers[0].mlp.experts
    out = layer(torch.randn(3, 64), torch.tensor([[1, 2]] * 3), torch.ones(3, 2))
    out.sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() == 0


def test_choices_that_do_not_fit_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"wanted `experts`.*find_hot_experts"):
        attach_adapters(model, "hot-experts")
    with pytest.raises(ValueError, match="no adapters on routed experts"):
        attach_adapters(model, "attention", experts=SOME)
    with pytest.raises(ValueError, match=r"ids below 8, got none"):
        attach_adapters(model, "hot-experts", experts={"layers.0.mlp.experts": [1]})
    with pytest.raises(ValueError, match=r"ids below 8, got \[8\]"):
        attach_adapters(model, "hot-experts", experts={name: [8] for name in SOME})
    hot = HotExperts.given(SOME, 16)
    with pytest.raises(ValueError, match="made for another model"):
        attach_adapters(model, "hot-experts", experts=hot)
