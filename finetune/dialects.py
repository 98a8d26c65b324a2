# SPDX-License-Identifier: Apache-2.0
"""Common layouts of training rows, brought into one of three forms.

| layout | keys | becomes |
|---|---|---|
| chat | `messages: [{role, content, reasoning_content, tool_calls}]`, `tools` | the same |
| ShareGPT | `conversations: [{from, value}]`, `system`, `tools` | chat |
| Alpaca | `instruction`, `input`, `output`, `system`, `history` | chat: instruction + input |
| pair | `prompt`, `completion` | the same |
| text | `text` | the same |

`reasoning` and `thinking` of a message are other names of `reasoning_content`. Tools and a call's
arguments may be JSON text, as columns of tables hold them.
"""

import json
from typing import Any

LAYOUTS = ("chat", "sharegpt", "alpaca", "prompt_completion", "text")
# Rows for other objectives than supervised ones.
OTHER_LAYOUTS = ("preference", "rated", "task")
# Keys of a row that make up the record; others (ids, sources) are not looked at.
KEYS = {
    "chat": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "rated": ("prompt", "completion", "label", "tools"),
    "task": ("prompt", "messages", "answer", "regex", "rewards", "stop"),
}
_FIRST = {
    "messages": "chat",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt_completion",
    "text": "text",
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
}
_REASONING = ("reasoning", "thinking")
# A column's name is shorter; what is longer may be anybody's secret.
_LONGEST_KEY = 24


def short(value: object) -> str:
    """A value by type and length: messages are kept and sent on, content may be a secret."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return f"text of {len(value)} characters" if value.strip() else "blank text"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return type(value).__name__


def key_name(key: object) -> str:
    """A key as messages say it: names as they are, anything else by its length."""
    name = str(key)
    plain = len(name) <= _LONGEST_KEY and name.isidentifier()
    return name if plain else f"a key of {len(name)} characters"


def is_preference(row: dict[str, Any]) -> bool:
    """Whether a row holds a pair of answers, which the objectives dpo, orpo and kto learn from."""
    return all(key in row for key in ("prompt", "chosen", "rejected"))


def find_layout(row: dict[str, Any]) -> str:
    """Which layout a row has.

    Raises:
        ValueError: none, or several; says which keys came.
    """
    if "completion" not in row and is_preference(row):
        raise ValueError(
            "wanted an answer to learn, got preferences (`prompt`, `chosen`, `rejected`); these "
            "are read by `train --objective dpo` (or orpo, kto)"
        )
    if "completion" not in row and "prompt" in row and row.keys() & {"answer", "regex", "rewards"}:
        raise ValueError(
            "wanted an answer to learn, got a question with rewards (`prompt`, and `answer`, "
            "`regex` or `rewards`); these are read by `train --objective grpo` and `eval --tasks`"
        )
    if "completion" in row and "prompt" not in row:
        raise ValueError("`completion` without `prompt`")
    if "instruction" in row and "output" not in row and "text" not in row:
        raise ValueError("`instruction` without `output`")
    first = [key for key in _FIRST if key in row]
    # Alpaca files often carry the whole example a second time, as `text`.
    if "instruction" in first and "output" in row:
        first = [key for key in first if key != "text"]
    if len(first) != 1:
        got = " and ".join(first) or (", ".join(map(key_name, row)) or "no keys")
        raise ValueError(
            "wanted one of `messages`, `conversations`, `instruction` + `output`, `prompt` + "
            f"`completion`, `text`, got {got}"
        )
    return _FIRST[first[0]]


def to_content(row: dict[str, Any], layout: str) -> dict[str, Any]:
    """The row's content in the keys of its form, to be checked by the caller.

    Raises:
        ValueError: a ShareGPT turn without a known speaker, or a call that is not JSON.
    """
    if layout == "sharegpt":
        return {"messages": _from_sharegpt(row), **_tools(row)}
    if layout == "alpaca":
        return {"messages": _from_alpaca(row)}
    if layout == "chat":
        messages = row["messages"]
        if isinstance(messages, list):
            messages = [_rename_reasoning(message) for message in messages]
        return {"messages": messages, **_tools(row)}
    return {key: row.get(key) for key in KEYS[layout]}


def _rename_reasoning(message: Any) -> Any:
    if not isinstance(message, dict) or not any(message.get(key) for key in _REASONING):
        return message
    kept = {key: value for key, value in message.items() if key not in _REASONING}
    texts = [message[key] for key in _REASONING if message.get(key)]
    return {**kept, "reasoning_content": kept.get("reasoning_content") or texts[0]}


def _tools(row: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            raise ValueError(f"`tools`: wanted a list of schemas, got {short(tools)}") from None
    if not tools:
        return {}
    if isinstance(tools, list):
        # Schemas without the wrapping of OpenAI's interface, as ShareGPT files have them.
        tools = [
            {"type": "function", "function": tool}
            if isinstance(tool, dict) and "name" in tool and "function" not in tool
            else tool
            for tool in tools
        ]
    return {"tools": tools}


def _from_sharegpt(row: dict[str, Any]) -> Any:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"`conversations`: wanted a list of turns, got {short(turns)}")
    messages: list[Any] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {i}: wanted an object, got {type(turn).__name__}")
        speaker = turn.get("from", turn.get("role"))
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(
                f"turn {i}: wanted `from` to be one of {', '.join(_SHAREGPT_ROLES)}, "
                f"got {short(speaker)}"
            )
        value = turn.get("value", turn.get("content"))
        if role == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(i, value)})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _calls(i: int, value: Any) -> list[dict[str, Any]]:
    """`function_call` turns: JSON of one call or a list, `{"name", "arguments"}`."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"turn {i}: wanted a call as JSON with `name`, got {short(value)}")
    return [
        {"function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _from_alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise ValueError(f"`history`: wanted a list of [question, answer], got {short(history)}")
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        question = f"{question}\n\n{more}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": row["output"]})
    return messages
