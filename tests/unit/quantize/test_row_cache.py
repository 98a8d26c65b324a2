# SPDX-License-Identifier: Apache-2.0
"""A cache of rows: bounded, exact, and kind to what is used often."""

from collections import OrderedDict

import numpy as np
import pytest

from quantize.row_cache import RowCache

ROW = 24


def row_of(keys: np.ndarray) -> np.ndarray:
    return np.stack([keys * 7 + i for i in range(ROW)], axis=1).astype(np.uint8)


def use(cache: RowCache, keys: np.ndarray) -> int:
    """Look keys up, check what is held, take up the others; returns how many were held."""
    unique = np.unique(keys)
    out = np.zeros((len(unique), ROW), np.uint8)
    held = cache.read(unique, out)
    assert np.array_equal(out[held], row_of(unique[held]))
    assert not out[~held].any()
    cache.write(unique[~held], row_of(unique[~held]))
    return int(held.sum())


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 1000])
def test_what_is_held_is_right_and_within_the_budget(rows: int) -> None:
    budget, dice = rows * (ROW + 16), np.random.default_rng(0)
    cache = RowCache(budget, ROW)
    assert 0 < cache.nbytes <= budget
    for _ in range(50):
        use(cache, dice.integers(0, 2 * rows, 20))
    keys = np.arange(2 * rows + 20)
    assert 0 < int(cache.holds(keys).sum()) <= rows


def test_all_is_held_where_all_fits() -> None:
    cache, keys = RowCache(4000 * (ROW + 16), ROW), np.arange(1000) * 977
    assert use(cache, keys) == 0
    assert use(cache, keys) == 1000


def test_the_row_used_last_stays() -> None:
    cache = RowCache(8 * (ROW + 16), ROW)
    for key in range(8):
        use(cache, np.array([key]))
    use(cache, np.array([0]))
    use(cache, np.array([100]))
    assert cache.holds(np.array([0, 100, 1])).tolist() == [True, True, False]


def test_frequent_keys_are_hit_almost_as_by_one_exact_order() -> None:
    dice = np.random.default_rng(1)
    asked = dice.zipf(1.2, (400, 48)) % 100_000
    cache, exact, hits, wanted = RowCache(2000 * (ROW + 16), ROW), OrderedDict(), 0, 0
    for keys in asked:
        hits += use(cache, keys)
        for key in np.unique(keys).tolist():
            wanted += key in exact
            exact.pop(key, None)
            exact[key] = None
            if len(exact) > 2000:
                exact.popitem(last=False)
    assert wanted > 5000
    assert hits > 0.97 * wanted


def test_less_than_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="engram_memory: wanted at least one row of 40 bytes"):
        RowCache(39, ROW)
