# SPDX-License-Identifier: Apache-2.0
"""Where entries lie that are not where the model computes: in host memory, or in a file."""

from __future__ import annotations

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache_offload import BLOCK_BYTES, Codec, FarStore, OffloadCounts
from .cpu.rows import Ids, Spans, read_ready, read_spans

# Rows apart by no more than this are one read: bytes are cheaper than calls.
_GAP_BYTES = 2048
# Room for one row of the batch in a file; what is not written takes no space on the disk.
_RUN_BYTES = 1 << 32


class HostRows(FarStore):
    """Rows in host memory, of a model that computes on a GPU."""

    def fill(self, raw: torch.Tensor) -> None:
        self._hold(raw)

    def append(self, raw: torch.Tensor, start: torch.Tensor, count: torch.Tensor) -> None:
        self._reserve(self.length, raw)
        assert self.data is not None
        which = torch.arange(raw.shape[1]) < count[:, None]
        batch, at = torch.nonzero(which, as_tuple=True)
        self.data[batch, start[batch] + at] = raw[batch, at]

    def fetch(self, rows: Ids, length: int) -> torch.Tensor:
        began, data = time.perf_counter(), self.data
        assert data is not None
        room, at = data.shape[1], torch.from_numpy(rows)
        at = at // length * room + at % length
        out = data.view(-1, data.shape[2]).index_select(0, at)
        self._note(began, len(rows), data.shape[2])
        return out

    def fetch_block(self, low: int, high: int) -> torch.Tensor:
        began, data = time.perf_counter(), self.data
        assert data is not None
        self._note(began, data.shape[0] * (high - low), data.shape[2], gather=False)
        return data[:, low:high]

    def held(self) -> torch.Tensor:
        assert self.dtype is not None
        return self.codec.stored(super().held(), self.dtype)

    def restore(self, data: torch.Tensor, device: str | torch.device) -> None:
        self.dtype = data.dtype
        super().restore(data.view(torch.uint8), "cpu")


