# SPDX-License-Identifier: Apache-2.0
"""Memory in a run: its background, its optimizer group."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.config import RunConfig
from finetune.memory_training import read_background, rows_for_run
from finetune.optimizers import Rule, make_optimizer

MakeModel = Callable[..., PreTrainedModel]


def test_rows_learn_faster_and_are_not_pulled_back(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("v4.1", engram_vocab_size=200)
    rows = rows_for_run(model, tokenizer, [[20, 21, 22, 23]], None, 64)
    tuned = attach_adapters(model, "memory", r=2, memory=rows)
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    delta = next(p for n, p in trained.items() if n.endswith("delta"))
    assert delta.shape == (len(rows.layers[0].ids), 16)
    optimizer = make_optimizer("adamw", tuned, 0.1, 0.5)
    settings = {(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups}
    assert settings == {(0.1, 0.5, len(trained) - 1), (0.5, 0.0, 1)}
    before = delta.detach().clone()
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(before - delta, torch.full_like(before, 0.5))
    # A run's own word on the rows goes before.
    named = make_optimizer("adamw", tuned, 0.1, 0.5, [Rule(r".*lora_rows.*", 2.0)])
    assert {group["lr"] for group in named.param_groups} == {0.1, 0.2}


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


def test_settings_of_memory_are_checked() -> None:
    names = {"model": "m", "data": "d.jsonl", "output": "o", "preset": "memory"}
    assert RunConfig(**names).memory_rows == 4096
    with pytest.raises(ValueError, match="memory_rows: wanted at least 1, got 0"):
        RunConfig(**names, memory_rows=0)
    with pytest.raises(ValueError, match="preset 'memory': wanted objective sft, got dpo"):
        RunConfig(**names, objective="dpo")
