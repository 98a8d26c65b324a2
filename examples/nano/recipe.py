# SPDX-License-Identifier: Apache-2.0
"""What is trained and how: the nano's architecture, its first weights and its recipes."""

from dataclasses import dataclass, field

import torch
from torch import nn

from finetune.pretraining_settings import Pretraining
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.engram_hash import build_token_map

from .data import BOS, EOS, PAD, Tokenizer


@dataclass(frozen=True)
class Recipe(Pretraining):
    """One training run, first weights included; the same values give the same losses."""

    embed_std: float = 0.3


@dataclass(frozen=True)
class Plan:
    """A nano: its recipe, what its configuration changes, and whether all of the code trains.

    `name` is what `pretrain_nano.py --plan` takes; its default is the plan of the nano in models/.
    """

    name: str
    recipe: Recipe
    changes: dict[str, int] = field(default_factory=dict)
    all_code: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("first", Recipe()),
        # Memories cost no time here, and 5,000 rows are shared by too many n-grams.
        Plan("long", Recipe(steps=2400, document_start=BOS), {"engram_vocab_size": 20_000}, True),
    )
}


def nano_config(tokenizer: Tokenizer, **changes: object) -> Dsv4Config:
    """V4.1 in miniature, every mechanism present.

    Encoder layers 0-3 (window, window, ratio 2, ratio 2), decoder layers 4-5 (ratio 1) that read
    the entries of layer 4 alone. Layer 3 reuses what layer 2 chose, layer 5 chooses again among
    the candidates of layer 4.
    """
    token_map = build_token_map(tokenizer)
    fields = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 96,
        "q_head_norm": False,
        "o_lora_rank": 48,
        "o_groups": 2,
        "rms_norm_eps": 1e-20,
        "max_position_embeddings": 4096,
        "yarn": None,
        "moe_intermediate_size": 96,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "num_hash_layers": 0,
        "router_weight_eps": 1e-20,
        "sliding_window": 32,
        "compress_ratios": [0, 0, 2, 2, 1, 1],
        "compressor_overlap_ratio": None,
        "compressor_position_bias": False,
        "kv_source_layer_ids": [2, 4],
        "index_source_layer_ids": [2, 4, 5],
        "index_key": "latent",
        "index_hadamard": False,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 16,
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 16,
        "candidate_block_size": 8,
        "hc_mult": 4,
        "hc_single_pass": True,
        "engram_layer_ids": [1, 3],
        "engram_max_ngram_size": 3,
        "engram_vocab_size": 5000,
        "engram_n_heads": 2,
        "engram_head_dim": 32,
        "engram_pad_token_id": PAD,
        "engram_compressed_vocab_size": int(token_map.max()) + 1,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return Dsv4Config(**{**fields, **changes})


def new_model(config: Dsv4Config, tokenizer: Tokenizer, recipe: Recipe) -> Dsv4ForCausalLM:
    """A model in its first weights.

    Every block starts silent (its last projection is zero) and the logits start equal, so the
    first steps learn unigrams instead of undoing noise.
    """
    torch.manual_seed(recipe.seed)
    model = Dsv4ForCausalLM(config)
    model.set_engram_token_map(build_token_map(tokenizer))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.5 * module.in_features**-0.5)
        for layer in model.model.layers:
            layer.self_attn.o_a_proj.weight.normal_(
                std=0.5 * layer.self_attn.o_a_proj.weight.shape[1] ** -0.5
            )
            layer.mlp.experts.gate_up_proj.normal_(std=0.5 * config.hidden_size**-0.5)
            for silent in (
                layer.self_attn.o_b_proj.weight,
                layer.mlp.experts.down_proj,
                layer.mlp.shared_experts.down_proj.weight,
            ):
                silent.zero_()
        model.model.embed_tokens.weight.normal_(std=recipe.embed_std)
        model.lm_head.weight.zero_()
    return model
