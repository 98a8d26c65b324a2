# SPDX-License-Identifier: Apache-2.0
"""Make a table of the trellis formats anew: `python benchmarks/trellis_tables.py BITS [MINUTES]`.

Gaussian pairs are encoded and every entry becomes the mean of what was encoded to it, in turn, as
in Lloyd's algorithm; an entry and its mirror share their means. Prints the squared error of numbers
that the table was not made from, and in the end the table as `quantize/trellis_tables.py` has it.
"""

import sys
import time

import torch

from quantize.trellis import STATES, viterbi

HALF = STATES // 2
ROWS, PAIRS = 32, 64
# Pairs at either end of a row are chosen with less freedom, or more.
EDGE = 6


def whole(half: torch.Tensor) -> torch.Tensor:
    """A table [1024, 2] of its first half."""
    return torch.cat((half, -half.flip(0)))


def as_stored(half: torch.Tensor) -> torch.Tensor:
    """Half a table in steps of 1/32, int8."""
    return (half * 32).round().clamp(-127, 127).to(torch.int8)


def encode(y: torch.Tensor, half: torch.Tensor, bits: int) -> torch.Tensor:
    """Windows [pairs, rows] of rows y [rows, K]."""
    table = whole(half)
    start = torch.zeros(ROWS, dtype=torch.int64)
    return torch.cat([viterbi(part, table, bits, start) for part in y.split(ROWS)], dim=1)


def improve(half: torch.Tensor, bits: int, y: torch.Tensor) -> torch.Tensor:
    """Centroids of what rows y are encoded to; an entry that was not used stays."""
    window = encode(y, half, bits)[EDGE:-EDGE].T.flatten()
    pairs = y.unflatten(1, (-1, 2))[:, EDGE:-EDGE].flatten(0, 1)
    mirrored = window >= HALF
    window = torch.where(mirrored, STATES - 1 - window, window)
    pairs = torch.where(mirrored[:, None], -pairs, pairs)
    count = torch.zeros(HALF).index_add_(0, window, torch.ones(len(window)))
    total = torch.zeros(HALF, 2).index_add_(0, window, pairs)
    return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], half)


def main() -> None:
    bits, minutes = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    random = torch.Generator().manual_seed(0)
    held = torch.randn(768, 2 * PAIRS, generator=torch.Generator().manual_seed(99))
    half = torch.randn(HALF, 2, generator=random)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        half = improve(half, bits, torch.randn(1536, 2 * PAIRS, generator=random))
        stored = as_stored(half).float() / 32
        found = whole(stored)[encode(held, stored, bits)].transpose(0, 1).flatten(1)
        print(f"{bits / 2:g} bits: squared error {(found - held).square().mean():.5f}", flush=True)
    print(as_stored(half).numpy().tobytes().hex())


if __name__ == "__main__":
    main()
