# SPDX-License-Identifier: Apache-2.0
"""Inputs longer than one chunk pass the layers piece by piece: the result is the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_dsv4 import Dsv4Cache, Dsv4ForCausalLM, modeling_dsv4


@pytest.fixture(params=("v4_b_bf16_mtp", "v41_c_bf16"))
def model(request: pytest.FixtureRequest, golden_dir: Path) -> Dsv4ForCausalLM:
    folder = golden_dir / request.param
    found = Dsv4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = load_file(folder / "inputs.safetensors")
    if "compressed_token_map" in inputs:
        found.set_engram_token_map(inputs["compressed_token_map"])
    return found


def _inputs(case: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 100, (2, 190))
    if case == "plain":
        return {"input_ids": ids}
    if case == "padded":
        mask = torch.ones_like(ids)
        mask[0, :77], mask[1, 120:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}
    # A document begins where a chunk begins (column 64), and others inside chunks.
    lengths = (64, 70, 56)
    if case == "packed positions":
        places = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
        return {"input_ids": ids, "position_ids": places}
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    if case == "packed numbers":
        return {"input_ids": ids, "seq_idx": numbers}
    # Numbers alone say where documents begin; the positions run on.
    return {"input_ids": ids, "seq_idx": numbers, "position_ids": torch.arange(190)[None]}


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["plain", "padded", "packed positions", "packed numbers", "running positions"]
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_chunks_give_what_one_pass_gives(
    model: Dsv4ForCausalLM, monkeypatch: pytest.MonkeyPatch, case: str, use_cache: bool
) -> None:
    inputs = _inputs(case)
    whole = model(**inputs, use_cache=False).logits
    passes = _count_passes(model, monkeypatch)
    monkeypatch.setattr(modeling_dsv4, "_CHUNK_TOKENS", 2 * 64)
    out = model(**inputs, use_cache=use_cache)
    assert passes() == 3
    real = inputs.get("attention_mask", torch.ones(2, 190)).bool()
    torch.testing.assert_close(out.logits[real], whole[real], atol=2e-4, rtol=0)
    assert isinstance(out.past_key_values, Dsv4Cache) == use_cache
    if use_cache:
        assert out.past_key_values.get_seq_length() == 190


def _count_passes(
    model: Dsv4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    calls = []
    one = model.model._pass
    monkeypatch.setattr(model.model, "_pass", lambda *a, **k: (calls.append(1), one(*a, **k))[1])
    return lambda: len(calls)


@torch.no_grad()
def test_chunks_keep_their_cache_in_training_mode_with_checkpointing(
    model: Dsv4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _inputs("plain")["input_ids"]
    whole = model(ids, use_cache=False).logits
    model.gradient_checkpointing_enable()
    model.train()
    monkeypatch.setattr(modeling_dsv4, "_CHUNK_TOKENS", 2 * 64)
    torch.testing.assert_close(model(ids).logits, whole, atol=2e-4, rtol=0)


def test_gradients_and_hidden_states_take_one_pass(
    model: Dsv4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_dsv4, "_CHUNK_TOKENS", 32)
    ids = _inputs("plain")["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    with torch.no_grad():
        streams = model(ids, output_hidden_states=True).hidden_states
    assert streams[0].shape[:2] == ids.shape
