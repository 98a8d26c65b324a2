# SPDX-License-Identifier: Apache-2.0
"""Where a cache keeps numbers: the last tokens of a row in a ring, compressed entries in rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .cache_storage import PackedRows, RowCodec
from .configuration_dsv4 import Dsv4Config
from .segments import Segments


class Store:
    """Numbers of a cache, a row of the batch after another: `data` [B, ...], None while empty."""

    data: torch.Tensor | None

    @property
    def batch(self) -> int:
        """Rows of the batch, 0 while empty."""
        return 0 if self.data is None else self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return 0 if self.data is None else self.data.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on a disk."""
        return 0

    def held(self) -> torch.Tensor:
        """All that a file must keep."""
        assert self.data is not None
        return self.data

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of `held`."""
        held = self.held()
        return held.dtype, tuple(held.shape)

    def restore(self, data: torch.Tensor, device: str | torch.device) -> None:
        """Take a copy of what `held` gave, to a device."""
        self.data = data.to(device, copy=True)

    def drop(self) -> None:
        """Hold nothing."""
        self.data = None

    def select(self, indices: torch.Tensor, in_place: bool) -> None:
        """Keep the rows `indices`, in that order; `in_place`: where they lie, if they fit."""
        if self.data is None:
            return
        rows = self.data.index_select(0, indices.to(self.data.device))
        if in_place and rows.shape == self.data.shape:
            self.data.copy_(rows)
        else:
            self.data = rows


class Ring(Store):
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
        if self.data.dtype is not like.dtype:
            raise ValueError(
                f"past_key_values holds {self.data.dtype}, the model computes in {like.dtype}; use "
                "a cache that a model of this dtype has filled"
            )
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

    def restore(self, data: torch.Tensor, device: str | torch.device) -> None:
        if data.shape[1] != self.capacity:
            raise ValueError(f"wanted {self.capacity} slots of a ring, got {list(data.shape)}")
        super().restore(data, device)


class DraftRings:
    """What a draft head has kept of the backbone's tokens; written only while `on`.

    `keys`: window keys of each stage. `streams`: [N, D] leaving the backbone, for MTP. `since` [B]:
    the row index from which on nothing is missing.
    """

    def __init__(self, config: Dsv4Config, slack: int) -> None:
        width = config.sliding_window + slack
        self.keys = [Ring(width) for _ in range(config.num_draft_layers)]
        self.streams = Ring(1 + slack)
        self.since = torch.zeros(1, dtype=torch.long)
        self.on = False

    def begin(self, seen: torch.Tensor | None) -> None:
        """Write from now on; `seen` [B] tokens, None for none, passed unwritten."""
        if not self.on:
            self.since = torch.zeros(1, dtype=torch.long) if seen is None else seen.clone()
        self.on = True

    def select(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of what is no store."""
        if self.since.shape[0] > 1:
            self.since = self.since[indices.to(self.since.device)]

    def named(self) -> Iterator[tuple[str, Ring]]:
        """All rings by name."""
        for i, ring in enumerate(self.keys):
            yield f"drafts.{i}", ring
        yield "drafts.streams", self.streams


class Rows(Store):
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

    def held(self) -> torch.Tensor:
        """All that a file must keep, without room to grow."""
        return super().held()[:, : self.length]

    def restore(self, data: torch.Tensor, device: str | torch.device) -> None:
        super().restore(data, device)
        self.length = data.shape[1]

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
        # Asked of the memory, whose shape a compiler may take for granted; a number it may not.
        self.length = self.data.shape[1] - 1 if step else max(int((start + count).max()), 1)
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


class CodedRows(Rows):
    """`Rows` of bytes [B, capacity, bytes] uint8, made of entries or keys by a codec."""

    def __init__(self, codec: RowCodec, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self.codec = codec

    def extend(  # type: ignore[override]
        self,
        new: torch.Tensor,
        before: torch.Tensor | None,
        count: torch.Tensor,
        step: bool = False,
    ) -> PackedRows:
        """As `Rows.extend`; all [B, T, C] stay packed, so that all passes read the same numbers."""
        data = super().extend(self.codec.encode(new), before, count, step)
        return PackedRows(data, self.codec, new.dtype)
