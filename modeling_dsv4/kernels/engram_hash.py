# SPDX-License-Identifier: Apache-2.0
"""Engram addressing: table rows of every token for all layers, in one launch.

Reference (`engram.ngram_rows`), per token and layer, x_i the compressed id at look-back i:

    x_i = pad from the first break on: before the document's start, or a dead position
    mixed_1 = x_0 m_0 ^ x_1 m_1,   mixed_j = mixed_{j-1} ^ x_j m_j
    row = mixed_j mod prime + offset                      for every order j and head

Integers of 64 bits throughout, none of them negative, so that the remainder is everyone's. Grid:
blocks of BLOCK_T tokens x layers. Tile: [BLOCK_T, BLOCK_P] of the heads of one order. Masks: tokens
past the last load dead ids, heads from HEADS on a prime of 1, and neither is stored.
"""

import torch
import triton
import triton.language as tl

from .launching import on_device_of

TOKENS = 128


@triton.jit
def engram_rows_kernel(
    history, local, pad, multipliers, primes, offsets, rows, tokens, S,
    N: tl.constexpr, HEADS: tl.constexpr, DEAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    p = tl.arange(0, BLOCK_P)
    # Every row of the batch has N - 1 ids before its first token.
    now = history + t // S * (S + N - 1) + t % S + N - 1
    place = tl.load(local + t, mask=inside, other=0)
    filler = tl.load(pad)
    broken = t < 0
    mixed = tl.zeros([BLOCK_T], dtype=tl.int64)
    for i in tl.static_range(N):
        x = tl.load(now - i, mask=inside, other=DEAD)
        broken = broken | (x == DEAD) | (place < i)
        mixed = mixed ^ (tl.where(broken, filler, x) * tl.load(multipliers + layer * N + i))
        if i > 0:
            table = (layer * (N - 1) + i - 1) * HEADS + p
            prime = tl.load(primes + table, mask=p < HEADS, other=1)
            offset = tl.load(offsets + table, mask=p < HEADS, other=0)
            row = mixed[:, None] % prime[None, :] + offset[None, :]
            at = (layer * tokens + t) * (N - 1) * HEADS + (i - 1) * HEADS
            keep = inside[:, None] & (p < HEADS)[None, :]
            tl.store(rows + at[:, None] + p[None, :], row, mask=keep)


def ngram_rows(
    history: torch.Tensor,
    local: torch.Tensor,
    pad: torch.Tensor,
    constants: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dead: int,
) -> torch.Tensor:
    """Twin of `engram.ngram_rows`.

    Args:
        history: [B, n - 1 + S] int64, compressed ids.
        local: [B, S] int64, places of the tokens in their documents.
        pad: [] int64, the id behind a break.
        constants: multipliers [L, n], primes and offsets [L, n - 1, heads], int64.
        dead: the id of a dead position.

    Returns:
        [L, B, S, (n - 1) * heads] int64.
    """
    multipliers, primes, offsets = (x.contiguous() for x in constants)
    (layers, n), heads, (b, s) = multipliers.shape, primes.shape[2], local.shape
    rows = history.new_empty(layers, b, s, (n - 1) * heads)
    if rows.numel():
        with on_device_of(history):
            engram_rows_kernel[(triton.cdiv(b * s, TOKENS), layers)](
                history.contiguous(), local.contiguous(), pad, multipliers, primes, offsets, rows,
                b * s, s, N=n, HEADS=heads, DEAD=dead, BLOCK_T=TOKENS,
                BLOCK_P=triton.next_power_of_2(heads), num_warps=4,
            )  # fmt: skip
    return rows
