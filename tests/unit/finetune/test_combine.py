# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: mixed, added, combined, exchanged; against each alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from finetune import attach_adapters
from finetune.beside import BesideLora
from finetune.layers import LoraPackedLinear

MakeModel = Callable[..., PreTrainedModel]
RANKS = {"first": 4, "second": 8, "third": 4}
STORAGES = ["plain", "packed"]


@pytest.fixture
def base(make_model: MakeModel, pack: Callable[[PreTrainedModel], PreTrainedModel]) -> MakeModel:
    """`base(storage, kind)`: the same weights every time, plain or packed."""

    def make(storage: str, kind: str = "v4") -> PreTrainedModel:
        model = make_model(kind)
        return pack(model) if storage == "packed" else model

    return make


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    """Directories of adapters on everything, of several ranks."""
    for seed, (name, rank) in enumerate(RANKS.items()):
        tuned = attach_adapters(make_model(), r=rank, alpha=rank / (1 + seed))
        dice = torch.Generator().manual_seed(seed)
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.1, generator=dice)
        tuned.save_pretrained(tmp_path / name)
    return tmp_path


def _load(model: PreTrainedModel, saved: Path, *names: str) -> PeftModel:
    tuned = PeftModel.from_pretrained(model, saved / names[0], adapter_name=names[0])
    for name in names[1:]:
        tuned.load_adapter(saved / name, adapter_name=name)
    return tuned.eval()


def _ids(rows: int = 2, size: int = 30) -> torch.Tensor:
    return torch.randint(5, 290, (rows, size))


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


@torch.no_grad()
def _alone(tuned: PeftModel, name: str | list[str], ids: torch.Tensor) -> torch.Tensor:
    tuned.base_model.set_adapter(name)
    return _logits(tuned, ids)


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_row_of_a_mixed_batch_is_what_its_adapter_alone_says(
    base: MakeModel, make_model: MakeModel, tmp_path: Path, storage: str, kind: str
) -> None:
    for seed, name in enumerate(("first", "second")):
        tuned = attach_adapters(make_model(kind), r=4 + 4 * seed)
        torch.manual_seed(seed)
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        tuned.save_pretrained(tmp_path / name)
    tuned, ids = _load(base(storage, kind), tmp_path, "first", "second"), _ids(4)
    names = ["second", "__base__", "first", "second"]
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, 25:] = 0
    mixed = _logits(tuned, ids, attention_mask=mask, adapter_names=names)
    for i, name in enumerate(names):
        tuned.set_adapter("first" if name == "__base__" else name)
        row = {"attention_mask": mask[i : i + 1]}
        if name == "__base__":
            with tuned.disable_adapter():
                expected = _logits(tuned, ids[i : i + 1], **row)
        else:
            expected = _logits(tuned, ids[i : i + 1], **row)
        real = mask[i].bool()
        torch.testing.assert_close(mixed[i, real], expected[0, real], atol=2e-5, rtol=0)
    assert (mixed[0, 29] - mixed[3, 29]).abs().max() > 0.05


@pytest.mark.parametrize("storage", STORAGES)
def test_generate_takes_an_adapter_for_each_row(base: MakeModel, saved: Path, storage: str) -> None:
    tuned, ids = _load(base(storage), saved, "first", "second"), _ids(3, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    names = ["first", "__base__", "second"]
    mixed = tuned.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        row = tuned.generate(input_ids=ids[i : i + 1], adapter_names=[name], **options)
        assert torch.equal(mixed[i], row[0]), name
    tuned.set_adapter("second")
    assert torch.equal(tuned.generate(input_ids=ids[2:], **options)[0], mixed[2])
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(input_ids=ids[1:2], **options)[0], mixed[1])
    assert len({tuple(row[12:].tolist()) for row in mixed}) == 3


