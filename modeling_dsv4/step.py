# SPDX-License-Identifier: Apache-2.0
"""A decoding step that is made once and then repeated: compiled, or captured in a CUDA graph.

A step of one column a row into a static cache runs hundreds of small operations a layer, in shapes
that no data decides. Eagerly their launching takes longer than their work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .cache import Dsv4Cache

MODES = ("eager", "compiled", "captured")
# With a wrapper in C++ no Python runs between the operations of a step.
COMPILE: dict[str, Any] = {"fullgraph": True, "options": {"cpp_wrapper": True}}
# Runs before a capture: kernels are compiled and workspaces allocated in these.
_WARM_UP = 2

# Ids, mask and positions [B, 1], the last two or None, and the cache, to logits [B, 1, V].
OneColumn = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None, Dsv4Cache], torch.Tensor
]


def check_mode(mode: str) -> None:
    """Refuse a mode that is unknown, or that this machine cannot run."""
    if mode not in MODES:
        raise ValueError(f"set_step: wanted one of {', '.join(MODES)}, got {mode!r}")
    if mode == "captured" and not torch.cuda.is_available():
        raise ValueError(
            "set_step: wanted 'captured', which needs a CUDA device, and found none; use 'compiled'"
        )


def make_step(mode: str, one_column: OneColumn) -> OneColumn | None:
    """What repeats `one_column` in the given mode; None: nothing but itself."""
    check_mode(mode)
    if mode == "eager":
        return None
    return (Compiled if mode == "compiled" else Captured)(one_column)


def is_step(cache: object, x: torch.Tensor | None) -> bool:
    """Whether ids x [B, S] are one more column into a static cache that has read a prompt."""
    return (
        x is not None
        and x.shape[1] == 1
        and isinstance(cache, Dsv4Cache)
        and cache.is_static
        and cache.is_initialized
        # A repeated step does not write what a draft head keeps.
        and not cache.drafts.on
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class Compiled:
    """Compile `one_column`, anew for a cache of another length: no length is a symbol."""

    def __init__(self, one_column: OneColumn) -> None:
        self.step = torch.compile(one_column, **COMPILE)
        self.marked: WeakKeyDictionary[Dsv4Cache, tuple[int, ...]] = WeakKeyDictionary()

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Dsv4Cache,
    ) -> torch.Tensor:
        held = [store.data for _, store in cache.named_stores() if store.data is not None]
        places = tuple(x.data_ptr() for x in held)
        if self.marked.get(cache) != places:
            for x in held:
                torch._dynamo.mark_static(x)
            self.marked[cache] = places
        return self.step(ids, mask, positions, cache)


@dataclass
class _Graph:
    """A captured step: its inputs and its output lie where it was captured."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor | None, ...]
    logits: torch.Tensor
    place: tuple[Any, ...]


class Captured:
    """Capture `one_column` in one CUDA graph a cache, and replay it.

    A graph holds the addresses of its cache's memory, which `crop`, `reset` and reordering keep;
    where it moved all the same, or other inputs are given, the step is captured again.
    """

    def __init__(self, one_column: OneColumn) -> None:
        self.one_column = one_column
        self.graphs: WeakKeyDictionary[Dsv4Cache, _Graph] = WeakKeyDictionary()

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Dsv4Cache,
    ) -> torch.Tensor:
        given = (ids, mask, positions)
        cache.begin(ids.shape[0], ids.device, 1)
        made = self.graphs.get(cache)
        if made is None or made.place != _place(cache, given):
            made = self.graphs[cache] = self._capture(given, cache)
        for held, x in zip(made.inputs, given, strict=True):
            if held is not None and x is not None:
                held.copy_(x)
        made.graph.replay()
        cache.columns += 1
        return made.logits.clone()

    def _capture(self, given: tuple[torch.Tensor | None, ...], cache: Dsv4Cache) -> _Graph:
        inputs = tuple(None if x is None else x.clone() for x in given)
        ids, mask, positions = inputs
        assert ids is not None
        counters, columns = [x.clone() for x in cache.counters()], cache.columns

        def restore() -> None:
            # What a run wrote stands where the replay will write the same.
            for held, x in zip(cache.counters(), counters, strict=True):
                held.copy_(x)
            cache.columns = columns

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.one_column(ids, mask, positions, cache)
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.one_column(ids, mask, positions, cache)
        cache.columns = columns
        return _Graph(graph, inputs, logits, _place(cache, given))


def _place(cache: Dsv4Cache, given: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    """What a captured step depends on besides numbers: addresses, and which inputs there are."""
    stores = tuple(s.data.data_ptr() for _, s in cache.named_stores() if s.data is not None)
    counters = tuple(x.data_ptr() for x in cache.counters())
    return stores, counters, tuple(None if x is None else x.shape for x in given)
