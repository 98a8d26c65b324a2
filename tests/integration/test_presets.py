# SPDX-License-Identifier: Apache-2.0
"""Presets from files to files, through the program: hot experts, the indexer, whole weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import quantize  # noqa: F401 - registers the quantizer
from finetune.cli import app, run
from finetune.inspection import inspect_adapter
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from quantize.config import get_recipe
from quantize.convert import convert

PRIVATE = Path(__file__).parents[2] / "examples" / "data" / "private.jsonl"
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "plain"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [PRIVATE.read_text()],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    config = Dsv4Config(
        vocab_size=320,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_hash_layers=0,
        sliding_window=8,
        compress_ratios=[0, 4],
        index_n_heads=4,
        index_head_dim=16,
        index_topk=4,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        initializer_range=0.1,
        yarn=None,
        max_position_embeddings=512,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dsv4ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "some.jsonl"
    lines = PRIVATE.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::6]), encoding="utf-8")
    return file


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program in this process: exit code, standard output, standard error."""

    def invoke(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(lambda: app([str(word) for word in words]))
        out = capsys.readouterr()
        return code, out.out, out.err

    return invoke


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
