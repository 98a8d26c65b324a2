# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: interleaved pairs on the last R channels (V4 §2.3; inference/model.py).

Window-only layers turn with theta 10000. Layers with a compressor turn queries, window keys,
compressed entries and index vectors alike with theta 160000 and YaRN. Cosine and sine are never
multiplied by an attention factor.
"""

import functools
import math

import torch

from .configuration_dsv4 import Dsv4Config
from .kernel_choice import use_triton
from .ops import fp32, rms_norm


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


@functools.cache
def _held_frequencies(
    dim: int, theta: float, yarn: tuple[tuple[str, float], ...] | None, device: torch.device
) -> torch.Tensor:
    return inverse_frequencies(dim, theta, None if yarn is None else dict(yarn), device)


def rotation(position: torch.Tensor, config: Dsv4Config, compressed: bool) -> torch.Tensor:
    """Cosine and sine [..., R/2, 2] of positions [...]; `compressed` picks the layer kind."""
    theta = config.compress_rope_theta if compressed else config.rope_theta
    yarn = config.yarn if compressed else None
    dim, device = config.qk_rope_head_dim, position.device
    if torch.compiler.is_compiling():
        freq = inverse_frequencies(dim, theta, yarn, device)
    else:
        items = None if yarn is None else tuple(sorted(yarn.items()))
        freq = _held_frequencies(dim, theta, items, device)
    angle = position[..., None].float() * freq
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(
    x: torch.Tensor, turn: torch.Tensor, inverse: bool = False, kernels: str = "torch"
) -> torch.Tensor:
    """Turn the last R channels of [..., C] by [..., R/2, 2] (broadcast), or turn them back."""
    if use_triton(kernels, x):
        from .kernels import rotary as fused

        return fused.rotate(x, turn, inverse)
    r = 2 * turn.shape[-2]
    plain, pairs = x[..., :-r], fp32(x[..., -r:]).unflatten(-1, (-1, 2))
    # A compiler fuses real numbers and leaves complex ones alone; eagerly, theirs is the one pass.
    turned = (turn_pairs_ref if torch.compiler.is_compiling() else turn_pairs)(pairs, turn, inverse)
    return torch.cat((plain, turned.flatten(-2).to(x.dtype)), dim=-1)


def turn_pairs_ref(pairs: torch.Tensor, turn: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """`(a cos - b sin, a sin + b cos)` of pairs and (cos, sin), both [..., R/2, 2]."""
    (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
    if inverse:
        sin = -sin
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)


def turn_pairs(pairs: torch.Tensor, turn: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The same as a complex product; see `turn_pairs_ref`."""
    by = torch.view_as_complex(turn.to(pairs.dtype).contiguous())
    by = by.conj() if inverse else by
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * by)


def norm_rotate(
    x: torch.Tensor, turn: torch.Tensor, eps: float, kernels: str = "torch"
) -> torch.Tensor:
    """Norm each head [..., C] without a weight, round, and turn it; see `rotate`."""
    if use_triton(kernels, x):
        from .kernels import rotary as fused

        return fused.rotate(x, turn, eps=eps)
    return rotate(rms_norm(x, None, eps), turn)
