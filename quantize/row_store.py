# SPDX-License-Identifier: Apache-2.0
"""Rows of Engram tables on disk: asked for at the entry of a pass, there when a layer wants them.

Which rows a token reads follows from token ids alone, so every read of a pass is known before its
first layer. One store serves all tables of a model, in the order of the layers:

```
announce(table, ids) ─ once each ─┬─ cache ────────────────────────────┐
                                  └─ misses ─ page cache, or threads ──┴─> rows of the pass
take(table, ids) ── waits for its own reads ──> [n, row], and the cache takes the misses up
```

A miss is first tried without waiting: what the system's page cache holds is there at once, and only
what the disk has to bring goes through threads. Rows side by side in a page are one read.
"""

import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from .pack import read_exactly
from .row_cache import Ids, RowCache, Rows
from .tables import TableFile

_PAGE = 4096
_THREADS = 64
# Reads that one thread does after another, where there are more than threads.
_LEAST_SHARE = 16
# More misses than this go to the threads at once: trying each would hold the pass up.
_TRIED = 256
# Where the system has them: read what it holds already, and have it fetch ranges meanwhile.
_NO_WAIT = getattr(os, "RWF_NOWAIT", None)
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", None)


@dataclass
class RowCounts:
    """What the tables' rows cost since loading.

    Attributes:
        engram_rows: rows that tokens asked for.
        engram_hits: of these, how many cost no read: held, or wanted twice in a pass.
        engram_reads: reads from the files.
        engram_bytes_read: their bytes.
        engram_waits: layers that had to wait for a read.
        engram_wait_seconds: how long they waited.
    """

    engram_rows: int = 0
    engram_hits: int = 0
    engram_reads: int = 0
    engram_bytes_read: int = 0
    engram_waits: int = 0
    engram_wait_seconds: float = 0.0


@dataclass
class _Batch:
    """Rows of one table for one pass.

    `ids` [n] as asked for; `unique` without repeats; `place` [n] of each in `unique`; `rows`
    [unique, row] filled as reads end; `missed`: which were read.
    """

    ids: Ids
    unique: Ids
    place: Ids
    rows: Rows
    missed: Ids
    reads: "list[Future[None]]" = field(default_factory=list)


