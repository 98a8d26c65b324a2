# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer, small models of both kinds, and adapters that do something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.chat import FORMATS
from modeling_dsv4.storage import Fp8GroupedLinear, Fp8Linear, PackedExperts

V4 = {
    "compress_ratios": [0, 4, 8],
    "num_hash_layers": 1,
}
V41 = {
    "compress_ratios": [0, 2, 1],
    "compressor_overlap_ratio": None,
    "compressor_position_bias": False,
    "kv_source_layer_ids": [1, 2],
    "index_source_layer_ids": [1, 2],
    "index_key": "latent",
    "index_hadamard": False,
    "num_hash_layers": 0,
    "q_head_norm": False,
    "hc_single_pass": True,
    "router_weight_eps": 1e-20,
    "engram_layer_ids": [1],
    "engram_vocab_size": 40,
    "engram_n_heads": 2,
    "engram_head_dim": 16,
    "engram_compressed_vocab_size": 290,
}


@pytest.fixture(scope="session")
def tokenizer(train_tokenizer: Callable[..., Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the markers of the plain prompt format."""
    return train_tokenizer(["the meter lasts nine years and the battery lasts too"] * 3, 290)


@pytest.fixture(scope="session")
def thinker() -> PreTrainedTokenizerFast:
    """Bytes and V4's markers: a token is a letter or a marker."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(letters))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    form = FORMATS["v4"]
    raw.add_special_tokens(list(form.markers()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=form.bos, eos_token=form.eos)


@pytest.fixture
def short_run(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of eight steps, all of it kept in its folder."""
    return {
        "model": "m",
        "output": str(tmp_path / "out"),
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "keep_best": False,
    }


@pytest.fixture
def make_config() -> Callable[..., Dsv4Config]:
    """Configurations of three layers; `kind` is "v4" or "v4.1"."""

    def make(kind: str = "v4", **changes: Any) -> Dsv4Config:
        values = {
            "vocab_size": 290,
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 32,
            "qk_rope_head_dim": 16,
            "q_lora_rank": 32,
            "o_lora_rank": 16,
            "o_groups": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
            "initializer_range": 0.1,
            "yarn": None,
            "max_position_embeddings": 512,
        }
        return Dsv4Config(**values | {"v4": V4, "v4.1": V41}[kind] | changes)

    return make


@pytest.fixture
def make_model(make_config: Callable[..., Dsv4Config]) -> Callable[..., PreTrainedModel]:
    """Models of such configurations: the same weights for the same seed."""

    def make(kind: str = "v4", seed: int = 0, **changes: Any) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Dsv4ForCausalLM(make_config(kind, **changes))
        if model.config.engram_layer_ids:
            model.set_engram_token_map(torch.arange(model.config.vocab_size))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def pack() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Store a model as the releases do: FP8 attention and shared experts, FP4 experts."""

    def store(model: PreTrainedModel) -> PreTrainedModel:
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for owner in (attention, mlp.shared_experts):
                for name, child in list(owner.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(owner, name, Fp8Linear.from_plain(child, 32))
            attention.o_a_proj = Fp8GroupedLinear.from_plain(attention.o_a_proj, 32)
            mlp.experts = PackedExperts.from_plain(mlp.experts)
        return model

    return store


@pytest.fixture
def stir() -> Callable[[torch.nn.Module], None]:
    """Give every adapter tensor values, so that the adapters have an effect."""

    def fill(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1, generator=generator)

    return fill
