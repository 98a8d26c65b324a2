# SPDX-License-Identifier: Apache-2.0
"""Losses of draft heads: what they compare, whom they teach, and that training drafts what decoding
will."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache
from modeling_dsv4.draft_training import draft_loss

Make = Callable[..., Any]
DSPARK = {
    "draft_kind": "dspark",
    "num_draft_layers": 2,
    "dspark_block_size": 4,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [1, 3],
}
HEADS = {
    "mtp": ("v4", {"draft_kind": "mtp", "num_draft_layers": 1}),
    "v4": ("v4", DSPARK),
    "v41": ("v41", DSPARK | {"dspark_target_layer_ids": [3, 6]}),
}


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, tiny: Make) -> Any:
    kind, head = HEADS[request.param]
    return tiny(kind, torch.float64, **head)


def _by_decoding(model: Any, ids: torch.Tensor, anchors: list[int], places: int) -> torch.Tensor:
    """Cross entropies [anchors, places] of what `propose` guesses behind the text itself."""
    found = []
    with torch.no_grad():
        target = model(ids, use_cache=False).logits[0].softmax(-1)
        for at in anchors:
            cache = Dsv4Cache(model.config)
            cache.drafts.begin(None)
            model(ids[:, :at], past_key_values=cache)

            def pick(tokens: torch.Tensor, _: torch.Tensor, at: int = at) -> torch.Tensor:
                return ids[:, (at + tokens.shape[1] + 1) % ids.shape[1]]

            draft = model.mtp.propose(model, ids[:, at], places, cache.state, cache.drafts, pick)
            q = draft.logits[0].log_softmax(-1)
            found.append(-(target[at : at + places] * q).sum(-1))
    return torch.stack(found)


def test_the_loss_is_that_of_what_decoding_will_guess(model: Any) -> None:
    ids, anchors = torch.randint(4, 64, (1, 30)), [1, 5, 9, 26]
    if model.config.draft_kind == "mtp":
        wanted = _by_decoding(model, ids, list(range(1, 30)), 1).mean()
    else:
        weights = 0.5 ** torch.arange(4)
        entropies = _by_decoding(model, ids, anchors, 4).mean(0)
        wanted = (entropies * weights).sum() / weights.sum()
    found = draft_loss(model, ids, torch.tensor(anchors), decay=0.5)
    torch.testing.assert_close(found.tokens.double(), wanted.double(), atol=1e-6, rtol=0)


def test_the_head_learns_and_the_backbone_does_not(model: Any) -> None:
    ids, anchors = torch.randint(4, 64, (2, 30)), torch.tensor([2, 12, 20])
    found = draft_loss(model, ids, anchors)
    (found.tokens + found.confidence).backward()
    for name, p in model.named_parameters():
        lends = name in ("model.embed_tokens.weight", "lm_head.weight")
        unused = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if name.startswith("mtp."):
            assert unused or p.grad is not None, name
        else:
            assert lends or p.grad is None, name


def test_the_confidence_is_taught_by_itself_alone(tiny: Make) -> None:
    kind, head = HEADS["v41"]
    model = tiny(kind, torch.float64, **head)
    found = draft_loss(model, torch.randint(4, 64, (2, 30)), torch.tensor([2, 12]))
    found.confidence.backward()
    taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught == {"mtp.1.confidence_head.proj.weight"}
    assert found.agreed.shape == found.sure.shape == (4,)


@pytest.mark.parametrize("anchors", [[], [0], [27]])
def test_blocks_outside_of_the_text_are_refused(tiny: Make, anchors: list[int]) -> None:
    kind, head = HEADS["v4"]
    with pytest.raises(ValueError, match="wanted columns 1 to 26 of a text of 30"):
        draft_loss(tiny(kind, **head), torch.full((1, 30), 5), torch.tensor(anchors))


def test_a_model_without_a_head_has_nothing_to_learn(tiny: Make) -> None:
    with pytest.raises(ValueError, match="draft_kind mtp or dspark, got None"):
        draft_loss(tiny("v4"), torch.full((1, 30), 5), torch.tensor([3]))
