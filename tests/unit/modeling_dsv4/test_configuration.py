# SPDX-License-Identifier: Apache-2.0
"""Configurations: translated from every foreign form, validated, and stable through saving."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config as NativeConfig
from transformers import PreTrainedConfig

from modeling_dsv4.configuration_dsv4 import DeepseekV41Config, Dsv4Config, translate_config
from modeling_dsv4.official_export import official_config

RELEASES = ("v4-flash", "v4-flash-0731", "v4-pro", "v4-pro-0813", "v4.1-flash")
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "compress_ratios": [0, 4, 128, 4, 128],
}
TINY_V41: dict[str, Any] = TINY | {
    "compress_ratios": [0, 2, 2, 1, 1],
    "compressor_overlap_ratio": None,
    "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 4],
    "index_key": "latent",
    "hc_single_pass": True,
    "num_hash_layers": 0,
}


@pytest.fixture
def release(golden_dir: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((golden_dir / "configs" / f"{request.param}.json").read_text())


def _read(golden_dir: Path, name: str) -> Dsv4Config:
    return Dsv4Config.from_pretrained(golden_dir / "configs" / f"{name}.json")


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}


def test_the_default_is_v4_flash_without_its_draft(golden_dir: Path) -> None:
    flash, default = _plain(_read(golden_dir, "v4-flash")), _plain(Dsv4Config())
    differing = {name for name in flash if flash[name] != default.get(name)}
    release_only = {"architectures", "dtype", "official_config", "quantization_config"}
    assert differing == release_only | {"draft_kind", "num_draft_layers"}


def test_v4_flash_is_translated_to_its_layer_mix(golden_dir: Path) -> None:
    config = _read(golden_dir, "v4-flash")
    assert config.compress_ratios == [0, 0] + [4, 128] * 20 + [4]
    assert config.kv_source_layer_ids == list(range(2, 43))
    assert config.index_source_layer_ids == list(range(2, 43, 2))
    assert [config.index_source(i) for i in (0, 2, 3, 42)] == [None, 2, None, 42]
    assert [config.kv_source(i) for i in (0, 2, 3, 42)] == [None, 2, 3, 42]
    assert config.yarn == {
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    }
    assert (config.hc_single_pass, config.q_head_norm, config.router_weight_eps) == (False, True, 0)


def test_v41_is_unnested_and_keeps_its_tiny_epsilon(golden_dir: Path) -> None:
    config = _read(golden_dir, "v4.1-flash")
    assert config.rms_norm_eps == 1e-20
    assert type(config.rms_norm_eps) is float
    assert config.compress_ratios == [0, 0] + [2] * 18 + [1] * 20
    assert [config.kv_source(i) for i in (1, 2, 7, 19, 39)] == [None, 2, 2, 14, 20]
    assert [config.index_source(i) for i in (7, 20, 23, 24, 39)] == [2, 20, 20, 24, 36]
    assert (config.pad_token_id, config.image_token_id) == (2, 129264)
    assert (config.hc_single_pass, config.router_bias_vl, config.q_head_norm) == (True, True, False)
    assert config.vision_config["num_hidden_layers"] == 32


@pytest.mark.parametrize(
    ("name", "kind", "stages"),
    [
        ("v4-flash", "mtp", 1),
        ("v4-flash-0731", "dspark", 3),
        ("v4-pro", "mtp", 1),
        ("v4-pro-0813", "dspark", 3),
        ("v4.1-flash", "dspark", 3),
    ],
)
def test_draft_stages_are_the_tail_of_the_ratios(
    golden_dir: Path, name: str, kind: str, stages: int
) -> None:
    config = _read(golden_dir, name)
    assert (config.draft_kind, config.num_draft_layers) == (kind, stages)
    assert len(config.compress_ratios) == config.num_hidden_layers


@pytest.mark.parametrize("name", RELEASES)
def test_the_storage_keeps_its_fields_under_our_own_method(golden_dir: Path, name: str) -> None:
    quantization = _read(golden_dir, name).quantization_config
    assert quantization["quant_method"] == "dsv4_release"
    assert quantization["expert_dtype"] == "fp4"
    assert quantization["weight_block_size"] == ([32, 32] if "4.1" in name else [128, 128])
    assert quantization["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("name", RELEASES)
def test_every_way_of_saving_and_copying_keeps_a_configuration(
    golden_dir: Path, tmp_path: Path, name: str
) -> None:
    config = _read(golden_dir, name)
    config.save_pretrained(tmp_path)
    again = Dsv4Config.from_pretrained(tmp_path)
    copies = (
        again,
        copy.copy(config),
        copy.deepcopy(config),
        Dsv4Config.from_json_file(tmp_path / "config.json"),
        Dsv4Config.from_dict(config.to_dict()),
        Dsv4Config(**config.to_dict()),
    )
    for other in copies:
        assert _plain(other) == _plain(config)
    assert config.to_diff_dict()["model_type"] == "dsv4"
    # What the Trainer does when it resumes: the base class reads the file.
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").hidden_size > 0


@pytest.mark.parametrize("name", RELEASES)
def test_the_official_file_is_kept_verbatim(golden_dir: Path, tmp_path: Path, name: str) -> None:
    official = json.loads((golden_dir / "configs" / f"{name}.json").read_text())
    config = _read(golden_dir, name)
    config.save_pretrained(tmp_path)
    assert official_config(Dsv4Config.from_pretrained(tmp_path)) == official


@pytest.mark.parametrize("name", RELEASES)
def test_an_official_file_composed_from_fields_means_the_same(golden_dir: Path, name: str) -> None:
    config = _read(golden_dir, name)
    official, config.official_config = config.official_config, None
    composed = official_config(config)
    nested = composed.get("text_config", composed), official.get("text_config", official)
    for ours, theirs in (nested, (composed, official)):
        differing = {k for k in set(ours) | set(theirs) if ours.get(k) != theirs.get(k)}
        extra = {"initializer_range", "use_cache", "tie_word_embeddings", "transformers_version"}
        assert differing <= extra | {"text_config"}


def test_a_changed_model_no_longer_writes_the_original_file(golden_dir: Path) -> None:
    config = _read(golden_dir, "v4-flash")
    config.n_routed_experts = 160
    assert official_config(config)["n_routed_experts"] == 160
    del config.quantization_config
    assert "quantization_config" not in official_config(config)
    assert "expert_dtype" not in official_config(config)


def test_a_mixture_that_no_release_has_is_not_written_as_one() -> None:
    with pytest.raises(ValueError, match="q_head_norm"):
        official_config(Dsv4Config(**TINY, q_head_norm=False))


def test_what_others_hang_on_a_configuration_is_not_written(tmp_path: Path) -> None:
    config = Dsv4Config()
    config.layer_norm_epsilon = 1.0
    config.save_pretrained(tmp_path)
    again = Dsv4Config.from_pretrained(tmp_path)
    assert not hasattr(again, "layer_norm_epsilon")
    # And nothing else is left out.
    assert set(config.to_dict()) == set(PreTrainedConfig.to_dict(Dsv4Config()))


def test_a_plain_configuration_has_no_quantization_field() -> None:
    config = Dsv4Config(**TINY, quantization_config=None)
    assert not hasattr(config, "quantization_config")
    assert "quantization_config" not in config.to_dict()


def test_expert_aliases_read_and_write_the_same_field() -> None:
    config = Dsv4Config(**{**TINY, "n_routed_experts": 8}, num_local_experts=16)
    assert (config.n_routed_experts, config.num_experts, config.num_local_experts) == (16,) * 3
    assert "num_experts" not in config.to_dict()
    assert config.router_aux_loss_coef == 0.0


def test_the_text_configuration_is_the_configuration_itself(golden_dir: Path) -> None:
    config = _read(golden_dir, "v4.1-flash")
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config


def test_the_subclass_of_the_auto_classes_translates_a_raw_file(golden_dir: Path) -> None:
    official = json.loads((golden_dir / "configs" / "v4.1-flash.json").read_text())
    config = DeepseekV41Config.from_dict(official, name_or_path="somewhere")
    assert type(config) is DeepseekV41Config
    assert config.kv_source_layer_ids == [2, 8, 14, 20]
    assert config.to_dict()["model_type"] == "dsv4"


def test_draft_stages_found_in_the_files_override_the_claim(golden_dir: Path) -> None:
    config = _read(golden_dir, "v4-flash")
    config.set_draft_layers(0)
    assert (config.draft_kind, config.num_draft_layers) == (None, 0)
    config = _read(golden_dir, "v4-flash-0731")
    config.set_draft_layers(3)
    assert config.draft_kind == "dspark"


def test_two_draft_stages_without_dspark_fields_are_refused(golden_dir: Path) -> None:
    with pytest.raises(ValueError, match="one MTP block"):
        _read(golden_dir, "v4-flash").set_draft_layers(2)


def test_engram_rows_are_the_sum_of_the_generated_primes() -> None:
    engram = {"engram_layer_ids": [1], "engram_vocab_size": 20, "engram_n_heads": 2}
    config = Dsv4Config(**TINY_V41, **engram, engram_num_embeddings=[999])
    # Orders 2, 3 and 4 take the next two primes each: 23 29, 31 37, 41 43.
    assert config.engram_num_embeddings == [23 + 29 + 31 + 37 + 41 + 43]


def _native(**changes: Any) -> NativeConfig:
    fields = {k: v for k, v in TINY.items() if k != "compress_ratios"}
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    layers = {"layer_types": [kinds[i] for i in (0, 1, 2, 1, 2)], "mlp_layer_types": ["moe"] * 5}
    return NativeConfig(**(fields | layers | changes))


def _saved(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_a_file_of_transformers_own_v4_is_translated(tmp_path: Path) -> None:
    native = _native(mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe", "moe"])
    native.save_pretrained(tmp_path)
    config = Dsv4Config.from_pretrained(tmp_path)
    assert config.compress_ratios == TINY["compress_ratios"]
    assert config.num_hash_layers == 2
    assert config.yarn is None
    assert config.qk_rope_head_dim == 8
    assert config.router_aux_loss_coef == 0.0
    assert config.official_config is None
    assert official_config(config)["compress_ratios"] == TINY["compress_ratios"]


def test_nested_rotary_parameters_give_both_bases_and_yarn(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    native = _native(rope_parameters=yarn, rope_theta=500.0, compress_rope_theta=7000.0)
    native.save_pretrained(tmp_path)
    config = Dsv4Config.from_pretrained(tmp_path)
    assert (config.rope_theta, config.compress_rope_theta) == (500.0, 7000.0)
    assert config.yarn == {
        "factor": 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    }


def test_other_compress_rates_keep_the_overlap_with_the_sparse_layers(tmp_path: Path) -> None:
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 32}
    config = Dsv4Config(**translate_config(_saved(_native(compress_rates=rates), tmp_path)))
    assert config.compress_ratios == [0, 8, 32, 8, 32]
    assert config.compressor_overlap_ratio == 8
    assert config.index_source_layer_ids == [1, 3]


@pytest.mark.parametrize("release", ["v4-flash"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_attention_heads": 4}, "linear_attention_heads"),
        ({"layer_types": ["full_attention"] * 43}, "layer_types"),
        ({"compress_ratios": [0, 0, 7] + [4] * 41}, "compress_ratios among"),
        ({"compress_ratios": [4] * 20}, "at least num_hidden_layers 43"),
        ({"compress_ratios": [4] * 43 + [128]}, "zeros in compress_ratios after"),
        ({"compress_ratios": None}, "compress_ratios"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rotary scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1}}, "rope_scaling.mscale"),
        ({"quantization_config": "fp8"}, "quantization_config to be a mapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method fp8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ({"expert_dtype": "int3"}, "expert_dtype"),
    ],
)
def test_a_release_file_with_something_else_in_it_is_refused(
    release: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Dsv4Config.from_dict(release | change)


@pytest.mark.parametrize("release", ["v4.1-flash"], indirect=True)
def test_an_unknown_field_inside_the_text_configuration_is_named(release: dict[str, Any]) -> None:
    release["text_config"]["short_conv_kernel"] = 4
    with pytest.raises(ValueError, match=r"text_config\.short_conv_kernel"):
        Dsv4Config.from_dict(release)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 5}, "layer_types among"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe"]}, "hash_moe layers to come"),
        ({"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types among"),
        ({"compress_rates": {}, "layer_types": None}, "compress_ratios or layer_types"),
    ],
)
def test_a_file_of_transformers_with_other_layer_kinds_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        translate_config(_saved(_native(), tmp_path) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"banana": 1}, "banana"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hc_single_pass": 1}, "hc_single_pass"),
        ({"qk_rope_head_dim": 7}, "even qk_rope_head_dim"),
        ({"qk_rope_head_dim": 34}, "head_dim 32"),
        ({"qk_rope_head_dim": 18}, "index_head_dim 16"),
        ({"o_groups": 3}, "divisible by o_groups"),
        ({"num_experts_per_tok": 5}, "n_routed_experts 4"),
        ({"num_hash_layers": 6}, "num_hash_layers"),
        ({"compress_ratios": [0, 4]}, "each of the 5 layers"),
        ({"compress_ratios": [0, 4, 128, 4, -1]}, "integers >= 0"),
        ({"kv_source_layer_ids": [3, 1, 2, 4]}, "ascending"),
        ({"kv_source_layer_ids": [1, 2, 3, 9]}, "below 5"),
        ({"kv_source_layer_ids": [0, 1, 2, 3, 4]}, "ratio > 0"),
        ({"kv_source_layer_ids": [2, 3, 4], "index_source_layer_ids": [3]}, "at or below"),
        ({"kv_source_layer_ids": [1, 3], "index_source_layer_ids": [1]}, "to have the ratio 4"),
        ({"candidate_source_layer_id": 2}, "candidate_source_layer_id"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"draft_kind": "mtp"}, "num_draft_layers"),
        ({"draft_kind": "dspark", "num_draft_layers": 3}, "dspark_block_size"),
        ({"draft_kind": "medusa", "num_draft_layers": 1}, "draft_kind"),
        ({"quantization_config": {"weight_block_size": [32, 32]}}, "quant_method"),
        (
            {"quantization_config": {"quant_method": "dsv4_release", "weight_block_size": [32]}},
            "weight_block_size",
        ),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Dsv4Config(**(TINY | change))


def test_latent_index_keys_need_their_source_among_the_index_sources() -> None:
    assert Dsv4Config(**TINY_V41).index_source(2) == 1
    with pytest.raises(ValueError, match="layer 3 to make the index keys of layer 4"):
        Dsv4Config(**(TINY_V41 | {"index_source_layer_ids": [1, 4]}))


def test_a_source_without_selection_is_attended_in_full() -> None:
    config = Dsv4Config(**(TINY_V41 | {"index_source_layer_ids": [1]}))
    assert [config.index_source(i) for i in range(5)] == [None, 1, 1, None, None]


def test_the_dtype_of_the_file_is_the_dtype_of_the_configuration(golden_dir: Path) -> None:
    assert _read(golden_dir, "v4-flash").dtype is torch.bfloat16
    assert _read(golden_dir, "v4.1-flash").dtype is torch.bfloat16
