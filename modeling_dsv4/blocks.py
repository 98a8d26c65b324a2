# SPDX-License-Identifier: Apache-2.0
"""Decoder layer: two mHC sites around attention and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import hyper_ops
from .attention import Dsv4Attention, Shared
from .cache import LayerCache
from .cache_storage import CachedRows
from .configuration_dsv4 import Dsv4Config
from .engram import Engram
from .hyper_connection import HyperConnection, close_and_open
from .layers import RMSNorm
from .moe import Dsv4MoE
from .segments import Segments

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Pass:
    """What every layer of one forward pass is told.

    `turns`: rotation of the positions by layer kind. `input_ids`, `token_types` [B, S] or None.
    `engram_rows[i]` [B, S, P] table rows of the i-th Engram layer. `live` [B, S]: false on images.
    `stores_only`: the layer that leaves keys and entries for later tokens and computes nothing
    else, because nobody reads what these tokens become there; the layers behind it are not run.
    `attentions`: whether attention records its probabilities. `moved`: what `to` made so far.
    """

    segments: Segments
    turns: dict[bool, torch.Tensor]
    input_ids: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    engram_rows: torch.Tensor | None = None
    live: torch.Tensor | None = None
    stores_only: int | None = None
    attentions: bool = False
    moved: dict[torch.device, Pass] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Pass:
        """The same for layers on another device; once for all of them, accelerate asks at each."""
        there = torch.device(device)
        if there == self.segments.row.device:
            return self
        if there not in self.moved:
            tensors: dict[str, Any] = {
                name: None if value is None else value.to(there, non_blocking=non_blocking)
                for name in ("input_ids", "token_types", "live")
                for value in [getattr(self, name)]
            }
            rows = self.engram_rows
            # Those that tables on the host were told stay there: by these they are known again.
            if rows is not None and rows.device == self.segments.row.device:
                tensors["engram_rows"] = rows.to(there, non_blocking=non_blocking)
            turns = {k: x.to(there, non_blocking=non_blocking) for k, x in self.turns.items()}
            segments = self.segments.to(there)
            # A copy that is moved on finds what was made before, itself too.
            new = replace(self, segments=segments, turns=turns, **tensors)
            self.moved |= {self.segments.row.device: self, there: new}
        return self.moved[there]


class Dsv4DecoderLayer(GradientCheckpointingLayer):
    """Engram (some layers), then attention and experts, each inside one mHC site."""

    def __init__(self, config: Dsv4Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.single_pass = config.hc_single_pass
        # A layer that makes entries of its own reads none: they need not move to its device.
        self.hands_on = layer_idx + 1 not in config.kv_source_layer_ids
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

        streams, pre, (shared, probabilities), router_logits = self._sites(
            attend, think, streams, pre
        )
        shared = shared if self.hands_on else Shared()
        return streams, pre, *shared, router_logits, probabilities

    def _sites(
        self,
        attend: Callable[[torch.Tensor], tuple[torch.Tensor, T]],
        think: Callable[[torch.Tensor], tuple[torch.Tensor, U]],
        streams: torch.Tensor,
        pre: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, T, U]:
        """Two sites: collapse, run the block, expand, each; the first closes as the second opens.

        Single-pass sites collapse with what was handed on. The second is closed here and not as
        the next layer opens: between layers streams are seen, changed, moved and checkpointed.
        """
        single = self.single_pass
        first, second = self.attn_hc, self.ffn_hc
        x, own, post, comb, streams = first(streams, pre if single else None)
        u, seen = attend(x)
        x, last, post, comb, streams = close_and_open(
            first, second, u, streams, post, comb, own if single else None
        )
        u, thought = think(x)
        streams = hyper_ops.expand(u, streams, post, comb, second.kernels)
        return streams, last if single else pre, seen, thought


def foresee_experts(layers: Iterable[nn.Module], told: Pass) -> None:
    """Tell hash-routed layers at the start of a pass what they will want: its ids say it."""
    if told.input_ids is None:
        return
    for layer in layers:
        assert isinstance(layer, Dsv4DecoderLayer)
        if told.stores_only is None or layer.layer_idx < told.stores_only:
            layer.mlp.foresee(told.input_ids)
