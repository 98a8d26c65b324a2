# SPDX-License-Identifier: Apache-2.0
"""Which rows belong to which expert: pairs of tokens and experts sorted, and cut into tiles.

A tile is up to `Plan.rows` sorted rows of one expert. Tiles are made on the device, under a bound
that follows from shapes, so that nothing waits for the host; those beyond the last name an expert
that does not exist.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Up to so many tokens each pair is a matrix-vector product: experts are rarely shared then.
DECODE_ROWS = 16
# Most sorted rows of a matrix tile; fewer where experts have fewer.
MOST_ROWS = 128


class Plan(NamedTuple):
    """Pairs sorted by expert: `order` [P] into the flat pairs, `tiles` [T, 3] of `rows` each."""

    order: torch.Tensor
    tiles: torch.Tensor
    rows: int

    def grid(self, size: int, block: int) -> tuple[int]:
        """Programs for `size` outputs of every row, in blocks."""
        return (len(self.tiles) * (-(-size // block)),)


class Part(NamedTuple):
    """Some of a pass's pairs: `order` [P] into the flat pairs, sorted by expert.

    `counts` of these belong to each expert, whose weights lie at `places`; the pass has `experts`
    in all and `top_k` a token, which decide the tiles.
    """

    order: torch.Tensor
    counts: list[int]
    places: list[int]
    experts: int
    top_k: int

    def plan(self, pairs: int) -> Plan:
        """Tiles as the whole pass of so many pairs has them."""
        block, first, tiles = tile_rows(pairs, self.experts), 0, []
        for place, count in zip(self.places, self.counts, strict=True):
            starts = range(first, first + count, block)
            tiles += [(place, start, first + count) for start in starts]
            first += count
        device = self.order.device
        return Plan(self.order, torch.tensor(tiles, dtype=torch.int32).to(device), block)


def make_plan(index: torch.Tensor, experts: int) -> Plan:
    """Sort the pairs of [n, K] ids and cut them into tiles, without asking how many there are."""
    flat = index.flatten()
    block = tile_rows(flat.numel(), experts)
    ids, order = flat.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    count = (ends - starts + block - 1) // block
    last = count.cumsum(0)
    # The most tiles there can be: full ones, and one that is not full per expert.
    tile = torch.arange(flat.numel() // block + min(experts, flat.numel()), device=ids.device)
    expert = torch.searchsorted(last, tile, right=True)
    e = expert.clamp(max=experts - 1)
    first = starts[e] + (tile - last[e] + count[e]) * block
    tiles = torch.stack((expert, first, ends[e]), dim=1).to(torch.int32)
    return Plan(order, tiles, block)


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: about as many as an expert has, from 16 to MOST_ROWS."""
    block = 16
    while block < MOST_ROWS and block * experts < pairs:
        block *= 2
    return block
