# SPDX-License-Identifier: Apache-2.0
"""What a draft head keeps of the backbone's passes, and reads when it guesses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache

DSPARK = {
    "draft_kind": "dspark",
    "num_draft_layers": 2,
    "dspark_block_size": 4,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 3,
}
HEADS = {
    "mtp": ("v4", {"draft_kind": "mtp", "num_draft_layers": 1}),
    "v4": ("v4", {**DSPARK, "dspark_target_layer_ids": [1, 3]}),
    "v41": ("v41", {**DSPARK, "dspark_target_layer_ids": [3, 6]}),
}


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    kind, head = HEADS[request.param]
    return tiny(kind, torch.float64, **head)


def _ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(4, 64, (batch, length))


@torch.no_grad()
def _read(model: Any, ids: torch.Tensor, cache: Dsv4Cache, **more: Any) -> None:
    cache.drafts.begin(None if cache.state is None else cache.state.seen)
    model(ids, past_key_values=cache, **more)


def _guess(model: Any, token: torch.Tensor, cache: Dsv4Cache) -> torch.Tensor:
    def pick(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    return model.mtp.propose(model, token, 2, cache.state, cache.drafts, pick).logits


def test_what_was_not_kept_is_not_read(model: Any) -> None:
    ids, cache = _ids(14), Dsv4Cache(model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
    _read(model, ids[:, 9:], cache)
    assert cache.drafts.since.tolist() == [9]
    before = _guess(model, ids[:, 0], cache)
    for ring in cache.drafts.keys:
        # Slot = place of the token: five were kept.
        ring.data[:, :9], ring.data[:, 14:] = 7.0, 7.0
    assert torch.equal(_guess(model, ids[:, 0], cache), before)
    cache.drafts.since.zero_()
    assert not torch.equal(_guess(model, ids[:, 0], cache), before)


def test_a_prompt_that_leaves_tokens_out_keeps_the_head_s_window(model: Any) -> None:
    ids, caches = _ids(150), [Dsv4Cache(model.config, max_rewind=2) for _ in range(2)]
    _read(model, ids, caches[0])
    _read(model, ids, caches[1], logits_to_keep=1)
    full, short = (_guess(model, ids[:, 0], cache) for cache in caches)
    torch.testing.assert_close(short, full, atol=1e-9, rtol=0)


def test_rows_that_change_places_take_the_head_s_keys_along(model: Any) -> None:
    ids, cache = _ids(14, batch=3), Dsv4Cache(model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    _read(model, ids[:, 5:], cache)
    before, order = _guess(model, ids[:, 0], cache), torch.tensor([2, 0])
    cache.reorder_cache(order)
    after = _guess(model, ids[order, 0], cache)
    torch.testing.assert_close(after, before[order], atol=1e-12, rtol=0)


def test_a_document_s_guesses_do_not_see_the_one_before(model: Any) -> None:
    ids, alone = _ids(5), Dsv4Cache(model.config)
    _read(model, ids, alone)
    wanted = _guess(model, ids[:, 0], alone)
    packed = Dsv4Cache(model.config)
    positions = torch.cat((torch.arange(9), torch.arange(5)))[None]
    _read(model, torch.cat((_ids(9), ids), dim=1), packed, position_ids=positions)
    torch.testing.assert_close(_guess(model, ids[:, 0], packed), wanted, atol=1e-9, rtol=0)


def test_a_block_has_so_many_places(model: Any) -> None:
    if model.config.draft_kind == "mtp":
        return
    cache = Dsv4Cache(model.config)
    _read(model, _ids(6), cache)
    with pytest.raises(ValueError, match="at most a block of 4 tokens, got 5"):
        model.mtp.propose(model, _ids(1)[:, 0], 5, cache.state, cache.drafts, lambda _, x: x)
