# SPDX-License-Identifier: Apache-2.0
"""Rows of a table in host memory on their way to a GPU that computes with them.

```
announce(ids) ── each id once ──> rows gathered into pinned memory ── copy on a stream of its own
take()        ── the stream that computes waits for the copy, the host does not ──> rows, places
```

What a pass reads is announced at its entry, so that the copies of all tables run beside the layers
before theirs. A table whose rows a disk has to bring is gathered when they are taken: bytes come
over packed, and are opened there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .pinned import pinned

# Rows [n] of distinct ids [n] int64, written into [n, row bytes] uint8.
Gather = Callable[[torch.Tensor, torch.Tensor], None]


class Link(Protocol):
    """What stages rows: memory that copies leave from, and copies that say when they are done."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Host memory [nbytes] uint8."""
        ...

    def send(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin a copy; its target, not to be read yet, and a ticket for what follows."""
        ...

    def hand_over(self, rows: torch.Tensor, ticket: Any) -> None:
        """What is launched from here on finds the copy done, and its memory kept until then."""
        ...

    def wait(self, ticket: Any) -> None:
        """Return when the host memory was read."""
        ...


class GpuLink:
    """Copies to one GPU on a stream of their own.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return pinned(nbytes)

    def send(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        done = torch.cuda.Event()
        # Allocated here as well: memory that the other stream still reads is not handed out.
        with torch.cuda.stream(self._stream):
            rows = host.to(self.device, non_blocking=True)
            done.record(self._stream)
        return rows, done

    def hand_over(self, rows: torch.Tensor, ticket: Any) -> None:
        now = torch.cuda.current_stream(self.device)
        now.wait_event(ticket)
        rows.record_stream(now)

    def wait(self, ticket: Any) -> None:
        ticket.synchronize()


@dataclass
class _Told:
    """Ids as they were told, distinct ones, the place of each among these; copies once begun."""

    ids: torch.Tensor
    distinct: torch.Tensor
    place: torch.Tensor
    copies: list[tuple[torch.Tensor, Any]] = field(default_factory=list)


class StagedRows:
    """Brings a table's rows to where they are wanted, each distinct id once.

    Args:
        link: to a device.
        row_bytes: of a row.
        gather: from host memory, or from where `begin` reads.
        begin: starts to read the rows of distinct ids, for a table on disk; they are then gathered
            when they are taken. None for one in memory.
    """

    def __init__(
        self,
        link: Link,
        row_bytes: int,
        gather: Gather,
        begin: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._link, self._row_bytes, self._gather, self._begin = link, row_bytes, gather, begin
        # Memory that copies leave from: of rows, and of places; each with what still reads it.
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._busy: list[Any] = [None, None]
        self._told: _Told | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of a model makes its own: streams and what is under way stay here.
        return type(None), ()

    def announce(self, ids: torch.Tensor) -> None:
        """Begin to bring the rows of ids [n] int64, on the host; the last that were told count.

        Where those before were not taken, many passes are told at once: only reads begin.
        """
        alone, told = self._told is None, _Told(ids, *ids.unique(return_inverse=True))
        self._told = told
        if self._begin is not None:
            self._begin(told.distinct)
        elif alone:
            self._send(told)

    def holds(self, ids: torch.Tensor) -> bool:
        """Whether ids [n] were announced, and not taken since."""
        return self._told is not None and torch.equal(self._told.ids, ids)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was announced, on the device.

        Returns:
            distinct rows [m, row bytes] uint8, and the place [n] of each id among them.
        """
        told, self._told = self._told, None
        assert told is not None, "nothing was announced"
        if not told.copies:
            self._send(told)
        for tensor, ticket in told.copies:
            self._link.hand_over(tensor, ticket)
        (rows, _), (place, _) = told.copies
        return rows, place

    def _send(self, told: _Told) -> None:
        count = len(told.distinct)
        rows = self._buffer(0, count * self._row_bytes).view(count, self._row_bytes)
        self._gather(told.distinct, rows)
        place = self._buffer(1, told.place.nbytes).view(torch.int64).copy_(told.place)
        told.copies = [self._link.send(rows), self._link.send(place)]
        self._busy = [ticket for _, ticket in told.copies]

    def _buffer(self, kind: int, nbytes: int) -> torch.Tensor:
        """Memory [nbytes] that no copy reads any more."""
        if self._busy[kind] is not None:
            self._link.wait(self._busy[kind])
            self._busy[kind] = None
        if len(self._buffers[kind]) < nbytes:
            self._buffers[kind] = self._link.allocate(max(nbytes, 2 * len(self._buffers[kind])))
        return self._buffers[kind][:nbytes]


def make_link(device: torch.device | None) -> Link | None:
    """How rows in host memory reach a device; None where they are used where they lie."""
    return GpuLink(device) if device is not None and device.type == "cuda" else None
