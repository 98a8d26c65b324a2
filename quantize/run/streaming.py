# SPDX-License-Identifier: Apache-2.0
"""Tokens as they come, as text: never half a character, and never the beginning of a stop text."""

from collections.abc import Sequence
from typing import Any

# What a decoder writes for bytes that are no character, or not yet one.
_BROKEN = "�"
# A character has at most four bytes; behind more tokens than that, broken bytes are the model's.
_LONGEST = 4


class TextStream:
    """Turns ids into text that can be shown at once.

    Args:
        tokenizer: with `decode`.
        end: ids that end an answer and are no part of its text.
        stop: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, end: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.end, self.stop = tokenizer, frozenset(end), tuple(stop)
        self.stopped = False
        # The ids since the last border, how much of their text was taken, and what is held back.
        self._ids: list[int] = []
        self._taken = 0
        self._held = ""

    def feed(self, ids: Sequence[int]) -> str:
        """Text that these ids complete."""
        return "".join(self._one(token) for token in ids)

    def close(self) -> str:
        """What was held back, once no more ids come."""
        rest, self._held = self._held + self._decode()[self._taken :], ""
        self._ids, self._taken = [], 0
        if self.stopped:
            return ""
        found = self._find(rest)
        return rest if found is None else rest[:found]

    def _one(self, token: int) -> str:
        if self.stopped or token in self.end:
            return ""
        self._ids.append(token)
        text = self._decode()
        waiting = len(self._ids) - self._border
        if text.endswith(_BROKEN) and waiting < _LONGEST:
            return ""
        new, self._taken = text[self._taken :], len(text)
        self._border = len(self._ids)
        if text.endswith("\n") or len(self._ids) > 64:
            self._cut()
        return self._release(new)

    _border = 0

    def _cut(self) -> None:
        """Start anew behind the last id, which stays as the context of the next."""
        self._ids = self._ids[-1:]
        self._border, self._taken = 1, len(self._decode())

    def _decode(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=False)

    def _release(self, new: str) -> str:
        """Text that can't be the beginning of a stop text; cut before one that is there."""
        text = self._held + new
        found = self._find(text)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        hold = next(
            (n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0
        )
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _begins(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stop)

    def _find(self, text: str) -> int | None:
        places = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return min(places, default=None)
