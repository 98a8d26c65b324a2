# SPDX-License-Identifier: Apache-2.0
"""The prompt formats as Jinja templates for `apply_chat_template`.

One body, chat_template.jinja, behind the markers of a format. It writes what `encode_messages`
writes, for conversations that it accepts: the checks are there alone. Arguments of calls must be
objects, since Jinja cannot read JSON. Answers are marked as generated, so that
`return_assistant_tokens_mask` marks the spans.
"""

import json
from importlib import resources
from typing import Any

from .chat_format import (
    EFFORT_LINE,
    EFFORT_MAX,
    EFFORT_NUMBERS,
    RESPONSE_FORMAT,
    TASKS,
    choose_variant,
    find_format,
)
from .chat_tools import tag_names, tools_frame


def write_template(variant: str = "v4") -> str:
    """The template of a format, a key of `FORMATS`.

    It reads the options of `encode_messages` under the same names: `thinking`,
    `drop_past_thinking`, `reasoning_effort`, `response_format`; `tools` and
    `add_generation_prompt` (False by default) are transformers' own.

    Raises:
        ValueError: there is no such format.
    """
    form = find_format(variant)
    values: dict[str, Any] = {
        "bos": form.bos,
        "eos": form.eos,
        "user_mark": form.user,
        "assistant_mark": form.assistant,
        "system_mark": form.system,
        "reminder_mark": form.reminder,
        "think": form.think,
        "end_think": form.end_think,
        "efforts": form.efforts,
        "effort_line": EFFORT_LINE,
        "effort_max": EFFORT_MAX,
        "effort_numbers": dict(EFFORT_NUMBERS),
        "format_head": RESPONSE_FORMAT,
        "task_marks": dict(TASKS),
    }
    if form.tags:
        values |= {f"{key}_tag": tag for key, tag in tag_names(form).items()}
        values["tools_head"], values["tools_tail"] = tools_frame(form)
    head = "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
        for name, value in values.items()
    )
    body = resources.files(__package__).joinpath("chat_template.jinja").read_text("utf-8")
    return head + body


def set_chat_template(tokenizer: Any, variant: str | None = None) -> str:
    """Give a tokenizer the template of its format, kept by `save_pretrained`; return the name.

    Args:
        variant: a key of `FORMATS`; by default the one whose markers are its tokens.

    Raises:
        ValueError: it has the markers of no format, or there is no such format.
    """
    name = choose_variant(tokenizer) if variant is None else variant
    tokenizer.chat_template = write_template(name)
    return name
