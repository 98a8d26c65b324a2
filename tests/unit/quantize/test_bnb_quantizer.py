# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes around our experts: nothing stays wide unsaid, nothing is corrupted or cut off."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import quantize
from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.moe import Dsv4Experts
from quantize.convert import convert
from quantize.experts import StoredExperts

bnb = pytest.importorskip("bitsandbytes")
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
repacks = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="this processor does not make bitsandbytes repack"
)


@pytest.fixture(scope="module", params=["v4", "v41"])
def plain(request: pytest.FixtureRequest, tiny, tmp_path_factory) -> Path:
    """Plain weights of a model wide enough that bitsandbytes would repack its linear maps."""
    folder = tmp_path_factory.mktemp("plain") / request.param
    torch.manual_seed(0)
    model = tiny(request.param, torch.bfloat16, hidden_size=64, moe_intermediate_size=32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(plain, tmp_path_factory.mktemp("packed") / "fp4", quantize.get_recipe("fp4"))


@pytest.fixture(params=["plain", "packed"])
def source(request: pytest.FixtureRequest, plain: Path, packed: Path) -> Path:
    return {"plain": plain, "packed": packed}[request.param]


def load(directory: Path, kind: str | None = "nf4", **kwargs: object) -> Dsv4ForCausalLM:
    if kind is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**CONFIGS[kind])
    return Dsv4ForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


def linear_maps(model: torch.nn.Module) -> list[torch.nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [m for m in model.modules() if isinstance(m, kinds)]


def bare_linear() -> torch.nn.Module:
    out = bnb.nn.Linear4bit(512, 256, bias=False, compress_statistics=False, quant_type="nf4")
    out.weight = bnb.nn.Params4bit(
        torch.randn(256, 512), requires_grad=False, compress_statistics=False, quant_type="nf4",
        module=out,
    ).to("cpu")  # fmt: skip
    return out.eval()


def opened(linear: torch.nn.Module) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).clone()


# --- the defects of bitsandbytes, and what keeps them out ---------------------------------------


@repacks
def test_alone_it_saves_another_weight_after_an_evaluation() -> None:
    linear = bare_linear()
    before = opened(linear)
    with torch.no_grad():
        linear(torch.randn(3, 512))
    linear.state_dict()
    assert (opened(linear) - before).norm() / before.norm() > 0.1, "mended: the guard can go"


@repacks
def test_alone_it_drops_gradients_after_an_evaluation() -> None:
    linear = bare_linear()
    with torch.no_grad():
        linear(torch.randn(3, 512))
    x = torch.randn(3, 512, requires_grad=True)
    linear.train()(x).sum().backward()
    assert x.grad is None, "mended: the guard can go"


def test_guarded_it_keeps_weight_and_gradient() -> None:
    linear = bare_linear()
    before = opened(linear)
    quantize.bnb_quantizer.keep_unpacked(linear)
    with torch.no_grad():
        linear(torch.randn(3, 512))
    assert torch.equal(opened(linear), before)
    x = torch.randn(3, 512, requires_grad=True)
    linear.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(0).expand(3, -1), atol=1e-4, rtol=1e-5)


def test_every_4_bit_map_of_a_model_is_guarded(plain: Path, tmp_path: Path) -> None:
    model = load(plain)
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path, None)):
        assert linear_maps(each)
        assert not any(m.support_avx512bf16_for_cpu for m in linear_maps(each))


# --- a model ------------------------------------------------------------------------------------


def test_no_expert_stays_wide(source: Path) -> None:
    model = load(source)
    assert not any(isinstance(m, Dsv4Experts) for m in model.modules())
    experts = [m for m in model.modules() if isinstance(m, StoredExperts)]
    assert len(experts) == model.config.num_hidden_layers
    assert {m.layout.of(0).format("down_proj") for m in experts} == {"fp4"}
    assert model.is_loaded_in_4bit


def test_the_auto_class_leaves_experts_on_disk(packed: Path) -> None:
    config = BitsAndBytesConfig(**CONFIGS["nf4"])
    model = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, quantization_config=config, expert_memory="16KiB"
    )
    assert all(m.store for m in model.modules() if isinstance(m, StoredExperts))
    assert torch.equal(logits(model.eval()), logits(load(packed)))


