# SPDX-License-Identifier: Apache-2.0
"""Presets from files to files, through the program: hot experts, the indexer, whole weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import quantize  # noqa: F401 - registers the quantizer
from finetune.inspection import inspect_adapter
from modeling_dsv4 import Dsv4ForCausalLM
from quantize.config import get_recipe
from quantize.convert import convert

PRIVATE = Path(__file__).parents[2] / "examples" / "data" / "private.jsonl"
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    private_tokenizer: Callable[..., Any],
    small_config: Callable[..., Any],
) -> Path:
    """A small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "plain"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dsv4ForCausalLM(small_config()).save_pretrained(folder)
    private_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "some.jsonl"
    lines = PRIVATE.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::6]), encoding="utf-8")
    return file


def _train(call: Call, model: Path, data: Path, output: Path, *more: object) -> tuple[dict, str]:
    options = ("--max-steps", 6, "--rank", 4, "--learning-rate", 1e-2, "--max-length", 128)
    words = ("--model", model, "--data", data, "--output", output, *options, *more)
    code, out, err = call("train", *words, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_hot_experts_train_beside_experts_on_disk(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    packed, adapter = tmp_path / "fp4", tmp_path / "adapter"
    convert(base, packed, get_recipe("fp4"))
    options = ("--preset", "hot-experts", "--hot-share", 0.6, "--expert-memory", "1MiB")
    result, err = _train(call, packed, data, adapter, *options)
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    assert "mass covered" in err
    values = inspect_adapter(adapter)
    hot = values["hot_experts"]
    assert values["preset"] == "hot-experts"
    assert hot["share"] == 0.6
    assert min(hot["mass"].values()) >= 0.6
    chosen = sum(len(ids) for ids in hot["ids"].values())
    assert chosen < 16
    assert result["trained_parameters"] == values["parameters"] == chosen * 2 * (64 * 3 + 32)
    # Plain experts, packed ones in memory and on disk, by PEFT's own loading.
    logits = []
    for model, more in ((packed, {"expert_memory": "64KiB"}), (packed, {"dequantize": True})):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)
        tuned = PeftModel.from_pretrained(loaded, adapter).eval()
        with torch.no_grad():
            logits.append(tuned(torch.arange(5, 60)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
    code, out, _ = call("inspect", adapter, "--json")
    assert code == 0
    assert json.loads(out) == values
    code, out, _ = call("inspect", adapter)
    assert "routed experts" in out
    assert "hot experts: 60% of token mass" in out


def test_the_indexer_is_trained_and_told_of(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    options = ("--preset", "attention", "--train-indexer", "--packing")
    _train(call, base, data, adapter, *options)
    history = json.loads((adapter / "result.json").read_text())["history"]
    found = [entry["indexer_kl"] for entry in history if "indexer_kl" in entry]
    assert found
    assert all(0 < kl < 5 for kl in found)
    groups = inspect_adapter(adapter)["groups"]
    assert groups["indexer"]["modules"] == 4
    assert inspect_adapter(adapter)["preset"] == "attention"
    code, out, _ = call("inspect", adapter)
    assert code == 0
    assert "indexer" in out


def test_whole_weights_train_and_are_saved_as_a_model(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    result, _ = _train(call, base, data, output, "--preset", "full", "--learning-rate", 1e-3)
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "model.layers.1.mlp.experts.gate_up_proj" in moved
    assert not [name for name in moved if "indexer" in name or "mlp.gate" in name]
    assert (output / "tokenizer.json").is_file()
    packed = tmp_path / "fp4"
    convert(base, packed, get_recipe("fp4"))
    words = ("--model", packed, "--data", data, "--output", tmp_path / "x", "--preset", "full")
    code, _, err = call("train", *words)
    assert code == 1
    assert "wanted plain weights" in err


def test_what_is_no_adapter_is_told(call: Call, tmp_path: Path) -> None:
    code, _, err = call("inspect", tmp_path)
    assert code == 1
    assert "give the directory of an adapter" in err
