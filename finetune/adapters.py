# SPDX-License-Identifier: Apache-2.0
"""Adapters in two calls: attach them to a model, merge them into it. PEFT models in between."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from .deltas import check_weights, read_config
from .hot_experts import HOT_KEY, HotExperts, check_hot
from .layers import BesideLora, plain_weight
from .memory_attach import attach_memory
from .memory_rows import MemoryRows
from .targets import (
    DEFAULT_PRESET,
    EXPERTS,
    INDEXER,
    choose_ranks,
    get_preset,
    match_targets,
    target_regex,
)
from .tuner import register

# Chosen experts: counted, or as ids by module name.
Chosen = HotExperts | Mapping[str, Sequence[int]]


def adapter_config(
    model: PreTrainedModel,
    preset: str = DEFAULT_PRESET,
    r: int = 32,
    alpha: float | None = None,
    *,
    expert_rank: int | None = None,
    dropout: float = 0.0,
    experts: Chosen | None = None,
    train_indexer: bool = False,
) -> LoraConfig:
    """PEFT's description of a preset for a model; arguments as in `attach_adapters`."""
    names = [name for name, _ in model.named_modules()]
    match_targets(names, preset)
    targets = target_regex(preset)
    hot = _check_chosen(model, preset, experts)
    if train_indexer:
        if not any(re.fullmatch(INDEXER, name) for name in names):
            raise ValueError("train_indexer: wanted a model with an indexer, got one without")
        targets = f"{targets}|{INDEXER}"
    ranks = choose_ranks(r, alpha, model.config.num_experts_per_tok, expert_rank)
    # PEFT puts `(.*\.)?(` ... `)$` around a pattern's key.
    routed = {EXPERTS: ranks} if EXPERTS in targets else {}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM if hasattr(model, "lm_head") else TaskType.FEATURE_EXTRACTION,
        target_modules=targets,
        r=ranks.rank,
        lora_alpha=ranks.alpha,
        rank_pattern={key: value.expert_rank for key, value in routed.items()},
        alpha_pattern={key: value.expert_alpha for key, value in routed.items()},
        use_rslora=ranks.stabilised,
        lora_dropout=dropout,
        auto_mapping=None if hot is None else {HOT_KEY: hot.to_dict()},
    )


def _check_chosen(model: PreTrainedModel, preset: str, experts: Chosen | None) -> HotExperts | None:
    """A choice of experts in one form, compared with what the preset and the model want."""
    wanted = get_preset(preset)
    if wanted.weights:
        raise ValueError(
            f"preset {preset!r}: there are no adapters in it; wanted finetune.train_weights(model)"
        )
    if experts is None:
        if wanted.hot:
            raise ValueError(
                f"preset {preset!r}: wanted `experts`, got none; choose them with "
                "finetune.find_hot_experts(model, data)"
            )
        return None
    if EXPERTS not in wanted.patterns:
        raise ValueError(
            f"experts: preset {preset!r} has no adapters on routed experts; leave them out"
        )
    if not isinstance(experts, HotExperts):
        experts = HotExperts.given(experts, model.config.n_routed_experts)
    check_hot(experts, model)
    return experts


def attach_adapters(
    model: PreTrainedModel,
    preset: str = DEFAULT_PRESET,
    r: int = 32,
    alpha: float | None = None,
    *,
    expert_rank: int | None = None,
    dropout: float = 0.0,
    experts: Chosen | None = None,
    train_indexer: bool = False,
    adapter_name: str = "default",
    memory: MemoryRows | None = None,
) -> PeftModel:
    """Freeze a model and put new adapters beside its weights.

    Args:
        model: plain or quantized; its weights are not touched.
        preset: a word of `finetune.targets.PRESETS` that means adapters.
        r: rank of attention and shared experts, or of the low rank beside written memory.
        alpha: None makes the scale 2.
        expert_rank: of one routed expert; None is `max(2, round(r / active experts))`.
        dropout: on the input of linear adapters.
        experts: which routed experts get adapters, None for all of them; "hot-experts" wants
            some, see `finetune.find_hot_experts`.
        train_indexer: adapters on the indexer too, which `finetune.teach_indexer` trains.
        adapter_name: PEFT's name for it.
        memory: the rows that preset "memory" may write, see `finetune.choose_memory_rows`.

    Returns:
        A PEFT model: `save_pretrained`, `disable_adapter`, `load_adapter` and the rest are PEFT's.
    """
    register()
    config = adapter_config(
        model,
        preset,
        r,
        alpha,
        expert_rank=expert_rank,
        dropout=dropout,
        experts=experts,
        train_indexer=train_indexer,
    )
    if preset == "memory" or memory is not None:
        return attach_memory(model, config, memory, adapter_name)
    return get_peft_model(model, config, adapter_name=adapter_name)


def load_adapters(
    model: PreTrainedModel, directory: str | Path, *, trainable: bool = False
) -> PeftModel:
    """Put saved adapters beside the weights of their base model.

    Raises:
        ValueError: no adapter there, or one of another model.
    """
    register()
    check_adapter(directory)
    return PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)


def check_adapter(directory: str | Path) -> None:
    """Refuse a directory that holds no LoRA adapter; PEFT would ask the Hub for missing weights.

    Raises:
        ValueError: a file is missing or unreadable.
    """
    read_config(directory)
    check_weights(directory)


def merge_adapters(peft_model: PeftModel) -> PreTrainedModel:
    """Add the active adapters to the weights and return the plain model.

    The sum is computed in float32 and rounded once to the weights' dtype: exact where that is
    float32; in bfloat16 a small update is partly lost.

    Raises:
        ValueError: a base weight is packed. Nothing has been changed then.
    """
    if not isinstance(peft_model, PeftModel):
        raise ValueError(f"merge: wanted a PEFT model, got {type(peft_model).__name__}")
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            _check_mergeable(module)
    with torch.no_grad():
        return peft_model.merge_and_unload(safe_merge=True)


def _check_mergeable(layer: LoraLayer) -> None:
    if isinstance(layer, BesideLora):
        layer.base_weights()
    else:
        plain_weight(layer.get_base_layer(), "weight")


def count_adapters(peft_model: PeftModel) -> dict[str, int]:
    """Parameters that train, and all adapter tensors' number."""
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    return {"tensors": len(trained), "parameters": sum(p.numel() for p in trained)}
