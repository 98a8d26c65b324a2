# SPDX-License-Identifier: Apache-2.0
"""Markers and fixed texts of the prompt formats, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

DSML = "｜DSML｜"
TASKS: Mapping[str, str] = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
"""Quick tasks: behind a message, the token that asks the model for one short verdict."""

EFFORT_NUMBERS: Mapping[str, int] = {"low": 50, "high": 75, "max": 100}
EFFORT_LINE = (
    "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
)
# The release's own words; the model was trained on them.
EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


@dataclass(frozen=True)
class ChatFormat:
    """Markers of one prompt format; an empty one does not exist there.

    Attributes:
        later_systems: a system message may stand behind the first place, and asks for an answer.
        efforts: what a thinking conversation opens with: nothing, a long instruction at effort
            `max`, or a line that states a number.
        tags: DSML names of the block of calls, of a call and of a parameter; none: no tools.
    """

    bos: str
    eos: str
    user: str
    assistant: str
    system: str = ""
    reminder: str = ""
    think: str = ""
    end_think: str = ""
    later_systems: bool = False
    efforts: Literal["none", "max", "number"] = "none"
    tags: tuple[str, str, str] | tuple[()] = ()

    def markers(self) -> tuple[str, ...]:
        """All of them, turn markers first."""
        turns = (self.bos, self.eos, self.user, self.assistant, self.system, self.reminder)
        return tuple(m for m in (*turns, self.think, self.end_think) if m)


_V4 = ChatFormat(
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    user="<｜User｜>",
    assistant="<｜Assistant｜>",
    reminder="<｜latest_reminder｜>",
    think="<think>",
    end_think="</think>",
    efforts="max",
    tags=("tool_calls", "invoke", "parameter"),
)

FORMATS: Mapping[str, ChatFormat] = {
    "v4.1": replace(
        _V4,
        system="<｜System｜>",
        later_systems=True,
        efforts="number",
        tags=(" calls", " invoke", " parameter"),
    ),
    "v4": _V4,
    "plain": ChatFormat(bos="<bos>", eos="<eos>", user="<|user|>", assistant="<|assistant|>"),
}
"""By name; a format comes before those whose markers are a part of its own."""


def choose_variant(tokenizer: Any) -> str:
    """Name of the format whose markers are all tokens of `tokenizer` (a fast one, or raw).

    Raises:
        ValueError: none is.
    """
    raw = getattr(tokenizer, "backend_tokenizer", tokenizer)
    known = getattr(raw, "token_to_id", lambda marker: None)
    for name, form in FORMATS.items():
        if all(known(marker) is not None for marker in form.markers()):
            return name
    wanted = "; ".join(f"{name}: {' '.join(form.markers())}" for name, form in FORMATS.items())
    raise ValueError(
        f"chat: this tokenizer has the markers of no known prompt format ({wanted}); "
        "use records of the form `text` or `prompt` + `completion`"
    )


def find_format(variant: str) -> ChatFormat:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    form = FORMATS.get(variant)
    if form is None:
        raise ValueError(f"chat: wanted a variant of {', '.join(FORMATS)}, got {variant!r}")
    return form