def test_adapter_names_are_for_inference_and_have_to_exist(
    make_model: MakeModel, saved: Path
) -> None:
    tuned, ids = _load(make_model(), saved, "first"), _ids()
    with pytest.raises(ValueError, match="non-existing adapter"):
        _logits(tuned, ids, adapter_names=["first", "other"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        _logits(tuned, ids, adapter_names=["first"])
    with pytest.raises(ValueError, match="training mode"):
        _logits(tuned.train(), ids, adapter_names=["first", "first"])


@pytest.mark.parametrize("storage", STORAGES)
def test_active_adapters_add_up_and_can_be_told_apart(
    base: MakeModel, saved: Path, storage: str
) -> None:
    tuned, ids = _load(base(storage), saved, "first", "second"), _ids()
    both = _alone(tuned, ["first", "second"], ids)
    tuned.base_model.add_weighted_adapter(["first", "second"], [1, 1], "sum", "cat")
    torch.testing.assert_close(_alone(tuned, "sum", ids), both, atol=2e-5, rtol=0)
    for name in RANKS:
        if name in tuned.peft_config:
            assert (_alone(tuned, name, ids) - both).abs().max() > 0.05
    with tuned.disable_adapter():
        off = _logits(tuned, ids)
    assert torch.equal(off, _logits(base(storage), ids))


def _deltas(tuned: PeftModel, name: str) -> dict[str, list[torch.Tensor]]:
    found = {}
    for key, module in tuned.named_modules():
        if isinstance(module, BesideLora):
            found[key] = [delta.detach().double() for delta in module.get_delta_weight(name)]
        elif isinstance(module, LoraLayer):
            found[key] = [module.get_delta_weight(name).detach().double()]
    return found


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_weighted_sums_are_what_they_say(make_model: MakeModel, saved: Path, kind: str) -> None:
    tuned = _load(make_model(), saved, "first", "third")
    options = {"svd_rank": 8} if kind == "svd" else {}
    tuned.add_weighted_adapter(["first", "third"], [0.7, -0.4], "sum", kind, **options)
    one, other, found = (_deltas(tuned, name) for name in ("first", "third", "sum"))
    assert set(found) == set(one)
    assert {type(m) for m in tuned.modules() if isinstance(m, BesideLora)}
    off, cross = [], []
    for key, deltas in found.items():
        for got, a, b in zip(deltas, one[key], other[key], strict=True):
            wanted = 0.7 * a - 0.4 * b
            off.append(float((got - wanted).norm() / wanted.norm()))
            cross.append(float((got - wanted).norm()))
    # Ranks of experts are 2 and of the rest 4: 8 holds either sum whole.
    assert max(off) < 1e-6 if kind != "linear" else max(off) > 0.1
    ranks = {tuned.get_submodule(key).r["sum"] for key in found}
    assert ranks == {"cat": {4, 8}, "svd": {4, 8}, "linear": {2, 4}}[kind]
    assert {tuned.get_submodule(key).scaling["sum"] for key in found} == {1.0}


def test_linear_is_twice_the_mean_of_two_with_one_a(make_model: MakeModel, saved: Path) -> None:
    tuned = _load(make_model(), saved, "first", "third")
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.scaling["third"] = module.scaling["first"]
            for banks in (module.lora_A, getattr(module, "lora_down_A", {})):
                if "first" in banks:
                    banks["third"].weight.data.copy_(banks["first"].weight)
    tuned.add_weighted_adapter(["first", "third"], [0.5, 0.5], "mean", "linear")
    one, other, found = (_deltas(tuned, name) for name in ("first", "third", "mean"))
    for key, deltas in found.items():
        for got, a, b in zip(deltas, one[key], other[key], strict=True):
            torch.testing.assert_close(got, a + b, atol=1e-5, rtol=1e-4)


def test_the_nearest_of_a_rank_is_the_truncated_sum(make_model: MakeModel, saved: Path) -> None:
    tuned = _load(make_model(), saved, "first", "second")
    tuned.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", "svd", svd_rank=2)
    one, other, found = (_deltas(tuned, name) for name in ("first", "second", "sum"))
    for key, deltas in found.items():
        for got, a, b in zip(deltas, one[key], other[key], strict=True):
            u, s, vh = torch.linalg.svd(a + b, full_matrices=False)
            nearest = (u[..., :2] * s[..., None, :2]) @ vh[..., :2, :]
            torch.testing.assert_close(got, nearest, atol=1e-5, rtol=1e-4)


def test_a_sum_saves_and_loads_and_leaves_training_alone(
    make_model: MakeModel, saved: Path, tmp_path: Path
) -> None:
    tuned, ids = attach_adapters(make_model(), r=4), _ids()
    for name in ("first", "second"):
        tuned.load_adapter(saved / name, adapter_name=name)
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    tuned.add_weighted_adapter(["first", "second"], [0.5, 0.25], "sum", "svd")
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == trained
    assert tuned.active_adapters == ["default"]
    tuned.save_pretrained(tmp_path / "out", selected_adapters=["sum"])
    again = PeftModel.from_pretrained(make_model(), tmp_path / "out" / "sum")
    assert torch.equal(_logits(again, ids), _alone(tuned, "sum", ids))


def test_adapters_of_different_presets_add_up(make_model: MakeModel, saved: Path) -> None:
    tuned, ids = attach_adapters(make_model(), "attention", r=2, adapter_name="small"), _ids()
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.load_adapter(saved / "first", adapter_name="first")
    tuned.eval().add_weighted_adapter(["small", "first"], [1.0, 1.0], "sum", "cat")
    both = _alone(tuned, ["small", "first"], ids)
    torch.testing.assert_close(_alone(tuned, "sum", ids), both, atol=2e-5, rtol=0)


def test_sums_that_make_no_sense_are_refused(make_model: MakeModel, saved: Path) -> None:
    tuned = _load(make_model(), saved, "first", "second")
    names, ones = ["first", "second"], [1.0, 1.0]
    with pytest.raises(ValueError, match=r"'linear' wants equal ranks, got \[4, 8\]"):
        tuned.add_weighted_adapter(names, ones, "sum", "linear")
    for kind in ("ties", "dare_linear", "magnitude_prune_svd"):
        with pytest.raises(NotImplementedError, match=f"svd, linear, cat, got '{kind}'"):
            tuned.add_weighted_adapter(names, ones, "sum", kind, density=0.5)
    with pytest.raises(NotImplementedError, match="svd_clamp would change nothing"):
        tuned.add_weighted_adapter(names, ones, "sum", "svd", svd_clamp=0.9)
    with pytest.raises(ValueError, match="out of first, second, got third"):
        tuned.add_weighted_adapter(["first", "third"], ones, "sum")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        tuned.add_weighted_adapter(names, [1.0], "sum")
    assert list(tuned.peft_config) == names
    some = {f"layers.{i}.mlp.experts": [i] for i in range(3)}
    for i, chosen in enumerate((some, {name: [5] for name in some})):
        model = attach_adapters(make_model(), "hot-experts", r=2, experts=chosen)
        model.save_pretrained(saved / f"hot{i}")
    hot = _load(make_model(), saved, "hot0", "hot1")
    with pytest.raises(ValueError, match="beside the same experts"):
        hot.add_weighted_adapter(["hot0", "hot1"], ones, "sum", "cat")
    hot.add_weighted_adapter(["hot0"], [2.0], "twice", "cat")
    layer = hot.base_model.model.model.layers[1].mlp.experts
    assert layer.hot["twice"] == [1]


@pytest.mark.parametrize("storage", STORAGES)
def test_adapters_are_exchanged_while_the_model_stays(
    base: MakeModel, saved: Path, storage: str
) -> None:
    ids = _ids()
    truth = {n: _logits(_load(base(storage), saved, n), ids) for n in RANKS}
    tuned = _load(base(storage), saved, "first")
    assert torch.equal(_logits(tuned, ids), truth["first"])
    # Under the same name: equal ranks go into the same tensors, others are refused.
    tuned.load_adapter(saved / "third", adapter_name="first")
    for module in tuned.modules():
        if isinstance(module, LoraLayer) and "first" in module.scaling:
            module.set_scale("first", 1 / 3)
    torch.testing.assert_close(_logits(tuned, ids), truth["third"], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="misshapen"):
        tuned.load_adapter(saved / "second", adapter_name="first")
    tuned.load_adapter(saved / "second", adapter_name="second")
    tuned.set_adapter("second")
    assert torch.equal(_logits(tuned, ids), truth["second"])
    tuned.delete_adapter("first")
    assert torch.equal(_logits(tuned, ids), truth["second"])
    assert not [n for n, _ in tuned.named_parameters() if ".first." in n]
    kinds = {type(m) for m in tuned.modules() if isinstance(m, BesideLora | LoraPackedLinear)}
    assert (LoraPackedLinear in kinds) is (storage == "packed")


def test_models_of_other_families_keep_pefts_sums() -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

    tuned = get_peft_model(Other(), LoraConfig(r=2, target_modules=["linear"]))
    tuned.add_adapter("second", LoraConfig(r=2, target_modules=["linear"]))
    tuned.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "ties", density=0.5)
    assert "sum" in tuned.peft_config
