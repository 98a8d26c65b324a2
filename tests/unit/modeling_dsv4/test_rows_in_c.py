# SPDX-License-Identifier: Apache-2.0
"""Small reads in C and their twin: the same bytes, the same faults."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modeling_dsv4.cpu import rows
from modeling_dsv4.cpu.rows import Spans, read_ready, read_spans

DATA = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)


@pytest.fixture(params=["C", "Python"])
def file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """A descriptor of a file of DATA, read in either way."""
    if request.param == "Python":
        monkeypatch.setattr(rows, "_function", lambda *_: None)
    elif rows._function("dsv4_read_ready", 7) is None:
        pytest.skip("no C compiler")
    (tmp_path / "data").write_bytes(DATA.tobytes())
    descriptor = os.open(tmp_path / "data", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def _spans(count: int, seed: int = 1) -> Spans:
    dice = np.random.default_rng(seed)
    size = dice.integers(0, 300, count)
    start = dice.integers(0, len(DATA) - 300, count)
    place = np.cumsum(size) - size
    return Spans(start, size, place, np.zeros(int(size.sum()), np.uint8))


def _is_read(spans: Spans, some: np.ndarray) -> bool:
    found = zip(spans.start[some], spans.size[some], spans.place[some], strict=True)
    return all(
        np.array_equal(spans.out[place : place + size], DATA[start : start + size])
        for start, size, place in found
    )


def test_every_span_comes_to_its_place(file: int) -> None:
    for count in (0, 1, 2, 100):
        spans = _spans(count)
        read_spans(file, spans, spans.all())
        assert _is_read(spans, spans.all())


def test_what_was_not_ready_is_left_and_nothing_else_is_read(file: int) -> None:
    spans = _spans(60)
    asked = spans.all()[::2]
    before = asked.copy()
    left = read_ready(file, spans, asked)
    assert np.array_equal(asked, before) and set(left) <= set(asked)
    assert _is_read(spans, np.setdiff1d(asked, left))
    read_spans(file, spans, left)
    assert _is_read(spans, asked)
    for i in spans.all()[1::2]:
        at = slice(spans.place[i], spans.place[i] + spans.size[i])
        assert not spans.out[at].any()


def test_the_end_of_the_file_and_faults_are_told(file: int) -> None:
    start, size = np.array([0, len(DATA) - 10]), np.array([5, 20])
    spans = Spans(start, size, np.array([0, 5]), np.zeros(25, np.uint8))
    assert 1 in read_ready(file, spans, spans.all())
    with pytest.raises(EOFError, match="cut short"):
        read_spans(file, spans, spans.all())
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_spans(10_000, spans, spans.all())
