# SPDX-License-Identifier: Apache-2.0
"""Which layers lie on which GPU: arithmetic alone, for plans and for loading by them.

A token passes the layers in order, so each GPU holds a run of them and every run but the first
costs one move of the streams. What a GPU has room for beside its layers' dense weights and their
keys and values, slots of routed experts take:

```
GPU 0   embedding | layers 0 .. i-1: dense, cache | slots for the experts of these layers
GPU 1   layers i .. L-1: dense, cache | norm, head, drafts, vision | slots for theirs
```

The runs are chosen so that the layers with the fewest of their experts in slots have as many as
can be: the slowest run, not the average, is what every token waits for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Records that lie in slots side by side at least: one is computed while the next is copied.
_LEAST_SLOTS = 2


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of a model by layer, in the order that a token passes them.

    Attributes:
        dense: of each layer, read for every token.
        cache: keys and values that each layer keeps.
        handed: keys and values that a GPU holds once more if its run begins with this layer, whose
            source lies before.
        experts: all routed experts of each layer.
        count: routed experts of one layer.
        record: the largest expert; a slot holds one.
        first, last: what lies with the first layer, and with the last one.
        first_modules, last_modules: their names.
    """

    dense: tuple[int, ...]
    cache: tuple[int, ...]
    handed: tuple[int, ...]
    experts: tuple[int, ...]
    count: int
    record: int
    first: int = 0
    last: int = 0
    first_modules: tuple[str, ...] = ()
    last_modules: tuple[str, ...] = ()

    @property
    def fixed(self) -> int:
        """Bytes without experts, were all of it on one GPU."""
        return sum(self.dense) + sum(self.cache) + self.first + self.last


@dataclass(frozen=True)
class Run:
    """Neighbouring layers on one GPU.

    Attributes:
        card: number of the GPU among those given.
        layers: the first one, and the one behind the last.
        dense: bytes that are there for good, embedding and head included.
        cache: bytes of keys and values.
        slots: experts that lie there.
        slot_bytes: bytes of these.
        whole: whether they are all experts of these layers.
    """

    card: int
    layers: tuple[int, int]
    dense: int
    cache: int
    slots: int
    slot_bytes: int
    whole: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.dense + self.cache + self.slot_bytes


class _Sums:
    """Bytes of any run of layers, from sums over all before each layer."""

    def __init__(self, sizes: LayerSizes) -> None:
        self.sizes, self.layers = sizes, len(sizes.dense)
        columns = (sizes.dense, sizes.cache, sizes.experts)
        self._before = [list(accumulate(column, initial=0)) for column in columns]

    def of(self, low: int, high: int) -> tuple[int, int, int]:
        """Dense part with what lies at either end, cache, and experts of layers low to high - 1."""
        dense, cache, experts = (sums[high] - sums[low] for sums in self._before)
        dense += self.sizes.first if low == 0 else 0
        dense += self.sizes.last if high == self.layers else 0
        return dense, cache + (self.sizes.handed[low] if low else 0), experts

    def share(self, room: int, low: int, high: int) -> float:
        """Share of the run's experts that fit beside the rest; below 0 where that does not fit."""
        dense, cache, experts = self.of(low, high)
        left = room - dense - cache
        if left >= experts:
            return 1.0
        return left / experts if left >= _LEAST_SLOTS * self.sizes.record else -1.0


def split_layers(sizes: LayerSizes, rooms: Sequence[int]) -> tuple[Run, ...] | None:
    """Lay the layers on GPUs, in the order given; None if they do not fit.

    Of all ways, one with the largest least share of experts in slots, and of these one with the
    fewest GPUs: a model that fits on one stays there.

    Args:
        sizes: bytes by layer.
        rooms: bytes of each GPU, without what is left for working memory.
    """
    sums, layers = _Sums(sizes), len(sizes.dense)
    # best[used][high]: the least share with layers up to `high` on so many GPUs, and their borders.
    best: list[dict[int, tuple[float, tuple[tuple[int, int, int], ...]]]] = [{0: (1.0, ())}]
    best += [{} for _ in rooms]
    for card, room in enumerate(rooms):
        for used in range(card, -1, -1):
            for low, (least, runs) in list(best[used].items()):
                for high in range(low + 1, layers + 1):
                    found = min(least, sums.share(room, low, high))
                    if found < 0:
                        # One more layer does not shrink what does not fit; the last ones add more.
                        break
                    if found > best[used + 1].get(high, (-1.0,))[0]:
                        best[used + 1][high] = found, (*runs, (card, low, high))
    whole = [way[layers] for way in best if layers in way]
    if not whole:
        return None
    _, runs = max(whole, key=lambda way: (way[0], -len(way[1])))
    return tuple(_run(sums, rooms[card], card, low, high) for card, low, high in runs)


def _run(sums: _Sums, room: int, card: int, low: int, high: int) -> Run:
    dense, cache, experts = sums.of(low, high)
    left, sizes = room - dense - cache, sums.sizes
    if left >= experts:
        return Run(card, (low, high), dense, cache, sizes.count * (high - low), experts, True)
    slots = left // sizes.record
    return Run(card, (low, high), dense, cache, slots, slots * sizes.record, False)


def layers_that_fit(sizes: LayerSizes, rooms: Sequence[int]) -> int:
    """How many of the first layers can be laid at all: what to say where not all can."""
    sums, done = _Sums(sizes), 0
    for room in rooms:
        fitting = range(done + 1, len(sizes.dense) + 1)
        done = max((high for high in fitting if sums.share(room, done, high) >= 0), default=done)
    return done


def device_map(sizes: LayerSizes, runs: Sequence[Run], devices: Sequence[int]) -> dict[str, int]:
    """Which module goes where, as transformers takes it.

    Args:
        sizes: of the model.
        runs: of `split_layers`.
        devices: what torch calls each of the GPUs that were given there.
    """
    first, last = devices[runs[0].card], devices[runs[-1].card]
    layers = {f"model.layers.{i}": devices[r.card] for r in runs for i in range(*r.layers)}
    return (
        dict.fromkeys(sizes.first_modules, first) | layers | dict.fromkeys(sizes.last_modules, last)
    )
