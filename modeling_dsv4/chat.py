# SPDX-License-Identifier: Apache-2.0
"""Conversations as the text a model was trained on, and which characters of it are answers.

```
v4     <bos>system<｜User｜>question<｜Assistant｜></think>answer<eos>
v4.1   <bos><｜System｜>system<｜User｜>question<｜Assistant｜></think>answer<eos>
       thinking: ..<｜Assistant｜><think>reasoning</think>answer<eos>
plain  <bos>system<|user|>question<|assistant|>answer<eos>
```

Formats of the release files encoding_dsv4.py (V4) and encoding.py (V4.1), without tools. There is
no line break, blank or role name but these; one more shifts everything behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_EFFORTS = {"low": 50, "high": 75, "max": 100}
_DEFAULT_EFFORT = "high"
_ROLES = ("system", "latest_reminder", "user", "assistant")
# Keys that change what the official encoders write, which this one does not write.
_UNSUPPORTED = (
    "tools",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "response_format",
    "content_blocks",
    "task",
    "wo_eos",
)


@dataclass(frozen=True)
class ChatFormat:
    """Markers of one prompt format; an empty one does not exist there.

    Attributes:
        later_systems: a system message may stand behind the first place, and asks for an answer.
        efforts: a thinking conversation opens with a line that states the reasoning effort.
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
    efforts: bool = False

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
)

