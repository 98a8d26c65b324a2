# SPDX-License-Identifier: Apache-2.0
"""Reasoning and content of an answer that comes in pieces."""

from modeling_dsv4.chat import FORMATS


class AnswerStream:
    """Split an answer at the end of its reasoning; the marker itself is never shown."""

    def __init__(self, variant: str = "v4", thinking: bool = False) -> None:
        self.form = FORMATS[variant]
        self.part = "reasoning" if thinking else "content"
        self._held = ""

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Take the next piece; return what is certain by now, as (kind, text)."""
        if self.part == "content":
            return [("content", text)]
        self._held += text
        before, marker, behind = self._held.partition(self.form.end_think)
        if marker:
            self.part, self._held = "content", ""
            return [(k, t) for k, t in (("reasoning", before), ("content", behind)) if t]
        end = self.form.end_think
        hold = next((n for n in range(len(end) - 1, 0, -1) if before.endswith(end[:n])), 0)
        self._held = before[len(before) - hold :]
        return [("reasoning", before[: len(before) - hold])] if len(before) > hold else []

    def close(self) -> list[tuple[str, str]]:
        """Return what was held back."""
        held, self._held = self._held, ""
        return [(self.part, held)] if held else []
