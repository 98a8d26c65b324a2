# SPDX-License-Identifier: Apache-2.0
"""Compressors: W tokens become one entry (V4 §2.3.1-2.3.2; V4.1 release file inference/model.py).

| ratio | gate | overlap | position bias |
|---|---|---|---|
| 128 (V4 HCA) | softmax per channel | no | yes |
| 4 (V4 CSA) | softmax over 8 slots | with the window before: `lo` half of its channels | yes |
| 2 (V4.1) | softmax per channel | no | no |
| 1 (V4.1) | none: one projection in the model's dtype | no | no |

An entry is visible once its window is complete, the query's own token included. Tokens of an
unfinished window are reached through the sliding window, which always covers them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .cache_stores import Ring
from .configuration_dsv4 import Dsv4Config
from .layers import Float32Linear, RMSNorm
from .precision import Float32Parameters
from .segments import Segments, Windows


class Compressor(Float32Parameters):
    """Pools windows of `ratio` tokens into entries of `channels`, before rotation."""

    def __init__(self, config: Dsv4Config, ratio: int, channels: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.overlap = ratio == config.compressor_overlap_ratio
        width = 2 * channels if self.overlap else channels
        self.kernels = "auto"  # see kernel_choice.py
        # Called as modules, never by their weights: offloading and adapters hook into the call.
        linear = Float32Linear if ratio > 1 else nn.Linear
        self.kv_proj = linear(config.hidden_size, width, bias=False)
        self.gate_proj = linear(config.hidden_size, width, bias=False) if ratio > 1 else None
        self.position_bias = (
            nn.Parameter(torch.empty(ratio, width, dtype=torch.float32))
            if config.compressor_position_bias
            else None
        )
        self.kv_norm = RMSNorm(channels, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, segments: Segments, ring: Ring | None
    ) -> torch.Tensor:
        """[B, S, D] -> normed entries that close in this pass [B, M, C], not yet rotated.

        `ring` carries the values and gates of the tokens before; None starts from nothing.
        """
        windows = segments.windows(self.ratio)
        values = self.kv_proj(hidden_states)
        if self.gate_proj is None:
            entries = values if segments.fresh else _take(values, windows.last.clamp(min=0))
            return self.kv_norm(entries)
        both = torch.stack((values, self.gate_proj(hidden_states)), dim=2)  # [B, S, 2, width]
        slots = self._slots(both, windows, segments, ring)  # [B, M, slots, 2, width]
        if ring is not None:
            ring.write(both, segments)
        overlap = windows.overlap if self.overlap else None
        pooled = ops.pool_windows(slots, self.position_bias, overlap, self.kernels)
        return self.kv_norm(pooled.to(hidden_states.dtype))

    def _slots(
        self, both: torch.Tensor, windows: Windows, segments: Segments, ring: Ring | None
    ) -> torch.Tensor:
        """The tokens of every closing window; with overlap, those of the window before first."""
        span = 2 * self.ratio if self.overlap else self.ratio
        if segments.fresh:
            m = windows.last.shape[1]
            own = both[:, : m * self.ratio].unflatten(1, (m, self.ratio))
            if not self.overlap:
                return own
            before = F.pad(own, (0, 0) * 3 + (1, 0))[:, :-1]
            return torch.cat((before, own), dim=2)
        past = span - 1
        if ring is None:
            extended = F.pad(both, (0, 0, 0, 0, past, 0))
        else:
            extended = torch.cat((ring.tail(segments.state.seen, past, both), both), dim=1)
        back = torch.arange(span, device=both.device)
        index = windows.last.clamp(min=0)[..., None] + back  # column + past - (span - 1) + slot
        return _take(extended, index)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, S, ...] at index [B, ...] along S."""
    batch = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (index.dim() - 1))
    return x[batch, index]
