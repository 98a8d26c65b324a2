# SPDX-License-Identifier: Apache-2.0
"""Lightning indexer: which compressed entries a query reads (V3.2-Exp §2; V4 §2.3.1; V4.1).

V4: every CSA layer has an indexer with a small compressor of its own.
V4.1: keys are a projection of the KV latent before its rotation, made by the layer that owns the
KV; later layers bring queries only. One layer also keeps candidate blocks, and the index layers
behind it choose inside them.

Selection has no gradient. Scores exist for one block of queries at a time, never as [S, T], and
only of entries that one of its queries may read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .cache import LayerCache
from .cache_storage import CachedRows, PackedRows
from .compressor import Compressor
from .configuration_dsv4 import Dsv4Config
from .formats import FP4
from .kernel_choice import use_triton
from .layers import RMSNorm
from .rotary import rotate, rotation
from .segments import Segments, Windows

if TYPE_CHECKING:
    from .simulation import Rounding

# Scores of one block of queries may take this many float32 numbers (64 MiB).
_BLOCK_NUMBERS = 1 << 24
# More queries at once gain nothing: fewer of the entries are visible to all of them.
_BLOCK_QUERIES = 256
# Logits of one tile of keys, all heads, may take so many (4 MiB: what a core's cache holds).
_TILE_NUMBERS = {"cpu": 1 << 20}
_DEVICE_TILE_NUMBERS = 1 << 26
# Index queries of so many tokens exist at once where a kernel chooses (64 MiB in V4-Flash).
_KERNEL_TOKENS = 4096


class Selection(NamedTuple):
    """What one index source chose; None is "all that is visible".

    `ids` [B, S, K] int32, ascending, -1 = none. `candidates` [B, S, blocks] int32: first entry of
    every block in which the index sources behind the candidate source may choose, -1 = none.
    """

    ids: torch.Tensor | None = None
    candidates: torch.Tensor | None = None


class Indexer(nn.Module):
    """Scores queries against index keys and keeps the top-k entries of every query."""

    def __init__(self, config: Dsv4Config, layer_idx: int, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        self.rounding: Rounding | None = None  # see simulation.py
        self.kernels = "auto"  # see kernel_choice.py
        self.heads, self.channels = config.index_n_heads, config.index_head_dim
        self.owns_keys = config.kv_source(layer_idx) == layer_idx
        self.makes_candidates = layer_idx == config.candidate_source_layer_id
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * self.channels, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        if config.index_key == "compressor":
            self.compressor = Compressor(config, ratio, self.channels)
        elif self.owns_keys:
            self.k_proj = nn.Linear(config.head_dim, self.channels, bias=False)
            self.k_norm = RMSNorm(self.channels, config.rms_norm_eps)

    @torch.no_grad()
    def new_keys(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        segments: Segments,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Rotated index keys of the entries that close in this pass: [B, M, J]."""
        return self.make_keys(hidden_states, latents, segments, cache)

    def make_keys(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        segments: Segments,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """`new_keys` with a gradient, for who trains the indexer."""
        windows = segments.windows(self.ratio)
        if self.config.index_key == "compressor":
            ring = None if cache is None else cache.index_pool
            keys = self.compressor(hidden_states, segments, ring)
        else:
            keys = self.k_norm(self.k_proj(latents))
        keys = rotate(keys, rotation(windows.position, self.config, compressed=True))
        return keys if self.rounding is None else self.rounding.index(keys)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        keys: CachedRows,
        turn: torch.Tensor,
        segments: Segments,
        before: Selection,
    ) -> Selection:
        """Choose entries for every query.

        Args:
            hidden_states: [B, S, D] normed input of attention.
            q_latent: [B, S, Q] normed query latent.
            keys: [B, T, J] all index keys of the row.
            turn: [B, S, R/2, 2] rotation of the query positions.
            segments: places of the tokens.
            before: the last index source's choice, for its candidates.
        """
        windows = segments.windows(self.ratio)
        b, entries = hidden_states.shape[0], keys.shape[1]
        all_blocks = -(-entries // self.config.candidate_block_size)
        narrows = self.makes_candidates and all_blocks > self.config.candidate_topk_blocks
        k = min(self.config.index_topk, entries)
        if entries == k and not narrows and before.candidates is None:
            return Selection(None)
        rows = _rows_for_kernels(keys)
        if rows is not None and use_triton(self.kernels, rows):
            keep = self.config.candidate_topk_blocks if narrows else 0
            asks = (hidden_states, q_latent, turn)
            return self._choose_by_kernel(asks, rows, windows, k, before.candidates, keep)
        width = entries if before.candidates is None else self._entries_inside(before.candidates)
        spans = [_step_span(entries)] if segments.step else _spans(windows, b, width)
        ids, blocks = [], []
        for span in spans:
            query, weight = self._queries(hidden_states, q_latent, turn, span.part)
            if before.candidates is not None:
                inside = before.candidates[:, span.part]
                ids.append(self._choose_inside(query, weight, keys, windows, span, inside))
                continue
            scores = self._scores(query, weight, keys, windows, span)
            if narrows:
                blocks.append(self._candidates(scores, windows, span))
            ids.append(_best(scores, k, span.low))
        candidates = torch.cat(blocks, 1) if blocks else before.candidates
        return Selection(torch.cat(ids, 1), candidates)

    def _choose_by_kernel(
        self,
        asks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        windows: Windows,
        k: int,
        candidates: torch.Tensor | None,
        keep: int,
    ) -> Selection:
        from .kernels.indexer import choose

        first, ids, blocks = windows.upto - windows.own, [], []
        # A source of candidates chooses its own entries among all.
        inside = None if keep else candidates
        for at in range(0, first.shape[1], _KERNEL_TOKENS):
            part = slice(at, at + _KERNEL_TOKENS)
            query, weight = self._queries(*asks, part)
            chosen, kept = choose(
                query, keys, weight, first[:, part], windows.own[:, part], k,
                candidates=None if inside is None else inside[:, part],
                group=self.config.candidate_block_size, keep=keep,
            )  # fmt: skip
            ids.append(chosen)
            blocks.append(kept)
        kept_all = [x for x in blocks if x is not None]
        return Selection(torch.cat(ids, 1), torch.cat(kept_all, 1) if kept_all else candidates)

    def _queries(
        self, x: torch.Tensor, q_latent: torch.Tensor, turn: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated index queries [B, s, I, J] and the weights of their heads [B, s, I]."""
        query = self.q_b_proj(q_latent[:, part]).unflatten(-1, (self.heads, self.channels))
        query = rotate(query, turn[:, part, None], kernels=self.kernels)
        if self.rounding is not None:
            query = self.rounding.index(query)
        weight = ops.fp32(self.weights_proj(x[:, part])) * (self.channels * self.heads) ** -0.5
        return query, weight

    def _scores(
        self,
        query: torch.Tensor,
        weight: torch.Tensor,
        keys: CachedRows,
        windows: Windows,
        span: Span,
    ) -> torch.Tensor:
        """Scores of the entries `span.low` to `span.high`, -inf where invisible: [B, s, n]."""
        budget = _TILE_NUMBERS.get(query.device.type, _DEVICE_TILE_NUMBERS)
        step = max(budget // weight.numel(), 64)
        tiles = []
        for low in range(span.low, span.high, step):
            high = min(low + step, span.high)
            tile = ops.index_scores(query, keys[:, low:high], weight)
            if low < span.all_low or high > span.all_high:
                at = torch.arange(low, high, device=tile.device)
                tile.masked_fill_(~_sees(windows, span.part, at), -torch.inf)
            tiles.append(tile)
        return torch.cat(tiles, -1) if tiles else weight.new_empty(*weight.shape[:2], 0)

    def _choose_inside(
        self,
        query: torch.Tensor,
        weight: torch.Tensor,
        keys: CachedRows,
        windows: Windows,
        span: Span,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """The best entries of the candidate blocks; only those are read and scored."""
        size, entries = self.config.candidate_block_size, keys.shape[1]
        at = candidates[..., None] + torch.arange(size, device=candidates.device)
        seen = (candidates[..., None] >= 0) & _sees(windows, span.part, at.flatten(-2)).view_as(at)
        at, seen = at.flatten(-2), seen.flatten(-2)
        some = ops.gather_entries(keys, at.clamp(max=entries - 1))  # [B, s, n, J]
        scores = ops.index_scores(
            query.flatten(0, 1)[:, None], some.flatten(0, 1), weight.flatten(0, 1)[:, None]
        )
        scores = scores.view_as(at).masked_fill(~seen, -torch.inf)
        chosen = _best(scores, min(self.config.index_topk, entries), 0)
        return torch.where(chosen >= 0, at.gather(-1, chosen.clamp(min=0).long()), -1).to(
            torch.int32
        )

    def _entries_inside(self, candidates: torch.Tensor) -> int:
        """Numbers that one query takes inside its candidates: keys and scores."""
        return candidates.shape[2] * self.config.candidate_block_size * (self.channels + self.heads)

    def _candidates(self, scores: torch.Tensor, windows: Windows, span: Span) -> torch.Tensor:
        """The best blocks of entries of every query: [B, s, blocks] int32, -1 = none.

        A block scores its best entry; the block with the newest visible entry always stays.
        Blocks are counted from the first entry of the query's document.
        """
        size, b, s = self.config.candidate_block_size, *scores.shape[:2]
        own = windows.own[:, span.part]
        first = windows.upto[:, span.part] - own
        count = -(-scores.shape[-1] // size)
        if span.one_start:
            shifted = F.pad(scores, (0, count * size - scores.shape[-1]), value=-torch.inf)
        else:
            entry = first[..., None] - span.low + torch.arange(count * size, device=scores.device)
            shifted = scores.gather(-1, entry.clamp(max=scores.shape[-1] - 1))
            shifted.masked_fill_(entry >= scores.shape[-1], -torch.inf)
        best = shifted.view(b, s, count, size).amax(-1)
        newest = (own[..., None] - 1).clamp(min=0) // size
        kept = torch.where(own[..., None] > 0, torch.inf, -torch.inf)
        best = best.scatter(-1, newest, kept.to(best.dtype))
        ids = _best(best, self.config.candidate_topk_blocks, 0)
        # Stored as first entry of the block, so that a later pass needs no document borders.
        return torch.where(ids >= 0, ids * size + first[..., None], -1).to(torch.int32)


class Span(NamedTuple):
    """A block of queries and the entries it may read.

    `low` to `high`: visible to at least one of its queries; `all_low` to `all_high`: to all.
    `one_start`: the documents of all its queries have their first entry at `low`, or none.
    """

    part: slice
    low: int
    high: int
    all_low: int
    all_high: int
    one_start: bool


def _spans(windows: Windows, batch: int, width: int) -> list[Span]:
    """Blocks of queries whose scores, `width` numbers a query, fit the budget."""
    queries = windows.upto.shape[1]
    step = max(min(_BLOCK_NUMBERS // (batch * width), _BLOCK_QUERIES), 1)
    parts = [slice(at, min(at + step, queries)) for at in range(0, queries, step)]
    upto, first = windows.upto, windows.upto - windows.own
    # One transfer for all blocks: on a device each would wait for it.
    borders = [
        torch.stack((first[:, p].amin(), upto[:, p].amax(), first[:, p].amax(), upto[:, p].amin()))
        for p in parts
    ]
    return [
        Span(part, low, high, all_low, all_high, low in (high, all_low))
        for part, (low, high, all_low, all_high) in zip(
            parts, torch.stack(borders).tolist(), strict=True
        )
    ]


def _rows_for_kernels(keys: CachedRows) -> torch.Tensor | None:
    """Keys as kernels read them, numbers or a release's packed rows; None where they cannot."""
    if isinstance(keys, torch.Tensor):
        return keys
    j, codec = keys.codec.channels, keys.codec
    here = type(keys) is PackedRows and keys.dtype is not torch.float64
    known = codec.coded is FP4 and not codec.plain and j >= 32 and j & (j - 1) == 0
    return keys.data if here and known else None


def _step_span(entries: int) -> Span:
    """All entries under a mask, for one query a row: what it may read is not asked."""
    return Span(slice(0, 1), 0, entries, entries, 0, one_start=False)


def _best(scores: torch.Tensor, k: int, low: int) -> torch.Tensor:
    """The k best of [B, s, n], counted from `low`, ascending: [B, s, k] int32, -1 = none."""
    kept = min(k, scores.shape[-1])
    if not kept:
        return torch.full((*scores.shape[:2], k), -1, dtype=torch.int32, device=scores.device)
    chosen = ops.top_k_ascending(scores, kept)
    chosen = torch.where(scores.gather(-1, chosen) == -torch.inf, -1, chosen + low)
    return F.pad(chosen.to(torch.int32), (0, k - kept), value=-1)


def _sees(windows: Windows, part: slice, at: torch.Tensor) -> torch.Tensor:
    """Which of the entries `at` [n] or [B, s, n] each query of `part` may read: [B, s, n] bool."""
    upto, own = windows.upto[:, part, None], windows.own[:, part, None]
    return (at < upto) & (at >= upto - own)


def visible(windows: Windows, part: slice, entries: int) -> torch.Tensor:
    """Which of the row's entries each query of `part` may read: [B, s, T] bool."""
    return _sees(windows, part, torch.arange(entries, device=windows.upto.device))
