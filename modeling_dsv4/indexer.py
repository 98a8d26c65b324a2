# SPDX-License-Identifier: Apache-2.0
"""Lightning indexer: which compressed entries a query reads (V3.2-Exp §2; V4 §2.3.1; V4.1).

V4: every CSA layer has an indexer with a small compressor of its own.
V4.1: keys are a projection of the KV latent before its rotation, made by the layer that owns the
KV; later layers bring queries only. One layer also keeps candidate blocks, and the index layers
behind it choose inside them.

Selection has no gradient. Scores exist for one block of queries at a time, never as [S, T].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from . import ops
from .cache import LayerCache
from .compressor import Compressor
from .configuration_dsv4 import Dsv4Config
from .kernel_choice import use_triton
from .layers import RMSNorm
from .rotary import rotate, rotation
from .segments import Segments, Windows

if TYPE_CHECKING:
    from .simulation import Rounding

# Scores of one block of queries may take this many float32 numbers (64 MiB).
_BLOCK_NUMBERS = 1 << 24
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
        keys: torch.Tensor,
        turn: torch.Tensor,
        segments: Segments,
        before: Selection,
    ) -> Selection:
        """Choose entries for every query.

        Args:
            hidden_states: [B, S, D] normed input of attention.
            q_latent: [B, S, Q] normed query latent.
            keys: [B, T, J] all index keys of the row.
            turn: [B, S, R/2] rotation of the query positions.
            segments: places of the tokens.
            before: the last index source's choice, for its candidates.
        """
        windows = segments.windows(self.ratio)
        candidates = before.candidates
        all_blocks = -(-keys.shape[1] // self.config.candidate_block_size)
        narrows = self.makes_candidates and all_blocks > self.config.candidate_topk_blocks
        k = min(self.config.index_topk, keys.shape[1])
        if keys.shape[1] == k and not narrows and candidates is None:
            return Selection(None)
        if use_triton(self.kernels, keys):
            keep = self.config.candidate_topk_blocks if narrows else 0
            asks = (hidden_states, q_latent, turn)
            return self._choose_by_kernel(asks, keys, windows, k, candidates, keep)
        b, s = hidden_states.shape[:2]
        step = max(1, _BLOCK_NUMBERS // (b * keys.shape[1] * (self.heads + 4)))
        ids, blocks = [], []
        for at in range(0, s, step):
            part = slice(at, at + step)
            scores = self._scores(hidden_states[:, part], q_latent[:, part], keys, turn[:, part])
            seen = visible(windows, part, keys.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
            if narrows:
                blocks.append(self._candidates(scores, windows, part))
            elif candidates is not None:
                scores = self._inside(scores, candidates[:, part])
            chosen = ops.top_k_ascending(scores, k)
            chosen = chosen.masked_fill(scores.gather(-1, chosen) == -torch.inf, -1)
            ids.append(chosen.to(torch.int32))
        return Selection(torch.cat(ids, 1), torch.cat(blocks, 1) if blocks else candidates)

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
            query, weight = self._query(*(x[:, part] for x in asks))
            chosen, kept = choose(
                query, keys, weight, first[:, part], windows.own[:, part], k,
                candidates=None if inside is None else inside[:, part],
                group=self.config.candidate_block_size, keep=keep,
            )  # fmt: skip
            ids.append(chosen)
            blocks.append(kept)
        kept_all = [x for x in blocks if x is not None]
        return Selection(torch.cat(ids, 1), torch.cat(kept_all, 1) if kept_all else candidates)

    def _query(
        self, x: torch.Tensor, q_latent: torch.Tensor, turn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries [B, s, I, J] and their heads' weights [B, s, I]."""
        query = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.channels))
        query = rotate(query, turn[:, :, None], kernels=self.kernels)
        if self.rounding is not None:
            query = self.rounding.index(query)
        weight = ops.fp32(self.weights_proj(x)) * (self.channels * self.heads) ** -0.5
        return query, weight

    def _scores(
        self, x: torch.Tensor, q_latent: torch.Tensor, keys: torch.Tensor, turn: torch.Tensor
    ) -> torch.Tensor:
        query, weight = self._query(x, q_latent, turn)
        return ops.index_scores(query, keys, weight)

    def _candidates(self, scores: torch.Tensor, windows: Windows, part: slice) -> torch.Tensor:
        """The best blocks of entries of every query: [B, s, blocks] int32, -1 = none.

        A block scores its best entry; the block with the newest visible entry always stays.
        Blocks are counted from the first entry of the query's document.
        """
        size, b, s = self.config.candidate_block_size, *scores.shape[:2]
        first = (windows.upto - windows.own)[:, part]
        count = -(-scores.shape[-1] // size)
        entry = first[..., None] + torch.arange(count * size, device=scores.device)
        inside = entry < scores.shape[-1]
        shifted = scores.gather(-1, entry.clamp(max=scores.shape[-1] - 1))
        best = shifted.masked_fill(~inside, -torch.inf).view(b, s, count, size).amax(-1)
        newest = (windows.own[:, part, None] - 1).clamp(min=0) // size
        kept = torch.where(windows.own[:, part, None] > 0, torch.inf, -torch.inf)
        best = best.scatter(-1, newest, kept.to(best.dtype))
        ids = ops.top_k_ascending(best, min(self.config.candidate_topk_blocks, count))
        ids = ids.masked_fill(best.gather(-1, ids) == -torch.inf, -1)
        # Stored as first entry of the block, so that a later pass needs no document borders.
        return torch.where(ids >= 0, ids * size + first[..., None], -1).to(torch.int32)

    def _inside(self, scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Hide the scores outside the candidate blocks."""
        size, t = self.config.candidate_block_size, scores.shape[-1]
        entry = candidates[..., None].long() + torch.arange(size, device=scores.device)
        entry = torch.where(candidates[..., None] >= 0, entry, t).clamp(max=t).flatten(-2)
        keep = torch.zeros(*scores.shape[:-1], t + 1, dtype=torch.bool, device=scores.device)
        keep.scatter_(-1, entry, True)
        return scores.masked_fill(~keep[..., :t], -torch.inf)


def visible(windows: Windows, part: slice, entries: int) -> torch.Tensor:
    """Which of the row's entries each query of `part` may read: [B, s, T] bool."""
    at = torch.arange(entries, device=windows.upto.device)
    upto, own = windows.upto[:, part, None], windows.own[:, part, None]
    return (at < upto) & (at >= upto - own)
