# SPDX-License-Identifier: Apache-2.0
"""The low ranks of adapters beside routed experts: products of sorted rows with thin matrices.

A branch is A [n, r, wide] and B [n, wide, r], one matrix an expert; a share says which rows of x
and y it sees, and how many of them each matrix has (`expert_rows.Share`).

| function | result |
|---|---|
| `narrow` | `s x W_e^T` with A, `s x W_e` with B: [m, r] |
| `widen` | `y += low W_e^T` with B, `y += low W_e` with A |
| `fill` | `sum low_i x_i` of every matrix, in the layout of A or of B |

Forward is `narrow` with A and `widen` with B; back to the inputs the same with B and A; back to a
bank `fill`. On a GPU `kernels/low_rank.py` computes them, rows found and added on the way; the
references here are products of `grouped.py`.
"""

from collections.abc import Sequence

import torch

from modeling_dsv4.kernel_choice import use_triton

from .expert_rows import Branch, Share
from .grouped import outer, times, times_back


def narrow(
    x: torch.Tensor,
    bank: torch.Tensor,
    share: Share,
    scale: float,
    wide_first: bool = False,
    kernels: str = "torch",
) -> torch.Tensor:
    """Rows of a share to ranks, [m, r] in the bank's dtype.

    Args:
        x: [M, wide], a block's rows.
        bank: the share's part of A, or of B with `wide_first`.
        share: which rows.
        scale: of the branch.
        wide_first: see `bank`.
        kernels: see `kernel_choice.py`.
    """
    if _by_kernel(kernels, x, bank):
        from .kernels import low_rank

        plan = low_rank.make_plan(share.counts, x.device)
        return low_rank.narrow(x, _ranks_first(bank, wide_first), plan, share.places, scale)
    rows, product = share.of(x).to(bank.dtype), times_back if wide_first else times
    return product(rows, bank, share.counts).mul_(scale)


def widen(
    y: torch.Tensor,
    low: torch.Tensor,
    bank: torch.Tensor,
    share: Share,
    wide_first: bool = False,
    kernels: str = "torch",
) -> None:
    """Add ranks [m, r] through a bank to the share's rows of y [M, wide]; others as `narrow`."""
    if _by_kernel(kernels, y, bank):
        from .kernels import low_rank

        plan = low_rank.make_plan(share.counts, y.device)
        low_rank.widen(y, low, _ranks_first(bank, wide_first), plan, share.places)
        return
    share.add(y, (times if wide_first else times_back)(low, bank, share.counts))


def fill(
    out: torch.Tensor,
    low: torch.Tensor,
    x: torch.Tensor,
    share: Share,
    wide_first: bool = False,
    kernels: str = "torch",
) -> None:
    """Write the gradient of a share's part of a bank, in the layout of A, or of B.

    Args:
        out: [n, r, wide], or [n, wide, r] with `wide_first`.
        low: [m, r].
        x: [M, wide], a block's rows.
        share: which rows.
        wide_first: see `out`.
        kernels: see `kernel_choice.py`.
    """
    if _by_kernel(kernels, x, out):
        from .kernels import low_rank

        plan = low_rank.make_plan(share.counts, x.device)
        low_rank.outer(_ranks_first(out, wide_first), low, x, plan, share.places)
        return
    wide = share.of(x).to(out.dtype)
    out.copy_(outer(wide, low, share.counts) if wide_first else outer(low, wide, share.counts))


def add_all(
    x: torch.Tensor, branches: Sequence[Branch], banks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sum of all branches for rows x [M, in], by kernels: [M, out], differentiable in x and banks.

    Args:
        x: sorted rows.
        branches: of each adapter.
        banks: A and B of each, in order.
    """
    from .kernels import low_rank

    parts = [
        low_rank.Part(low_rank.make_plan(b.counts, x.device), b.places, b.scale) for b in branches
    ]
    return low_rank.LowRanks.apply(x, parts, *banks)


def takes(kernels: str, x: torch.Tensor, banks: Sequence[torch.Tensor]) -> bool:
    """Whether `add_all` computes with these."""
    return all(_by_kernel(kernels, x, bank) for bank in banks)


def _by_kernel(kernels: str, x: torch.Tensor, bank: torch.Tensor) -> bool:
    double = torch.float64 in (x.dtype, bank.dtype)
    return not double and use_triton(kernels, x)


def _ranks_first(bank: torch.Tensor, wide_first: bool) -> torch.Tensor:
    return bank.mT if wide_first else bank
