# SPDX-License-Identifier: Apache-2.0
"""Decoder layer and draft stage: two mHC sites around attention and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import hyper_ops
from .attention import Dsv4Attention, Shared
from .cache import LayerCache
from .cache_storage import CachedRows
from .configuration_dsv4 import Dsv4Config
from .engram import Engram
from .hyper_connection import HyperConnection, HyperHead
from .layers import RMSNorm
from .moe import Dsv4MoE
from .segments import Segments

T = TypeVar("T")


@dataclass
class Pass:
    """What every layer of one forward pass is told.

    `turns`: rotation of the positions by layer kind. `input_ids`, `token_types` [B, S] or None.
    `engram_rows[i]` [B, S, P] table rows of the i-th Engram layer. `live` [B, S]: false on images.
    `stores_only`: the layer that leaves keys and entries for later tokens and computes nothing
    else, because nobody reads what these tokens become there; the layers behind it are not run.
    `attentions`: whether attention records its probabilities.
    """

    segments: Segments
    turns: dict[bool, torch.Tensor]
    input_ids: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    engram_rows: torch.Tensor | None = None
    live: torch.Tensor | None = None
    stores_only: int | None = None
    attentions: bool = False


class Dsv4DecoderLayer(GradientCheckpointingLayer):
    """Engram (some layers), then attention and experts, each inside one mHC site."""

    def __init__(self, config: Dsv4Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.single_pass = config.hc_single_pass
        has_engram = layer_idx in config.engram_layer_ids
        self.engram = Engram(config, layer_idx) if has_engram else None
        self.attn_hc = HyperConnection(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Dsv4Attention(config, layer_idx)
        self.ffn_hc = HyperConnection(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Dsv4MoE(config, layer_idx)

    def forward(
        self,
        streams: torch.Tensor,
        pre: torch.Tensor,
        entries: CachedRows | None,
        index_keys: CachedRows | None,
        ids: torch.Tensor | None,
        candidates: torch.Tensor | None,
        told: Pass,
        cache: LayerCache | None = None,
    ) -> tuple[CachedRows | None, ...]:
        """Pass streams [B, S, N, D] through the layer.

        `pre` [B, S, N] is the coefficient handed on by the site before; two-pass models hand it
        on untouched. The next four arguments are the fields of `Shared`, flat, so that
        activation checkpointing sees every tensor.

        Returns:
            streams, pre, the four fields of `Shared`, the router logits [B * S, E], and
            attention's probabilities or None.
        """
        if self.engram is not None:
            assert told.engram_rows is not None
            rows = told.engram_rows[self.engram.position]
            streams = self.engram(streams, rows, told.live)
        handed = Shared(entries, index_keys, ids, candidates)
        if told.stores_only == self.layer_idx:
            x = hyper_ops.collapse(streams, pre) if self.single_pass else self.attn_hc(streams)[0]
            x = self.input_layernorm(x)
            self.self_attn(x, told.segments, told.turns, handed, cache, stores_only=True)
            return streams, pre, *handed, None, None

        def attend(
            x: torch.Tensor,
        ) -> tuple[torch.Tensor, tuple[Shared, torch.Tensor | None]]:
            x = self.input_layernorm(x)
            out, shared, probabilities = self.self_attn(
                x, told.segments, told.turns, handed, cache, record=told.attentions
            )
            return out, (shared, probabilities)

        def think(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mlp(self.post_attention_layernorm(x), told.input_ids, told.token_types)

        streams, pre, (shared, probabilities) = self._site(self.attn_hc, attend, streams, pre)
        streams, pre, router_logits = self._site(self.ffn_hc, think, streams, pre)
        return streams, pre, *shared, router_logits, probabilities

    def _site(
        self,
        site: HyperConnection,
        block: Callable[[torch.Tensor], tuple[torch.Tensor, T]],
        streams: torch.Tensor,
        handed: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, T]:
        """Collapse, run the block, expand; single-pass sites collapse with what was handed on."""
        x, pre, post, comb, streams = site(streams, handed if self.single_pass else None)
        u, more = block(x)
        streams = hyper_ops.expand(u, streams, post, comb, site.kernels)
        return streams, pre if self.single_pass else handed, more


class MarkovHead(nn.Module):
    """First-order correction of draft logits: V x rank, rank x V."""

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__()
        rank = config.dspark_markov_rank or 0
        self.embed = nn.Embedding(config.vocab_size, rank)
        self.head = nn.Linear(rank, config.vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """Raw logit of a drafted token being accepted."""

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__()
        rank = config.dspark_markov_rank or 0
        self.proj = nn.Linear(config.hidden_size + rank, 1, bias=False)


class Dsv4DraftStage(Dsv4DecoderLayer):
    """One stage of the draft head (MTP or DSpark): weights that load and save with the model."""

    def __init__(self, config: Dsv4Config, stage: int) -> None:
        super().__init__(config, config.num_hidden_layers + stage)
        d, eps = config.hidden_size, config.rms_norm_eps
        mtp = config.draft_kind == "mtp"
        last = stage == config.num_draft_layers - 1
        if mtp:
            self.e_proj = nn.Linear(d, d, bias=False)
            self.h_proj = nn.Linear(d, d, bias=False)
            self.enorm, self.hnorm = RMSNorm(d, eps), RMSNorm(d, eps)
        elif stage == 0:
            targets = len(config.dspark_target_layer_ids or ())
            self.main_proj = nn.Linear(targets * d, d, bias=False)
            self.main_norm = RMSNorm(d, eps)
        if mtp or last:
            self.norm = RMSNorm(d, eps)
            if not config.hc_single_pass:
                self.hc_head = HyperHead(config)
        if last and not mtp:
            self.markov_head = MarkovHead(config)
            self.confidence_head = ConfidenceHead(config)

    def forward(self, *args: object, **kwargs: object) -> tuple[CachedRows | None, ...]:
        raise NotImplementedError("draft heads load and save; decoding with them is not built yet")
