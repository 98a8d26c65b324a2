# SPDX-License-Identifier: Apache-2.0
"""Samples show which tokens count, with colour and without."""

import io

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from finetune.encoding import encode_record
from finetune.preview import mark_runs, show_runs
from finetune.records import Record

CHAT = Record(
    1,
    "messages",
    {
        "messages": [
            {"role": "user", "content": "the\nmeter? ü"},
            {"role": "assistant", "content": "nine [b]years"},
        ]
    },
)


def test_runs_say_what_counts_and_lose_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_record(CHAT, tokenizer, 100)
    runs = show_runs(example, tokenizer)
    assert [(run["text"], run["counted"], run["special"]) for run in runs] == [
        ("<bos><|user|>", False, True),
        ("the\nmeter? ü", False, False),
        ("<|assistant|>", False, True),
        ("nine [b]years", True, False),
        ("<eos>", True, True),
    ]


def test_without_colour_what_counts_stands_between_signs(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    runs = show_runs(encode_record(CHAT, tokenizer, 100), tokenizer)
    shown = "<bos><|user|>the↵\nmeter? ü<|assistant|>{+nine [b]years<eos>+}"
    assert mark_runs(runs, colour=False).plain == shown
    stream = io.StringIO()
    Console(file=stream, force_terminal=False).print(mark_runs(runs, False), soft_wrap=True)
    assert stream.getvalue() == shown + "\n"


def test_with_colour_every_run_has_the_style_of_its_kind(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    runs = show_runs(encode_record(CHAT, tokenizer, 100), tokenizer)
    text = mark_runs(runs, colour=True)
    assert "{+" not in text.plain
    assert [str(span.style) for span in text.spans] == [
        "bold cyan",
        "dim",
        "bold cyan",
        "green",
        "bold black on green",
    ]