class RowStore:
    """Reads rows of tables under a budget of bytes.

    Args:
        tables: one per Engram layer; a table is known by its place here.
        budget: bytes of rows that may stay in memory; at least one row. Rows of the running pass
            are beside it.
        threads: reads in flight.

    Raises:
        ValueError: less memory than one row.
    """

    def __init__(self, tables: Sequence[TableFile], budget: int, threads: int = _THREADS) -> None:
        self.tables = tuple(tables)
        self.budget = budget
        self.counts = RowCounts()
        self._row_bytes = max(table.layout.nbytes for table in self.tables)
        self._cache = RowCache(budget, self._row_bytes)
        # Ids of all tables as one range of keys.
        self._base = np.cumsum([0, *(table.num_rows for table in self.tables)])
        self._pending: dict[int, _Batch] = {}
        self._lock = threading.Lock()
        self._threads = threads
        self._files: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._files)
        for table in self.tables:
            self._files.append(os.open(table.path, os.O_RDONLY))
            if hasattr(os, "posix_fadvise"):
                # Rows lie anywhere: reading ahead would bring pages that nobody wants.
                os.posix_fadvise(self._files[-1], 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engram-read")

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowStore":
        # A copy of a model reads the same files; two budgets would be twice what was allowed.
        return self

    def stats(self) -> dict[str, float]:
        """Counts since loading."""
        return dict(vars(self.counts))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cache, never more than the budget."""
        return self._cache.nbytes

    def announce(self, table: int, ids: Ids) -> None:
        """Say which rows [n] of a table a pass will take; their reads start at once."""
        with self._lock:
            self._pending[table] = self._begin(table, ids)

    def take(self, table: int, ids: Ids) -> Rows:
        """Rows of ids [n]: [n, row bytes], those that were announced, or read now.

        Raises:
            OSError: a read failed, or the file was cut short.
        """
        with self._lock:
            batch = self._pending.pop(table, None)
            if batch is None or not np.array_equal(batch.ids, ids):
                batch = self._begin(table, ids)
        self._wait(batch)
        with self._lock:
            keys = batch.unique[batch.missed] + self._base[table]
            new = ~self._cache.holds(keys)
            self._cache.write(keys[new], batch.rows[batch.missed[new]])
        return batch.rows[batch.place][:, : self.tables[table].layout.nbytes]

    def close(self) -> None:
        """Stop the threads and close the files; the store cannot be used afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._close()

    def _begin(self, table: int, ids: Ids) -> _Batch:
        unique, place = np.unique(ids, return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self.tables[table].num_rows:
            raise ValueError(
                f"{self.tables[table].path}: wanted rows 0 to {self.tables[table].num_rows - 1}, "
                f"got {unique[0]} to {unique[-1]}; the file is another model's"
            )
        rows = np.empty((len(unique), self._row_bytes), np.uint8)
        held = self._cache.read(unique + self._base[table], rows)
        missed = np.flatnonzero(~held)
        batch = _Batch(ids, unique, place.reshape(-1), rows, missed)
        self.counts.engram_rows += len(ids)
        self.counts.engram_hits += len(ids) - len(missed)
        if len(missed):
            self._start(table, batch)
        return batch

    def _start(self, table: int, batch: _Batch) -> None:
        """Read what is in the page cache, and hand the rest to the threads."""
        size, start = self.tables[table].layout.nbytes, self.tables[table].start
        begin = start + batch.unique[batch.missed] * size
        # Missed ids ascend; a row that begins in the page where the last one ends shares its read.
        apart = begin[1:] // _PAGE != (begin[:-1] + size - 1) // _PAGE
        cuts = np.flatnonzero(np.concatenate(([True], apart, [True]))).tolist()
        spans = list(pairwise(cuts))
        places, offsets = batch.missed.tolist(), begin.tolist()
        self.counts.engram_reads += len(spans)
        ends = begin[np.array(cuts[1:]) - 1] + size
        self.counts.engram_bytes_read += int((ends - begin[np.array(cuts[:-1])]).sum())

        descriptor, few = self._files[table], len(spans) <= _TRIED

        def read(some: list[tuple[int, int]]) -> None:
            if few and _WILL_NEED is not None:
                for a, b in some:
                    length = offsets[b - 1] + size - offsets[a]
                    os.posix_fadvise(descriptor, offsets[a], length, _WILL_NEED)
            for span in some:
                self._read(table, batch.rows, places, offsets, span)

        if few:
            view, width = batch.rows.data.cast("B"), self._row_bytes
            spans = [
                (a, b) for a, b in spans
                if b - a > 1
                or not _read_cached(descriptor, view, places[a] * width, size, offsets[a])
            ]  # fmt: skip
        share = max(-(-len(spans) // self._threads), 1)
        if len(spans) > self._threads:
            share = max(share, _LEAST_SHARE)
        elif _WILL_NEED is not None:
            # The disk is asked for all of them at once by one thread: waking many costs more.
            share = max(len(spans), 1)
        for at in range(0, len(spans), share):
            batch.reads.append(self._pool.submit(read, spans[at : at + share]))

    def _read(
        self,
        table: int,
        rows: Rows,
        places: list[int],
        offsets: list[int],
        span: tuple[int, int],
    ) -> None:
        """Read the misses [first, last) of a span by one read, each into its place."""
        first, last = span
        path, size = self.tables[table].path, self.tables[table].layout.nbytes
        descriptor = self._files[table]
        if last - first == 1:
            view = rows[places[first]].data[:size]
            return read_exactly(path, descriptor, view, offsets[first])
        start = offsets[first]
        raw = np.empty(offsets[last - 1] + size - start, np.uint8)
        read_exactly(path, descriptor, raw.data, start)
        for i in range(first, last):
            at = offsets[i] - start
            rows[places[i], :size] = raw[at : at + size]
        return None

    def _wait(self, batch: _Batch) -> None:
        if not batch.reads:
            return
        if not all(read.done() for read in batch.reads):
            began = time.perf_counter()
            for read in batch.reads:
                read.exception()
            self.counts.engram_waits += 1
            self.counts.engram_wait_seconds += time.perf_counter() - began
        for read in batch.reads:
            read.result()


def _read_cached(descriptor: int, view: memoryview, at: int, size: int, start: int) -> bool:
    """Read bytes that the page cache holds; False, at once, if the disk has to be asked."""
    if _NO_WAIT is None:
        return False
    try:
        return os.preadv(descriptor, [view[at : at + size]], start, _NO_WAIT) == size
    except OSError:
        # Not there, or a file system that cannot say; a read that fails for good fails again.
        return False


def _close_all(files: list[int]) -> None:
    while files:
        os.close(files.pop())
