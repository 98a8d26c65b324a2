# SPDX-License-Identifier: Apache-2.0
"""Presets: which modules get adapters, as anchored patterns, and with which rank.

Every pattern begins at the decoder's layers, so that draft heads (`mtp.*`), the compressors and
the indexer are never met by accident: all three own projections with the names of an attention
block, and the indexer gets no gradient from a language-model loss at all.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

# `(?:model\.)?`: the pattern serves a causal LM and its bare backbone.
_LAYER = r"(?:model\.)?layers\.\d+\."
ATTENTION = _LAYER + r"self_attn\.(?:q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)"
SHARED = _LAYER + r"mlp\.shared_experts\.(?:gate_proj|up_proj|down_proj)"
EXPERTS = _LAYER + r"mlp\.experts"
ENGRAM = _LAYER + r"engram"
# In no preset: it learns from a loss of its own, see `indexer_training.py`.
INDEXER = (
    _LAYER + r"self_attn\.indexer\.(?:q_b_proj|weights_proj|k_proj|compressor\.(?:kv|gate)_proj)"
)


@dataclass(frozen=True)
class Preset:
    """What one word means.

    Attributes:
        about: a line for people.
        patterns: names of the modules that get low-rank adapters.
        hot: only the experts that the data routes to, see `hot_experts.py`.
        weights: no adapters; the weights themselves train, see `full.py`.
    """

    about: str
    patterns: tuple[str, ...] = ()
    hot: bool = False
    weights: bool = False


PRESETS: dict[str, Preset] = {
    "attention": Preset("adapters on attention", (ATTENTION,)),
    "attention+shared": Preset("and on shared experts", (ATTENTION, SHARED)),
    "all": Preset("and on routed experts", (ATTENTION, SHARED, EXPERTS)),
    "hot-experts": Preset("adapters on the experts that the data routes to", (EXPERTS,), hot=True),
    "memory": Preset("facts in rows of the Engram tables, see docs/memory.md", (ENGRAM,)),
    "full": Preset("training of the weights themselves", weights=True),
}
DEFAULT_PRESET = "all"
# From this rank on the scale is rank-stabilised: alpha / sqrt(r) instead of alpha / r.
STABILISED_RANK = 64


@dataclass(frozen=True)
class Ranks:
    """Ranks and scales of one run: alpha is what makes `scaling` equal for every module."""

    rank: int
    alpha: float
    expert_rank: int
    expert_alpha: float
    stabilised: bool


def get_preset(preset: str) -> Preset:
    """Look a preset up.

    Raises:
        ValueError: no such name.
    """
    if preset in PRESETS:
        return PRESETS[preset]
    raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {preset!r}")


def preset_patterns(preset: str) -> tuple[str, ...]:
    """Patterns of the modules that a preset puts adapters on; errors as `get_preset`."""
    return get_preset(preset).patterns


def target_regex(preset: str) -> str:
    """One expression for PEFT's `target_modules`, matched against the whole module name."""
    return "|".join(preset_patterns(preset))


def match_targets(names: Iterable[str], preset: str) -> list[str]:
    """Names of the modules that a preset adapts.

    Raises:
        ValueError: a pattern of the preset meets no module; an adapter that is silently absent
            would be found out only after the training.
    """
    names = list(names)
    found: list[str] = []
    for pattern in preset_patterns(preset):
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            raise ValueError(
                f"preset {preset!r}: wanted modules like {pattern}, got none; is this a dsv4 "
                "model without adapters?"
            )
        found += hits
    return found


def choose_ranks(
    rank: int,
    alpha: float | None,
    experts_per_token: int,
    expert_rank: int | None = None,
) -> Ranks:
    """Ranks of ordinary and of routed modules (LoRA Without Regret: rank / active experts).

    Args:
        rank: r of attention and shared experts.
        alpha: its alpha; None makes the scale 2.
        experts_per_token: K; one expert gets `max(2, round(r / K))`.
        expert_rank: overrides that.
    """
    if rank < 1:
        raise ValueError(f"rank: wanted at least 1, got {rank}")
    if expert_rank is not None and expert_rank < 1:
        raise ValueError(f"expert_rank: wanted at least 1, got {expert_rank}")
    stabilised = rank >= STABILISED_RANK

    def share(r: int) -> float:
        return math.sqrt(r) if stabilised else float(r)

    if alpha is None:
        # 2r below, and the same scale where the stabilised formula takes over.
        alpha = 2 * math.sqrt(STABILISED_RANK) if stabilised else 2.0 * rank
    if not alpha > 0:
        raise ValueError(f"alpha: wanted more than 0, got {alpha}")
    small = expert_rank or max(2, round(rank / experts_per_token))
    return Ranks(rank, alpha, small, alpha / share(rank) * share(small), stabilised)
