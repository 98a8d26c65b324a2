# SPDX-License-Identifier: Apache-2.0
"""Bytes of a training step follow from the configuration; what does not fit names what would."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune import attach_adapters
from finetune.adapters import count_adapters
from finetune.cli import app, run
from finetune.known_models import MODELS, find_model
from finetune.planning import (
    Settings,
    activation_bytes,
    active_parameters,
    adapter_parameters,
    plan_training,
)
from modeling_dsv4 import Dsv4Config
from quantize.config import get_recipe
from quantize.inventory import model_sizes, part_bytes
from quantize.placement import Machine

GB = 10**9
BOX = Machine(192 * GB, 32 * GB)


@pytest.mark.parametrize("name", MODELS)
def test_names_stand_for_the_releases(name: str, golden_dir: Path) -> None:
    config, recipe = find_model(f"DeepSeek-{name.title()}")
    release = Dsv4Config.from_pretrained(golden_dir / "configs" / f"{name}.json")
    bytes_of = [part_bytes(c) for c in (config, release)]
    # Vision is carried by files alone.
    assert bytes_of[0] | {"vision": 0} == bytes_of[1] | {"vision": 0}
    assert recipe == get_recipe("fp4")
    for field in ("hc_mult", "compress_ratios", "kv_source_layer_ids", "index_topk", "head_dim"):
        assert getattr(config, field) == getattr(release, field)


def test_other_names_are_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"or give one of v4-flash, v4-pro, v4\.1-flash"):
        find_model("v3")


@pytest.mark.parametrize(
    ("kind", "preset"), [("v4", "attention"), ("v41", "attention+shared"), ("v4", "all")]
)
def test_adapters_have_the_parameters_that_are_planned(
    tiny: Callable[..., Any], kind: str, preset: str
) -> None:
    model = tiny(kind)
    settings = Settings(preset=preset, rank=6, expert_rank=3)
    planned = adapter_parameters(model.config, settings)
    adapted = attach_adapters(model, preset, 6, expert_rank=3)
    assert count_adapters(adapted)["parameters"] == planned


def test_v4_flash_is_what_its_paper_says() -> None:
    config, _ = find_model("v4-flash")
    # 13B of 284B parameters are active.
    assert active_parameters(config) == pytest.approx(13e9, rel=0.05)
    assert adapter_parameters(config, Settings(rank=24)) > 631e6
    assert 1.2e6 < activation_bytes(config, 1) < 1.5e6


@pytest.mark.parametrize("name", ["v4-flash", "v4.1-flash"])
def test_parts_add_up_and_experts_are_placed(name: str) -> None:
    config, recipe = find_model(name)
    machine = Machine(768 * GB, 96 * GB)
    plan = plan_training(config, recipe, machine, Settings())
    assert plan.problem is None
    sizes = model_sizes(config, recipe, 0)
    placed = sum(part.nbytes for part in plan.parts if part.name.startswith("routed experts,"))
    assert placed == sizes.experts
    assert plan.total("vram") <= 96 * GB
    assert plan.total("ram") <= 768 * GB
    named = {part.name: part.nbytes for part in plan.parts}
    assert named["everything but routed experts"] == sizes.dense
    assert named["adapters and gradients"] == 8 * plan.adapter_parameters
    row = 16384 * config.hidden_size * 2
    assert named["stream checkpoints"] == config.num_hidden_layers * row * (config.hc_mult + 1)


def test_experts_are_counted_once_a_direction_over_each_link() -> None:
    config, recipe = find_model("v4-flash")
    sizes = model_sizes(config, recipe, 0)
    plan = plan_training(config, recipe, BOX, Settings())
    share = 1 - plan.placed.experts_in["vram"] / sizes.num_experts
    assert plan.expert_bytes["link"] == pytest.approx(2 * share * sizes.experts)
    assert plan.expert_bytes["disk"] == 0
    assert plan.limit == "compute"
    assert plan.tokens_per_second == pytest.approx(16384 / plan.seconds["compute"])
    small = plan_training(config, recipe, Machine(48 * GB, 32 * GB), Settings(tokens=4096))
    on_disk = small.placed.experts_in["disk"] / sizes.num_experts
    assert small.expert_bytes["disk"] == pytest.approx(2 * on_disk * sizes.experts)
    assert small.limit == "disk"
    # Few tokens do not hit every expert.
    few = plan_training(config, recipe, BOX, Settings(tokens=16, micro_tokens=16))
    assert few.expert_bytes["link"] < 0.35 * plan.expert_bytes["link"]


def test_little_memory_reads_layers_again() -> None:
    config, recipe = find_model("v4-flash")
    settings = Settings(checkpoint_memory=10 * GB)
    tight, wide = (plan_training(config, recipe, BOX, s) for s in (settings, Settings()))
    assert (wide.group, wide.extra_layer_reads) == (1, 0)
    assert tight.group > 1
    more = 1 + tight.extra_layer_reads / (2 * config.num_hidden_layers)
    shares = [1 - p.placed.experts_in["vram"] / 11008 for p in (tight, wide)]
    wanted = wide.expert_bytes["link"] * more * shares[0] / shares[1]
    assert tight.expert_bytes["link"] == pytest.approx(wanted)


def test_what_does_not_fit_names_settings_that_do() -> None:
    config, recipe = find_model("v4-flash")
    machine = Machine(64 * GB, 16 * GB)
    plan = plan_training(config, recipe, machine, Settings())
    assert plan.problem is not None
    assert "of VRAM beside up to 4 GB for what else runs, got 16 GB" in plan.problem
    assert plan.nearest
    for way in plan.nearest:
        option, value = way.split()
        name = option.removeprefix("--")
        settings, box = Settings(), machine
        if name in ("ram", "vram"):
            box = replace(box, **{name: int(float(value.removesuffix("GB")) * GB)})
        else:
            kind = type(getattr(settings, name))
            settings = replace(settings, **{name: kind(value)})
        assert plan_training(config, recipe, box, settings).problem is None, way


def test_without_a_gpu_all_of_it_is_host_memory() -> None:
    config, recipe = find_model("v4-flash")
    plan = plan_training(config, recipe, Machine(256 * GB), Settings(tokens=2048))
    assert {part.tier for part in plan.parts} == {"ram"}
    assert "link" not in plan.seconds
    small = plan_training(config, recipe, Machine(16 * GB), Settings(tokens=2048))
    assert small.problem is not None
    assert "RAM" in small.problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 0}, "tokens: wanted at least 1"),
        ({"preset": "full"}, "a plan knows attention"),
        ({"optimizer": "adam"}, "optimizer: wanted one of sgd"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_the_program_shows_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "v4-flash", "--vram", "32GB", "--ram", "192GB", "--disk", "12GB/s"]
    assert run(lambda: app([*call, "--json"])) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["derived"]
    assert data["fits"]
    assert data["limit"] == "compute"
    assert data["machine"]["disk_rate"] == 12 * GB
    assert run(lambda: app(call)) == 0
    assert "derived from sizes and rates, not measured: at most" in capsys.readouterr().out
    assert run(lambda: app(["plan", "v4-pro", "--vram", "32GB", "--ram", "192GB"])) == 1
    error = capsys.readouterr().err
    assert "does not fit" in error
    assert "would fit: --vram" in " ".join(error.split())
