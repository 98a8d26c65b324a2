# SPDX-License-Identifier: Apache-2.0
"""Operations and bytes that a pass of a model cannot do without, counted from its modules."""

from __future__ import annotations

from typing import Any

import torch


def share_read(model: Any, name: str) -> float:
    """How much of a weight one token meets: its experts alone of routed ones, no embedding."""
    if name.endswith("embed_tokens.weight") or name.startswith("mtp.") or "engram_table" in name:
        return 0.0
    if ".experts." in name:
        return model.config.num_experts_per_tok / model.config.n_routed_experts
    return 1.0


def weights_per_token(model: Any) -> float:
    """Weights of matrices that a token is multiplied by, the head's included."""
    return sum(
        share_read(model, name) * weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.is_floating_point() and not name.endswith("position_bias")
    )


def attention_flops(model: Any, batch: int, tokens: int) -> float:
    """Scores and sums of a prompt over what each query reads, and the indexers' scores."""
    config, total = model.config, 0.0
    at = torch.arange(1, tokens + 1, dtype=torch.float64)
    window = at.clamp(max=config.sliding_window)
    for ratio, layer in zip(config.compress_ratios, model.model.layers, strict=False):
        pairs = window
        if ratio:
            entries = torch.div(at, ratio, rounding_mode="floor")
            if layer.self_attn.indexer is not None:
                heads = config.index_n_heads * config.index_head_dim
                total += 2.0 * heads * float(entries.sum())
                entries = entries.clamp(max=config.index_topk)
            pairs = window + entries
        total += 4.0 * config.num_attention_heads * config.head_dim * float(pairs.sum())
    return batch * total


def forward_flops(model: Any, batch: int, tokens: int, kept: int | None = None) -> float:
    """Multiplications and additions of a pass over [batch, tokens].

    Args:
        model: a `Dsv4ForCausalLM` of plain weights.
        batch: rows.
        tokens: of a row.
        kept: tokens of a row whose logits are made; None for all of them.
    """
    head = model.lm_head.weight.numel()
    kept = tokens if kept is None else kept
    body = 2.0 * batch * tokens * (weights_per_token(model) - head)
    return body + 2.0 * batch * kept * head + attention_flops(model, batch, tokens)
