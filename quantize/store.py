# SPDX-License-Identifier: Apache-2.0
"""Routed experts on disk: reads of whole records into a fixed number of reused buffers.

One store serves all layers of a model, with one least-recently-used order over all of them: kept
per layer, the same memory hits less often. A buffer is pinned while its record is read from, so
eviction is safe at any capacity, down to one record.

```
announce(layer, experts) ── all misses start at once ──> threads ── preadv ──> buffers
record(layer, expert)    ── waits for its own read ──> uint8 view, pinned until the block is left
```
"""

import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from .pack import PackFile, read_exactly
from .pinned import page_aligned
from .sizes import format_size

Key = tuple[int, int]


@dataclass
class ReadCounts:
    """What one layer's experts cost so far.

    Attributes:
        tokens: rows that passed the layer.
        hits: uses of an expert whose record was already in memory.
        misses: records read from disk.
        bytes_read: misses times the record's size, exactly.
        waits: uses that had to wait for a read.
        wait_seconds: how long they waited.
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    waits: int = 0
    wait_seconds: float = 0.0

    def add(self, other: "ReadCounts") -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class _Slot:
    """One buffer and the record in it. `fresh`: read, and not used since."""

    buffer: torch.Tensor
    read: "Future[None]"
    pins: int = 0
    fresh: bool = True


@dataclass
class _Files:
    """Open descriptors, closed when the store is forgotten."""

    descriptors: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


class ExpertStore:
    """Reads records of expert packs under a budget of bytes.

    Args:
        packs: one per layer; a layer is known by its place here.
        budget: bytes that may be resident; at least one record.
        threads: reads in flight.
        page_cache: false drops what was read from the system's page cache as well, so that the
            budget is all the memory that experts take.
    """

    def __init__(
        self,
        packs: Sequence[PackFile],
        budget: int,
        threads: int = 8,
        page_cache: bool = True,
    ) -> None:
        self.packs = tuple(packs)
        largest = max(pack.layout.largest for pack in self.packs)
        self.budget = budget
        if budget < largest:
            raise ValueError(
                f"expert_memory: wanted at least one expert of {largest} bytes "
                f"({format_size(largest)}), got {budget} ({format_size(budget)})"
            )
        # A tier on a GPU wants pinned memory, from here on.
        self.allocate: Callable[[int], torch.Tensor] = page_aligned
        self.counts = [ReadCounts() for _ in self.packs]
        self._page_cache = page_cache
        # Of every pack; a record is checked at its first read, and trusted when read again.
        self._checksums = [pack.checksums() for pack in self.packs]
        self._checked: set[Key] = set()
        self._slots: OrderedDict[Key, _Slot] = OrderedDict()
        self._free: list[torch.Tensor] = []
        # Bytes of all buffers: each is as large as the record that it was made for.
        self._allocated = 0
        # What the running layer still needs, in the order of use; and of that, what is not read.
        self._wanted: dict[Key, None] = {}
        self._unread: deque[Key] = deque()
        self._changed = threading.Condition()
        self._files = _Files()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="expert-read")
        weakref.finalize(self, self._files.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        # A copy of a model reads the same files; two budgets would be twice what was allowed.
        return self

    def stats(self) -> dict[str, float]:
        """Counts of all layers together since loading; tokens are counted once, not per layer."""
        total = ReadCounts()
        for counts in self.counts:
            total.add(counts)
        total.tokens = max(counts.tokens for counts in self.counts)
        return asdict(total)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all buffers, never more than the budget."""
        return self._allocated

    def layer_bytes(self, layer: int) -> int:
        """Bytes of the buffers that hold records of one layer."""
        with self._changed:
            return sum(slot.buffer.nbytes for key, slot in self._slots.items() if key[0] == layer)

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """Say which experts of a layer come next, in order; their reads start at once."""
        with self._changed:
            self._wanted = {(layer, expert): None for expert in experts}
            for key in self._wanted:
                if key in self._slots:
                    self._slots.move_to_end(key)
            self._unread = deque(key for key in self._wanted if key not in self._slots)
            self._read_ahead()

    @contextmanager
    def record(self, layer: int, expert: int, last: bool = True) -> Iterator[torch.Tensor]:
        """Lend an expert's record [record] uint8, valid inside the block alone.

        Args:
            layer: index of its pack.
            expert: index in the pack.
            last: this is the last look of one use; counts the use and frees the buffer to others.

        Raises:
            OSError: the read failed or came short.
            ValueError: the record is damaged.
        """
        key = (layer, expert)
        slot = self._pin(key)
        try:
            self._wait(layer, slot)
            yield slot.buffer
        finally:
            self._unpin(key, slot, last)

    def close(self) -> None:
        """Stop the threads and close the files; the store can't be used afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def _pin(self, key: Key) -> _Slot:
        with self._changed:
            while (slot := self._slots.get(key)) is None:
                buffer = self._take_buffer(self._size(key), insist=True)
                if buffer is not None:
                    slot = self._start_read(key, buffer)
                    break
                # Every buffer is being read into or looked at by another thread.
                self._changed.wait()
            slot.pins += 1
            self._slots.move_to_end(key)
            return slot

    def _wait(self, layer: int, slot: _Slot) -> None:
        if not slot.read.done():
            start = time.perf_counter()
            slot.read.exception()
            with self._changed:
                self.counts[layer].waits += 1
                self.counts[layer].wait_seconds += time.perf_counter() - start
        slot.read.result()

    def _unpin(self, key: Key, slot: _Slot, last: bool) -> None:
        with self._changed:
            slot.pins -= 1
            # Interrupted while waiting: the read goes on, and its buffer stays taken until it ends.
            failed = slot.read.done() and _failed(slot.read)
            if failed and self._slots.get(key) is slot:
                # Forgotten at once, so that the next use tries again.
                del self._slots[key]
            if failed and not slot.pins:
                self._free.append(slot.buffer)
            if last and not failed:
                self._wanted.pop(key, None)
                self.counts[key[0]].hits += not slot.fresh
                slot.fresh = False
            self._read_ahead()
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        while self._unread:
            if self._unread[0] not in self._slots:
                buffer = self._take_buffer(self._size(self._unread[0]), insist=False)
                if buffer is None:
                    return
                self._start_read(self._unread[0], buffer)
            self._unread.popleft()

    def _start_read(self, key: Key, buffer: torch.Tensor) -> _Slot:
        slot = _Slot(buffer, self._pool.submit(self._read, key, buffer))
        self._slots[key] = slot
        slot.read.add_done_callback(self._notify)
        return slot

    def _notify(self, _: "Future[None]") -> None:
        with self._changed:
            self._changed.notify_all()

    def _size(self, key: Key) -> int:
        return self.packs[key[0]].span(key[1])[1]

    def _take_buffer(self, size: int, insist: bool) -> torch.Tensor | None:
        """Find a buffer of `size` bytes: unused, new, or of the least recently used records.

        Nobody needs those; with `insist` also some that the running layer still wants, the last
        wanted first. Nothing is evicted if that would not do.
        """
        unused = next((i for i, free in enumerate(self._free) if free.nbytes == size), None)
        if unused is not None:
            return self._free.pop(unused)
        room = self.budget - self._allocated + sum(free.nbytes for free in self._free)
        victims: list[Key] = []
        for key in self._evictable(insist) if room < size else ():
            victims.append(key)
            room += self._slots[key].buffer.nbytes
            if room >= size:
                break
        if room < size:
            return None
        self._free += [self._recycle(self._slots.pop(key).buffer) for key in victims]
        same = next((i for i, free in enumerate(self._free) if free.nbytes == size), None)
        if same is not None:
            return self._free.pop(same)
        while self._allocated + size > self.budget:
            self._allocated -= self._free.pop().nbytes
        self._allocated += size
        return self.allocate(size)

    def _evictable(self, insist: bool) -> Iterator[Key]:
        idle = [k for k, slot in self._slots.items() if not slot.pins and slot.read.done()]
        yield from (key for key in idle if key not in self._wanted)
        if insist:
            order = {key: i for i, key in enumerate(self._wanted)}
            wanted = (key for key in idle if key in order)
            yield from sorted(wanted, key=order.__getitem__, reverse=True)

    def _recycle(self, buffer: torch.Tensor) -> torch.Tensor:
        """Hand out the buffer of an evicted record."""
        return buffer

    def _read(self, key: Key, buffer: torch.Tensor) -> None:
        layer, expert = key
        pack = self.packs[layer]
        start, size = pack.span(expert)
        descriptor = self._open(layer)
        view = buffer.numpy().data
        read_exactly(pack.path, descriptor, view, start)
        if key not in self._checked:
            pack.check_record(expert, view, self._checksums[layer][expert])
            self._checked.add(key)
        if not self._page_cache:
            _advise(descriptor, start, size, "POSIX_FADV_DONTNEED")
        with self._changed:
            self.counts[layer].misses += 1
            self.counts[layer].bytes_read += size

    def _open(self, layer: int) -> int:
        with self._changed:
            if layer not in self._files.descriptors:
                descriptor = os.open(self.packs[layer].path, os.O_RDONLY)
                self._files.descriptors[layer] = descriptor
                # Records are read whole: the system's read-ahead would fetch a neighbour's head.
                _advise(descriptor, 0, 0, "POSIX_FADV_RANDOM")
            return self._files.descriptors[layer]


def _failed(read: "Future[None]") -> bool:
    return read.cancelled() or read.exception() is not None


def _advise(descriptor: int, start: int, size: int, advice: str) -> None:
    # Advice about the page cache is not known to every system, and never changes what is read.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, getattr(os, advice))
