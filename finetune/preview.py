# SPDX-License-Identifier: Apache-2.0
"""What the loss sees: an example's text, marked where it counts.

On a terminal, what counts is green and what does not is dim; without colour it stands between
`{+` and `+}`. Special tokens are shown as they are written, ends of lines as `↵`.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from .encoding import IGNORED, Example

_STYLES = {
    (True, False): "green",
    (True, True): "bold black on green",
    (False, False): "dim",
    (False, True): "bold cyan",
}


def show_runs(example: Example, tokenizer: Any) -> list[dict[str, Any]]:
    """Runs of tokens alike: `text`, whether it is `counted`, whether tokens are `special`."""
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {i for i, token in added.items() if token.special}
    pairs = zip(example.input_ids, example.labels, strict=True)
    kinds = [(i, label != IGNORED, i in special) for i, label in pairs]
    return [
        {"text": tokenizer.decode([i for i, *_ in run]), "counted": counted, "special": is_special}
        for (counted, is_special), run in groupby(kinds, key=lambda kind: kind[1:])
    ]


def mark_runs(runs: list[dict[str, Any]], colour: bool) -> Text:
    """One example for a console."""
    text = Text()
    if colour:
        for run in runs:
            style = _STYLES[run["counted"], run["special"]]
            text.append(_show_ends(run["text"]), style=style)
        return text
    for part in _plain(runs):
        text.append(part)
    return text


def _plain(runs: list[dict[str, Any]]) -> Iterator[str]:
    for counted, some in groupby(runs, key=lambda run: run["counted"]):
        joined = _show_ends("".join(run["text"] for run in some))
        yield f"{{+{joined}+}}" if counted else joined


def _show_ends(text: str) -> str:
    return text.replace("\n", "↵\n")
