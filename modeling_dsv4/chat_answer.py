# SPDX-License-Identifier: Apache-2.0
"""From what a model says back to a message, whole or as it comes.

```
reasoning</think>content\\n\\n<｜DSML｜tool_calls>..</｜DSML｜tool_calls><eos>
```

The first part is there with thinking alone, the calls may be missing.
"""

import json
from typing import Any

from .chat_format import DSML, find_format
from .chat_tools import read_invoke, tag_names, to_json


class AnswerStream:
    """Split an answer that comes in pieces; no marker is ever shown, not even half of one.

    Kinds of pieces: `reasoning` and `content` are text to show; a `tool_call` is one whole call
    as JSON, `{"name": .., "arguments": {..}}`. Text behind the end of sequence is kept in `rest`.
    `part` is where it stands: reasoning, content, calls, behind (them), end; `reasoned`: `</think>`
    came.

    Args:
        variant: a key of `FORMATS`.
        thinking: the prompt ended in `<think>`.
    """

    def __init__(self, variant: str = "v4", thinking: bool = False) -> None:
        self.form = find_format(variant)
        if thinking and not self.form.think:
            raise ValueError(f"chat: variant {variant} has no thinking; use v4 or v4.1")
        self.part = "reasoning" if thinking else "content"
        self.rest = ""
        self.reasoned = False
        self._held = ""
        self._stops: dict[str, dict[str, str]] = {
            "reasoning": {self.form.end_think: "content", self.form.eos: "end"},
            "content": {self.form.eos: "end"},
            "behind": {self.form.eos: "end"},
        }
        if self.form.tags:
            tags = tag_names(self.form)
            self._stops["content"][f"\n\n<{tags['calls']}>"] = "calls"
            self._close_call, self._close_calls = f"</{tags['invoke']}>", f"</{tags['calls']}>"

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Take the next piece of text; return what is certain by now, as (kind, text).

        Raises:
            ValueError: a tool call is malformed.
        """
        self._held += text
        pieces: list[tuple[str, str]] = []
        while self._held and self._step(pieces):
            pass
        return pieces

    def close(self) -> list[tuple[str, str]]:
        """End the answer, with or without its end of sequence; return what was held back.

        Raises:
            ValueError: the answer ended amid its tool calls.
        """
        if self.part == "calls":
            raise ValueError(
                f"tool call: wanted {self._close_calls}, got the end of the answer; "
                "allow more tokens"
            )
        held, self._held = self._held, ""
        return [(self.part, held)] if held and self.part in ("reasoning", "content") else []

    def _step(self, pieces: list[tuple[str, str]]) -> bool:
        """Pass one marker. False: more text is needed."""
        if self.part == "end":
            self.rest, self._held = self.rest + self._held, ""
            return False
        if self.part == "calls":
            return self._step_call(pieces)
        stops = self._stops[self.part]
        found = min(((self._held.find(s), s) for s in stops if s in self._held), default=None)
        certain = found[0] if found else len(self._held) - _begun(self._held, tuple(stops))
        text = self._held[:certain]
        if text and self.part == "behind":
            raise ValueError(f"chat: wanted the end behind the tool calls, got {text!r:.60}")
        if text:
            pieces.append((self.part, text))
        self._held = self._held[certain + len(found[1]) if found else certain :]
        if found:
            self.reasoned |= found[1] == self.form.end_think
            self.part = stops[found[1]]
        return found is not None

    def _step_call(self, pieces: list[tuple[str, str]]) -> bool:
        call, end = self._held.find(self._close_call), self._held.find(self._close_calls)
        if call >= 0 and (end < 0 or call < end):
            stop = call + len(self._close_call)
            pieces.append(("tool_call", to_json(read_invoke(self._held[:stop], self.form))))
            self._held = self._held[stop:]
            return True
        if end < 0:
            return False
        if self._held[:end].strip():
            raise ValueError(f"tool call: wanted an invoke, got {self._held[:end]!r:.80}")
        self._held = self._held[end + len(self._close_calls) :]
        self.part = "behind"
        return True


def parse_answer(text: str, variant: str = "v4", *, thinking: bool = False) -> dict[str, Any]:
    """Read one whole answer: what follows the prompt, up to its end of sequence.

    The release's own reader wants the end of sequence; here it may be missing, since generation
    often leaves it out. A call's arguments are JSON text, as in the OpenAI interface.

    Returns:
        `{"role": "assistant", "content", "reasoning_content", "tool_calls"}`, all present.

    Raises:
        ValueError: reasoning without end, a malformed or unfinished call, text behind the end, or
            a marker amid the text.
    """
    stream = AnswerStream(variant, thinking)
    pieces = [*stream.feed(text), *stream.close()]
    if thinking and not stream.reasoned:
        raise ValueError(f"chat: wanted {stream.form.end_think} behind the reasoning, got none")
    if stream.rest:
        raise ValueError(f"chat: wanted nothing behind the end, got {stream.rest!r:.60}")
    said = {kind: "".join(t for k, t in pieces if k == kind) for kind in ("reasoning", "content")}
    for marker in (*stream.form.markers(), *((DSML,) if stream.form.tags else ())):
        if any(marker in part for part in said.values()):
            raise ValueError(f"chat: wanted text, got the marker {marker} in an answer")
    calls = [json.loads(piece) for kind, piece in pieces if kind == "tool_call"]
    return {
        "role": "assistant",
        "content": said["content"],
        "reasoning_content": said["reasoning"],
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": call["name"], "arguments": to_json(call["arguments"])},
            }
            for call in calls
        ],
    }


def _begun(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of the markers begins."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0
    )
