# SPDX-License-Identifier: Apache-2.0
"""The cache: rings that wrap, rows that grow, and everything that moves or takes back tokens."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache
from modeling_dsv4.cache_stores import Ring, Rows
from modeling_dsv4.segments import RowState, find_segments

EXACT = {"atol": 1e-10, "rtol": 0}
KINDS = ["v4", "v41"]
W = 8  # the window of the tiny models


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(request.param, torch.float64)


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


@torch.no_grad()
def _feed(model: Any, ids: torch.Tensor, cache: Any = None, sizes: Any = None) -> Any:
    for part in ids.split(sizes or ids.shape[1], dim=1):
        cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    return cache


@torch.no_grad()
def _next(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


# --- stores -------------------------------------------------------------------------------------


def _state(seen: list[int]) -> RowState:
    state = RowState.empty(len(seen), torch.device("cpu"))
    state.seen = torch.tensor(seen)
    return state


@pytest.mark.parametrize("first", [1, 7, 8, 9, 20])
def test_a_ring_holds_the_last_tokens_at_their_slots(first: int) -> None:
    ring, x = Ring(8), torch.arange(1.0, 41).view(1, 40, 1)
    ring.write(x[:, :first], find_segments((1, first), _state([0])))
    for token in range(max(first - 8, 0), first):
        assert ring.data[0, token % 8, 0] == token + 1
    ring.write(x[:, first : first + 3], find_segments((1, 3), _state([first])))
    length = min(8, first + 3)
    tail = ring.tail(torch.tensor([first + 3]), length, x)
    assert torch.equal(tail, x[:, first + 3 - length : first + 3])


def test_rows_of_a_ring_stand_at_their_own_places() -> None:
    ring, x = Ring(4), torch.arange(12.0).view(2, 6, 1)
    mask = torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 1]])
    segments = find_segments((2, 6), _state([0, 0]), attention_mask=mask)
    ring.write(segments.pick(x), segments)
    tail = ring.tail(torch.tensor([6, 2]), 2, x)
    assert tail[..., 0].tolist() == [[4, 5], [10, 11]]


def test_rows_grow_and_keep_what_they_hold() -> None:
    rows, found = Rows(), []
    before = None
    for m in (1, 0, 3, 40, 2):
        new = torch.randn(2, m, 3)
        count = torch.tensor([m, max(m - 1, 0)])
        out = rows.extend(new, before, count)
        found.append((new, count))
        before = count if before is None else before + count
    for b in range(2):
        expected = torch.cat([new[b, : int(count[b])] for new, count in found])
        assert torch.equal(out[b, : expected.shape[0]], expected)


@pytest.mark.parametrize("capacity", [None, 4])
def test_rows_pass_gradients_of_what_is_new(capacity: int | None) -> None:
    rows = Rows(capacity)
    rows.extend(torch.randn(1, 2, 3), None, torch.tensor([2]))
    new = torch.randn(1, 2, 3, requires_grad=True)
    out = rows.extend(new, torch.tensor([2]), torch.tensor([2]))
    out[:, 2:].sum().backward()
    assert torch.equal(new.grad, torch.ones(1, 2, 3)) and not rows.data.requires_grad


# --- taking back --------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [1, 2, 3, 4, 9, 30, 64])
def test_cropping_equals_never_having_been_there(model: Any, back: int) -> None:
    ids, other = _ids(2, 90), _ids(2, 6)
    cache = _feed(model, ids, sizes=[70, 1, 1, 18])
    cache.crop(-back)
    fresh = _feed(model, ids[:, : 90 - back])
    assert cache.get_seq_length() == 90 - back
    torch.testing.assert_close(_next(model, other, cache), _next(model, other, fresh), **EXACT)


@torch.no_grad()
def test_cropping_crosses_every_border_of_windows_and_rings(model: Any) -> None:
    # Ratios are 1, 2, 4 and 8, the window is 8; rings of 71 tokens and less have wrapped.
    ids = _ids(1, 88)
    full, prefix = model(ids).logits, _feed(model, ids[:, :85])
    for back in range(1, 18):
        cache = copy.deepcopy(prefix)
        _next(model, _ids(1, back), cache)
        cache.crop(-back)
        found = _next(model, ids[:, 85:88], cache)
        torch.testing.assert_close(found, full[:, 85:88], **EXACT)


@torch.no_grad()
def test_cropping_twice_reaches_no_further_than_cropping_once(model: Any) -> None:
    ids, other = _ids(2, 200), _ids(2, 30)
    cache = _feed(model, ids)
    cache.crop(-40)
    cache.crop(-24)
    with pytest.raises(ValueError, match="take back 1 tokens, this cache can take back 0"):
        cache.crop(-1)
    # What is read from here on can be taken back again, and no more.
    _next(model, other, cache)
    with pytest.raises(ValueError, match="take back 31 tokens, this cache can take back 30"):
        cache.crop(-31)
    cache.crop(-30)
    expected = _next(model, other, _feed(model, ids[:, :136]))
    torch.testing.assert_close(_next(model, other, cache), expected, **EXACT)


def test_cropping_again_and_again_keeps_the_rest(model: Any) -> None:
    ids, cache, length = _ids(1, 40), None, 0
    kept: list[int] = []
    for grow, back in ((20, 3), (5, 5), (1, 1), (9, 2), (2, 0), (7, 13)):
        new = _ids(1, grow)
        cache = _feed(model, new, cache)
        kept += new[0].tolist()
        if back:
            cache.crop(len(kept) - back)
            kept = kept[: len(kept) - back]
        length = len(kept)
    assert cache.get_seq_length() == length
    fresh = _feed(model, torch.tensor([kept]))
    torch.testing.assert_close(_next(model, ids, cache), _next(model, ids, fresh), **EXACT)


def test_cropping_too_much_is_refused_and_changes_nothing(model: Any) -> None:
    ids, other = _ids(1, 90), _ids(1, 5)
    cache = _feed(model, ids)
    with pytest.raises(ValueError, match=r"wanted to take back 65 tokens, this cache can .* 64"):
        cache.crop(-65)
    expected = _next(model, other, _feed(model, ids))
    torch.testing.assert_close(_next(model, other, cache), expected, **EXACT)
    with pytest.raises(ValueError, match="take back"):
        cache.crop(1)


def test_a_cache_says_how_far_it_can_be_rewound(model: Any) -> None:
    ids, other = _ids(1, 200), _ids(1, 5)
    cache = _feed(model, ids, Dsv4Cache(model.config, max_rewind=130))
    cache.crop(70)
    expected = _next(model, other, _feed(model, ids[:, :70]))
    torch.testing.assert_close(_next(model, other, cache), expected, **EXACT)
    with pytest.raises(ValueError, match="take back 1 tokens, this cache can take back 0"):
        _feed(model, ids, Dsv4Cache(model.config, max_rewind=0)).crop(-1)


@torch.no_grad()
def test_cropping_stops_at_pads(model: Any) -> None:
    ids, mask = _ids(2, 9), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    cache, other = model(ids, attention_mask=mask, use_cache=True).past_key_values, _ids(2, 3)
    _next(model, other, cache)
    # The shorter row's first token stays: with it, 3 + 4 can be taken back.
    with pytest.raises(ValueError, match="take back 8 tokens, this cache can take back 7"):
        cache.crop(-8)
    cache.crop(-7)
    found = _next(model, other, cache)
    for row, text in enumerate((ids[:1, :5], ids[1:, 4:5])):
        expected = _next(model, other[row : row + 1], _feed(model, text))
        torch.testing.assert_close(found[row : row + 1], expected, **EXACT)


@torch.no_grad()
def test_pads_behind_and_inside_cannot_be_cropped(model: Any) -> None:
    for pads, back in (([1] * 8 + [0], 1), ([1, 1, 0, 1, 1, 0, 1, 1, 1], 4)):
        mask, ids = torch.ones(2, 9, dtype=torch.long), _ids(2, 9)
        mask[1] = torch.tensor(pads)
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        message = f"take back {back} tokens, this cache can take back {back - 1}"
        with pytest.raises(ValueError, match=message):
            cache.crop(-back)


@torch.no_grad()
def test_cropping_stops_at_borders_of_documents(model: Any) -> None:
    ids, other = _ids(1, 13), _ids(1, 5)
    positions = torch.tensor([[*range(9), *range(4)]])
    cache = model(ids, position_ids=positions, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="take back 4 tokens, this cache can take back 3"):
        cache.crop(-4)
    cache.crop(-3)
    expected = _next(model, other, _feed(model, ids[:, 9:10]))
    torch.testing.assert_close(_next(model, other, cache), expected, **EXACT)


def test_cropping_everything_is_a_new_beginning(model: Any) -> None:
    cache, ids = _feed(model, _ids(2, 12)), _ids(3, 9)
    cache.crop(0)
    assert cache.get_seq_length() == 12
    cache.crop(-12)
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    expected = _next(model, ids, Dsv4Cache(model.config))
    torch.testing.assert_close(_next(model, ids, cache), expected, **EXACT)


# --- rows of the batch --------------------------------------------------------------------------


@torch.no_grad()
def _uneven(model: Any) -> tuple[Any, list[torch.Tensor]]:
    """A cache over three rows of unequal length, and the texts in it."""
    texts = [_ids(1, n) for n in (31, 18, 5)]
    ids, mask = torch.zeros(3, 31, dtype=torch.long), torch.zeros(3, 31, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 31 - text.shape[1] :], mask[row, 31 - text.shape[1] :] = text[0], 1
    return model(ids, attention_mask=mask, use_cache=True).past_key_values, texts


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0], [2, 2, 0, 1, 0]], ids=str)
def test_reordered_rows_carry_everything_with_them(model: Any, order: list[int]) -> None:
    cache, texts = _uneven(model)
    cache.reorder_cache(torch.tensor(order))
    more = _ids(len(order), 7)
    found = _next(model, more, cache)
    for row, source in enumerate(order):
        alone = _next(model, more[row : row + 1], _feed(model, texts[source]))
        torch.testing.assert_close(found[row : row + 1], alone, **EXACT)


def test_repeated_rows_part_ways(model: Any) -> None:
    cache, texts = _uneven(model)
    cache.batch_repeat_interleave(2)
    assert cache.max_batch_size == 6
    more = _ids(6, 9)
    found = _next(model, more, cache)
    for row in range(6):
        alone = _next(model, more[row : row + 1], _feed(model, texts[row // 2]))
        torch.testing.assert_close(found[row : row + 1], alone, **EXACT)


def test_a_cache_can_be_rolled_back_as_far_as_generate_asks(model: Any) -> None:
    # What `generate` asks before it lets a step run ahead of the stopping rule.
    assert Dsv4Cache(model.config).is_croppable


def test_another_batch_size_is_refused(model: Any) -> None:
    cache = _feed(model, _ids(2, 5))
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        _next(model, _ids(3, 1), cache)
    cache.reset()
    assert _next(model, _ids(3, 1), cache).shape[0] == 3


# --- leaks --------------------------------------------------------------------------------------


def _poison(cache: Dsv4Cache) -> None:
    for _, store in cache.named_stores():
        if store.data is not None and store.data.is_floating_point():
            store.data.fill_(torch.nan)


def test_a_reset_cache_forgets_everything(model: Any) -> None:
    ids = _ids(2, 33)
    cache = _feed(model, _ids(2, 50))
    _poison(cache)
    cache.reset()
    assert cache.memory_bytes() == 0 and cache.get_seq_length() == 0
    expected = _next(model, ids, Dsv4Cache(model.config))
    torch.testing.assert_close(_next(model, ids, cache), expected, **EXACT)


def test_slots_that_hold_no_token_yet_are_never_read(model: Any) -> None:
    ids = _ids(1, 20)
    cache = _feed(model, ids[:, :3])
    for _, store in cache.named_stores():
        data = store.data
        if isinstance(store, Ring) and data is not None and data.is_floating_point():
            data[:, 3:] = 1e30
    expected = _next(model, ids, Dsv4Cache(model.config))[:, 3:]
    torch.testing.assert_close(_next(model, ids[:, 3:], cache), expected, **EXACT)


def test_a_pass_that_failed_halfway_spoils_no_later_one(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, more = _ids(1, 30), _ids(1, 90)
    cache = _feed(model, ids)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    last = model.model.layers[-1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            _next(model, more, cache)
    # Its tokens have overwritten older ones by now: to go on would be silently wrong.
    with pytest.raises(ValueError, match="did not finish"):
        _next(model, more, cache)
    _poison(cache)
    cache.reset()
    expected = _next(model, more, Dsv4Cache(model.config))
    torch.testing.assert_close(_next(model, more, cache), expected, **EXACT)


def test_a_refused_input_leaves_a_cache_as_it_was(model: Any) -> None:
    ids = _ids(1, 12)
    cache = _feed(model, ids[:, :9])
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids[:, 9:], attention_mask=torch.ones(1, 1, 3, 12), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids[:, 9:], position_ids=torch.tensor([[4, 5, 6]]), past_key_values=cache)
    expected = _next(model, ids, Dsv4Cache(model.config))[:, 9:]
    torch.testing.assert_close(_next(model, ids[:, 9:], cache), expected, **EXACT)


def test_a_cache_costs_its_entries_and_not_its_tokens(tiny: Callable[..., Any]) -> None:
    model = tiny("v4")
    held = [_feed(model, _ids(1, n)).memory_bytes() for n in (512, 1024, 2048)]
    # Per 512 tokens: 128 entries of 16 + 8 channels in two CSA layers, 64 of 16 in the HCA layer.
    assert held[1] - held[0] == 4 * (2 * 128 * (16 + 8) + 64 * 16)
    assert held[2] - held[1] == 2 * (held[1] - held[0])


def test_only_what_a_layer_needs_is_kept(tiny: Callable[..., Any]) -> None:
    for kind in KINDS:
        model = tiny(kind)
        cache = _feed(model, _ids(1, 40))
        for i, store in enumerate(cache.layers):
            attention = model.model.layers[i].self_attn
            assert store.window.data.shape == (1, W - 1 + 64, 16)
            assert (store.entries.data is None) == (attention.compressor is None)
            gated = attention.compressor is not None and attention.ratio > 1
            assert (store.pool.data is None) == (not gated)
            owns = attention.indexer is not None and attention.compressor is not None
            assert (store.index_keys.data is None) == (not owns)
            assert (store.index_pool.data is None) == (not (owns and kind == "v4"))
        assert (cache.ngrams.data is None) == (kind == "v4")


def test_another_cache_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="wanted a Dsv4Cache, got DynamicCache"):
        model(_ids(1, 3), past_key_values=DynamicCache())
