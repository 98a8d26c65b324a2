# SPDX-License-Identifier: Apache-2.0
"""Tools in a prompt: their schemas, calls in DSML, results.

```
<｜DSML｜tool_calls>
<｜DSML｜invoke name="tool">
<｜DSML｜parameter name="text" string="true">as it is</｜DSML｜parameter>
<｜DSML｜parameter name="number" string="false">JSON</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>
```

V4.1 writes ` calls`, ` invoke` and ` parameter`, with the blank. Nothing is escaped, so that a
text cannot hold a tag of its own. Arguments are an object, or the JSON text of one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .chat_format import DSML, ChatFormat

# The release's own words; the model was trained on them. Only the tags differ between releases.
_TOOLS_HEAD = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{calls}>" block like the following:

<{calls}>
<{invoke} name="$TOOL_NAME">
<{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{parameter}>
...
</{invoke}>
<{invoke} name="$TOOL_NAME2">
...
</{invoke}>
</{calls}>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning \
inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)


def tag_names(form: ChatFormat) -> dict[str, str]:
    """DSML names of `calls`, `invoke` and `parameter`, without brackets."""
    return {
        key: DSML + tag
        for key, tag in zip(("calls", "invoke", "parameter"), form.tags, strict=True)
    }


def tools_frame(form: ChatFormat) -> tuple[str, str]:
    """What stands before and behind the schemas."""
    return _TOOLS_HEAD.format(**tag_names(form)), _TOOLS_TAIL


def write_tools(tools: Sequence[Mapping[str, Any]], form: ChatFormat) -> str:
    """The section of a system message that names the tools, one schema a line.

    Args:
        tools: as the OpenAI interface has them: `{"type": "function", "function": {...}}`.

    Raises:
        ValueError: one is not of this shape.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools: wanted a list, got {type(tools).__name__}")
    schemas = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'tool {i}: wanted {{"type": "function", "function": {{"name": ...}}}}, '
                f"got {tool!r:.60}"
            )
        schemas.append(to_json(function))
    head, tail = tools_frame(form)
    return head + "\n".join(schemas) + tail


def write_calls(calls: Sequence[Mapping[str, Any]], form: ChatFormat) -> str:
    """An answer's `tool_calls` in DSML, with the empty line before them.

    Raises:
        ValueError: a call without name, arguments that are no object, or a text with a marker.
    """
    tags = tag_names(form)
    written = []
    for i, call in enumerate(calls):
        name, arguments = _read_call(i, call)
        lines = [_write_parameter(key, value, tags["parameter"]) for key, value in arguments]
        for text in (name, *(part for pair in arguments for part in pair)):
            _check_text(i, text if isinstance(text, str) else to_json(text), form)
        body = "\n".join(lines)
        written.append(f'<{tags["invoke"]} name="{name}">\n{body}\n</{tags["invoke"]}>')
    return f"\n\n<{tags['calls']}>\n" + "\n".join(written) + f"\n</{tags['calls']}>"


def read_invoke(text: str, form: ChatFormat) -> dict[str, Any]:
    """One call, `<｜DSML｜invoke ..>` to its end: `{"name", "arguments": {...}}`.

    Raises:
        ValueError: it is malformed, a parameter comes twice, or its value is not JSON.
    """
    tags = {key: re.escape(tag) for key, tag in tag_names(form).items()}
    whole = re.fullmatch(
        rf'\s*<{tags["invoke"]} name="([^"]+)">\n(.*)</{tags["invoke"]}>', text, re.DOTALL
    )
    if whole is None:
        raise ValueError(f"tool call: wanted an invoke with a name, got {text!r:.80}")
    parameter = re.compile(
        rf'<{tags["parameter"]} name="([^"]+)" string="(true|false)">(.*?)</{tags["parameter"]}>\n',
        re.DOTALL,
    )
    name, body = whole.groups()
    arguments: dict[str, Any] = {}
    at = 0
    while match := parameter.match(body, at):
        key, is_text, value = match.groups()
        if key in arguments:
            raise ValueError(f"tool call {name}: parameter {key!r} came twice; wanted it once")
        arguments[key] = value if is_text == "true" else _read_value(name, key, value)
        at = match.end()
    if body[at:] not in ("", "\n"):
        raise ValueError(f"tool call {name}: wanted a parameter, got {body[at:]!r:.80}")
    return {"name": name, "arguments": arguments}


def to_json(value: Any) -> str:
    """JSON in one line, letters as they are.

    Raises:
        ValueError: JSON cannot say it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"chat: wanted a JSON value, got {value!r:.60}") from error


def _read_value(name: str, key: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"tool call {name}: wanted JSON as parameter {key!r}, got {value!r:.60}"
        ) from error


def _read_call(i: int, call: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    """Name and parameters of one call, checked."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _fits(name):
        raise ValueError(
            f'tool call {i}: wanted {{"function": {{"name", "arguments"}}}}, got {call!r:.60}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"tool call {i} ({name}): wanted arguments as a JSON object, "
            f"got {function.get('arguments')!r:.60}"
        )
    for key in arguments:
        if not isinstance(key, str) or not _fits(key):
            raise ValueError(f"tool call {i} ({name}): wanted a parameter's name, got {key!r:.40}")
    return name, list(arguments.items())


def _fits(name: str) -> bool:
    """Whether it can stand between quotes."""
    return bool(name) and '"' not in name and "\n" not in name


def _write_parameter(key: str, value: Any, tag: str) -> str:
    is_text = isinstance(value, str)
    text = value if is_text else to_json(value)
    return f'<{tag} name="{key}" string="{"true" if is_text else "false"}">{text}</{tag}>'


def _check_text(i: int, text: str, form: ChatFormat) -> None:
    for marker in (DSML, *form.markers()):
        # Code that is written by a tool may speak of thinking; the reasoning is over by then.
        if marker in text and marker not in (form.think, form.end_think):
            raise ValueError(f"tool call {i}: the text holds the marker {marker}; take it out")
