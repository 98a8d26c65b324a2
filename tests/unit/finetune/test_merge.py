# SPDX-License-Identifier: Apache-2.0
"""Merging from files to files: equal to adapters beside the base, honest about rounding, lean."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finetune import attach_adapters, merge_adapters
from finetune.adapters import load_adapters
from finetune.base_weights import identity_of, open_base
from finetune.hot_experts import HotExperts
from finetune.identity import base_identity
from finetune.loading import load_model
from finetune.merge import REPORT, MergeResult, merge_files
from finetune.repack import round_again
from finetune.survival import Survival, advice
from finetune.trainer import save_adapter
from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.checkpoint import save_official
from modeling_dsv4.formats import FP4
from quantize.checksums import Checksums, damages
from quantize.config import get_recipe
from quantize.convert import convert
from quantize.target import Target

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def base(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def release(golden_dir: Path) -> Path:
    """An official checkpoint: FP8 blocks and packed FP4."""
    return golden_dir / "v4_a_fp8"


@pytest.fixture
def adapt(stir: Callable[[torch.nn.Module], None], tmp_path: Path) -> Callable[..., Path]:
    """Save an adapter of a base that changes it by about a percent."""

    def make(base: Path, preset: str = "all", scale: float = 0.3, **more: object) -> Path:
        model = attach_adapters(load_model(base, dtype="float32"), preset, 4, **more)
        stir(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_down_B" in name:
                parameter.data.mul_(scale)
        output = tmp_path / "adapter"
        shutil.rmtree(output, ignore_errors=True)
        save_adapter(model, output)
        return output

    return make


def _logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(2 * 24).view(2, 24) % 60 + 3
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def _attached(base: Path, adapter: Path, **more: object) -> PeftModel:
    return load_adapters(load_model(base, dtype="float32", **more), adapter)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in sorted(directory.glob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
@pytest.mark.parametrize("preset", ["attention", "all"])
def test_in_float32_it_is_what_merging_in_memory_gives(
    make_model: MakeModel, adapt: Callable[..., Path], tmp_path: Path, kind: str, preset: str
) -> None:
    base = tmp_path / "base"
    make_model(kind).save_pretrained(base)
    adapter = adapt(base, preset, expert_rank=3 if preset == "all" else None)
    result = merge_files(base, adapter, tmp_path / "merged", to="float32")
    reference = merge_adapters(_attached(base, adapter))
    merged = load_model(tmp_path / "merged")
    wanted = reference.state_dict()
    found = merged.state_dict()
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(
        _logits(merged), _logits(_attached(base, adapter)), rtol=1e-5, atol=1e-5
    )
    assert result.whole.kept == pytest.approx(1, abs=1e-4)
    assert result.whole.error is not None
    assert result.whole.error < 1e-4
    assert not list(damages(tmp_path / "merged", Checksums.load(tmp_path / "merged")))


@pytest.mark.parametrize("stabilised", [False, True])
def test_scales_follow_the_ranks(
    base: Path, adapt: Callable[..., Path], tmp_path: Path, stabilised: bool
) -> None:
    adapter = adapt(base, "all", alpha=5.0, expert_rank=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["use_rslora"] = stabilised
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_files(base, adapter, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(
        _logits(merged), _logits(_attached(base, adapter)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["official", "ours", "converted"])
def test_a_packed_base_becomes_plain_in_any_layout(
    release: Path, adapt: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    source = release
    if layout == "ours":
        source = tmp_path / "ours"
        load_model(release).save_pretrained(source)
    elif layout == "converted":
        source = tmp_path / "q3"
        convert(release, source, get_recipe("q3"))
    adapter = adapt(source)
    merge_files(source, adapter, tmp_path / "merged", to="float32", max_shard_size=300_000)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    merged = load_model(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    attached = _attached(source, adapter, dequantize=True)
    reference = merge_adapters(attached).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, reference[name].to(tensor.dtype), rtol=1e-5, atol=1e-6)


def test_the_merged_model_goes_back_to_the_official_layout(
    release: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    merge_files(release, adapt(release), tmp_path / "merged", to="bfloat16")
    merged = load_model(tmp_path / "merged")
    save_official(merged, tmp_path / "official")
    again = Dsv4ForCausalLM.from_pretrained(tmp_path / "official")
    torch.testing.assert_close(_logits(again), _logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("to", ["source", "fp4"])
@pytest.mark.parametrize("kind", ["release", "q3"])
def test_packed_again_only_what_the_adapter_touched_changes(
    release: Path, adapt: Callable[..., Path], tmp_path: Path, kind: str, to: str
) -> None:
    source = release
    if kind == "q3":
        source = tmp_path / "q3"
        convert(release, source, get_recipe("q3"))
    untouched = tmp_path / "converted"
    adapter = adapt(source, "attention")
    result = merge_files(source, adapter, tmp_path / "merged", to=to)
    if kind == "release":
        convert(release, untouched, get_recipe("fp4"))
    elif to == "source":
        untouched = source
    found = _tensors(tmp_path / "merged")
    if untouched.exists():
        wanted = _tensors(untouched)
        assert set(found) == set(wanted)
        moved = {
            name
            for name, tensor in wanted.items()
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
        }
        names = {name.removesuffix("_scale_inv") for name in moved}
        assert names
        assert names <= set(result.tensors)
    merged = load_model(tmp_path / "merged", dtype="float32")
    assert merged.config.quantization_config.quant_method == "dsv4"
    assert _logits(merged).isfinite().all()
    assert not list(damages(tmp_path / "merged", Checksums.load(tmp_path / "merged")))


def test_a_large_update_survives_packing(
    release: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapt(release, "all", scale=30)
    result = merge_files(release, adapter, tmp_path / "merged", to="source")
    assert result.advice is None
    merged = load_model(tmp_path / "merged", dtype="float32")
    plain = merge_adapters(_attached(release, adapter, dequantize=True))
    both = zip(merged.model.layers, plain.model.layers, strict=True)
    for packed_layer, plain_layer in both:
        packed, wanted = packed_layer.mlp.experts, plain_layer.mlp.experts
        for projection in ("gate_up_proj", "down_proj"):
            got = _open(packed, projection)
            want = getattr(wanted, projection)[1]
            assert (got - want).norm() < 0.15 * want.norm()


def _open(experts: torch.nn.Module, projection: str) -> torch.Tensor:
    """Weight of expert 1, by what its product with the identity is."""
    gate_up, down = experts.open_expert(1)
    width = experts.hidden_size if projection == "gate_up_proj" else experts.intermediate_size
    return (gate_up if projection == "gate_up_proj" else down)(torch.eye(width)).T


def test_a_small_update_is_rounded_away_and_said_so(
    make_model: MakeModel, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "bfloat16"
    make_model().to(torch.bfloat16).save_pretrained(base)

    def merged(scale: float, to: str) -> MergeResult:
        output = tmp_path / f"{to}-{scale}"
        result = merge_files(base, adapt(base, scale=scale), output, to=to)
        told = json.loads((output / REPORT).read_text())
        assert told["all"]["error"] == pytest.approx(result.whole.error)
        assert set(told["tensors"]) == set(result.tensors)
        return result

    # The whole of it lies below half a step of bfloat16 for most weights.
    small = merged(0.003, "bfloat16")
    assert small.whole.error is not None
    assert small.whole.error > 0.5
    assert small.whole.kept is not None
    assert small.whole.kept < 0.75
    assert small.whole.moved < 0.5 * small.whole.weights
    assert small.advice is not None
    assert "serve the base with the adapter beside it" in small.advice
    large = merged(1.0, "bfloat16")
    assert large.advice is None
    assert large.whole.error is not None
    assert large.whole.error < 0.25
    assert merged(0.003, "float32").advice is None


def test_survival_is_what_its_letters_say() -> None:
    part = Survival()
    base = torch.tensor([1.0, 2, 3, 4])
    part.add(base, torch.ones(4), base + torch.tensor([2.0, 0, 0, 0]))
    assert (part.weights, part.moved) == (4, 1)
    assert part.size == pytest.approx(2 / 30**0.5)
    assert part.kept == pytest.approx(2 / 4)
    assert part.error == pytest.approx((1 + 1 + 1 + 1) ** 0.5 / 2)
    assert advice(part, "x") is not None
    assert "never trained" in str(advice(Survival(weights=1, base=1.0), "x"))


def test_a_group_keeps_its_scale_where_the_update_allows() -> None:
    weight = torch.randn(16, 96) / 50
    old = FP4.pack(weight)
    base = FP4.unpack(old, torch.float32)
    step = old["_scale"].float().repeat_interleave(32, -1)
    # Upwards from the grid's largest step, where packing anew doubles the scale.
    changed = base + 0.05 * step * base.sign()
    fresh = FP4.unpack(FP4.pack(changed), torch.float32)
    kept = FP4.unpack(round_again(changed, FP4, old), torch.float32)
    assert torch.equal(kept, base)
    assert not torch.equal(fresh, base)
    # A large update wants its own scale.
    large = base * 40
    parts, wanted = round_again(large, FP4, old), FP4.pack(large)
    assert torch.equal(FP4.unpack(parts, torch.float32), FP4.unpack(wanted, torch.float32))
    # Never farther than packing anew.
    some = base + torch.randn_like(base) * step
    again = FP4.unpack(round_again(some, FP4, old), torch.float32)
    assert (again - some).norm() <= (FP4.unpack(FP4.pack(some), torch.float32) - some).norm()


def test_an_untrained_adapter_is_told(base: Path, tmp_path: Path) -> None:
    save_adapter(attach_adapters(load_model(base), "all", 4), tmp_path / "new")
    result = merge_files(base, tmp_path / "new", tmp_path / "merged")
    assert "never trained" in str(result.advice)


def test_a_packed_base_wants_a_decision(
    release: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="wanted --to with a packed base"):
        merge_files(release, adapt(release), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_no_merge_can_add_is_refused_with_the_reason(
    base: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapt(base)
    file = adapter / "adapter_config.json"
    text = file.read_text()
    for change, reason in (
        ({"peft_type": "DSV4_MEMORY"}, "edited rows of Engram tables are not merged"),
        ({"use_dora": True}, "wanted low ranks alone, got use_dora"),
        ({"modules_to_save": ["lm_head"]}, "got modules_to_save"),
    ):
        file.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(ValueError, match=reason):
            merge_files(base, adapter, tmp_path / "merged")
    file.write_text(text)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    rows = {"base_model.model.model.layers.1.engram.embed.rows": torch.zeros(2, 4)}
    save_file(tensors | rows, weights)
    with pytest.raises(ValueError, match="edited rows of Engram tables are not merged"):
        merge_files(base, adapter, tmp_path / "merged")
    first = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != first}, weights)
    with pytest.raises(ValueError, match="wanted A and B of"):
        merge_files(base, adapter, tmp_path / "merged")
    save_file({k.replace("layers.0.", "layers.9."): v for k, v in tensors.items()}, weights)
    with pytest.raises(ValueError, match=r"for model\.layers\.9.*not there"):
        merge_files(base, adapter, tmp_path / "merged")


def test_another_models_adapter_is_refused(
    make_model: MakeModel, base: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapt(base)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it was trained on the base model"):
        merge_files(tmp_path / "other", adapter, tmp_path / "merged")


def test_files_have_the_identity_of_the_loaded_model(
    base: Path, release: Path, tmp_path: Path
) -> None:
    convert(release, tmp_path / "q3", get_recipe("q3"))
    for directory in (base, release, tmp_path / "q3"):
        assert identity_of(open_base(directory)) == base_identity(load_model(directory))


def test_only_the_chosen_experts_change(
    base: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapt(base)
    weights = adapter / "adapter_model.safetensors"
    chosen, every = [1, 4], load_file(weights)
    some = {k: v[chosen] if ".mlp.experts." in k else v for k, v in every.items()}
    save_file({k: v.contiguous() for k, v in some.items()}, weights)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    ids = {f"layers.{i}.mlp.experts": chosen for i in range(3)}
    config["auto_mapping"]["hot_experts"] = HotExperts.given(ids, 8).to_dict()
    file.write_text(json.dumps(config))
    merge_files(base, adapter, tmp_path / "merged")
    before, after = load_model(base), load_model(tmp_path / "merged")
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            one, other = getattr(old.mlp.experts, name), getattr(new.mlp.experts, name)
            changed = [e for e in range(8) if not torch.equal(one[e], other[e])]
            assert changed == chosen


def test_a_stopped_merge_goes_on_to_the_same_bytes(
    release: Path, adapt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapt(release)
    whole = merge_files(release, adapter, tmp_path / "whole", to="source", max_shard_size=100_000)
    real, calls = Target.finish, []

    def stop(self: Target, item: object, checksum: int) -> None:
        calls.append(item)
        if len(calls) == 40:
            raise KeyboardInterrupt
        real(self, item, checksum)  # type: ignore[arg-type]
        self.commit()

    monkeypatch.setattr(Target, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_files(release, adapter, tmp_path / "cut", to="source", max_shard_size=100_000)
    assert not (tmp_path / "cut" / "config.json").exists()
    monkeypatch.setattr(Target, "finish", real)
    with pytest.raises(ValueError, match="holds another merge"):
        merge_files(release, adapter, tmp_path / "cut", to="bfloat16", max_shard_size=100_000)
    again = merge_files(release, adapter, tmp_path / "cut", to="source", max_shard_size=100_000)
    assert again.to_dict() == whole.to_dict()
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "cut").iterdir()} == names
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Done is done: the same call says the same and writes nothing.
    stamp = (tmp_path / "cut" / "config.json").stat().st_mtime_ns
    assert (
        merge_files(
            release, adapter, tmp_path / "cut", to="source", max_shard_size=100_000
        ).to_dict()
        == whole.to_dict()
    )
    assert (tmp_path / "cut" / "config.json").stat().st_mtime_ns == stamp


def test_a_directory_with_other_files_is_left_alone(
    base: Path, adapt: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "letter.txt").write_text("x")
    with pytest.raises(ValueError, match="wanted an empty or new directory"):
        merge_files(base, adapt(base), output)
    assert [p.name for p in output.iterdir()] == ["letter.txt"]


# Bytes that a merge may add to a process, whatever the size of the model.
_LIMIT = 48 * 2**20


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(f"{key}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures it")
def test_memory_does_not_grow_with_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 32}
    for name, sizes in (("small", {}), ("large", wide)):
        with torch.device("meta"):
            model = make_model(**sizes)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(0.02)
        model.save_pretrained(tmp_path / name)
        tuned = attach_adapters(model, "all", 2)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(0.01)
        save_adapter(tuned, tmp_path / name / "adapter")
        del model, tuned
    size = sum(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    assert size > 1.5 * _LIMIT
    merge_files(tmp_path / "small", tmp_path / "small" / "adapter", tmp_path / "warm")
    # The system counts the highest mark anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = merge_files(tmp_path / "large", tmp_path / "large" / "adapter", tmp_path / "merged")
    assert _status("VmHWM") - before < _LIMIT
    assert result.peak_memory >= before
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), "pt") as file:
        some = file.get_slice("model.layers.1.mlp.experts.down_proj")
        assert some.get_shape() == [32, 256, 512]
        # 2 for the scale of rank 2 under alpha 4, twice 0.01 x 0.01.
        expected = torch.tensor(0.02).bfloat16().float() + 2 * 2 * 0.01 * 0.01
        assert bool((some[31] == expected.bfloat16()).all())
