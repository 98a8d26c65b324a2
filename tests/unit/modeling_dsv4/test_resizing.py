# SPDX-License-Identifier: Apache-2.0
"""A vocabulary of another size: what follows, what is refused, and that nothing is half done."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.checkpoint import save_official

Make = Callable[..., Any]
MARKOV = {
    "draft_kind": "dspark",
    "num_draft_layers": 2,
    "dspark_block_size": 2,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [0],
}


def _assert_same_weights(one: Dsv4ForCausalLM, other: Dsv4ForCausalLM) -> None:
    wanted = other.state_dict()
    assert one.state_dict().keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in one.state_dict().items())


def _ids(model: Any, length: int = 20) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, length))


@torch.no_grad()
def test_more_ids_leave_the_old_ones_as_they_were(tiny: Make, tmp_path: Path) -> None:
    model = tiny("v4", num_hash_layers=0, compress_ratios=[0, 4, 128, 4], **MARKOV)
    ids, mtp = _ids(model), model.mtp[1].markov_head
    before, old = model(ids).logits, mtp.embed.weight.clone()
    table = model.resize_token_embeddings(70, mean_resizing=False)
    assert table is model.model.embed_tokens and table.weight.shape == (70, 32)
    assert torch.equal(model(ids).logits[..., :64], before)
    assert model(torch.full((1, 3), 69)).logits.shape == (1, 3, 70)
    assert torch.equal(mtp.embed.weight[:64], old) and mtp.head.weight.shape == (70, 4)
    assert mtp.embed.num_embeddings == mtp.head.out_features == model.config.vocab_size == 70
    model.save_pretrained(tmp_path / "own")
    again = Dsv4ForCausalLM.from_pretrained(tmp_path / "own").eval()
    save_official(model, tmp_path / "official")
    release = Dsv4ForCausalLM.from_pretrained(tmp_path / "official", dtype=torch.float32).eval()
    _assert_same_weights(again, model)
    # Loaded weights lie at other addresses, on which some processors' last bit depends.
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.mtp[1].markov_head.head.weight, mtp.head.weight)
    # The release's layout rounds to bfloat16.
    assert release.config.vocab_size == 70
    rounded = mtp.head.weight.to(torch.bfloat16).float()
    assert torch.equal(release.mtp[1].markov_head.head.weight, rounded)


@torch.no_grad()
def test_fewer_ids_drop_the_rows_of_every_table(tiny: Make, tmp_path: Path) -> None:
    for kind, size in (("v4", 40), ("v41", 50)):
        model = tiny(kind)
        ids = _ids(model).clamp(max=size - 1)
        before = model(ids).logits
        model.resize_token_embeddings(size)
        assert torch.equal(model(ids).logits, before[..., :size])
        model.save_pretrained(tmp_path / kind)
        again = Dsv4ForCausalLM.from_pretrained(tmp_path / kind).eval()
        _assert_same_weights(again, model)
        torch.testing.assert_close(again(ids).logits, before[..., :size], rtol=1e-5, atol=1e-5)


def test_a_size_is_rounded_up_to_a_multiple(tiny: Make) -> None:
    model = tiny("window")
    assert model.resize_token_embeddings(65, pad_to_multiple_of=16).weight.shape[0] == 80
    assert model.resize_token_embeddings(pad_to_multiple_of=32).weight.shape[0] == 96
    assert model.resize_token_embeddings().weight.shape[0] == 96 == model.config.vocab_size


@pytest.mark.parametrize(
    ("kind", "size", "complaint"),
    [
        ("v4", 65, "at most the 64 ids .* got 65: it has experts chosen by token id"),
        ("v41", 65, "at most the 64 ids .* got 65: it has memory looked up by token id"),
        ("v41", 47, "names all 48 compressed ids, its first 47 ids name 47"),
        ("v4", 1, r"room for the special ids \{'eos_token_id': 1\}, got 1"),
        ("v41", 2, r"'engram_pad_token_id': 2"),
    ],
)
def test_what_cannot_follow_is_refused_and_nothing_changes(
    tiny: Make, kind: str, size: int, complaint: str
) -> None:
    model = tiny(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=complaint):
        model.resize_token_embeddings(size)
    state = model.state_dict()
    assert model.config.vocab_size == 64 and all(torch.equal(state[n], before[n]) for n in before)


def test_offloaded_embeddings_are_refused(tiny: Make) -> None:
    model = tiny("window")
    model.model.embed_tokens.to("meta")
    with pytest.raises(ValueError, match="wanted plain embeddings in memory, got Embedding"):
        model.resize_token_embeddings(70)
