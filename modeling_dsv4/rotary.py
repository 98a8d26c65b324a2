# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: interleaved pairs on the last R channels (V4 §2.3; inference/model.py).

Window-only layers turn with theta 10000. Layers with a compressor turn queries, window keys,
compressed entries and index vectors alike with theta 160000 and YaRN. Cosine and sine are never
multiplied by an attention factor.
"""

import math

import torch

from .configuration_dsv4 import Dsv4Config
from .ops import fp32


def inverse_frequencies(
    dim: int, theta: float, yarn: dict[str, float] | None, device: torch.device | None = None
) -> torch.Tensor:
    """Angles per position: [dim / 2] float32, `theta^(-2i/dim)`, blended by YaRN where given."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    freq = 1.0 / theta**exponent
    if yarn is None:
        return freq

    def correction(rotations: float) -> float:
        turns = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn["beta_fast"])), 0)
    high = min(math.ceil(correction(yarn["beta_slow"])), dim - 1)
    step = torch.arange(dim // 2, dtype=torch.float32, device=device) - low
    ramp = (step / max(high - low, 0.001)).clamp(0, 1)
    return freq * (1 - ramp) + freq / yarn["factor"] * ramp


def rotation(position: torch.Tensor, config: Dsv4Config, compressed: bool) -> torch.Tensor:
    """Unit complex numbers [..., R/2] for positions [...]; `compressed` picks the layer kind."""
    theta = config.compress_rope_theta if compressed else config.rope_theta
    yarn = config.yarn if compressed else None
    freq = inverse_frequencies(config.qk_rope_head_dim, theta, yarn, position.device)
    angle = position[..., None].float() * freq
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the last R channels of [..., C] by [..., R/2] (broadcast); conjugate to turn back."""
    r = 2 * turn.shape[-1]
    plain, pairs = x[..., :-r], fp32(x[..., -r:]).unflatten(-1, (-1, 2))
    # A compiler fuses real numbers and leaves complex ones alone; eagerly, theirs is the one pass.
    turned = (turn_pairs_ref if torch.compiler.is_compiling() else turn_pairs)(pairs, turn)
    return torch.cat((plain, turned.flatten(-2).to(x.dtype)), dim=-1)


def turn_pairs_ref(pairs: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """`(a cos - b sin, a sin + b cos)` of pairs [..., R/2, 2] and unit numbers [..., R/2]."""
    (a, b), cos, sin = pairs.unbind(-1), turn.real, turn.imag
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)


def turn_pairs(pairs: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The same as a complex product; see `turn_pairs_ref`."""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
