# SPDX-License-Identifier: Apache-2.0
"""A layer at a time: the gradients of the ordinary order, each expert read once a direction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from finetune import attach_adapters, layer_major
from finetune.layer_major import LayerMajor
from finetune.stream_checkpoints import CheckpointPlan
from modeling_dsv4.formats import get_format
from quantize.config import get_recipe
from quantize.experts import StoredExperts
from quantize.hf_quantizer import attach, store_experts
from quantize.pack import PackFile, PackLayout, PackWriter, pack_file_name

Batch = dict[str, torch.Tensor]
Tiny = Callable[..., PreTrainedModel]
# Of each gradient's norm. In float32 the ordinary order itself is up to 2e-5 from what
# float64 gives; in float64 transformers' loss is float32 still, the only part that is.
TIGHT = {torch.float32: 5e-5, torch.float64: 5e-7}


def _stir(model: nn.Module) -> None:
    dice = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=dice)


def _padded(left: bool = False) -> list[Batch]:
    batches = []
    for rows, columns, pads in ((2, 40, 7), (1, 33, 0), (3, 21, 5)):
        ids = torch.randint(2, 64, (rows, columns))
        mask, labels = torch.ones_like(ids), ids.clone()
        pad = slice(0, pads) if left else slice(columns - pads, columns)
        if pads:
            mask[0, pad], labels[0, pad] = 0, -100
        labels[:, 8:12] = -100
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def _packed() -> list[Batch]:
    batches = []
    for lengths in ((13, 22, 4), (30,), (9, 9)):
        ids = torch.randint(2, 64, (1, sum(lengths)))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        labels = torch.where(positions < 2, -100, ids)
        batches.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return batches


def _count(batches: list[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _ordinary(
    model: nn.Module, batches: list[Batch], items: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
        loss = model(**batch, **more).loss / (len(batches) if items is None else 1)
        loss.backward()
        total += loss.item()
    return total, _gradients(model)


def _check(model: nn.Module, batches: list[Batch], **options: Any) -> LayerMajor:
    """Compare one step with the ordinary order, every gradient and the loss."""
    loss, want = _ordinary(model, batches, _count(batches))
    assert want
    schedule = LayerMajor(model, **options)
    found = schedule.step(batches, _count(batches))
    assert found.item() == pytest.approx(loss, rel=1e-6)
    got = _gradients(model)
    _compare(got, want)
    return schedule


def _compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < TIGHT[gradient.dtype], name


@pytest.mark.parametrize("kind", ["v4", "v41"])
@pytest.mark.parametrize(
    ("batches", "dtype"),
    [("right", torch.float32), ("left", torch.float64), ("packed", torch.float64)],
)
def test_gradients_are_those_of_the_ordinary_order(
    tiny: Tiny, kind: str, batches: str, dtype: torch.dtype
) -> None:
    model = attach_adapters(tiny(kind), r=4).to(dtype).train()
    _stir(model)
    given = _packed() if batches == "packed" else _padded(left=batches == "left")
    _check(model, given)


@pytest.mark.parametrize("preset", ["attention", "attention+shared"])
def test_frozen_experts_pass_gradients_on(tiny: Tiny, preset: str) -> None:
    model = attach_adapters(tiny("v41"), preset, r=4).train()
    _stir(model)
    _check(model, _padded())


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_whole_weights_train_too(tiny: Tiny, kind: str) -> None:
    model = tiny(kind).train()
    model.mtp.requires_grad_(False)
    _check(model, _packed())


def test_without_a_count_micro_batches_weigh_alike(tiny: Tiny) -> None:
    model = attach_adapters(tiny("v4"), r=4).train()
    _stir(model)
    batches = _padded()
    loss, want = _ordinary(model, batches, None)
    found = LayerMajor(model).step(batches)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    _compare(_gradients(model), want)


@pytest.mark.parametrize(("kind", "group"), [("v4", 3), ("v41", 2)])
def test_groups_of_layers_computed_again_change_no_bit(
    tiny: Tiny, kind: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_adapters(tiny(kind), r=4).train()
    _stir(model)
    batches = _padded()
    schedule = LayerMajor(model)
    loss, want = schedule.step(batches, 7), _gradients(model)
    plan = CheckpointPlan(model.config.num_hidden_layers, group, 0)
    monkeypatch.setattr(layer_major, "plan_checkpoints", lambda *_: plan)
    assert torch.equal(schedule.step(batches, 7), loss)
    got = _gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_checkpoints_stay_within_their_budget(tiny: Tiny, kind: str) -> None:
    model = attach_adapters(tiny(kind), r=4).train()
    batches = _padded()[:1]
    schedule = LayerMajor(model, _budget_of_groups(model, batches))
    schedule.step(batches, 7)
    assert schedule.plan is not None
    assert schedule.plan.group == 2
    assert schedule.checkpoint_memory is not None
    assert schedule.plan.nbytes <= schedule.checkpoint_memory
    assert schedule.checkpoint_peak == schedule.plan.nbytes
    assert schedule._kept.nbytes == 0


@pytest.mark.parametrize("group", [1, 2])
def test_dropout_draws_the_same_twice(tiny: Tiny, group: int) -> None:
    # One micro-batch: the ordinary order then draws in the same sequence.
    model = attach_adapters(tiny("v4"), "attention+shared", r=4, dropout=0.3).train()
    _stir(model)
    batches = _padded()[:1]
    torch.manual_seed(3)
    loss, want = _ordinary(model, batches, _count(batches))
    torch.manual_seed(3)
    schedule = LayerMajor(model)
    if group > 1:
        schedule.checkpoint_memory = _budget_of_groups(model, batches)
    found = schedule.step(batches, _count(batches))
    assert schedule.plan is not None
    assert schedule.plan.group == group
    assert found.item() == pytest.approx(loss, rel=1e-6)
    _compare(_gradients(model), want)


def _budget_of_groups(model: Any, batches: list[Batch]) -> int:
    """One byte less than all checkpoints take."""
    config = model.config
    row = 4 * config.hidden_size * sum(batch["input_ids"].numel() for batch in batches)
    return config.num_hidden_layers * row * (config.hc_mult + 1) - 1


def test_narrow_checkpoints_are_what_the_pass_goes_on_with(tiny: Tiny) -> None:
    model = attach_adapters(tiny("v4"), r=4).train()
    _stir(model)
    batches = _padded()
    loss, _ = _ordinary(model, batches, _count(batches))
    schedule = LayerMajor(model, checkpoint_dtype=torch.bfloat16)
    found = schedule.step(batches, _count(batches)).item()
    # By more than additions in another order would.
    assert 1e-5 < abs(found - loss) / loss < 0.02
    whole, want = schedule.checkpoint_peak, _gradients(model)
    # Groups computed again see the same rounded streams only if the forward pass did.
    schedule = LayerMajor(model, whole * 3 // 4, torch.bfloat16)
    again = schedule.step(batches, _count(batches)).item()
    assert schedule.plan is not None
    assert schedule.plan.group > 1
    assert sorted(_gradients(model)) == sorted(want)
    assert again == pytest.approx(loss, rel=0.02)


# --- experts in packs ---------------------------------------------------------------------------


def _pack(model: Any, directory: Path) -> int:
    """Write the experts' packs and take the plain ones out; bytes of the largest record."""
    recipe, fp4 = get_recipe("fp4"), get_format("fp4")
    for path, plain in list(model.named_modules()):
        if type(plain).__name__ != "Dsv4Experts":
            continue
        layout = PackLayout.build(
            path, plain.num_experts, plain.hidden_size, plain.intermediate_size, recipe.format_of
        )
        with PackWriter(directory / pack_file_name(path), path, layout) as writer:
            for e in range(plain.num_experts):
                gate_up = plain.gate_up_proj[e].detach().unflatten(0, (2, -1))
                down = plain.down_proj[e].detach()
                parts = {"gate_up_proj": fp4.pack(gate_up), "down_proj": fp4.pack(down)}
                writer.write(layout.of(e).encode(parts))
    store_experts(model, recipe)
    return layout.largest


