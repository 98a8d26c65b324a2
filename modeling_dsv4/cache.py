# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps, per sequence (V4 §2.3, V4.1 release file inference/model.py).

Three kinds of store hold everything:

- `Ring`: the last tokens of a row (window keys, a compressor's values and gates, Engram ids), slot
  = row index mod capacity. It is a little longer than needed, so that a few tokens can be taken
  back by moving the counters alone.
- `Rows`: compressed entries and index keys, appended.
- `RowState`: the counters.

Rows of a batch may stand at different lengths. With `max_length` everything is allocated in the
first pass and stays where it is, counters included: a step of one token then runs in fixed shapes
(`segments.find_step`), which `torch.compile` traces whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.cache_utils import Cache

from .configuration_dsv4 import Dsv4Config
from .segments import RowState, Segments


class Ring:
    """The last tokens of every row: [B, capacity, ...], slot = row index mod capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: torch.Tensor | None = None

    def tail(self, seen: torch.Tensor, length: int, like: torch.Tensor) -> torch.Tensor:
        """The `length` tokens before row index `seen` [B] -> [B, length, ...].

        Slots before the row's first token hold anything finite; callers mask them.
        """
        if self.data is None:
            return like.new_zeros(like.shape[0], length, *like.shape[2:])
        slot = (seen[:, None] - length + torch.arange(length, device=seen.device)) % self.capacity
        return self.data[torch.arange(seen.shape[0], device=seen.device)[:, None], slot]

    def write(self, x: torch.Tensor, segments: Segments) -> None:
        """Keep the last real tokens of x [B, S, ...]."""
        x = x.detach()
        if self.data is None:
            self.data = x.new_zeros(x.shape[0], self.capacity, *x.shape[2:])
        keep = min(self.capacity, x.shape[1])
        column = segments.count[:, None] - keep + torch.arange(keep, device=x.device)
        batch = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(column)
        # Columns of pads have slots of their own too and put back what is there: fixed shapes.
        slot = (segments.state.seen[:, None] + column) % self.capacity
        real = (column >= 0).view(*column.shape, *[1] * (x.dim() - 2))
        held = self.data[batch, slot]
        self.data[batch, slot] = torch.where(real, x[batch, column.clamp(min=0)], held)


class Rows:
    """Entries appended per row: [B, capacity, ...], grown by half when full, or fixed."""

    def __init__(self, capacity: int | None = None) -> None:
        self.data: torch.Tensor | None = None
        self.length = 0
        self.capacity = capacity

    def extend(
        self,
        new: torch.Tensor,
        before: torch.Tensor | None,
        count: torch.Tensor,
        step: bool = False,
    ) -> torch.Tensor:
        """Append the first `count[b]` of new [B, M, ...] behind `before[b]`; give all [B, T, ...].

        In training the past is a constant and the returned rows carry the gradient of `new`.
        With a fixed capacity a `step` gives all of it, written or not.
        """
        if self.capacity is not None:
            return self._put(new, before, count, self.capacity, step)
        if before is None or self.data is None:
            self._hold(new.detach())
            return new
        after = before + count
        length = max(int(after.max()), 1)
        self._reserve(length, new)
        batch, at = torch.nonzero(
            torch.arange(new.shape[1], device=new.device) < count[:, None], as_tuple=True
        )
        to = before[batch] + at
        assert self.data is not None
        if torch.is_grad_enabled() and new.requires_grad:
            past = self.data[:, :length].clone()
            out = past.index_put((batch, to), new[batch, at])
        else:
            out = self.data[:, :length]
        self.data[batch, to] = new[batch, at].detach()
        self.length = length
        return out

    def _put(
        self,
        new: torch.Tensor,
        before: torch.Tensor | None,
        count: torch.Tensor,
        capacity: int,
        step: bool,
    ) -> torch.Tensor:
        """`extend` into rows held from the first pass on; a step asks the device nothing."""
        if self.data is None:
            # One row more than there are entries: rows of `new` that do not count lie behind
            # those that do, hidden, until the next entry replaces them.
            self.data = new.new_zeros(new.shape[0], capacity + 1, *new.shape[2:])
        start = torch.zeros_like(count) if before is None else before
        at = torch.arange(new.shape[1], device=new.device)
        to = start[:, None] + at
        batch = torch.arange(new.shape[0], device=new.device)[:, None].expand_as(to)
        if torch.is_grad_enabled() and new.requires_grad:
            out = self.data.clone().index_put((batch, to), new)
        else:
            out = self.data
        self.data[batch, to] = new.detach()
        self.length = capacity if step else max(int((start + count).max()), 1)
        return new if before is None and not step else out[:, : self.length]

    def _hold(self, new: torch.Tensor) -> None:
        self.data, self.length = new.clone(), new.shape[1]

    def _reserve(self, length: int, like: torch.Tensor) -> None:
        assert self.data is not None
        if length > self.data.shape[1]:
            capacity = length + max(length // 2, 16)
            grown = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
            grown[:, : self.data.shape[1]] = self.data
            self.data = grown


class LayerCache:
    """Stores of one layer; those that the layer does not need stay empty."""

    def __init__(
        self, config: Dsv4Config, layer_idx: int, slack: int, max_length: int | None = None
    ) -> None:
        ratio = config.compress_ratios[layer_idx]
        span = 2 * ratio if ratio == config.compressor_overlap_ratio else ratio
        self.window = Ring(config.sliding_window - 1 + slack)
        self.pool = Ring(span + slack)
        most = None if max_length is None else max(max_length // max(ratio, 1), 1)
        self.entries = Rows(most)
        self.index_pool = Ring(span + slack)
        self.index_keys = Rows(most)

    def stores(self) -> Iterable[Ring | Rows]:
        """All stores, for whatever moves rows of the batch."""
        return (self.window, self.pool, self.entries, self.index_pool, self.index_keys)


class Dsv4Cache(Cache):
    """The cache of a Dsv4 model; `generate` makes one, or pass your own as `past_key_values`.

    Args:
        config: the model's configuration.
        max_rewind: how many of the last tokens `crop` can take back. Costs that many more slots in
            each ring, nothing else.
        max_length: columns, pads included, that the cache has room for. All of it is allocated in
            the first pass and keeps its place, and a step of one column runs in fixed shapes that
            `torch.compile(model, fullgraph=True)` traces once. None grows as needed.

    Whoever replays a captured step moves `columns` too: it is Python's, the other counters are the
    device's.
    """

    # `generate` would compile by itself, with masks of four dimensions.
    is_compileable = False

    def __init__(
        self, config: Dsv4Config, max_rewind: int = 64, max_length: int | None = None
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: wanted at least 1 column, got {max_length}")
        self.layers = [
            LayerCache(config, i, max_rewind, max_length) for i in range(config.num_hidden_layers)
        ]
        self.max_length = max_length
        self.layer_class_to_replicate = None
        self.offloading = False
        self.max_rewind = max_rewind
        self.ngrams = Ring(max(config.engram_max_ngram_size - 1, 1) + max_rewind)
        self.ratios = sorted({r for r in config.compress_ratios if r})
        self.state: RowState | None = None
        self.columns = 0
        # Tokens that `crop` can still take back: since the start, the last pad, or the last border.
        # A number on the device, [], so that counting does not wait for it.
        self._rewindable: torch.Tensor | None = None
        # Between `open` and `advance` the stores are ahead of the counters.
        self._open = False

    @property
    def is_static(self) -> bool:
        """Whether everything is allocated once, for `max_length` columns."""
        return self.max_length is not None

    def begin(self, batch: int, device: torch.device, columns: int = 0) -> RowState:
        """The row state before a pass over `batch` rows of `columns` more."""
        if self._open:
            raise ValueError(
                "past_key_values: the last pass with this cache did not finish and has overwritten "
                "older tokens; call reset() and start again from the prompt"
            )
        if self.max_length is not None and self.columns + columns > self.max_length:
            raise ValueError(
                f"past_key_values has room for {self.max_length} columns and holds {self.columns}, "
                f"the input has {columns} more; make it with Dsv4Cache(config, max_length="
                f"{self.columns + columns}) or longer, or without max_length, which grows"
            )
        held = self.state
        # Emptied memory serves only as many rows, on the same device.
        if held and held.blank and (held.seen.shape[0], held.seen.device) != (batch, device):
            self._drop()
        if self.state is None:
            self.state = RowState.empty(batch, device)
            self._rewindable = torch.zeros((), dtype=torch.long, device=device)
        if self.state.seen.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.state.seen.shape[0]} rows, the input has {batch}; "
                "use a new cache, or batch_repeat_interleave / batch_select_indices"
            )
        return self.state

    def open(self) -> None:
        """Say that layers write from here on; until `advance`, the cache cannot be used again."""
        self._open = True

    def advance(self, segments: Segments, columns: int) -> None:
        """Close a pass: move the counters, once, behind the last layer."""
        assert self.state is not None and self._rewindable is not None
        self._open = False
        state = segments.after(self.ratios)
        plain = (segments.count == columns).all() & (state.start == self.state.start).all()
        self._rewindable.copy_(torch.where(plain, self._rewindable + columns, 0))
        self._keep(state)
        self.columns += columns

    def _keep(self, new: RowState) -> None:
        """Take over counters; those of a static cache stay where a compiled step reads them."""
        old = self.state
        same = old is not None and old.entries.keys() == new.entries.keys()
        if old is None or not same or not self.is_static or old.seen.shape != new.seen.shape:
            self.state = new
            return
        for held, value in zip(old.tensors(), new.tensors(), strict=True):
            held.copy_(value)
        old.blank = new.blank

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, pads included, as `generate` counts them."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Columns that the cache has room for; -1: no limit."""
        return -1 if self.max_length is None else self.max_length

    @property
    def is_initialized(self) -> bool:
        return self.state is not None and not self.state.blank

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def max_batch_size(self) -> int:
        return 0 if self.state is None else self.state.seen.shape[0]

    def activate_past_recording(self) -> None:
        """Rings always keep `max_rewind` tokens more than needed; nothing to switch on."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns; a positive number says how many to keep.

        Raises:
            ValueError: more than `max_rewind` tokens, or across pads or a document border; the
                cache is unchanged then.
        """
        keep = tokens_to_remove
        target = self.columns + keep if keep <= 0 else keep
        back = self.columns - target
        if back <= 0:
            return
        if target <= 0:
            self.reset()
            return
        state, rewindable = self.state, self._rewindable
        assert state is not None and rewindable is not None
        limit = min(self.max_rewind, int(rewindable))
        if back > limit:
            raise ValueError(
                f"crop: wanted to take back {back} tokens, this cache can take back {limit}; make "
                f"it with Dsv4Cache(config, max_rewind={back}) or start again from the prompt"
            )
        seen, entries = state.seen - back, {}
        for ratio, count in state.entries.items():
            was, now = (state.seen - state.start) // ratio, (seen - state.start) // ratio
            entries[ratio] = count - (was - now)
        self._keep(RowState(seen, state.start, state.offset, entries, state.blank))
        rewindable.sub_(back)
        self.columns = target

    def reset(self) -> None:
        """Forget everything; a static cache keeps its memory, emptied."""
        self.columns, self._open = 0, False
        if self.state is None or not self.is_static:
            self._drop()
            return
        for store in self._stores():
            if store.data is not None:
                store.data.zero_()
        for counter in self.state.tensors():
            counter.zero_()
        self.state.blank = True
        assert self._rewindable is not None
        self._rewindable.zero_()

    def _drop(self) -> None:
        for store in self._stores():
            store.data = None
        self.state = self._rewindable = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes old row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        for store in self._stores():
            if store.data is None:
                continue
            rows = store.data.index_select(0, indices.to(store.data.device))
            if self.is_static and rows.shape == store.data.shape:
                store.data.copy_(rows)
            else:
                store.data = rows
        if self.state is not None:
            s, at = self.state, indices.to(self.state.seen.device)
            entries = {w: n[at] for w, n in s.entries.items()}
            self._keep(RowState(s.seen[at], s.start[at], s.offset[at], entries, s.blank))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, in place."""
        if self.state is not None:
            rows = torch.arange(self.max_batch_size, device=self.state.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def memory_bytes(self) -> int:
        """Bytes held by all stores."""
        return sum(s.data.nbytes for s in self._stores() if s.data is not None)

    def _stores(self) -> Iterable[Ring | Rows]:
        for layer in self.layers:
            yield from layer.stores()
        yield self.ngrams
