# SPDX-License-Identifier: Apache-2.0
"""Release formats through transformers' own loading and saving."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from modeling_dsv4 import hf_quantizer
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.hf_quantizer import (
    RELEASE_METHOD,
    ReleaseConfig,
    apply_release_storage,
    dequantize_storage,
    stored_module,
)
from modeling_dsv4.moe import Dsv4Experts
from modeling_dsv4.storage import (
    Fp8GroupedLinear,
    Fp8Linear,
    GroupedLinear,
    OpaqueWeights,
    PackedEmbedding,
    PackedExperts,
)

RELEASE = {"quant_method": RELEASE_METHOD, "weight_block_size": [32, 32], "expert_dtype": "fp4"}
KINDS = {"model.proj": "fp8", "model.grouped": "fp8", "model.experts": "fp4", "model.table": "rows"}


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_storage"


class TinyBackbone(nn.Module):
    """One module of every kind that a release stores, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.proj = nn.Linear(64, 96, bias=False)
        self.grouped = GroupedLinear(48, 64, 2)
        self.experts = Dsv4Experts(4, 64, 32, None)
        self.table = nn.Embedding(40, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.proj(self.embed(ids)).unflatten(-1, (2, 48))).flatten(-2)
        routes = torch.stack((ids % 4, (ids + 1) % 4), dim=-1)
        y = self.experts(x, routes, torch.ones(*routes.shape))
        return y + self.table(ids).to(y.dtype).repeat(1, 2)


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = TinyBackbone()
        self.vision = OpaqueWeights({"vision.a.weight": (torch.bfloat16, (3, 5))})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if p.requires_grad and not getattr(p, "_is_hf_initialized", False):
                p.data.normal_(std=0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_quantizer.register()
    real = hf_quantizer.storage_kinds
    monkeypatch.setattr(
        hf_quantizer, "storage_kinds", lambda c: KINDS if isinstance(c, TinyConfig) else real(c)
    )


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    """State dict of a tiny model whose weights were rounded as a release stores them."""
    model = TinyModel(TinyConfig())
    m = model.model
    m.proj = Fp8Linear.from_plain(m.proj, 32)
    m.grouped = Fp8GroupedLinear.from_plain(m.grouped, 32)
    m.experts = PackedExperts.from_plain(m.experts)
    m.table = PackedEmbedding.from_plain(m.table)
    model.vision.vision__a__weight.data.normal_()
    return model.state_dict()


def release_config(**more: object) -> TinyConfig:
    return TinyConfig(quantization_config={**RELEASE, **more})


def load(stored: dict[str, torch.Tensor], dtype: torch.dtype, **more: object) -> TinyModel:
    # As the loading of foreign layouts calls it: tensors given, nothing read from disk.
    return TinyModel.from_pretrained(
        None, config=release_config(**more), state_dict=stored, dtype=dtype
    )


def as_bytes(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().view(torch.uint8).numpy().tobytes()


def assert_stored_bits(model: TinyModel, stored: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == stored.keys()
    for name, want in stored.items():
        if name != "model.embed.weight":
            assert got[name].dtype is want.dtype, name
            assert as_bytes(got[name]) == as_bytes(want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_stored_bits_survive_loading_in_any_dtype(
    stored: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    model = load(stored, dtype)
    assert_stored_bits(model, stored)
    assert model.model.embed.weight.dtype is dtype
    assert model.dtype is dtype
    assert not any(p.requires_grad for p in model.model.experts.parameters())


def test_stored_bits_survive_saving_and_loading_twice(
    stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = load(stored, torch.float32)
    ids = torch.arange(10)
    for turn, dtype in enumerate((torch.float32, torch.bfloat16)):
        model.save_pretrained(tmp_path / str(turn), max_shard_size="8KB")
        assert len(list((tmp_path / str(turn)).glob("*.safetensors"))) > 1
        again = TinyModel.from_pretrained(tmp_path / str(turn), dtype=dtype)
        assert_stored_bits(again, stored)
        if dtype is torch.float32:
            assert torch.equal(again(ids), model(ids))
        model = again


def test_a_dtype_of_auto_is_that_of_the_plain_weights(
    stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    load(stored, torch.bfloat16).save_pretrained(tmp_path)
    model = TinyModel.from_pretrained(tmp_path, dtype="auto")
    assert model.model.embed.weight.dtype is torch.bfloat16
    assert_stored_bits(model, stored)


def test_stored_and_dequantized_models_compute_the_same(stored: dict[str, torch.Tensor]) -> None:
    ids = torch.arange(10)
    packed = load(stored, torch.float32)
    want = packed(ids)
    wide = load(stored, torch.float32, dequantize=True)
    assert {type(m) for m in (wide.model.proj, wide.model.table)} == {nn.Linear, nn.Embedding}
    assert type(wide.model.experts) is Dsv4Experts
    torch.testing.assert_close(wide(ids), want, rtol=1e-5, atol=1e-4)
    assert getattr(wide.config, "quantization_config", None) is None
    # transformers' own method does the same to a model that is already there.
    torch.testing.assert_close(packed.dequantize()(ids), want, rtol=1e-5, atol=1e-4)


def test_a_dequantized_model_saves_as_a_plain_one(
    stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    wide = load(stored, torch.bfloat16, dequantize=True)
    wide.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = TinyModel.from_pretrained(tmp_path)
    assert torch.equal(again.model.proj.weight, wide.model.proj.weight)
    # Every stored number is a short mantissa times a power of two.
    exact = load(stored, torch.float32, dequantize=True)
    assert torch.equal(again.model.proj.weight.float(), exact.model.proj.weight)


def test_fields_of_the_release_are_saved_and_wishes_of_a_run_are_not(
    stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = load(stored, torch.float32, scale_fmt="ue8m0", dequantize=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved == {**RELEASE, "scale_fmt": "ue8m0"}
    assert model.config.quantization_config.get("scale_fmt") == "ue8m0"


def test_a_loaded_models_config_loads_again(stored: dict[str, torch.Tensor]) -> None:
    config = load(stored, torch.float32).config
    model = TinyModel.from_pretrained(None, config=config, state_dict=stored)
    assert_stored_bits(model, stored)


def test_loaded_models_may_be_trained_around_their_frozen_weights(
    stored: dict[str, torch.Tensor],
) -> None:
    model = load(stored, torch.float32)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    model(torch.arange(10)).square().sum().backward()
    assert model.model.embed.weight.grad.abs().min() > 0
    assert all(p.grad is None for p in model.model.experts.parameters())


def test_transformers_finds_the_method_by_its_name() -> None:
    config = AutoQuantizationConfig.from_dict({**RELEASE, "fmt": "e4m3"})
    assert isinstance(config, ReleaseConfig)
    assert config.to_dict() == {**RELEASE, "fmt": "e4m3"}
    hf_quantizer.register()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"quant_method": "fp8", "weight_block_size": [32, 32]}, "dsv4_release"),
        ({"weight_block_size": [32, 64]}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [32, 32], "expert_dtype": "int3"}, "expert_dtype"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ReleaseConfig(**fields)


def test_a_module_that_cannot_be_stored_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm.*'fp8'"):
        stored_module(nn.LayerNorm(4), "fp8", 32)
    with pytest.raises(ValueError, match=r"Linear.*'fp4'"):
        stored_module(nn.Linear(4, 4), "fp4")


def test_experts_can_be_left_to_the_caller() -> None:
    model = TinyModel(TinyConfig())
    apply_release_storage(model, RELEASE, experts=False)
    assert type(model.model.experts) is Dsv4Experts
    assert type(model.model.proj) is Fp8Linear


# --- the real model -----------------------------------------------------------------------------


def tiny(**more: object) -> Dsv4Config:
    """V4.1-style: every kind of module that a release stores, draft stages included."""
    fields = {
        "vocab_size": 64,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 0,
        "sliding_window": 8,
        "compress_ratios": [0, 0, 2, 1],
        "compressor_overlap_ratio": None,
        "compressor_position_bias": False,
        "kv_source_layer_ids": [2, 3],
        "index_source_layer_ids": [2, 3],
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "index_key": "latent",
        "index_hadamard": False,
        "q_head_norm": False,
        "hc_single_pass": True,
        "engram_layer_ids": [1],
        "engram_num_embeddings": [1],
        "engram_max_ngram_size": 3,
        "engram_vocab_size": 20,
        "engram_n_heads": 2,
        "engram_head_dim": 32,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 50,
        "draft_kind": "dspark",
        "num_draft_layers": 1,
        "dspark_block_size": 2,
        "dspark_markov_rank": 8,
        "dspark_noise_token_id": 3,
        "dspark_target_layer_ids": [2, 3],
        "quantization_config": dict(RELEASE),
    }
    return Dsv4Config(**{**fields, **more})


DTYPES = {
    "U8": torch.uint8,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("expert_dtype", ["fp4", None])
@pytest.mark.parametrize("headless", [False, True])
def test_swapped_modules_hold_what_the_inventory_lists(
    expert_dtype: str | None, headless: bool
) -> None:
    from modeling_dsv4.modeling_dsv4 import Dsv4ForCausalLM, Dsv4Model
    from modeling_dsv4.weight_map import our_inventory

    config = tiny(quantization_config={**RELEASE, "expert_dtype": expert_dtype})
    with torch.device("meta"):
        model = (Dsv4Model if headless else Dsv4ForCausalLM)(config)
    apply_release_storage(model, config.quantization_config)
    prefix = "model." if headless else ""
    held = {prefix + name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    stored = {
        name: (DTYPES[dtype], shape)
        for name, (dtype, shape) in our_inventory(config).items()
        if dtype in ("U8", "F8_E4M3", "F8_E8M0") and name.startswith(prefix)
    }
    packed = (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    assert {name: entry for name, entry in held.items() if entry[0] in packed} == stored
    assert all(t.is_meta for n, t in model.state_dict().items() if prefix + n in stored)


def test_every_stored_module_of_the_real_model_is_widened_again() -> None:
    from modeling_dsv4.modeling_dsv4 import Dsv4ForCausalLM

    config = tiny()
    with torch.device("meta"):
        model, plain = Dsv4ForCausalLM(config), Dsv4ForCausalLM(config)
    apply_release_storage(model, config.quantization_config)
    dequantize_storage(model, torch.float32)
    shapes = lambda m: {name: (t.dtype, t.shape) for name, t in m.state_dict().items()}
    assert shapes(model) == shapes(plain)
