# SPDX-License-Identifier: Apache-2.0
"""Memory adapters from files to files: tables on disk stay as they are, and are read beside it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.config import RunConfig
from finetune.loading import load_model, load_tokenizer
from finetune.memory_attach import find_touched
from finetune.memory_inspect import describe_memory
from finetune.trainer import train
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.engram_hash import build_token_map
from quantize.config import get_recipe
from quantize.convert import convert
from quantize.stored_table import StoredTable

PRIVATE = Path(__file__).parents[2] / "examples" / "data" / "private.jsonl"
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
# A few dozen rows: most are read again and again.
SMALL = "8KB"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, private_tokenizer: Callable[..., Any]) -> Path:
    """A V4.1 model in FP4, its Engram tables in files of their own."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), private_tokenizer(400)
    token_map = build_token_map(tokenizer, 400)
    config = Dsv4Config(
        vocab_size=400,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        compress_ratios=[0, 2, 1],
        compressor_overlap_ratio=None,
        compressor_position_bias=False,
        kv_source_layer_ids=[1, 2],
        index_source_layer_ids=[1, 2],
        index_key="latent",
        index_hadamard=False,
        num_hash_layers=0,
        q_head_norm=False,
        hc_single_pass=True,
        router_weight_eps=1e-20,
        engram_layer_ids=[0, 2],
        engram_vocab_size=8000,
        engram_n_heads=2,
        engram_head_dim=32,
        engram_compressed_vocab_size=int(token_map.max()) + 1,
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
        model = Dsv4ForCausalLM(config)
    model.set_engram_token_map(token_map)
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    return convert(folder / "plain", folder / "fp4", get_recipe("fp4"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some of the shipped pairs, and ordinary text."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [line for line in PRIVATE.read_text().splitlines() if line.startswith('{"prompt"')]
    (folder / "some.jsonl").write_text("\n".join(pairs[:16]) + "\n")
    (folder / "ordinary.txt").write_text("the days of the year, and the office of the first. " * 9)
    return {"data": folder / "some.jsonl", "background": folder / "ordinary.txt"}


def _digests(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def _load(base: Path, **more: Any) -> torch.nn.Module:
    return load_model(base, dtype="float32", **more).eval()


def _decode(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of 10 tokens, then of steps on its cache."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :10], use_cache=True)
        parts = [out.logits]
        for at in range(10, ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    return torch.cat(parts, 1)


def test_memory_is_written_beside_tables_on_disk(
    call: Call,
    base: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, output = _digests(base), tmp_path / "adapter"
    assert len([name for name in before if name.startswith("engram-")]) == 2
    words = ("--preset", "memory", "--rank", 4, "--memory-rows", 600, "--max-steps", 12)
    words += ("--memory-background", files["background"], "--learning-rate", 1e-2)
    words += ("--model", base, "--data", files["data"], "--output", output)
    words += ("--engram-memory", SMALL, "--json", "--quiet")
    code, out, err = call("train", *words)
    assert code == 0, err
    result = json.loads((output / "result.json").read_text())
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert json.loads(out)["trained_tensors"] == 6
    assert _digests(base) == before

    tokenizer = load_tokenizer(base)
    told = describe_memory(output, tokenizer)
    code, out, err = call("inspect", output, "--json")
    assert code == 0, err
    assert json.loads(out)["preset"] == "memory"
    assert json.loads(out)["memory"] == told
    assert repr(told["ngrams"][0]["text"]) in call("inspect", output)[1]
    assert [layer["layer"] for layer in told["layers"]] == [0, 2]
    assert all(0.9 < layer["written"] / layer["rows"] <= 1 for layer in told["layers"])
    pairs = [json.loads(line) for line in files["data"].read_text().splitlines()]
    data = "\0".join(pair["prompt"] + pair["completion"] for pair in pairs)
    assert all(gram["text"] in data for gram in told["ngrams"])
    assert all(gram["in_background"] < gram["in_corpus"] for gram in told["ngrams"])
    # Other letters, so that no n-gram is written.
    ids = torch.tensor([tokenizer("見覚言謝谷豊赤起足身車辛")["input_ids"]])
    own = torch.tensor([tokenizer(pairs[0]["completion"])["input_ids"]])
    tuned = PeftModel.from_pretrained(_load(base, engram_memory=SMALL), output)
    resident = PeftModel.from_pretrained(_load(base), output)
    plain = _decode(_load(base), ids)
    store = next(m.store for m in tuned.modules() if isinstance(m, StoredTable))
    assert store is not None
    announced, begin = [], store.announce
    monkeypatch.setattr(store, "announce", lambda t, rows: (announced.append(t), begin(t, rows)))
    assert not find_touched(tuned, ids).any()
    assert torch.equal(_decode(tuned, ids), plain)
    # Both tables, before the first layer of every pass, as without an adapter.
    assert announced == [0, 1] * (ids.shape[1] - 9)
    assert torch.equal(_decode(resident, ids), plain)
    assert find_touched(tuned, own).any()
    changed = _decode(tuned, own)
    assert not torch.equal(changed, _decode(_load(base), own))
    assert torch.equal(changed, _decode(resident, own))
    tuned.delete_adapter("default")
    assert torch.equal(_decode(tuned.base_model.model, own), _decode(_load(base), own))
    assert _digests(base) == before


def test_memory_is_not_merged(
    call: Call, base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    settings = RunConfig(
        model=str(base),
        data=str(files["data"]),
        output=str(tmp_path / "adapter"),
        preset="memory",
        rank=2,
        memory_rows=64,
        max_steps=1,
    )
    train(settings)
    words = ("--model", base, "--adapter", settings.output, "--output", tmp_path / "merged")
    code, _, err = call("merge", *words)
    assert code == 1
    assert "dropping them takes the edit back" in " ".join(err.split())
    assert not (tmp_path / "merged").exists()


def test_a_memory_run_goes_on_where_its_last_checkpoint_stood(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def settings(name: str) -> RunConfig:
        return RunConfig(
            model=str(base),
            data=str(files["data"]),
            output=str(tmp_path / name),
            preset="memory",
            rank=2,
            memory_rows=200,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
        )

    whole = train(settings("whole"))
    train(settings("cut"))
    for path in (tmp_path / "cut").iterdir():
        if path.name.startswith(("adapter", "result", "README")):
            path.unlink()
    last = tmp_path / "cut" / "checkpoint-4"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = train(settings("cut"), resume=True)
    assert again.held_out_loss_after == whole.held_out_loss_after
    rates = [e["learning_rate"] for e in again.history if "learning_rate" in e]
    assert rates == [e["learning_rate"] for e in whole.history if "learning_rate" in e]
