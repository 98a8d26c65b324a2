# SPDX-License-Identifier: Apache-2.0
"""Compressed sparse attention (V4 §2.3; V4.1 release file inference/model.py).

Keys and values are one head, the same tensor. A query reads the last `sliding_window` keys and
some compressed entries in one softmax, with a sink in its denominator:

```
x ── q_a ─ norm ─┬─ q_b ── rotate ───────────────┐
                 └──────────┐                    │
x ── kv ── norm ── rotate ──┼───── window ───────┤ softmax ── rotate back ── o_a ── o_b
x ── compressor ─┬─ rotate ─┼───── entries ──────┤
                 └─ indexer ┴───── which ────────┘
```

Layers may own their compressed entries and their choice of entries, or reuse those of the last
layer that did (V4.1); `Shared` carries both down the stack. Work and memory are linear in the
context: queries go in blocks, each against its window and its chosen entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from . import ops
from .cache import LayerCache
from .compressor import Compressor
from .configuration_dsv4 import Dsv4Config
from .indexer import Indexer, Selection, visible
from .layers import RMSNorm
from .precision import Float32Parameters
from .rotary import rotate, rotation
from .segments import Segments
from .storage import GroupedLinear

if TYPE_CHECKING:
    from .simulation import Rounding

# Up to this many times the chosen entries, reading all and masking is faster than gathering.
_DENSE_UP_TO = 8
# One block of queries may hold this many float32 numbers of scores and gathered entries (64 MiB).
_BLOCK_NUMBERS = 1 << 24


class Shared(NamedTuple):
    """What attention hands from layer to layer within one pass; nothing of it is cached.

    `entries` [B, T, C] and `index_keys` [B, T, J] of the last KV source; `ids` and `candidates`
    of the last index source (see `Selection`).
    """

    entries: torch.Tensor | None = None
    index_keys: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    candidates: torch.Tensor | None = None


class Dsv4Attention(Float32Parameters):
    """One attention block; `layer_idx >= num_hidden_layers` makes a window-only draft block."""

    def __init__(self, config: Dsv4Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        drafting = layer_idx >= config.num_hidden_layers
        self.ratio = 0 if drafting else config.compress_ratios[layer_idx]
        h, c, g = config.num_attention_heads, config.head_dim, config.o_groups
        self.heads, self.channels, self.groups = h, c, g
        self.scaling = c**-0.5
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, h * c, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, c, bias=False)
        self.kv_norm = RMSNorm(c, config.rms_norm_eps)
        self.o_a_proj = GroupedLinear(h * c // g, g * config.o_lora_rank, g)
        self.o_b_proj = nn.Linear(g * config.o_lora_rank, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(h, dtype=torch.float32))
        self.rounding: Rounding | None = None  # see simulation.py
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        self.reads_all = True
        if self.ratio:
            if config.kv_source(layer_idx) == layer_idx:
                self.compressor = Compressor(config, self.ratio, c)
            source = config.index_source(layer_idx)
            self.reads_all = source is None
            if source == layer_idx:
                self.indexer = Indexer(config, layer_idx, self.ratio)

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: Segments,
        turns: dict[bool, torch.Tensor],
        shared: Shared,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, Shared]:
        """Attend from [B, S, D] to window and entries.

        Args:
            hidden_states: [B, S, D] normed.
            segments: places of the tokens.
            turns: rotation [B, S, R/2] of the positions, by whether the layer compresses.
            shared: entries and choices of the layers before.
            cache: this layer's stores, read and written; None starts from nothing.

        Returns:
            [B, S, D], and what the next layer is handed.
        """
        turn = turns[self.ratio > 0]
        q_latent = self.q_a_norm(self.q_a_proj(hidden_states))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.channels))
        if self.config.q_head_norm:
            q = ops.rms_norm(q, None, 1e-6)
        q = rotate(q, turn[:, :, None])
        k = rotate(self.kv_norm(self.kv_proj(hidden_states)), turn)
        if self.rounding is not None:
            k = self.rounding.key(k)
        if self.ratio:
            shared = self._compress(hidden_states, q_latent, turn, segments, shared, cache)
        out = self._attend(q, k, segments, shared, cache)
        # Values were rotated as keys; turning back at the query makes their part relative too.
        out = rotate(out, turn.conj()[:, :, None])
        out = self.o_a_proj(out.flatten(2).unflatten(-1, (self.groups, -1)))
        return self.o_b_proj(out.flatten(2)), shared

    def _compress(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        turn: torch.Tensor,
        segments: Segments,
        shared: Shared,
        cache: LayerCache | None,
    ) -> Shared:
        """Make what this layer owns of entries, index keys and choice."""
        windows = segments.windows(self.ratio)
        past = segments.state.entries.get(self.ratio)
        if self.compressor is not None:
            ring = None if cache is None else cache.pool
            latents = self.compressor(hidden_states, segments, ring)
            entries = rotate(latents, rotation(windows.position, self.config, compressed=True))
            if self.rounding is not None:
                entries = self.rounding.entry(entries)
            keys = None
            if self.indexer is not None:
                keys = self.indexer.new_keys(hidden_states, latents, segments, cache)
            if cache is not None:
                step = segments.step
                entries = cache.entries.extend(entries, past, windows.count, step)
                if keys is not None:
                    keys = cache.index_keys.extend(keys, past, windows.count, step)
            shared = Shared(entries, keys)
        if self.indexer is not None:
            assert shared.index_keys is not None
            before = Selection(shared.ids, shared.candidates)
            chosen = self.indexer(
                hidden_states, q_latent, shared.index_keys, turn, segments, before
            )
            shared = Shared(shared.entries, shared.index_keys, *chosen)
        return shared

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        segments: Segments,
        shared: Shared,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        w, state = self.config.sliding_window, segments.state
        past = 0
        if cache is not None:
            keys = k
            if not segments.fresh:
                past = w - 1
                keys = torch.cat((cache.window.tail(state.seen, past, k), k), dim=1)
            cache.window.write(k, segments)
            k = keys
        # Key x stands at row index seen + x - past.
        first = (segments.start - state.seen[:, None] + past)[..., None]  # [B, S, 1]
        entries, ids = self._readable(shared)
        out = []
        for part in self._blocks(q, entries, ids):
            low = max(part.start + past - w + 1, 0)
            x = torch.arange(low, min(part.stop + past, k.shape[1]), device=k.device)
            at = torch.arange(part.start, part.stop, device=k.device)[:, None] + past
            keep = (x <= at) & (x > at - w) & (x >= first[:, part])
            some, some_keep = self._entries_of(entries, ids, segments, part)
            near = k[:, low : low + x.shape[0]]
            out.append(
                ops.sink_attention(
                    q[:, part], near, keep, some, some_keep, self.sinks, self.scaling
                )
            )
        return torch.cat(out, dim=1)

    def _readable(self, shared: Shared) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Entries this layer may read, and which of them each query chose (None: all it sees)."""
        if not self.ratio or shared.entries is None or shared.entries.shape[1] == 0:
            return None, None
        return shared.entries, None if self.reads_all else shared.ids

    def _entries_of(
        self,
        entries: torch.Tensor | None,
        ids: torch.Tensor | None,
        segments: Segments,
        part: slice,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if entries is None:
            return None, None
        if ids is not None:
            chosen = ids[:, part]
            if entries.shape[1] > _DENSE_UP_TO * ids.shape[2]:
                return ops.gather_entries(entries, chosen), chosen >= 0
            return entries, ops.chosen_mask(chosen, entries.shape[1])
        windows = segments.windows(self.ratio)
        upto = entries.shape[1] if segments.step else int(windows.upto[:, part].max())
        if upto == 0:
            return None, None
        return entries[:, :upto], visible(windows, part, upto)

    def _blocks(
        self, q: torch.Tensor, entries: torch.Tensor | None, ids: torch.Tensor | None
    ) -> list[slice]:
        """Blocks of queries whose scores and gathered entries fit the budget."""
        b, s, h, c = q.shape
        w = self.config.sliding_window
        numbers = h * (2 * w)
        if entries is not None:
            t = entries.shape[1]
            k = t if ids is None or t <= _DENSE_UP_TO * ids.shape[2] else ids.shape[2]
            numbers += k * (2 * h if k == t else 2 * h + c)
        step = max(1, min(_BLOCK_NUMBERS // (b * numbers), max(w, 64)))
        return [slice(at, min(at + step, s)) for at in range(0, s, step)]