class FileRows(FarStore):
    """Rows in a file without a name, which ends with the store.

    Row b of the batch is a run of its own, `slots[b]`, so that its neighbours lie side by side, and
    a row that moves takes nothing along. The runs lie far apart; between them the file is empty.
    A process that was forked shares the file and would write over it, so it may not.

    Args:
        codec: from numbers to bytes and back.
        counts: where to note what fetching costs.
        directory: where the file is made, at the first row.
    """

    def __init__(self, codec: Codec, counts: OffloadCounts, directory: Path) -> None:
        super().__init__(codec, counts)
        self.directory = directory
        self.slots: list[int] = []
        self.row_bytes = 0
        self._file: Any = None
        self._maker = 0

    @property
    def batch(self) -> int:
        return len(self.slots)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def disk_bytes(self) -> int:
        return self.batch * self.length * self.row_bytes

    @property
    def _run(self) -> int:
        """Rows from one run to the next."""
        return _RUN_BYTES // self.row_bytes

    def fileno(self) -> int:
        """Descriptor of the file."""
        if self._file is None:
            # Open as long as the store is; then the system forgets it.
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115
            self._maker = os.getpid()
        if self._maker != os.getpid():
            raise ValueError(
                "this cache's file belongs to the process that made it; deepcopy before the fork, "
                "or load a saved one"
            )
        return int(self._file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say of a disk's error where it was and what helps."""
        try:
            yield
        except EOFError:
            raise OSError(
                f"{self.directory}: the cache's file was cut short; start again from the prompt"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.directory}: the cache's file failed ({error.strerror}); make room there, "
                "or offload to another directory, and start again from the prompt",
            ) from error

    def drop(self) -> None:
        self.slots, self.length = [], 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def fill(self, raw: torch.Tensor) -> None:
        self.drop()
        self.row_bytes, self.length = raw.shape[2], raw.shape[1]
        self.slots = list(range(raw.shape[0]))
        self._write(raw, [0] * raw.shape[0], [raw.shape[1]] * raw.shape[0])

    def append(self, raw: torch.Tensor, start: torch.Tensor, count: torch.Tensor) -> None:
        self._write(raw, start.tolist(), count.tolist())
        # Where a row is shorter than the longest, or has none yet, its run reads as zeros.
        end = (max(self.slots) * self._run + self.length) * self.row_bytes
        with self._told():
            if os.fstat(self.fileno()).st_size < end:
                os.ftruncate(self.fileno(), end)

    def _write(self, raw: torch.Tensor, start: list[int], count: list[int]) -> None:
        if self.length > self._run:
            raise ValueError(
                f"offload: a file has room for {self._run} entries of {self.row_bytes} bytes a "
                f'layer and row, got {self.length}; use offload="cpu" or none'
            )
        for slot, rows, at, some in zip(self.slots, raw, start, count, strict=True):
            if some:
                view = memoryview(rows[:some].contiguous().numpy()).cast("B")
                self._put_at(view, (slot * self._run + at) * self.row_bytes)

    def _put_at(self, view: memoryview | bytes, where: int) -> None:
        """Write all of a view from byte `where` on; the system may take less at once."""
        with self._told():
            while view:
                done = os.pwrite(self.fileno(), view, where)
                view, where = view[done:], where + done

    def fetch(self, rows: Ids, length: int) -> torch.Tensor:
        began = time.perf_counter()
        flat = rows
        if self.slots != [0]:
            flat = np.array(self.slots)[rows // length] * self._run + rows % length
            order = np.argsort(flat, kind="stable")
            out = self._read(flat[order])
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            out = out.index_select(0, torch.from_numpy(back))
        else:
            out = self._read(flat)
        self._note(began, len(rows), self.row_bytes)
        return out

    def _read(self, flat: Ids) -> torch.Tensor:
        """Rows by ascending numbers of the file [n]: [n, bytes]; neighbours are one read."""
        if not len(flat):
            return torch.empty(0, self.row_bytes, dtype=torch.uint8)
        apart = np.diff(flat) > 1 + _GAP_BYTES // self.row_bytes
        first = np.flatnonzero(np.concatenate(([True], apart)))
        last = np.append(first[1:], len(flat)) - 1
        rows = flat[last] - flat[first] + 1
        place = np.cumsum(rows) - rows
        out = np.empty((int(rows.sum()), self.row_bytes), np.uint8)
        starts, sizes, places = (x * self.row_bytes for x in (flat[first], rows, place))
        self._read_spans(Spans(starts, sizes, places, out))
        found = torch.from_numpy(out)
        if len(out) == len(flat):
            return found
        at = flat + np.repeat(place - flat[first], last - first + 1)
        return found.index_select(0, torch.from_numpy(at))

    def _read_spans(self, spans: Spans) -> None:
        with self._told():
            file = self.fileno()
            left = read_ready(file, spans, spans.all())
            self.counts.kv_reads += len(spans.start)
            if len(left):
                self.counts.kv_waits += 1
                read_spans(file, spans, left)

    def fetch_block(self, low: int, high: int) -> torch.Tensor:
        began, out = (
            time.perf_counter(),
            np.empty((self.batch, high - low, self.row_bytes), np.uint8),
        )
        each = (high - low) * self.row_bytes
        starts = (np.array(self.slots) * self._run + low) * self.row_bytes
        sizes, places = np.full(self.batch, each), np.arange(self.batch) * each
        self._read_spans(Spans(starts, sizes, places, out))
        self._note(began, out.shape[0] * out.shape[1], self.row_bytes, gather=False)
        return torch.from_numpy(out)

    def select(self, indices: torch.Tensor, in_place: bool) -> None:
        """Rows that stay keep their run; those that stand twice are copied."""
        if not self.batch:
            return
        slots: list[int] = []
        free = sorted(set(range(len(indices) + self.batch)) - set(self.slots))
        for slot in (self.slots[i] for i in indices.tolist()):
            if slot in slots:
                slot, source = free.pop(0), slot
                self._copy(self, source, slot)
            slots.append(slot)
        self.slots = slots

    def _copy(self, other: FileRows, source: int, slot: int) -> None:
        """Copy a run of another store's file into one of this."""
        run, size = self._run * self.row_bytes, self.length * self.row_bytes
        at = 0
        while at < size:
            with other._told():
                wanted = min(BLOCK_BYTES, size - at)
                some = os.pread(other.fileno(), wanted, source * run + at)
                if not some:
                    raise EOFError
            self._put_at(some, slot * run + at)
            at += len(some)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        assert self.dtype is not None
        like = self.codec.stored(torch.empty(0, self.row_bytes, dtype=torch.uint8), self.dtype)
        return like.dtype, (self.batch, self.length, like.shape[1])

    def held(self) -> torch.Tensor:
        """All rows, mapped from the file where the batch is one row."""
        assert self.dtype is not None
        each = [self._mapped(slot) for slot in self.slots]
        raw = each[0][None] if len(each) == 1 else torch.stack(each)
        return self.codec.stored(raw, self.dtype)

    def _mapped(self, slot: int) -> torch.Tensor:
        """One run [length, row bytes], to be read alone."""
        if not self.length:
            return torch.empty(0, self.row_bytes, dtype=torch.uint8)
        offset, shape = slot * self._run * self.row_bytes, (self.length, self.row_bytes)
        self.fileno()
        rows = np.memmap(self._file, np.uint8, "r", offset, shape)
        with warnings.catch_warnings():
            # Torch knows no memory that may not be written; nobody here writes it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writ")
            return torch.from_numpy(rows)

    def restore(self, data: torch.Tensor, device: str | torch.device) -> None:
        raw = data.view(torch.uint8)
        self.dtype = data.dtype
        self.fill(raw[:, :0])
        self.length = raw.shape[1]
        step = max(BLOCK_BYTES // (self.row_bytes * raw.shape[0]), 1)
        for at in range(0, self.length, step):
            some = raw[:, at : at + step].cpu()
            self._write(some, [at] * self.batch, [some.shape[1]] * self.batch)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            "a cache whose entries lie in files is not pickled: write it by cache.save(path), and "
            "read it by Dsv4Cache.load(path, config, offload=...)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FileRows:
        other = FileRows(self.codec, copy.deepcopy(self.counts, memo), self.directory)
        other.dtype, other.row_bytes, other.length = self.dtype, self.row_bytes, self.length
        other.slots = list(range(self.batch))
        for slot, source in enumerate(self.slots):
            other._copy(self, source, slot)
        memo[id(self)] = other
        return other


def far_store(offload: str | Path, codec: Codec, counts: OffloadCounts) -> Callable[[], FarStore]:
    """What makes the stores of a cache with this `offload`, see `Dsv4Cache`."""
    if offload == "cpu":
        return lambda: HostRows(codec, counts)
    return lambda: FileRows(codec, counts, Path(offload))
