# SPDX-License-Identifier: Apache-2.0
"""Rows rotated for a trellis, and put into the order in which its kernels read them.

    y = H across, then inside:  a row [K] as blocks [A, B], y = across x, then Walsh-Hadamard of B

Reference: `trellis.rotate`. Grid: rows. Blocks are mixed while they are loaded; inside a block each
of log2(B) steps takes the lowest bit of a column, adds and subtracts, and puts the bit on top, so
that after all of them every bit is where it was. Everything is float32, and a row's numbers do not
depend on how many rows there are. The orders are those of *pieces*: column c of K lies at place
c % P * (K / P) + c // P; P is 1 for the order of columns, 2 for even columns first.
"""

import torch
import triton
import triton.language as tl

from modeling_dsv4.kernels.launching import on_device_of

from ..trellis import rotations


@triton.jit
def rotate_rows(
    x, across, y, K, A,
    PIECES_IN: tl.constexpr, PIECES_OUT: tl.constexpr,
    BLOCK_A: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Rows x [n, K] in one order to y [n, K] in another."""
    row = tl.program_id(0).to(tl.int64) * K
    a, b = tl.arange(0, BLOCK_A), tl.arange(0, B)
    value = tl.zeros((BLOCK_A, B), tl.float32)
    for block in range(A):
        c = block * B + b
        part = tl.load(x + row + c % PIECES_IN * (K // PIECES_IN) + c // PIECES_IN).to(tl.float32)
        factor = tl.load(across + a * A + block, mask=a < A, other=0)
        value += factor[:, None] * part[None, :]
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(value, (BLOCK_A, B // 2, 2)))
        both = tl.join(even + odd, even - odd)
        value = tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK_A, B))
    c = a[:, None] * B + b[None, :]
    at = c % PIECES_OUT * (K // PIECES_OUT) + c // PIECES_OUT
    tl.store(y + row + at, value * (1.0 / B) ** 0.5, mask=(a < A)[:, None])


def rotate(
    x: torch.Tensor, pieces_in: int, pieces_out: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rotate rows x [..., K], in the order of `pieces_in`, to the order of `pieces_out`."""
    inside, across = rotations(x.shape[-1], x.device)
    x, y = x.contiguous(), x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return y
    with on_device_of(x):
        rotate_rows[(x.shape[:-1].numel(),)](
            x, across, y, x.shape[-1], len(across), pieces_in, pieces_out,
            BLOCK_A=triton.next_power_of_2(len(across)), B=len(inside),
            STEPS=len(inside).bit_length() - 1,
        )  # fmt: skip
    return y
