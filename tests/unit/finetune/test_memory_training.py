# SPDX-License-Identifier: Apache-2.0
"""Memory in a run: its background, its optimizer group."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.memory_training import (
    memory_parameters,
    read_background,
    rows_for_run,
    split_group,
)

MakeModel = Callable[..., PreTrainedModel]


def test_rows_learn_faster_and_are_not_pulled_back(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("v4.1", engram_vocab_size=200)
    rows = rows_for_run(model, tokenizer, [[20, 21, 22, 23]], None, 64)
    tuned = attach_adapters(model, "memory", r=2, memory=rows)
    own = memory_parameters(tuned)
    assert [tuple(p.shape) for p in own] == [(len(rows.layers[0].ids), 16)]
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    split_group(optimizer, own)
    settings = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert settings == [(0.1, 0.5, len(trained) - 1), (0.5, 0.0, 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    before = own[0].detach().clone()
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(before - own[0], torch.full_like(before, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    tuned.requires_grad_(False)
    assert memory_parameters(tuned) == []


def test_an_optimizer_without_memory_stays_as_it_is() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    split_group(optimizer, [])
    assert len(optimizer.param_groups) == 1


def test_a_background_is_text_or_records(tmp_path: Path) -> None:
    text, records = tmp_path / "some.txt", tmp_path / "some.jsonl"
    text.write_text("one\ntwo\n")
    assert read_background(text) == ["one\ntwo\n"]
    records.write_text(
        '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n'
        '{"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]}\n'
    )
    assert read_background(records) == ["a", "b\nc", "d\ne"]
    with pytest.raises(ValueError, match="found none at"):
        read_background(tmp_path / "none.txt")
    text.write_text(" \n")
    with pytest.raises(ValueError, match=r"wanted text in .*, got none"):
        read_background(text)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="wanted UTF-8 text"):
        read_background(text)


def test_a_run_without_a_background_says_so(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model("v4.1", engram_vocab_size=200)
    documents = [tokenizer("the meter lasts")["input_ids"]]
    rows_for_run(model, tokenizer, documents, None, 64)
    assert "ranked by their frequency in the data alone" in caplog.text
    caplog.clear()
    text = tmp_path / "some.txt"
    text.write_text("the meter lasts nine years")
    with caplog.at_level(logging.WARNING):
        rows = rows_for_run(model, tokenizer, documents, text, 64)
    assert not caplog.text
    assert rows.report["disturbed"] > 0
