# SPDX-License-Identifier: Apache-2.0
"""A lock that no Ctrl-C breaks: what is changed under it is changed whole.

Python raises `KeyboardInterrupt` in the main thread between any two calls, also between taking a
lock and the block that gives it back. Here a Ctrl-C that comes while the lock is held, or while it
is taken and given back, is raised behind that. Waiting is never under the lock.
"""

# Not the module around it, which makes enumerations of every number: a lock is taken often.
import _signal as signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class _Deferred:
    """A handler of SIGINT that notes what comes, for the one before it."""

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before = before
        self.came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = (number, frame)


class Guard:
    """A lock that its thread may take again, and a way to wait for changes under it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._deferred: list[_Deferred | None] = []
        self._waiting: list[Any] = []
        # Counts the changes that were told.
        self.version = 0

    def __enter__(self) -> "Guard":
        deferred = _defer()
        self._lock.acquire()
        self._deferred.append(deferred)
        return self

    def __exit__(self, *_: object) -> None:
        deferred = self._deferred.pop()
        self._lock.release()
        if deferred is None:
            return
        signal.signal(signal.SIGINT, deferred.before)
        if deferred.came is not None:
            deferred.before(*deferred.came)

    def held_elsewhere(self) -> bool:
        """Whether another thread holds the lock, in a forked process one that is no more."""
        if not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

    def changed(self) -> None:
        """Wake all who wait; called under the lock."""
        self.version += 1
        while self._waiting:
            self._waiting.pop().release()

    def wait(self, seen: int, seconds: float = -1) -> None:
        """Wait, without the lock, until the version is another than `seen`, or so long."""
        waiter = threading.Lock()
        waiter.acquire()
        with self:
            if self.version != seen:
                return
            self._waiting.append(waiter)
        # Who is interrupted here is woken in vain.
        waiter.acquire(timeout=seconds)


def _defer() -> _Deferred | None:
    """Note Ctrl-C from now on; None where it raises nothing here, or is noted already."""
    if threading.get_ident() != threading.main_thread().ident:
        return None
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, _Deferred) or not callable(before):
        return None
    deferred = _Deferred(before)
    signal.signal(signal.SIGINT, deferred)
    return deferred
