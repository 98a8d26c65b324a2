# SPDX-License-Identifier: Apache-2.0
"""Batches of rows in C and their twin: the same rows, the same counts, the same cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modeling_dsv4.cpu.rows import read_spans
from quantize import row_batch
from quantize.row_batch import Batch, BatchReader
from quantize.row_cache import RowCache

ROWS, SIZE, START, BASE = 2000, 20, 12, 500
DATA = np.random.default_rng(0).integers(0, 256, (ROWS, SIZE), dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "table").write_bytes(b"x" * START + DATA.tobytes())
    descriptor = os.open(tmp_path / "table", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def _readers(file: int, rows: int, row_bytes: int = SIZE) -> list[BatchReader]:
    caches = [RowCache(rows * (row_bytes + 16), row_bytes) for _ in range(2)]
    return [BatchReader(cache, file, START, SIZE, BASE, ROWS) for cache in caches]


def _run(reader: BatchReader, ids: np.ndarray, tried: int, twin: bool) -> Batch | None:
    with pytest.MonkeyPatch.context() as patch:
        if twin:
            patch.setattr(row_batch, "_functions", lambda: (None, None))
        elif row_batch._functions()[0] is None:
            pytest.skip("no C compiler")
        batch = reader.begin(ids, tried)
        if batch is not None and len(batch.left):
            read_spans(reader.file, reader.spans(batch), np.arange(len(batch.left)))
            left = batch.left.copy()
            reader.end(batch)
            batch.left = left
    return batch


@pytest.mark.parametrize("rows", [1, 5, 64, 3000])
@pytest.mark.parametrize("tried", [0, 30, 10_000])
@pytest.mark.parametrize("row_bytes", [SIZE, SIZE + 4])
def test_both_ways_give_the_same(file: int, rows: int, tried: int, row_bytes: int) -> None:
    readers, dice = _readers(file, rows, row_bytes), np.random.default_rng(1)
    for count in (1, 24, 24, 0, 300, 24, 700, 24, 24):
        ids = dice.zipf(1.3, count) % ROWS
        one, two = (_run(r, ids, tried, twin) for twin, r in enumerate(readers))
        assert one is not None and two is not None
        assert np.array_equal(one.rows[:, :SIZE], DATA[ids])
        assert np.array_equal(two.rows[:, :SIZE], DATA[ids])
        assert (one.missed, one.pages) == (two.missed, two.pages)
        assert np.array_equal(one.left, two.left) and np.array_equal(one.order, two.order)
        first, second = (reader.cache for reader in readers)
        for name in ("keys", "used", "tick"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
        held = first.keys >= 0
        assert np.array_equal(first.rows[held][:, :SIZE], second.rows[held][:, :SIZE])


def test_what_is_held_is_not_read_again(file: int) -> None:
    ids = np.array([7, 3, 7, 1999])
    for twin, reader in enumerate(_readers(file, 100)):
        first, again = (_run(reader, ids, 100, bool(twin)) for _ in range(2))
        assert first is not None and again is not None
        assert (first.missed, first.pages) == (3, 2)
        assert (again.missed, again.pages, len(again.left)) == (0, 0, 0)
        assert reader.cache.holds(np.array([7, 3, 1999]) + BASE).all()
        assert not reader.cache.holds(np.array([7, 3, 1999])).any()


def test_ids_that_are_no_rows_are_told(file: int) -> None:
    for twin, reader in enumerate(_readers(file, 100)):
        for wrong in (-1, ROWS):
            assert _run(reader, np.array([0, wrong, 5]), 100, bool(twin)) is None


def test_a_row_that_was_begun_twice_is_kept_once(file: int) -> None:
    ids = np.array([7, 3, 1999])
    for twin, reader in enumerate(_readers(file, 100)):
        with pytest.MonkeyPatch.context() as patch:
            if twin:
                patch.setattr(row_batch, "_functions", lambda: (None, None))
            batches = [reader.begin(ids, 0) for _ in range(2)]
            for batch in batches:
                assert batch is not None and len(batch.left) == 3
                read_spans(file, reader.spans(batch), np.arange(3))
                reader.end(batch)
        held = reader.cache.keys[reader.cache.keys >= 0]
        assert sorted(held.tolist()) == sorted((ids + BASE).tolist())
