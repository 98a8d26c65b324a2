# SPDX-License-Identifier: Apache-2.0
"""`generate`: the cache never changes a word, and batches write what each prompt alone writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from modeling_dsv4 import Dsv4Cache

KINDS = ["v4", "v41"]
NEW = 20


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    found = tiny(request.param, torch.float64)
    found.generation_config.pad_token_id = 2
    found.generation_config.eos_token_id = None
    return found


def _ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _greedy(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False} | more
    return model.generate(ids, **settings)[:, ids.shape[1] :]


@torch.no_grad()
def _by_hand(model: Any, ids: torch.Tensor, count: int = NEW) -> torch.Tensor:
    """Greedy decoding without a cache: every token from one pass over all before it."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, -count:]


def test_greedy_text_is_that_of_full_passes(model: Any) -> None:
    for length in (1, 7, 30):
        ids = _ids(length, batch=2)
        expected = _by_hand(model, ids)
        assert torch.equal(_greedy(model, ids), expected)
        assert torch.equal(_greedy(model, ids, use_cache=False), expected)
        assert expected.unique().numel() > 3


@pytest.mark.parametrize("pad", [2, 57])
def test_prompts_of_unequal_length_write_what_each_alone_writes(model: Any, pad: int) -> None:
    prompts = [_ids(n) for n in (33, 14, 3)]
    ids, mask = torch.full((3, 33), pad), torch.zeros(3, 33, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 33 - prompt.shape[1] :], mask[row, 33 - prompt.shape[1] :] = prompt[0], 1
    found = _greedy(model, ids, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(found[row : row + 1], _greedy(model, prompt))


def test_a_row_that_ended_does_not_disturb_the_others(model: Any) -> None:
    ids = _ids(20, batch=3)
    free = _greedy(model, ids)
    stop = int(free[1, 4])
    ended = _greedy(model, ids, eos_token_id=stop)
    for row in range(3):
        hits = (free[row] == stop).nonzero()
        length = int(hits[0]) + 1 if len(hits) else ended.shape[1]
        assert torch.equal(ended[row, :length], free[row, :length])
        assert bool((ended[row, length:] == 2).all())


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_those_of_full_passes(model: Any, beams: int) -> None:
    ids = _ids(18, batch=2)
    texts = [
        _greedy(model, ids, num_beams=beams, num_return_sequences=2, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    # Beams cross: rows of the cache were reordered on the way, or this would test nothing.
    assert not torch.equal(texts[0][::2], _greedy(model, ids))


def test_a_seed_gives_the_same_text_twice_with_and_without_a_cache(model: Any) -> None:
    ids, texts = _ids(18, batch=2), []
    for cached in (True, True, False):
        torch.manual_seed(5)
        texts.append(
            _greedy(
                model,
                ids,
                do_sample=True,
                temperature=1.5,
                top_p=0.95,
                num_return_sequences=2,
                use_cache=cached,
            )
        )
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert len({tuple(row) for row in texts[0].tolist()}) == 4


@pytest.mark.parametrize("count", [1, 3, 10])
def test_looked_up_drafts_change_no_token(model: Any, count: int) -> None:
    # A prompt that repeats itself: drafts are proposed, some are taken back.
    ids = _ids(9).repeat(1, 4)
    calls: list[int] = []
    crop = Dsv4Cache.crop

    def counted(self: Dsv4Cache, tokens: int) -> None:
        calls.append(tokens)
        crop(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dsv4Cache, "crop", counted)
        found = _greedy(model, ids, prompt_lookup_num_tokens=count)
    assert torch.equal(found, _greedy(model, ids))
    assert any(tokens < 0 for tokens in calls)


def test_a_draft_model_changes_no_token(model: Any, tiny: Callable[..., Any]) -> None:
    # Its weights differ a little: some of its words are taken, some are not.
    kind = "v41" if model.config.engram_layer_ids else "v4"
    helper = tiny(kind, torch.float64)
    with torch.no_grad():
        helper.lm_head.weight += 0.3 * torch.randn_like(helper.lm_head.weight)
    helper.generation_config.eos_token_id = None
    ids = _ids(20)
    assert torch.equal(_greedy(model, ids, assistant_model=helper), _greedy(model, ids))


def test_a_cache_is_handed_in_and_carries_on(model: Any) -> None:
    first, cache = _ids(20), Dsv4Cache(model.config)
    said = model.generate(first, past_key_values=cache, max_new_tokens=6, do_sample=False)
    # The last word said has not been fed yet.
    assert cache.get_seq_length() == 25
    both = torch.cat((said, _ids(9)), dim=1)
    found = _greedy(model, both, past_key_values=cache)
    assert torch.equal(found, _by_hand(model, both))


def test_scores_and_other_outputs_are_returned(model: Any) -> None:
    ids = _ids(12)
    out = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert isinstance(out.past_key_values, Dsv4Cache) and len(out.logits) == 4
    with torch.no_grad():
        full = model(out.sequences[:, :-1], use_cache=False).logits[0, -4:]
    torch.testing.assert_close(torch.cat(out.logits).double(), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_changes_no_token(model: Any, beams: int) -> None:
    ids, mask = _ids(18, batch=2), torch.ones(2, 18, dtype=torch.long)
    mask[1, :7] = 0
    out = _greedy(model, ids, attention_mask=mask, num_beams=beams)
    caches: list[Dsv4Cache] = []
    init = Dsv4Cache.__init__

    def seen(self: Dsv4Cache, *args: Any, **kwargs: Any) -> None:
        caches.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dsv4Cache, "__init__", seen)
        static = {"attention_mask": mask, "num_beams": beams, "cache_implementation": "static"}
        found = _greedy(model, ids, **static)
        longer = _greedy(model, ids, max_cache_len=90, **static)
    assert torch.equal(found, out) and torch.equal(longer, out)
    # The last word is never fed.
    assert [cache.max_length for cache in caches] == [18 + NEW - 1, 90]


def test_repetition_penalties_and_stops_work_as_elsewhere(model: Any) -> None:
    text = _greedy(model, _ids(12), no_repeat_ngram_size=1)
    assert text.unique().numel() == text.numel()


def test_caches_of_other_kinds_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="this model has its own cache"):
        _greedy(model, _ids(5), cache_implementation="offloaded")
    cache = Dsv4Cache(model.config)
    with pytest.raises(ValueError, match="pass one of the two"):
        _greedy(model, _ids(5), cache_implementation="static", past_key_values=cache)
    with pytest.raises(ValueError, match="wanted a Dsv4Cache, got DynamicCache"):
        _greedy(model, _ids(5), past_key_values=DynamicCache())


def test_what_is_written_behind_an_image_is_text(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("v41", torch.float64), _ids(20, batch=2)
    types = torch.full_like(ids, -1)
    types[0, 5:9], types[1, 17:] = 0, 1
    expected, text = ids, types
    with torch.no_grad():
        for _ in range(6):
            out = model(expected, token_types=text, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat((expected, out), 1)
            text = torch.cat((text, torch.full_like(out, -1)), 1)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    assert torch.equal(_greedy(model, ids, token_types=types, **settings), expected[:, 20:])
    beams = [
        _greedy(model, ids, token_types=types, num_beams=3, use_cache=cached, **settings)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    one = {"token_types": types[:1], "prompt_lookup_num_tokens": 2, **settings}
    assert torch.equal(_greedy(model, ids[:1], **one), expected[:1, 20:])
    assert not torch.equal(_greedy(model, ids, **settings), expected[:, 20:])
