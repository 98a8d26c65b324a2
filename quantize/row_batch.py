# SPDX-License-Identifier: Apache-2.0
"""The rows that one pass reads of one table: found in the cache, read, and taken up by it.

Behind a layer's work nothing of this is in a processor's caches, and every call of numpy costs ten
times what it does in a loop. So all of it is one call in C (`cpu/rows.c`) where there is a
compiler; the twin beside it is the definition, and gives the same rows, counts and cache.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dsv4.cpu.build import library
from modeling_dsv4.cpu.rows import Spans, read_ready

from .row_cache import Ids, RowCache, Rows

_PAGE = 4096


@dataclass
class Batch:
    """Rows of one table for one pass.

    Attributes:
        ids: [n] as asked for.
        rows: [n, row bytes], in that order; those of `left` are not yet there.
        order: [n] places of the ids as they ascend.
        left: [m] places that have still to be read, one of each id.
        missed: distinct ids that the cache did not hold.
        pages: of these, how many do not begin in the page where the one before ends.
    """

    ids: Ids
    rows: Rows
    order: Ids
    left: Ids
    missed: int
    pages: int


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sets", "ways", "row_bytes")),
        *((name, ctypes.c_void_p) for name in ("keys", "used", "tick", "rows")),
        *((name, ctypes.c_int64) for name in ("file", "start", "size", "base", "num_rows")),
    ]


class BatchReader:
    """Begins and ends the batches of one table.

    Args:
        cache: of the rows of all tables.
        file: descriptor of the table's file.
        start: byte of the first row.
        size: bytes of a row.
        base: of the table's ids among the keys of the cache.
        num_rows: of the table.
    """

    def __init__(
        self, cache: RowCache, file: int, start: int, size: int, base: int, num_rows: int
    ) -> None:
        self.cache, self.file, self.start, self.size = cache, file, start, size
        self.base, self.num_rows = base, num_rows
        sets, ways, row_bytes = cache.rows.shape
        arrays = (x.ctypes.data for x in (cache.keys, cache.used, cache.tick, cache.rows))
        self._table = _Table(sets, ways, row_bytes, *arrays, file, start, size, base, num_rows)
        self._address = ctypes.addressof(self._table)

    def begin(self, ids: Ids, tried: int) -> Batch | None:
        """Rows of ids [n] int64, contiguous, as far as nothing has to be waited for.

        More misses than `tried` are left without a look at the page cache. None: an id is no row
        of the table.
        """
        begin = _functions()[0]
        if begin is None:
            return self._begin_ref(ids, tried)
        count = len(ids)
        rows = np.empty((count, self.cache.row_bytes), np.uint8)
        numbers = np.empty(2 * count + 3, np.int64)
        at = numbers.ctypes.data
        failed = begin(
            self._address, ids.ctypes.data, count, tried, rows.ctypes.data, at, at + 8 * count,
            at + 16 * count,
        )  # fmt: skip
        if failed == 2:
            raise MemoryError(f"{count} rows at once")
        if failed:
            return None
        missed, pages, stay = numbers[2 * count :].tolist()
        left = numbers[count : count + stay]
        return Batch(ids, rows, numbers[:count], left, missed, pages)

    def spans(self, batch: Batch) -> Spans:
        """What of the file is left to be read, and where to."""
        begin = self.start + batch.ids[batch.left] * self.size
        size, place = np.full(len(begin), self.size), batch.left * self.cache.row_bytes
        return Spans(begin, size, place, batch.rows)

    def end(self, batch: Batch) -> None:
        """Take up rows that were left and have been read since."""
        if not len(batch.left):
            return None
        end = _functions()[1]
        if end is None:
            return self._end_ref(batch)
        pointers = (x.ctypes.data for x in (batch.rows, batch.order, batch.left))
        end(self._address, batch.ids.ctypes.data, len(batch.ids), *pointers, len(batch.left))
        return None

    def _begin_ref(self, ids: Ids, tried: int) -> Batch | None:
        unique, first, place = np.unique(ids, return_index=True, return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self.num_rows:
            return None
        rows = np.empty((len(ids), self.cache.row_bytes), np.uint8)
        found = np.empty((len(unique), self.cache.row_bytes), np.uint8)
        missed = first[~self.cache.read(unique + self.base, found)]
        rows[first] = found
        begin = self.start + ids[missed] * self.size
        pages = int(np.count_nonzero(begin[1:] // _PAGE != (begin[:-1] + self.size - 1) // _PAGE))
        order = np.argsort(ids, kind="stable")
        batch = Batch(ids, rows, order, missed, len(missed), pages + bool(len(missed)))
        if 0 < len(missed) <= tried:
            stay = missed[read_ready(self.file, self.spans(batch), np.arange(len(missed)))]
            ready = np.setdiff1d(missed, stay, assume_unique=True)
            ready = ready[np.argsort(ids[ready])]
            self.cache.write(ids[ready] + self.base, rows[ready])
            batch.left = stay
        rows[:] = rows[first[place.reshape(-1)]]
        return batch

    def _end_ref(self, batch: Batch) -> None:
        keys, rows = batch.ids[batch.left] + self.base, batch.rows[batch.left]
        new = ~self.cache.holds(keys)
        self.cache.write(keys[new], rows[new])
        _, first, place = np.unique(batch.ids, return_index=True, return_inverse=True)
        batch.rows[:] = batch.rows[first[place.reshape(-1)]]


@functools.cache
def _functions() -> tuple[Any, Any]:
    """`begin` and `end` in C, or twice None."""
    lib = library(Path(__file__).parent / "cpu")
    if lib is None:
        return None, None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    begin, end = lib.dsv4_begin_rows, lib.dsv4_end_rows
    begin.argtypes = [pointer, pointer, number, number, pointer, pointer, pointer, pointer]
    begin.restype = number
    end.argtypes, end.restype = [pointer, pointer, number, pointer, pointer, pointer, number], None
    return begin, end
