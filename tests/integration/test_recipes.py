# SPDX-License-Identifier: Apache-2.0
"""Every format and every named recipe comes back: convert, load, generate, save, load; bit for bit.

Formats and recipes come from their registries, so that a new one is tested by being there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantize
from modeling_dsv4 import Dsv4ForCausalLM, formats
from quantize.convert import convert
from quantize.pack import PackFile

FORMATS = sorted(formats._FORMATS)
NANO = Path(__file__).parents[2] / "models" / "nano-v41"
WIDE = {"hidden_size": 64, "moe_intermediate_size": 64, "vocab_size": 96}
Load = Callable[..., Dsv4ForCausalLM]


@pytest.fixture(scope="module")
def tiny_v4(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V4 whose experts are as wide as any format wants them."""
    folder = tmp_path_factory.mktemp("tiny") / "v4"
    torch.manual_seed(0)
    tiny("v4", torch.bfloat16, **WIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(
    tiny_v4: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, quantize.Recipe], Path]:
    """`converted(source, recipe)`, in shards of 100 kB, made once."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def make(source: Path, recipe: quantize.Recipe) -> Path:
        key = source.name, recipe.name
        if key not in made:
            target = folder / "-".join(key)
            if "nf4" in recipe.name or "bnb" in recipe.name:
                pytest.importorskip("bitsandbytes")
            made[key] = convert(source, target, recipe, max_shard_size=100_000)
        return made[key]

    return make


def uniform(name: str) -> quantize.Recipe:
    return quantize.Recipe(name, (("*.mlp.experts.*", name),))


def load(directory: Path, **kwargs: Any) -> Dsv4ForCausalLM:
    return Dsv4ForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


def continuation(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 12)[None]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        pad_token_id=1,
    )  # fmt: skip


def largest_record(directory: Path) -> int:
    return max(PackFile.open(p).layout.largest for p in directory.glob("experts-*.safetensors"))


def comes_back(directory: Path, tmp_path: Path) -> None:
    """Resident and from disk, before and after saving: one model."""
    few = 2 * largest_record(directory)
    resident = load(directory)
    wanted, text = logits(resident), continuation(resident)
    assert wanted.isfinite().all()
    ways = {"resident": resident, "store": load(directory, expert_memory=few)}
    for way, model in ways.items():
        assert torch.equal(logits(model), wanted), way
        assert torch.equal(continuation(model), text), way
        model.save_pretrained(tmp_path / way, max_shard_size="100KB")
        assert len(list((tmp_path / way).glob("model-*.safetensors"))) > 1
        for budget in ({}, {"expert_memory": few}):
            assert torch.equal(logits(load(tmp_path / way, **budget)), wanted), (way, budget)
    for pack in directory.glob("experts-*.safetensors"):
        saved = [(tmp_path / way / pack.name).read_bytes() for way in ways]
        assert saved == [pack.read_bytes()] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_experts_in_every_format_come_back(
    tiny_v4: Path, converted: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    comes_back(converted(tiny_v4, uniform(name)), tmp_path)


# The nano's experts are 50 times a tiny model's, and rounding them is most of the test.
PAIRS = [*(("tiny V4", recipe) for recipe in sorted(quantize.RECIPES)), ("nano V4.1", "q2")]


@pytest.mark.parametrize(("source", "recipe"), PAIRS)
def test_every_named_recipe_comes_back(
    tiny_v4: Path, converted: Callable[..., Path], tmp_path: Path, recipe: str, source: str
) -> None:
    folder = {"tiny V4": tiny_v4, "nano V4.1": NANO}[source]
    comes_back(converted(folder, quantize.get_recipe(recipe)), tmp_path)


def test_bitsandbytes_numbers_come_back_in_head_and_embedding(
    tiny_v4: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    rules = (
        ("lm_head.weight", "nf4"),
        ("model.embed_tokens.weight", "int8_bnb"),
        ("*.mlp.experts.*", "fp4"),
    )
    directory = converted(tiny_v4, quantize.Recipe("nf4-head", rules))
    comes_back(directory, tmp_path)
    head = load(directory).lm_head
    wide = load(tiny_v4).lm_head.weight
    kept = formats.get_format("nf4").pack(wide)
    assert all(torch.equal(head.parts()[k], kept[k]) for k in kept)


@pytest.mark.parametrize("name", FORMATS)
def test_widened_experts_are_what_the_format_holds(
    tiny_v4: Path, converted: Callable[..., Path], name: str
) -> None:
    directory, found = converted(tiny_v4, uniform(name)), formats.get_format(name)
    plain, wide = load(tiny_v4), load(directory, dequantize=True)
    for a, b in zip(plain.model.layers, wide.model.layers, strict=True):
        down = a.mlp.experts.down_proj.detach()
        kept = found.unpack(found.pack(down[1]), torch.float32)
        error = (b.mlp.experts.down_proj[1] - down[1]).norm() / down[1].norm()
        assert error <= 1.02 * (kept - down[1]).norm() / down[1].norm() + 1e-6


@pytest.mark.parametrize("recipe", sorted(quantize.RECIPES))
def test_the_dense_part_may_lie_on_disk(
    tiny_v4: Path, converted: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    directory = converted(tiny_v4, quantize.get_recipe(recipe))
    cpu = ["model.embed_tokens", "model.norm", "model.hc_head", "lm_head", "model.layers.0"]
    place = dict.fromkeys(cpu, "cpu") | {f"model.layers.{i}": "disk" for i in (1, 2, 3)}
    model = load(directory, device_map=place, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].self_attn.q_a_proj.weight.is_meta
    wanted = logits(load(directory))
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("recipe", sorted(quantize.RECIPES))
def test_a_skeleton_on_meta_is_the_loaded_model_without_numbers(
    tiny_v4: Path, converted: Callable[..., Path], recipe: str
) -> None:
    directory = converted(tiny_v4, quantize.get_recipe(recipe))
    skeleton, loaded = load(directory, device_map="meta"), load(directory)
    assert all(p.is_meta for p in skeleton.parameters())
    for (a, p), (b, q) in zip(skeleton.named_parameters(), loaded.named_parameters(), strict=True):
        assert (a, p.shape, p.dtype) == (b, q.shape, q.dtype)


def test_a_recipe_is_data_in_the_config_and_stays_so(
    tiny_v4: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    directory = converted(tiny_v4, uniform("fp8_rows32"))
    load(directory).save_pretrained(tmp_path)
    for folder in (directory, tmp_path):
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["recipe"] == uniform("fp8_rows32").to_dict()
    copied = Path(shutil.copytree(tmp_path, tmp_path.parent / "elsewhere"))
    assert torch.equal(logits(load(copied)), logits(load(directory)))
