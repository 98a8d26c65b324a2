# SPDX-License-Identifier: Apache-2.0
"""Round a weight again that is on a grid already, so that what did not change stays.

Packing anew takes the scale of a group from its largest weight. Where that is the grid's largest
step, an update of any size upwards doubles the scale, and all 32 weights are rounded to steps twice
as wide. So a group of FP4 also tries the scale that it had, with its largest weights cut to what
that can hold, and keeps what is nearer.
"""

from collections.abc import Mapping

import torch

from modeling_dsv4.formats import E2M1_MAX, FP4, FP4_GROUP, WeightFormat
from quantize.rounding import quantize_weight


def round_again(
    weight: torch.Tensor, weight_format: WeightFormat, old: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parts of a changed weight in the format that it was in.

    Args:
        weight: [..., R, K] float32.
        weight_format: of `old`, and of the result.
        old: parts of the weight as it was.
    """
    fresh = quantize_weight(weight, weight_format)
    if weight_format != FP4:
        return fresh
    width = weight.shape[-1]
    most = (E2M1_MAX * old["_scale"].float()).repeat_interleave(FP4_GROUP, -1)[..., :width]
    kept = quantize_weight(weight.clamp(-most, most), weight_format)
    better = _errors(weight, kept) < _errors(weight, fresh)
    codes = better.repeat_interleave(FP4_GROUP // 2, -1)[..., : width // 2]
    # As bytes: choosing is not implemented for every 8-bit float.
    one, other = (parts["_scale"].view(torch.uint8) for parts in (kept, fresh))
    return {
        "": torch.where(codes, kept[""], fresh[""]),
        "_scale": torch.where(better, one, other).view(fresh["_scale"].dtype),
    }


def _errors(weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Squared error of each group: [..., R, groups]."""
    wrong = (FP4.unpack(parts, torch.float32) - weight).square()
    short = -wrong.shape[-1] % FP4_GROUP
    return torch.nn.functional.pad(wrong, (0, short)).unflatten(-1, (-1, FP4_GROUP)).sum(-1)
