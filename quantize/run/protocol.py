# SPDX-License-Identifier: Apache-2.0
"""OpenAI's interface: requests read and checked, answers written, no transport."""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .conversation import Reply
from .engine import Answer
from .settings import Settings

_MOST_STOPS = 16
# Wishes that change the answer and that this server does not grant.
_REFUSED: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "tool_choice": (None, "auto", "none"),
}


@dataclass(frozen=True)
class Request:
    """What somebody asks.

    Attributes:
        settings: length, choice of tokens, stop texts.
        stream: pieces as they come.
        usage: a last piece of a stream counts tokens.
        messages: of a chat, else None.
        prompt: of a raw text, else "".
        thinking: the answer reasons first.
        options: others of `encode_messages`.
    """

    settings: Settings
    stream: bool
    usage: bool
    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    thinking: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def read_chat(body: Any, defaults: Settings) -> Request:
    """Read the body of /v1/chat/completions.

    Raises:
        ValueError: what is wrong with it.
    """
    request = _read(body, defaults)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: wanted a list of at least one, got {messages!r:.60}")
    thinking, effort = _thinking(body)
    options: dict[str, Any] = {}
    if body.get("tools") and body.get("tool_choice") != "none":
        options["tools"] = _typed(body, "tools", list, None)
    if effort is not None:
        options["reasoning_effort"] = effort
    form = body.get("response_format")
    if form is not None and form != {"type": "text"}:
        options["response_format"] = form
    said = [_message(i, message) for i, message in enumerate(messages)]
    return replace(request, messages=said, thinking=thinking, options=options)


def read_completion(body: Any, defaults: Settings) -> Request:
    """Read the body of /v1/completions.

    Raises:
        ValueError: what is wrong with it.
    """
    request = _read(body, defaults)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt: wanted one text, got {prompt!r:.60}")
    return replace(request, prompt=prompt)


def _read(body: Any, defaults: Settings) -> Request:
    if not isinstance(body, dict):
        raise ValueError(f"body: wanted a JSON object, got {type(body).__name__}")
    for name, granted in _REFUSED.items():
        if body.get(name) not in granted:
            wanted = " or ".join(repr(x) for x in granted if x is not None)
            raise ValueError(f"{name}: wanted {wanted}, got {body[name]!r:.60}")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise ValueError(f"stop: wanted a text or up to {_MOST_STOPS} of them, got {stop!r:.60}")
    if not all(isinstance(x, str) and len(x) <= 1000 for x in stops):
        raise ValueError("stop: wanted texts of up to 1000 characters, got something else")
    length = _typed(body, "max_completion_tokens", int, None)
    given = {
        "max_new_tokens": _typed(body, "max_tokens", int, None) if length is None else length,
        "temperature": _typed(body, "temperature", float, None),
        "top_p": _typed(body, "top_p", float, None),
        "seed": _typed(body, "seed", int, None),
    }
    settings = replace(
        defaults, **{k: v for k, v in given.items() if v is not None}, stop=tuple(stops)
    )
    options = _typed(body, "stream_options", dict, {})
    return Request(
        settings, _typed(body, "stream", bool, False), bool(options.get("include_usage"))
    )


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of one type; null is as if it were not there."""
    value = body.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name}: wanted {kind.__name__}, got {value!r:.60}")
    return value


def _thinking(body: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether to reason, and how hard: DeepSeek's field, OpenAI's, or the template's."""
    effort = body.get("reasoning_effort")
    switch = _typed(body, "thinking", dict, {}).get("type")
    if switch not in (None, "enabled", "disabled"):
        raise ValueError(f"thinking.type: wanted enabled or disabled, got {switch!r:.60}")
    template = _typed(body, "chat_template_kwargs", dict, {})
    thinks = template.get("thinking", template.get("enable_thinking", False))
    if switch is not None:
        thinks = switch == "enabled"
    elif effort is not None:
        thinks = effort != "none"
    return bool(thinks), effort if thinks and effort != "none" else None


def _message(i: int, message: Any) -> dict[str, Any]:
    """One message with its content as one text, and without fields that are null."""
    if not isinstance(message, dict):
        raise ValueError(f"message {i}: wanted an object, got {type(message).__name__}")
    said = {key: value for key, value in message.items() if value is not None}
    parts = said.get("content", "")
    if isinstance(parts, list):
        texts = [part.get("text") for part in parts if _is_text(part)]
        if len(texts) != len(parts):
            raise ValueError(f"message {i}: wanted parts of type text alone, got {parts!r:.80}")
        parts = "".join(texts)
    if said.get("role") == "developer":
        said["role"] = "system"
    return said | {"content": parts}


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


class Writer:
    """Writes one answer's objects; all of them have one id.

    Args:
        model: name to answer with.
        chat: a chat's answer, else a raw text's.
    """

    def __init__(self, model: str, chat: bool) -> None:
        self.model, self.chat = model, chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self._calls = 0

    def _object(self, streamed: bool, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def piece(self, kind: str, text: str) -> dict[str, Any]:
        """One piece of a stream."""
        if not self.chat:
            return self._object(True, [{"index": 0, "text": text, "finish_reason": None}])
        if kind == "tool_call":
            delta: dict[str, Any] = {"tool_calls": [{"index": self._calls, **_call(text)}]}
            self._calls += 1
        else:
            delta = {"content" if kind == "content" else "reasoning_content": text}
        return self._object(True, [{"index": 0, "delta": delta, "finish_reason": None}])

    def opening(self) -> dict[str, Any]:
        """What a chat's stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return self._object(True, [{"index": 0, "delta": delta, "finish_reason": None}])

    def ending(self, reply: Reply) -> dict[str, Any]:
        """What a stream ends with."""
        last: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._object(True, [{"index": 0, **last, "finish_reason": _reason(reply)}])

    def usage(self, answer: Answer) -> dict[str, Any]:
        """A stream's count of tokens."""
        return self._object(True, []) | {"usage": _usage(answer)}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """All of an answer."""
        said: dict[str, Any] = {"text": reply.content}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": reply.content}
            if reply.reasoning:
                message["reasoning_content"] = reply.reasoning
            if reply.calls:
                message["tool_calls"] = [_call(call) for call in reply.calls]
                message["content"] = reply.content or None
            said = {"message": message}
        choices = [{"index": 0, **said, "logprobs": None, "finish_reason": _reason(reply)}]
        return self._object(False, choices) | {"usage": _usage(reply.answer)}


def error(kind: str, text: str) -> dict[str, Any]:
    """An error's body."""
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


def _reason(reply: Reply) -> str:
    if reply.calls:
        return "tool_calls"
    return "length" if reply.answer.reason == "length" else "stop"


def _call(text: str) -> dict[str, Any]:
    call = json.loads(text)
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _usage(answer: Answer) -> dict[str, Any]:
    stats = answer.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }
