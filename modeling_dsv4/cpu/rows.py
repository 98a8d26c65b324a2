# SPDX-License-Identifier: Apache-2.0
"""Many small reads of one file: in C (`rows.c`) where there is a compiler, else one after another.

A span is `size` bytes of the file from `start`, read to `place` of the memory. Both ways give the
same bytes; in C a call holds no lock of the interpreter, and costs no Python a span.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# Where the system has them: read what it holds already, and have it fetch ranges meanwhile.
_NO_WAIT = getattr(os, "RWF_NOWAIT", None)
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", None)
_MOST = 1 << 30


@dataclass(frozen=True)
class Spans:
    """What to read: `start`, `size` and `place` [n] int64, contiguous, and the memory `out`."""

    start: Ids
    size: Ids
    place: Ids
    out: Bytes

    def all(self) -> Ids:
        """The numbers of all spans."""
        return np.arange(len(self.start))


def read_ready(file: int, spans: Spans, left: Ids) -> Ids:
    """Read those of the spans `left` that the system holds in memory; gives the others, at once."""
    function = _function("dsv4_read_ready", 7)
    if function is None:
        return _ready_ref(file, spans, left)
    left = left.copy()
    stay = function(file, *_pointers(spans), left.ctypes.data, len(left))
    return left[:stay]


def read_spans(file: int, spans: Spans, left: Ids) -> None:
    """Read the spans `left`, and wait for them; the disk is asked for all of them at once.

    Raises:
        OSError: a read failed.
        EOFError: the file ends before a span does.
    """
    function = _function("dsv4_read_spans", 8)
    if function is None:
        return _read_ref(file, spans, left)
    error, left = ctypes.c_int64(0), np.ascontiguousarray(left)
    failed = function(file, *_pointers(spans), left.ctypes.data, len(left), ctypes.addressof(error))
    if failed >= 0:
        raise _failure(error.value)
    return None


def _failure(number: int) -> OSError | EOFError:
    if not number:
        return EOFError("the file was cut short")
    return OSError(number, os.strerror(number))


def _pointers(spans: Spans) -> tuple[int, ...]:
    return tuple(x.ctypes.data for x in (spans.out, spans.start, spans.size, spans.place))


@functools.cache
def _function(name: str, arguments: int) -> Callable[..., Any] | None:
    # Late: importing the model must not look for a compiler.
    from .build import library

    lib = library()
    if lib is None:
        return None
    function = getattr(lib, name)
    pointers = [ctypes.c_void_p] * 5
    last = [ctypes.c_void_p] * (arguments - 7)
    function.argtypes = [ctypes.c_int64, *pointers, ctypes.c_int64, *last]
    function.restype = ctypes.c_int64
    found: Callable[..., Any] = function
    return found


def _ready_ref(file: int, spans: Spans, left: Ids) -> Ids:
    if _NO_WAIT is None:
        return left
    view = spans.out.data.cast("B")
    stay = []
    for i in left.tolist():
        start, size, place = int(spans.start[i]), int(spans.size[i]), int(spans.place[i])
        try:
            if os.preadv(file, [view[place : place + size]], start, _NO_WAIT) == size:
                continue
        except OSError as error:
            # Not there, or a file system that cannot say; what fails for good fails again.
            if error.errno == errno.EBADF:
                raise
        stay.append(i)
    return np.array(stay, np.int64)


def _read_ref(file: int, spans: Spans, left: Ids) -> None:
    view = spans.out.data.cast("B")
    found = [(int(spans.start[i]), int(spans.size[i]), int(spans.place[i])) for i in left]
    if _WILL_NEED is not None and len(found) > 1:
        for start, size, _ in found:
            os.posix_fadvise(file, start, size, _WILL_NEED)
    for start, size, place in found:
        done = 0
        while done < size:
            part = view[place + done : place + min(size, done + _MOST)]
            got = os.preadv(file, [part], start + done)
            if not got:
                raise _failure(0)
            done += got
