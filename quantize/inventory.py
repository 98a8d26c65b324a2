# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's parts from its config.json alone, for `placement`."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.safetensors_file import DTYPES
from modeling_dsv4.weight_map import official_inventory

from .config import Recipe
from .pack import PackLayout
from .placement import ModelSizes

_PARTS = (
    ("experts", r"layers\.\d+\.ffn\.experts\..*"),
    ("draft", r"mtp\..*"),
    ("vision", r"(vision|aligner)\..*|image_\w+"),
    ("lookup", r".*\.engram\.embed\..*|.*\.tid2eid"),
    ("embedding", r"embed\.weight"),
    ("dense", r".*"),
)


def part_bytes(config: Dsv4Config) -> dict[str, int]:
    """Bytes by part as the configuration says they are stored: experts, dense, embedding, ..."""
    sizes = dict.fromkeys((name for name, _ in _PARTS), 0)
    for name, (dtype, shape) in official_inventory(config).items():
        part = next(part for part, pattern in _PARTS if re.fullmatch(pattern, name))
        sizes[part] += DTYPES[dtype].itemsize * math.prod(shape)
    return sizes


def model_sizes(config: Dsv4Config, recipe: Recipe, context: int = 65536) -> ModelSizes:
    """Measure a model whose experts are stored by `recipe`, the rest as it is.

    Args:
        config: of any release, or of our own.
        recipe: formats of the routed experts.
        context: tokens whose keys and values are to fit.
    """
    parts = part_bytes(_without_packs(config))
    layers, experts = config.num_hidden_layers, config.n_routed_experts
    widths = config.hidden_size, config.moe_intermediate_size
    records = [
        PackLayout.build(f"model.layers.{i}.mlp.experts", experts, *widths, recipe.format_of)
        for i in range(layers)
    ]
    return ModelSizes(
        expert=-(-sum(pack.nbytes for pack in records) // (layers * experts)),
        num_experts=layers * experts,
        experts_per_token=layers * config.num_experts_per_tok,
        dense=parts["dense"],
        embedding=parts["embedding"],
        lookup=parts["lookup"],
        draft=parts["draft"],
        vision=parts["vision"],
        cache=cache_bytes(config, context),
    )


def sizes_by_context(config: Dsv4Config, recipe: Recipe) -> Callable[[int], ModelSizes]:
    """`model_sizes` as a function of the context, for many of them."""
    base = model_sizes(config, recipe, 0)
    return lambda context: replace(base, cache=cache_bytes(config, context))


def cache_bytes(config: Dsv4Config, context: int) -> int:
    """Bytes of keys and values of one sequence, in bfloat16."""
    window = config.num_hidden_layers * min(context, config.sliding_window) * config.head_dim
    total = window
    for layer in config.kv_source_layer_ids:
        entries = context // config.compress_ratios[layer]
        # An index source that is a KV source too keeps a key per entry of its own.
        keys = config.index_head_dim if layer in config.index_source_layer_ids else 0
        total += entries * (config.head_dim + keys)
    return 2 * total


def _without_packs(config: Dsv4Config) -> Dsv4Config:
    """A converted model's configuration with the storage of the dense part alone."""
    stored = getattr(config, "quantization_config", None)
    if not stored or "recipe" not in stored:
        return config
    config = copy.copy(config)
    if stored.get("weight_block_size"):
        config.quantization_config = {"weight_block_size": stored["weight_block_size"]}
    else:
        del config.quantization_config
    return config
