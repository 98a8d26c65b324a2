# SPDX-License-Identifier: Apache-2.0
"""A recipe is data: ordered patterns, known formats, the same after config.json."""

import json

import pytest
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from quantize import Dsv4QuantizationConfig, Dsv4Quantizer, Recipe, get_recipe
from quantize.pack import PackLayout

NAME = "model.layers.3.mlp.experts"


def test_the_first_pattern_that_matches_decides() -> None:
    recipe = Recipe("mine", (("*.layers.3.*.down_proj", "fp8_block32"), ("*.mlp.experts.*", "fp4")))
    assert recipe.format_of(f"{NAME}.down_proj") == "fp8_block32"
    assert recipe.format_of(f"{NAME}.gate_up_proj") == "fp4"
    assert recipe.format_of("model.layers.3.mlp.gate.weight") is None
    layout = PackLayout.build(NAME, 2, 64, 32, recipe.format_of)
    assert layout.of(1).formats == (("gate_up_proj", "fp4"), ("down_proj", "fp8_block32"))


def test_fp4_packs_every_expert_and_nothing_else() -> None:
    recipe = get_recipe("fp4")
    assert recipe.format_of("mtp.0.mlp.experts.down_proj") == "fp4"
    for name in ("lm_head.weight", "model.layers.0.mlp.shared_experts.up_proj.weight"):
        assert recipe.format_of(name) is None


@pytest.mark.parametrize(
    ("name", "gate_up", "down"),
    [("q3", "trellis3", "trellis3.5"), ("q2", "trellis2", "trellis2.5")],
)
def test_named_recipes_give_down_projections_half_a_bit_more(
    name: str, gate_up: str, down: str
) -> None:
    recipe = get_recipe(name)
    for expert in ("", ".17"):
        assert recipe.format_of(f"{NAME}{expert}.gate_up_proj") == gate_up
        assert recipe.format_of(f"{NAME}{expert}.down_proj") == down
    assert recipe.format_of("model.layers.3.mlp.shared_experts.down_proj.weight") is None
    assert recipe.format_of("model.layers.3.mlp.gate.weight") is None


def test_thousands_of_names_keep_their_place_among_wildcards() -> None:
    names = [f"model.layers.3.mlp.experts.{e}.down_proj" for e in range(5000)]
    rules = (
        (names[0], "int4"),
        ("*.experts.1?.down_proj", "int3"),
        *((name, "int2") for name in names),
        (names[20], "int4"),
        ("*.mlp.experts.*", "fp4"),
    )
    recipe = Recipe("mine", rules)
    found = [recipe.format_of(name) for name in names]
    assert found[0] == "int4"
    assert found[10:20] == ["int3"] * 10
    assert set(found[1:10] + found[20:]) == {"int2"}
    assert recipe.format_of("model.layers.4.mlp.experts.0.down_proj") == "fp4"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"wanted a recipe out of \['fp4', 'q2', 'q3'\], got 'fp3'"
    ):
        get_recipe("fp3")


def test_an_unknown_format_is_refused_when_the_recipe_is_made() -> None:
    with pytest.raises(ValueError, match=r"wanted a weight format .* got 'fp3'"):
        Recipe("mine", (("*", "fp3"),))


def test_a_recipe_that_skips_experts_is_refused() -> None:
    recipe = Recipe("mine", (("*.gate_up_proj", "fp4"),))
    with pytest.raises(ValueError, match=f"wanted a format for {NAME}.0.down_proj"):
        PackLayout.build(NAME, 2, 64, 32, recipe.format_of)


@pytest.mark.parametrize("bad", [{}, {"name": "a"}, {"name": "a", "rules": [["*"]]}, 3])
def test_a_malformed_recipe_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"recipe: wanted|not enough values"):
        Recipe.from_dict(bad)


def test_a_recipe_survives_json() -> None:
    recipe = get_recipe("fp4")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_wishes_of_a_run_are_not_saved() -> None:
    data = {"quant_method": "dsv4", "recipe": get_recipe("fp4").to_dict(), "fmt": "e4m3",
            "weight_block_size": [128, 128]}  # fmt: skip
    config = Dsv4QuantizationConfig(**data, expert_memory="2MiB", engram_memory=7)
    assert (config.expert_memory, config.engram_memory) == (2 * 2**20, 7)
    saved = config.to_dict()
    assert data.items() <= saved.items()
    assert not {"expert_memory", "engram_memory", "dequantize"} & set(saved)


def test_a_nonsensical_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted a size such as 2GiB"):
        Dsv4QuantizationConfig(recipe=get_recipe("fp4"), expert_memory="lots")


def test_transformers_finds_the_method() -> None:
    data = {"quant_method": "dsv4", "recipe": get_recipe("fp4").to_dict()}
    assert isinstance(AutoQuantizationConfig.from_dict(dict(data)), Dsv4QuantizationConfig)
    quantizer = AutoHfQuantizer.from_config(dict(data))
    assert isinstance(quantizer, Dsv4Quantizer)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