FORMATS: Mapping[str, ChatFormat] = {
    "v4.1": ChatFormat(
        bos=_V4.bos,
        eos=_V4.eos,
        user=_V4.user,
        assistant=_V4.assistant,
        system="<｜System｜>",
        reminder=_V4.reminder,
        think=_V4.think,
        end_think=_V4.end_think,
        later_systems=True,
        efforts=True,
    ),
    "v4": _V4,
    "plain": ChatFormat(bos="<bos>", eos="<eos>", user="<|user|>", assistant="<|assistant|>"),
}
"""By name; a format comes before those whose markers are a part of its own."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as text. `spans`: [start, stop) of every answer, its end of sequence inside.

    With thinking, an answer is what the model says: reasoning, `</think>`, content, end.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str
    reasoning: str


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


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    variant: str = "v4",
    *,
    thinking: bool = False,
    drop_past_thinking: bool = True,
    reasoning_effort: int | str | None = None,
) -> EncodedChat:
    """Write a conversation; if it ends in a question, the text ends where the answer begins.

    Args:
        messages: `{"role", "content"}` and, on answers, `"reasoning_content"`. Roles: system,
            user, assistant, latest_reminder. Adjacent user messages are joined by an empty line.
        variant: a key of `FORMATS`.
        thinking: answers reason first. Without it, `reasoning_content` is left out.
        drop_past_thinking: only answers to the last question reason, as the release does.
        reasoning_effort: V4.1 thinking only: 1 to 100, or low, high (the default), max.

    Raises:
        ValueError: what the format cannot say, with the number of the message.
    """
    form = FORMATS.get(variant)
    if form is None:
        raise ValueError(f"chat: wanted a variant of {', '.join(FORMATS)}, got {variant!r}")
    if thinking and not form.think:
        raise ValueError(f"chat: variant {variant} has no thinking; use v4 or v4.1")
    turns = _read_turns(messages, form)
    _check_order(turns, form)
    opening = _opening(turns, form, thinking, reasoning_effort)
    asking = [_asks(i, turn) for i, turn in enumerate(turns)]
    last = max(i for i, asks in enumerate(asking) if asks)
    text, spans = form.bos + opening, []
    for i, turn in enumerate(turns):
        reasons = thinking and (i >= last or not drop_past_thinking)
        if turn.role == "assistant":
            start = len(text)
            text += turn.reasoning + form.end_think if reasons else ""
            text += turn.content + form.eos
            spans.append((start, len(text)))
            continue
        # The first system message's marker belongs to the opening.
        marker = "" if i == 0 and turn.role == "system" else _marker(turn.role, form)
        text += marker + turn.content
        if asking[i] and (i + 1 == len(turns) or turns[i + 1].role == "assistant"):
            text += form.assistant + (form.think if reasons else form.end_think)
    return EncodedChat(text, tuple(spans))


def _asks(i: int, turn: _Turn) -> bool:
    """Whether an answer may follow: a question, or an instruction amid the conversation."""
    return turn.role == "user" or (turn.role == "system" and i > 0)


def _marker(role: str, form: ChatFormat) -> str:
    return {"system": form.system, "user": form.user, "latest_reminder": form.reminder}[role]


def _opening(turns: list[_Turn], form: ChatFormat, thinking: bool, effort: int | str | None) -> str:
    """What stands between `bos` and the first content."""
    if effort is not None and not (thinking and form.efforts):
        raise ValueError(
            f"chat: reasoning_effort {effort!r} wants variant v4.1 with thinking=True; "
            "elsewhere leave it None"
        )
    system = form.system if turns[0].role == "system" else ""
    if not (thinking and form.efforts):
        return system
    effort = _DEFAULT_EFFORT if effort is None else effort
    number = _EFFORTS.get(effort, effort) if isinstance(effort, str) else effort
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 100:
        raise ValueError(
            f"chat: wanted a reasoning_effort of 1 to 100, {', '.join(_EFFORTS)}, got {effort!r}"
        )
    scale = "(range 1-100, the higher the value, the more thorough the reasoning)"
    return f"{form.system}Reasoning Effort: {number} {scale}\n\n"


def _read_turns(messages: Sequence[Mapping[str, Any]], form: ChatFormat) -> list[_Turn]:
    """Check every message alone; join adjacent user messages."""
    turns: list[_Turn] = []
    for i, message in enumerate(messages):
        turn = _read_turn(i, message, form)
        if turn.role == "user" and turns and turns[-1].role == "user":
            turn = _Turn("user", f"{turns.pop().content}\n\n{turn.content}", "")
        turns.append(turn)
    return turns


def _read_turn(i: int, message: Mapping[str, Any], form: ChatFormat) -> _Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {i}: wanted an object, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    unsupported = [key for key in _UNSUPPORTED if message.get(key)]
    if unsupported or role == "tool":
        raise ValueError(
            f"message {i}: tools and tasks are not encoded yet, got "
            f"{', '.join(unsupported) or 'role tool'}; leave such conversations out"
        )
    if role not in _ROLES or (role == "latest_reminder" and not form.reminder):
        raise ValueError(f"message {i}: wanted a role of {', '.join(_ROLES)}, got {role!r}")
    reasoning = message.get("reasoning_content") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise ValueError(f"message {i} ({role}): wanted content as text, got {content!r:.40}")
    # A system message may explain <think>; in an answer it would end the reasoning early.
    answers = role == "assistant"
    for marker in form.markers():
        if not answers and marker in (form.think, form.end_think):
            continue
        if marker in content or marker in reasoning:
            hint = "put reasoning into reasoning_content" if "think" in marker else "take it out"
            raise ValueError(f"message {i} ({role}): the text holds the marker {marker}; {hint}")
    return _Turn(role, content, reasoning if answers else "")


def _check_order(turns: list[_Turn], form: ChatFormat) -> None:
    """Questions and answers alternate; a reminder stands before a question, a system first."""
    roles = [turn.role for turn in turns]
    got = ", ".join(roles[:8]) + (", .." if len(roles) > 8 else "")
    if not any(_asks(i, turn) for i, turn in enumerate(turns)):
        raise ValueError(f"chat: wanted a user message, got {got or 'no message'}")
    for i, role in enumerate(roles):
        before, after = roles[i - 1] if i else None, roles[i + 1] if i + 1 < len(roles) else None
        if role == "system" and i > 0 and not form.later_systems:
            raise ValueError(f"chat: wanted a system message in the first place only, got {got}")
        if role == "assistant" and (i == 0 or not _asks(i - 1, turns[i - 1])):
            raise ValueError(f"chat: wanted an answer behind each question, got {got}")
        if role == "latest_reminder" and (before == "user" or after != "user"):
            raise ValueError(f"chat: wanted a reminder before a user message, got {got}")