def _stored(model: Any, directory: Path, budget: int) -> Any:
    names = [m.name for m in model.modules() if isinstance(m, StoredExperts)]
    packs = [PackFile.open(directory / pack_file_name(name)) for name in names]
    attach(model, packs, expert_memory=budget)
    return next((m.store for m in model.modules() if getattr(m, "store", None)), None)


_WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8}


@pytest.mark.parametrize(
    ("kind", "records"), [("v4", 1), ("v4", 1000), ("v41", 3), ("v41", 9), ("v41", 1000)]
)
def test_each_expert_is_read_once_a_direction(
    tiny: Tiny, tmp_path: Path, kind: str, records: int
) -> None:
    model = tiny(kind, **_WIDE)
    record = _pack(model, tmp_path)
    store = _stored(model, tmp_path, records * record)
    model = attach_adapters(model, r=4).train()
    _stir(model)
    batches = _padded()
    schedule = _check(model, batches)
    if store is None:
        assert records == 1000
        return
    used = sum(len(experts.hit) for experts in schedule.experts)
    reads = []
    for some in (batches[:1], batches):
        before = store.stats()["misses"]
        schedule.step(some, 1)
        used = sum(len(experts.hit) for experts in schedule.experts)
        reads.append((store.stats()["misses"] - before) / used)
    # What lies in memory where the directions turn is not read again.
    assert all(1 <= share <= 2 for share in reads)
    if records < 4:
        assert min(reads) > 2 - 2 * records / len(schedule.experts)
    # What was lent has come back: the modules read by themselves again.
    assert all(experts.base.store is store for experts in schedule.experts)


def test_ordinary_order_reads_more_with_every_micro_batch(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("v4", **_WIDE)
    record = _pack(model, tmp_path)
    store = _stored(model, tmp_path, 3 * record)
    model = attach_adapters(model, r=4).train()
    batches = _padded()
    schedule = LayerMajor(model)
    schedule.step(batches, 1)
    reads = []
    for step in (lambda: schedule.step(batches, 1), lambda: _ordinary(model, batches, 1)):
        before = store.stats()["misses"]
        step()
        reads.append(store.stats()["misses"] - before)
    assert reads[1] > 2 * reads[0]


def test_groups_read_again_what_the_plan_says(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("v41", **_WIDE)
    record = _pack(model, tmp_path)
    store = _stored(model, tmp_path, record)
    model = attach_adapters(model, r=4).train()
    batches = _padded()
    schedule, reads = LayerMajor(model), []
    for budget in (None, _budget_of_groups(model, batches)):
        schedule.checkpoint_memory = budget
        schedule.step(batches, 1)
        before = store.stats()["misses"]
        schedule.step(batches, 1)
        reads.append(store.stats()["misses"] - before)
    assert schedule.plan is not None
    # One record stays where the direction turns.
    more = schedule.plan.extra_layer_reads * model.config.n_routed_experts
    assert abs(reads[1] - reads[0] - more) <= 2 * len(schedule.plan.starts())


def test_other_models_and_empty_steps_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="Dsv4ForCausalLM, got Linear"):
        LayerMajor(nn.Linear(1, 1))
    schedule = LayerMajor(tiny("window"))
    with pytest.raises(ValueError, match="at least one micro-batch"):
        schedule.step([])
    with pytest.raises(ValueError, match="wanted labels"):
        schedule.step([{"input_ids": torch.zeros(1, 3).long()}])
