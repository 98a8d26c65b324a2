# SPDX-License-Identifier: Apache-2.0
"""Presets meet what they should, and nothing by accident."""

import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from finetune.full import train_weights
from finetune.targets import (
    INDEXER,
    choose_ranks,
    match_targets,
    target_regex,
)
from modeling_dsv4 import Dsv4Config, Dsv4Model

KINDS = ("v4", "v4.1")


def _names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_presets_grow_by_group(make_model: Callable[..., PreTrainedModel], kind: str) -> None:
    names = _names(make_model(kind))
    counts = [len(match_targets(names, p)) for p in ("attention", "attention+shared", "all")]
    layers = 3
    assert counts == [5 * layers, 8 * layers, 9 * layers]


def _with_everything(make_model: Callable[..., PreTrainedModel], kind: str) -> PreTrainedModel:
    """Every mechanism of a family: draft heads of both kinds, Engram, shared sources."""
    draft = {"num_draft_layers": 1, "draft_kind": "mtp"}
    if kind != "v4 mtp":
        draft = {
            "num_draft_layers": 2,
            "draft_kind": "dspark",
            "dspark_target_layer_ids": [1, 2],
            "dspark_block_size": 3,
            "dspark_markov_rank": 8,
            "dspark_noise_token_id": 4,
        }
    return make_model(kind.split()[0], **draft)


# Whatever is behind top-k, chooses experts, names rows of tables, or is not the backbone.
FORBIDDEN = re.compile(
    r"indexer|compressor|mlp\.gate\b|e_score_correction|tid2eid|engram\.embed|engram_hash"
    r"|token_map|^mtp\."
)


@pytest.mark.parametrize("preset", ["attention", "attention+shared", "all", "hot-experts"])
@pytest.mark.parametrize("kind", ["v4 mtp", "v4 dspark", "v4.1 dspark"])
def test_no_preset_meets_indexer_compressor_router_tables_or_draft(
    make_model: Callable[..., PreTrainedModel], kind: str, preset: str
) -> None:
    model = _with_everything(make_model, kind)
    names = _names(model)
    assert any(name.startswith("mtp.0.self_attn.q_b_proj") for name in names)
    assert any(name.endswith("indexer.q_b_proj") for name in names)
    assert any(name.endswith("mlp.gate") for name in names)
    assert ("model.layers.1.engram.embed" in names) == (kind == "v4.1 dspark")
    found = match_targets(names, preset)
    assert found
    others = re.compile(FORBIDDEN.pattern + "|engram|_hc|norm|lm_head|embed|vision")
    assert not [name for name in found if others.search(name)]
    # Adapters stand on linear maps and experts, never on what only chooses.
    kinds = {type(model.get_submodule(name)).__name__ for name in found}
    assert kinds <= {"Linear", "GroupedLinear", "Dsv4Experts"}


@pytest.mark.parametrize("kind", ["v4 mtp", "v4 dspark", "v4.1 dspark"])
def test_full_leaves_the_same_alone(make_model: Callable[..., PreTrainedModel], kind: str) -> None:
    model = _with_everything(make_model, kind)
    train_weights(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    left = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not [name for name in trained if FORBIDDEN.search(name)]
    assert all(FORBIDDEN.search(name) or name.endswith("sinks") for name in left)
    every = {name for name in left if FORBIDDEN.search(name)}
    assert any("indexer" in name for name in every)
    assert any("mlp.gate" in name for name in every)


@pytest.mark.parametrize("kind", ["v4 mtp", "v4.1 dspark"])
def test_the_indexers_own_pattern_meets_its_projections_and_nothing_else(
    make_model: Callable[..., PreTrainedModel], kind: str
) -> None:
    model = _with_everything(make_model, kind)
    found = [name for name in _names(model) if re.fullmatch(INDEXER, name)]
    expected = [
        name
        for name, module in model.named_modules()
        if ".indexer." in name and isinstance(module, torch.nn.Linear)
    ]
    assert found == expected != []


def test_the_bare_backbone_is_met_too(make_config: Callable[..., Dsv4Config]) -> None:
    assert len(match_targets(_names(Dsv4Model(make_config())), "all")) == 27


def test_a_model_without_such_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        match_targets(["layers.0.self_attn.q_proj"], "attention")


def test_memory_meets_the_engram_modules_alone(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    assert match_targets(_names(make_model("v4.1")), "memory") == ["model.layers.1.engram"]
    with pytest.raises(ValueError, match="got none"):
        match_targets(_names(make_model("v4")), "memory")


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted one of"):
        target_regex("al")


@pytest.mark.parametrize(("rank", "active", "expected"), [(32, 6, 5), (32, 8, 4), (8, 6, 2)])
def test_an_expert_gets_its_share_of_the_rank(rank: int, active: int, expected: int) -> None:
    ranks = choose_ranks(rank, None, active)
    assert ranks.expert_rank == expected
    assert ranks.alpha / ranks.rank == ranks.expert_alpha / ranks.expert_rank == 2


def test_from_rank_64_the_scale_is_stabilised_and_starts_where_the_other_ends() -> None:
    ranks = choose_ranks(64, None, 8)
    assert ranks.stabilised
    assert ranks.alpha / ranks.rank**0.5 == pytest.approx(2)
    assert ranks.expert_alpha / ranks.expert_rank**0.5 == pytest.approx(2)
    assert choose_ranks(256, None, 8).alpha / 256**0.5 == pytest.approx(1)


@pytest.mark.parametrize("values", [(0, None, 2), (8, 0.0, 2), (8, None, 2, 0)])
def test_senseless_ranks_are_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match="wanted"):
        choose_ranks(*values)