def test_a_recipe_may_be_chosen_for_plain_experts(plain: Path) -> None:
    chosen = quantize.Recipe("mine", (("*.0.*", "fp8_rows32"), ("*", "fp4")))
    config = quantize.Dsv4BitsAndBytesConfig(CONFIGS["nf4"], recipe=chosen, round_experts=True)
    model = Dsv4ForCausalLM.from_pretrained(plain, quantization_config=config)
    experts = [m for m in model.modules() if isinstance(m, StoredExperts)]
    kinds = [m.layout.of(1).format("down_proj") for m in experts]
    assert kinds == ["fp8_rows32"] + ["fp4"] * (len(experts) - 1)


def test_plain_experts_become_the_records_that_convert_writes(plain: Path, packed: Path) -> None:
    assert torch.equal(logits(load(plain)), logits(load(packed)))


def test_what_stays_is_said_with_bytes(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        model = load(plain)
    assert "stays as stored" in caplog.text
    assert "experts in packs" in caplog.text
    counted = sum(m.packed.nbytes for m in model.modules() if isinstance(m, StoredExperts))
    assert quantize.sizes.format_size(counted) in caplog.text


@pytest.mark.parametrize("kind", CONFIGS)
def test_scales_beside_the_weights_are_counted(
    plain: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    model = load(plain, kind)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    beside = 0
    for linear in linear_maps(model):
        groups = linear.weight.numel() * 2 // 64
        if kind == "int8":
            beside += 4 * linear.out_features
        elif kind == "nf4 twice":
            # A byte for each group, a scale for 256 of them, two tables and the mean.
            beside += groups + 4 * -(-groups // 256) + 4 * (16 + 256 + 1)
        else:
            beside += 4 * (groups + 16)
    assert f"and {quantize.sizes.format_size(beside)} of scales and tables" in caplog.text
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    report = model.memory_report()
    assert sum(sum(tiers.values()) for tiers in report.values()) == own + beside
    logits(model)
    assert model.memory_report() == report


@pytest.mark.parametrize(
    ("source", "kind"),
    [*(("plain", kind) for kind in CONFIGS), ("packed", "nf4")],
    indirect=["source"],
)
def test_it_saves_and_loads_bit_for_bit_after_an_evaluation(
    source: Path, kind: str, tmp_path: Path
) -> None:
    model = load(source, kind)
    model.save_pretrained(tmp_path / "before")
    wanted = logits(model)
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(model), wanted)
    for path in (tmp_path / "before").glob("*.safetensors"):
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()
    again = load(tmp_path / "after", None)
    assert len(linear_maps(again)) == len(linear_maps(model))
    assert torch.equal(logits(again), wanted)
    on_disk = load(tmp_path / "after", None, expert_memory="64KiB")
    assert torch.equal(logits(on_disk), wanted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_stops_no_gradient(plain: Path, kind: str) -> None:
    found = []
    for evaluated in (False, True):
        model = load(plain, kind)
        if evaluated:
            logits(model)
        model.train()
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        ids = torch.arange(3, 43)[None]
        model(ids, labels=ids).loss.backward()
        found.append(embedding.grad.clone())
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_opening_it_again_gives_plain_weights(plain: Path, tmp_path: Path) -> None:
    load(plain).save_pretrained(tmp_path)
    wide = load(tmp_path, None, dequantize=True)
    assert not linear_maps(wide)
    assert any(isinstance(m, Dsv4Experts) for m in wide.modules())
    torch.testing.assert_close(logits(wide), logits(load(tmp_path, None)), atol=1e-4, rtol=1e-4)


# --- what cannot be ------------------------------------------------------------------------------


def test_without_quantize_it_is_refused_with_the_experts_counted(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, quantize.bnb_quantizer.METHOD)
    layers = 4 if plain.name == "v4" else 7
    wanted = f"{layers * 4 * 3 * 64 * 32} weights of routed experts would stay.*`import quantize`"
    with pytest.raises(ValueError, match=wanted):
        load(plain)


def test_a_second_time_is_refused(plain: Path, tmp_path: Path) -> None:
    load(plain).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized by bitsandbytes already"):
        load(tmp_path)


def test_a_release_is_widened_first_or_refused(golden_dir: Path) -> None:
    release = golden_dir / "v4_a_fp8"
    with pytest.raises(NotImplementedError, match="convert it first"):
        load(release)
    model = load(release, dequantize=True)
    assert linear_maps(model)
    assert not any(isinstance(m, Dsv4Experts) for m in model.modules())


@pytest.mark.parametrize("change", ["missing", "not expected"])
def test_a_broken_directory_is_refused(plain: Path, tmp_path: Path, change: str) -> None:
    load(plain).save_pretrained(tmp_path / "saved")
    folder = Path(shutil.copytree(tmp_path / "saved", tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.other"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 {change} \(model\.norm\."):
        load(folder, None)
