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


def test_beams_of_unequal_prompts_are_those_of_full_passes(model: Any) -> None:
    ids, mask = _ids(18, batch=2), torch.ones(2, 18, dtype=torch.long)
    mask[1, :7] = 0
    texts = [
        _greedy(model, ids, attention_mask=mask, num_beams=3, max_new_tokens=8, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


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


def test_drafts_behind_a_padded_prompt_change_no_token(
    model: Any, tiny: Callable[..., Any]
) -> None:
    ids = _ids(9).repeat(1, 4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8}
    expected = _greedy(model, ids, **settings)
    helper = tiny("v41" if model.config.engram_layer_ids else "v4", torch.float64)
    with torch.no_grad():
        helper.lm_head.weight += 0.3 * torch.randn_like(helper.lm_head.weight)
    for draft in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": helper}):
        assert torch.equal(_greedy(model, ids, **settings, **draft), expected)


def test_drafts_longer_than_the_default_rewind_change_no_token(model: Any) -> None:
    # A text that repeats itself, which the model does not: nearly all of 90 tokens are taken back.
    ids = _ids(100).repeat(1, 2)
    expected = _greedy(model, ids, max_new_tokens=3)
    more = {"max_new_tokens": 95, "eos_token_id": int(expected[0, -1])}
    found = _greedy(model, ids, prompt_lookup_num_tokens=90, **more)
    assert found.shape[1] <= 3 and torch.equal(found, expected[:, : found.shape[1]])


def test_one_prompt_is_read_once_for_several_questions(model: Any) -> None:
    prompt, cache = _ids(23), Dsv4Cache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(4)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    ids = torch.cat((prompt.expand(3, -1), _ids(4, batch=3)), 1)
    found = _greedy(model, ids, past_key_values=cache, max_new_tokens=8)
    for row in range(3):
        alone = _greedy(model, ids[row : row + 1], max_new_tokens=8)
        assert torch.equal(found[row : row + 1], alone)


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


def test_beam_samples_are_those_of_full_passes(model: Any) -> None:
    ids, texts = _ids(18, batch=2), []
    for cached in (True, True, False):
        torch.manual_seed(3)
        more = {"num_beams": 3, "do_sample": True, "num_return_sequences": 3, "use_cache": cached}
        texts.append(_greedy(model, ids, temperature=1.5, **more))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert texts[0].shape == (6, NEW) and not torch.equal(texts[0][0], texts[0][1])


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_the_inside_of_every_step_is_returned(model: Any, more: dict[str, Any]) -> None:
    ids, asked = _ids(12), ("scores", "logits", "hidden_states", "attentions")
    plain = {"max_new_tokens": 3, "do_sample": False, **more}
    out = model.generate(
        ids, return_dict_in_generate=True, **plain, **{f"output_{name}": True for name in asked}
    )
    assert torch.equal(out.sequences, model.generate(ids, **plain))
    layers, rows = model.config.num_hidden_layers, more.get("num_beams", 1)
    window = model.config.sliding_window
    assert all(len(out[name]) == 3 for name in asked)
    for step, (states, maps) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        fed = 1 if step else 12
        assert len(states) == layers + 1 and len(maps) == layers
        assert states[0].shape == (rows, fed, 4, 32)
        # The first layer has a window alone.
        assert maps[0].shape == (rows, 4, fed, window if step else 12)
        assert bool((maps[0].sum(-1) < 1).all())
    # What `generate` has no keyword for is asked of the configuration.
    model.config.output_router_logits = True
    try:
        with torch.no_grad():
            assert len(model(ids).router_logits) == layers
        assert torch.equal(model.generate(ids, **plain), out.sequences)
    finally:
        model.config.output_router_logits = False


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_embeddings_with_ids_write_what_the_ids_write(model: Any, more: dict[str, Any]) -> None:
    ids = _ids(15, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    embeds = model.get_input_embeddings()(ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **more}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **settings), expected)
    # The first pass reads the embeddings, not the ids beside them.
    other = model.generate(ids, inputs_embeds=embeds.flip(0), **settings)
    assert not torch.equal(other[:, 15:], expected[:, 15:])


def test_embeddings_alone_are_enough_where_ids_are_not_looked_up(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("v4", torch.float64, num_hash_layers=0), _ids(15, batch=2)
    embeds = model.get_input_embeddings()(ids)
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 2, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected[:, 15:])
    # Ids of another length are no one's prompt.
    with pytest.raises(ValueError, match="one id per embedding, or embeddings alone, got 2 ids"):
        model.generate(ids[:, :2], inputs_embeds=embeds, **settings)


def test_embeddings_alone_are_refused_where_ids_are_looked_up(model: Any) -> None:
    ids = _ids(15)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="wanted `input_ids` beside `inputs_embeds`, got none"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_image_spans_come_as_embeddings_with_their_types(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("v41", torch.float64), _ids(20, batch=2)
    types = torch.full_like(ids, -1)
    types[:, 5:9] = 0
    settings = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 2, "token_types": types}
    expected = _greedy(model, ids, **settings)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(_greedy(model, ids, inputs_embeds=embeds, **settings), expected)
    plain = tiny("v41", torch.float64, engram_layer_ids=[])
    expected = _greedy(plain, ids, **settings)
    embeds = plain.get_input_embeddings()(ids)
    found = plain.generate(inputs_embeds=embeds, do_sample=False, **settings)
    assert torch.equal(found, expected)


def test_both_names_of_attention_write_the_same(model: Any) -> None:
    ids = _ids(18, batch=2)
    fused = _greedy(model, ids)
    try:
        model.set_attn_implementation("eager")
        assert torch.equal(_greedy(model, ids), fused)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_typing_error_among_the_settings_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokes"):
        model.generate(_ids(5), max_new_tokes=3)


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
