# SPDX-License-Identifier: Apache-2.0
"""Stops by signal: the step under way is finished and saved, and the stop says how to go on.

SIGINT (Ctrl-C) and SIGTERM alike. Outside of the training loop, and at the second signal, the
stop is at once: the last checkpoint stands.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped. Not an `Exception`: nothing should catch it by accident.

    Attributes:
        signum: the signal.
        checkpoint: directory to continue from; None where nothing has been saved yet.
        step: optimizer steps in that checkpoint.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, step: int = 0) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.checkpoint, self.step = signum, checkpoint, step

    @property
    def exit_code(self) -> int:
        """What a shell expects: 128 and the signal's number."""
        return 128 + self.signum


class StopSignal:
    """What the handlers know: whether a stop was asked for, and whether it can wait."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._waits = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal while a step is under way; stop at once otherwise."""
        if self.signum is not None or not self._waits:
            raise Interrupted(signum)
        self.signum = signum

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While this lasts, the first signal waits for somebody to look at `signum`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Take SIGINT and SIGTERM over; elsewhere than in the main thread they are left alone."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier: dict[signal.Signals, Any] = {s: signal.signal(s, stop.handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
