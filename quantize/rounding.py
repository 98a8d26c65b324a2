# SPDX-License-Identifier: Apache-2.0
"""Rounding for the least error of outputs: `E |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T)`.

H = E x x^T is the second moment of the inputs. Columns are rounded from left to right, and what
went wrong in one is made up for by those that are not rounded yet (LDLQ, arXiv 2307.13304, which is
GPTQ, arXiv 2210.17323). With `U^T U = H^-1`, U upper triangular, an error e in block b asks for
`-e U_bb^-1 U_b,rest` in the rest. Without statistics H is the identity: formats' own `pack`, each
for the least squared error of the weights.
"""

from collections.abc import Callable

import torch

from modeling_dsv4.formats import WeightFormat, get_format

from .grids import GRIDS, Grid, finite, group_size
from .trellis import TRELLISES, Trellis, normalize, rotate

# Of the mean second moment, added to each: keeps inputs that were never seen from being ignored.
DAMPING = 0.01
# Columns of a trellis that are settled together, and that are looked at beyond.
_COMMIT, _AHEAD = 32, 16


def quantize_weight(
    weight: torch.Tensor,
    weight_format: str | WeightFormat,
    statistics: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Round a weight into a format's parts.

    Args:
        weight: [..., O, I]; leading axes stack and share the statistics.
        weight_format: a format or its name. `int*` and `trellis*` use statistics; others, such
            as fp4, are rounded to the nearest.
        statistics: second moments of the inputs, [I] for a diagonal or [I, I]; None for a rounding
            without calibration.

    Raises:
        ValueError: statistics of another width, or numbers that are not finite.
    """
    fmt = get_format(weight_format)
    if statistics is None or fmt.name not in GRIDS | TRELLISES:
        return fmt.pack(weight)
    second = _check(statistics, weight)
    w = finite(weight).flatten(0, -2)
    if fmt.name in GRIDS:
        parts = _round_grid(GRIDS[fmt.name], w, second)
    else:
        parts = _round_trellis(TRELLISES[fmt.name], w, second)
    return {k: part.view(*weight.shape[:-1], -1) for k, part in parts.items()}


def weighted_error(
    weight: torch.Tensor, rounded: torch.Tensor, statistics: torch.Tensor | None = None
) -> float:
    """`tr((W - Q) H (W - Q)^T) / tr(W H W^T)`: share of the output's energy that is wrong."""
    w = weight.float().flatten(0, -2)
    wrong = rounded.float().flatten(0, -2) - w

    def energy(x: torch.Tensor) -> float:
        if statistics is None:
            return float(x.square().sum())
        second = statistics.float()
        return float(((x * second if second.dim() == 1 else x @ second) * x).sum())

    return energy(wrong) / max(energy(w), 2.0**-126)


def _check(statistics: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Statistics as float32 with a mean diagonal of 1."""
    k = weight.shape[-1]
    if statistics.shape not in ((k,), (k, k)):
        raise ValueError(
            f"wanted second moments [{k}] or [{k}, {k}] of the inputs of a weight "
            f"{list(weight.shape)}, got {list(statistics.shape)}"
        )
    if not statistics.isfinite().all():
        raise ValueError("wanted finite second moments, got infinities or NaN; calibrate again")
    second = statistics.to(weight.device, torch.float32)
    mean = (second if second.dim() == 1 else second.diagonal()).mean()
    if mean <= 0:
        raise ValueError("wanted second moments of inputs that were seen, got zeros")
    return second / mean


def _damp(second: torch.Tensor) -> torch.Tensor:
    return second + DAMPING * torch.eye(len(second), device=second.device)


def feedback(second: torch.Tensor) -> torch.Tensor:
    """U [I, I], upper triangular, with `U^T U` the inverse of second moments [I, I]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_grid(grid: Grid, w: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    group = group_size(w.shape[1])
    diagonal = (second if second.dim() == 1 else second.diagonal()) + DAMPING
    upper = feedback(_damp(second)) if second.dim() == 2 else None
    w, codes, scales, zeros = w.clone(), [], [], []
    for start in range(0, w.shape[1], group):
        at = slice(start, start + group)
        scale, zero = grid.fit(w[:, at], diagonal[at])
        scales.append(scale)
        zeros.append(zero)
        if upper is None:
            codes.append(grid.codes(w[:, at], scale, zero))
            continue
        found, wrong = _columns(grid, w[:, at], scale, zero, upper[at, at])
        codes.append(found)
        w[:, at.stop :] -= wrong @ upper[at, at.stop :]
    return grid.store(*(torch.cat(x, -1) for x in (codes, scales, zeros)))


def _columns(
    grid: Grid, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a group [O, g] in turn: codes, and errors over U's diagonal."""
    # Columns as rows: each is then contiguous.
    w, scale, zero = w.T.contiguous(), scale.squeeze(-1), zero.squeeze(-1)
    codes, wrong = torch.empty_like(w), torch.empty_like(w)
    for i in range(len(w)):
        codes[i] = grid.codes(w[i], scale, zero)
        wrong[i] = (w[i] - (codes[i] - zero) * scale) / upper[i, i]
        w[i + 1 :] -= upper[i, i + 1 :, None] * wrong[i]
    return codes.T, wrong.T


def _round_trellis(
    trellis: Trellis, w: torch.Tensor, second: torch.Tensor
) -> dict[str, torch.Tensor]:
    second = torch.diag(second) if second.dim() == 1 else second
    second = _damp(rotate(rotate(second).T.contiguous()))
    y, scale = normalize(rotate(w))
    make_up = _make_up(feedback(second))
    codes = trellis.search(y, trellis.table(w.device), make_up, _COMMIT, _AHEAD)
    q = trellis.values(codes)
    seen = q @ second
    gain = (seen * y).sum(-1, keepdim=True) / (seen * q).sum(-1, keepdim=True)
    return trellis.store(codes, scale * gain.clamp(min=0))


def _make_up(upper: torch.Tensor) -> Callable[[torch.Tensor, int, torch.Tensor], None]:
    def settled(y: torch.Tensor, start: int, wrong: torch.Tensor) -> None:
        stop = start + wrong.shape[1]
        if stop < y.shape[1]:
            block = upper[start:stop, start:stop]
            share = torch.linalg.solve_triangular(block, wrong, upper=True, left=False)
            y[:, stop:] -= share @ upper[start:stop, stop:]

    return settled
