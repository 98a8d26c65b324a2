# SPDX-License-Identifier: Apache-2.0
"""The released models' shapes by name, so that a plan needs no file.

What differs from `Dsv4Config`'s defaults, which are V4-Flash's. Tests compare them with the
releases' own config.json.
"""

from pathlib import Path
from typing import Any

from modeling_dsv4 import Dsv4Config
from quantize.config import Recipe, get_recipe
from quantize.run.loading import look


def _storage(block: int) -> dict[str, Any]:
    return {
        "quant_method": "dsv4_release",
        "weight_block_size": [block, block],
        "expert_dtype": "fp4",
    }


_V4: dict[str, Any] = {
    "draft_kind": "mtp",
    "num_draft_layers": 1,
    "quantization_config": _storage(128),
}
MODELS: dict[str, dict[str, Any]] = {
    "v4-flash": _V4,
    "v4-pro": _V4
    | {
        "hidden_size": 7168,
        "moe_intermediate_size": 3072,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
        "compress_ratios": [128, 128, *[4, 128] * 29, 4],
        "index_topk": 1024,
    },
    "v4.1-flash": {
        "hidden_size": 5120,
        "moe_intermediate_size": 2304,
        "num_hidden_layers": 40,
        "q_lora_rank": 1280,
        "rms_norm_eps": 1e-20,
        "q_head_norm": False,
        "n_routed_experts": 384,
        "router_weight_eps": 1e-20,
        "num_hash_layers": 0,
        "router_bias_vl": True,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20],
        "compressor_overlap_ratio": None,
        "compressor_position_bias": False,
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "index_n_heads": 32,
        "index_key": "latent",
        "index_hadamard": False,
        "candidate_source_layer_id": 20,
        "hc_single_pass": True,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "draft_kind": "dspark",
        "num_draft_layers": 3,
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [37, 38, 39],
        "dspark_reads_outputs": False,
        "dspark_n_routed_experts": 128,
        "dspark_num_experts_per_tok": 3,
        "quantization_config": _storage(32),
    },
}


def find_model(model: str | Path) -> tuple[Dsv4Config, Recipe]:
    """A model's configuration, and how its experts are stored.

    Args:
        model: a name of `MODELS`, in any case, with or without "deepseek-"; a directory; a
            config.json.

    Raises:
        ValueError: neither.
    """
    name = str(model).lower().removeprefix("deepseek-")
    if name in MODELS and not Path(model).exists():
        return Dsv4Config(**MODELS[name]), get_recipe("fp4")
    try:
        source = look(Path(model))
    except ValueError as error:
        raise ValueError(f"{error}; or give one of {', '.join(MODELS)}") from error
    return source.config, source.recipe
