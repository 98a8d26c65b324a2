# SPDX-License-Identifier: Apache-2.0
"""Which sorted rows an adapter of routed experts sees, and in which portions they are computed.

Rows are token-expert pairs, sorted by expert. A block is a span of experts whose rows are computed
together; a unit is what the frozen weights are asked for at a time: the block, or one expert.
"""

from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple

import torch

from modeling_dsv4 import ops
from modeling_dsv4.moe import ExpertsBase

from .frozen import Frozen

# Bytes that h of a block of experts may take in float32. On a CPU a block that stays in the cache
# is faster; an expert with more rows is a block of its own.
_BLOCK_BYTES = {"cpu": 16 << 20}
_DEVICE_BLOCK_BYTES = 256 << 20


class Span(NamedTuple):
    """Experts `first` to `last`, exclusive, with their sorted rows `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int


class Share(NamedTuple):
    """What one adapter has to do with a span: its matrices, its rows, and where they stand."""

    banks: slice
    rows: slice
    places: torch.Tensor | None
    counts: list[int]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The span's rows [m, size] that the adapter sees."""
        return x if self.places is None else x[self.places]

    def add(self, y: torch.Tensor, delta: torch.Tensor) -> None:
        """Add what the adapter gives for them."""
        if self.places is None:
            y.add_(delta)
        else:
            y.index_add_(0, self.places, delta)


class Branch:
    """One adapter beside the experts.

    Attributes:
        scale: of its low ranks.
        counts: rows of each expert it stands beside, [n] numbers.
        experts: ids of these, ascending; None where it stands beside all.
        places: of its rows among the sorted ones, int64, ascending; None for every row.
    """

    def __init__(
        self,
        scale: float,
        counts: list[int],
        experts: list[int] | None = None,
        places: torch.Tensor | None = None,
    ) -> None:
        self.scale, self.counts, self.experts, self.places = scale, counts, experts, places
        self._ends = [0, *accumulate(counts)]

    @property
    def rows(self) -> int:
        """How many rows it sees."""
        return self._ends[-1]

    def share(self, span: Span) -> Share | None:
        """Its part of a span; None where it has none."""
        if self.experts is None:
            first, last = span.first, span.last
        else:
            first, last = (bisect_left(self.experts, e) for e in (span.first, span.last))
        start, stop = self._ends[first], self._ends[last]
        if start == stop:
            return None
        rows = slice(start, stop)
        places = None if self.places is None else self.places[rows] - span.start
        return Share(slice(first, last), rows, places, self.counts[first:last])


def make_branch(
    rows: ops.ExpertRows,
    scale: float,
    experts: list[int] | None = None,
    tokens: torch.Tensor | None = None,
) -> Branch:
    """An adapter beside some experts (None: all), for some tokens ([n] bool; None: all)."""
    if experts is None and tokens is None:
        return Branch(scale, rows.counts)
    device, number = rows.token.device, len(rows.counts)
    expert = torch.arange(number, device=device).repeat_interleave(
        torch.tensor(rows.counts, device=device), output_size=len(rows.token)
    )
    seen = torch.ones_like(expert, dtype=torch.bool) if tokens is None else tokens[rows.token]
    if experts is not None:
        chosen = torch.zeros(number, dtype=torch.bool, device=device)
        chosen[experts] = True
        seen = seen & chosen[expert]
    places = seen.nonzero()[:, 0]
    counts = torch.bincount(expert[places], minlength=number).tolist()
    if experts is not None:
        counts = [counts[e] for e in experts]
    return Branch(scale, counts, experts, places)


class Pass:
    """One call of a layer: its frozen weights, its rows and who stands beside them.

    Attributes:
        frozen: the experts' weights.
        rows: sorted token-expert pairs.
        branches: the adapters.
        keep: whether h is kept for the backward pass; else it is computed again there.
        limit: of SwiGLU.
        kernels: what computes the low ranks, see `modeling_dsv4/kernel_choice.py`.
    """

    def __init__(
        self,
        base: ExpertsBase,
        frozen: Frozen,
        rows: ops.ExpertRows,
        branches: list[Branch],
        keep: bool = True,
    ) -> None:
        self.frozen, self.rows, self.branches, self.keep = frozen, rows, branches, keep
        self.kernels = base.kernels
        self.limit, self.inner, self.prepare = (
            base.swiglu_limit,
            base.intermediate_size,
            base.prepare,
        )

    def hit(self) -> list[int]:
        """Experts that have rows."""
        return [expert for expert, count in enumerate(self.rows.counts) if count]

    def blocks(self) -> list[Span]:
        """Spans of experts whose rows fit a block."""
        budget = _BLOCK_BYTES.get(self.rows.token.device.type, _DEVICE_BLOCK_BYTES)
        most, spans = budget // (8 * self.inner), []
        first = start = stop = 0
        for expert, count in enumerate(self.rows.counts):
            if stop > start and stop + count - start > most:
                spans.append(Span(first, expert, start, stop))
                first, start = expert, stop
            stop += count
        if stop > start:
            spans.append(Span(first, len(self.rows.counts), start, stop))
        return spans

    def units(self, block: Span) -> list[tuple[Span, slice]]:
        """What the frozen weights are asked for at a time, and where its rows are in the block."""
        if not self.frozen.one_by_one:
            return [(block, slice(0, block.stop - block.start))]
        found, start = [], block.start
        for expert in range(block.first, block.last):
            stop = start + self.rows.counts[expert]
            if stop > start:
                rows = slice(start - block.start, stop - block.start)
                found.append((Span(expert, expert + 1, start, stop), rows))
            start = stop
        return found

    def counts(self, span: Span) -> list[int]:
        """Rows of each expert of a span."""
        return self.rows.counts[span.first : span.last]

    def shares(self, block: Span) -> list[tuple[Branch, Share, int]]:
        """Adapters that have rows in a block, each with the place of its first bank."""
        found = ((branch, branch.share(block), 4 * i) for i, branch in enumerate(self.branches))
        return [(branch, share, i) for branch, share, i in found if share is not None]
