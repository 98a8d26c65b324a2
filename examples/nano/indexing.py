# SPDX-License-Identifier: Apache-2.0
"""Teaching the lightning indexer (DeepSeek-V3.2-Exp §2.1.1).

The loss of the language model never reaches the indexer: a choice has no gradient. It learns from
attention instead: the probabilities that the layer's heads give to every visible entry, summed and
normalised, are the target of its scores' softmax. Its inputs are detached, so it watches without
being catered to. A few rows of every batch are enough.
"""

from typing import Any

import torch
import torch.nn.functional as F

from modeling_dsv4 import Dsv4ForCausalLM, ops
from modeling_dsv4.attention import Dsv4Attention
from modeling_dsv4.compressor import Compressor
from modeling_dsv4.indexer import visible
from modeling_dsv4.rotary import rotate, rotation
from modeling_dsv4.segments import Segments


class IndexTeacher:
    """Hooks every index source; `loss()` after a forward pass gives what the indexers should lose.

    Args:
        model: wants rows of one unpadded document, as in training here.
        rows: how many rows of a batch are used.
    """

    def __init__(self, model: Dsv4ForCausalLM, rows: int) -> None:
        self.rows = rows
        self._latents: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []
        for layer in model.model.layers:
            attention = layer.self_attn
            if attention.compressor is not None:
                attention.compressor.register_forward_hook(self._see_latents)
            if attention.indexer is not None:
                attention.register_forward_hook(self._teach)

    def loss(self) -> torch.Tensor:
        """Sum of the divergences since the last call: a scalar with a gradient, in nats."""
        total = torch.stack(self._losses).sum()
        self._losses.clear()
        return total

    def _see_latents(self, module: Compressor, args: Any, latents: torch.Tensor) -> None:
        self._latents = latents[: self.rows].detach()

    def _teach(self, module: Dsv4Attention, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        x, segments, turns = args[:3]
        x, entries = x[: self.rows].detach(), output[1].entries[: self.rows].detach()
        turn = turns[True][: self.rows]
        with torch.no_grad():
            q_latent = module.q_a_norm(module.q_a_proj(x))
            target, seen = wanted(module, x, q_latent, entries, turn, segments)
        indexer = module.indexer
        if indexer.owns_keys:
            assert self._latents is not None
            first = segments.windows(module.ratio).position[: self.rows]
            turns_of_keys = rotation(first, module.config, compressed=True)
            self._keys = rotate(indexer.k_norm(indexer.k_proj(self._latents)), turns_of_keys)
        query, weight = indexer._queries(x, q_latent, turn, slice(None))
        scores = ops.index_scores(query, self._keys, weight)
        guess = scores.masked_fill(~seen, -1e9).log_softmax(-1)
        some = seen.any(-1)
        self._losses.append(F.kl_div(guess[some], target[some], reduction="batchmean"))


def wanted(
    attention: Dsv4Attention,
    x: torch.Tensor,
    q_latent: torch.Tensor,
    entries: torch.Tensor,
    turn: torch.Tensor,
    segments: Segments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries the layer's heads would read if they read all they see.

    Returns:
        probabilities [b, S, T] that sum to 1 over the visible entries, and which those are.
    """
    b, s = x.shape[:2]
    heads, channels = attention.heads, attention.channels
    q = rotate(attention.q_b_proj(q_latent).unflatten(-1, (heads, channels)), turn[:, :, None])
    k = rotate(attention.kv_norm(attention.kv_proj(x)), turn)
    seen = visible(segments.windows(attention.ratio), slice(0, s), entries.shape[1])[:b]
    back = torch.arange(s)[:, None] - torch.arange(s)
    near = (back >= 0) & (back < attention.config.sliding_window)
    logits = torch.einsum("bshc,btc->bhst", q, torch.cat((k, entries), dim=1)) * attention.scaling
    keep = torch.cat((near.expand(b, s, s), seen), dim=-1)
    logits = logits.masked_fill(~keep[:, None], -torch.inf)
    sink = attention.sinks.view(1, heads, 1, 1).expand(b, heads, s, 1)
    p = torch.cat((logits, sink), dim=-1).softmax(-1)[..., s:-1].sum(1)
    return p / p.sum(-1, keepdim=True).clamp(min=1e-9), seen
