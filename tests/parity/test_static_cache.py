# SPDX-License-Identifier: Apache-2.0
"""A static cache gives what a growing one gives, keeps its place, and its step compiles once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_dsv4 import Dsv4Cache, moe

EXACT = {"atol": 1e-10, "rtol": 0}
# Few layers, each another kind: a compiler reads all of them. Sinkhorn's rounds are most of what it
# reads and nothing of what is tested.
KINDS: dict[str, dict[str, Any]] = {
    "v4": {"num_hidden_layers": 2, "compress_ratios": [4, 8]},
    "v41": {
        "num_hidden_layers": 3,
        "compress_ratios": [2, 1, 1],
        "kv_source_layer_ids": [0, 1],
        "index_source_layer_ids": [0, 1, 2],
        "candidate_source_layer_id": 1,
        "engram_layer_ids": [1],
    },
}
# 44 tokens wrap every ring (the window's has 7 + 5 slots) and close windows of every ratio.
LENGTH, REWIND = 44, 5


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(request.param, torch.float64, hc_sinkhorn_iters=1, **KINDS[request.param])


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _static(model: Any, length: int = LENGTH) -> Dsv4Cache:
    return Dsv4Cache(model.config, max_rewind=REWIND, max_length=length)


@torch.no_grad()
def _feed(model: Any, ids: torch.Tensor, cache: Dsv4Cache, sizes: Any = 1) -> torch.Tensor:
    """Logits of ids, fed in pieces of `sizes`."""
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def _whole(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **more).logits


def _places(cache: Dsv4Cache) -> list[int]:
    assert cache.state is not None
    held = [store.data for store in cache._stores() if store.data is not None]
    return [x.data_ptr() for x in (*held, *cache.state.tensors())]


# --- equal to a growing cache -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [1, [11, 1, 1, 20, 1, 1, 3, 6], [1, 34, 1, 1, 7]], ids=str)
def test_pieces_of_any_size_give_what_one_pass_gives(model: Any, sizes: Any) -> None:
    ids = _ids(2, LENGTH)
    found = _feed(model, ids, _static(model), sizes)
    torch.testing.assert_close(found, _whole(model, ids), **EXACT)


def test_nothing_moves_once_it_is_allocated(model: Any) -> None:
    cache, ids = _static(model), _ids(2, LENGTH)
    _feed(model, ids[:, :20], cache, 20)
    before, held = _places(cache), cache.memory_bytes()
    _feed(model, ids[:, 20:], cache, [1] * 8 + [11] + [1] * 5)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    _feed(model, ids[:, :9], cache, [8, 1])
    assert _places(cache) == before and cache.memory_bytes() == held


@torch.no_grad()
def test_rows_of_unequal_length_decode_as_each_alone(model: Any) -> None:
    lengths, columns = (31, 18, 5), 31
    mask = torch.stack([(torch.arange(columns) >= columns - n).long() for n in lengths])
    ids, more = _ids(3, columns), _ids(3, 20)
    # The second row waits for some steps and ends before the others.
    more_mask = torch.ones_like(more)
    more_mask[1, 4:9] = more_mask[1, 17:] = 0
    cache, found = _static(model, columns + 20), []
    model(ids, attention_mask=mask, past_key_values=cache)
    for i in range(20):
        mask = torch.cat((mask, more_mask[:, i : i + 1]), dim=1)
        step = model(more[:, i : i + 1], attention_mask=mask, past_key_values=cache)
        found.append(step.logits)
    for row, n in enumerate(lengths):
        real = more_mask[row].bool()
        alone = torch.cat((ids[row, columns - n :], more[row, real]))[None]
        expected = _whole(model, alone)[0, n:]
        torch.testing.assert_close(torch.cat(found, 1)[row, real], expected, **EXACT)
    assert cache.state is not None and cache.state.seen.tolist() == [51, 30, 25]


@torch.no_grad()
def test_a_document_may_begin_in_a_step(model: Any) -> None:
    ids, cache, found = _ids(1, 40), _static(model), []
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    for i in range(40):
        part = slice(i, i + 1)
        step = model(ids[:, part], position_ids=positions[:, part], past_key_values=cache)
        found.append(step.logits)
    expected = torch.cat((_whole(model, ids[:, :15]), _whole(model, ids[:, 15:])), dim=1)
    torch.testing.assert_close(torch.cat(found, 1), expected, **EXACT)
    with pytest.raises(ValueError, match="row 0 stands at position 25, got 26"):
        model(ids[:, :1], position_ids=torch.tensor([[26]]), past_key_values=cache)


# --- taking back, moving rows, running full -----------------------------------------------------


@pytest.mark.parametrize("back", range(1, REWIND + 1))
def test_cropping_equals_never_having_been_there(model: Any, back: int) -> None:
    ids, more, cache = _ids(2, 33), _ids(2, 9), _static(model)
    _feed(model, ids, cache, [20] + [1] * 13)
    cache.crop(-back)
    kept = torch.cat((ids[:, : 33 - back], more), dim=1)
    found = _feed(model, more, cache)
    torch.testing.assert_close(found, _whole(model, kept)[:, 33 - back :], **EXACT)


def test_cropping_beyond_what_is_kept_is_refused(model: Any) -> None:
    ids, cache = _ids(1, 40), _static(model)
    _feed(model, ids[:, :30], cache, [20] + [1] * 10)
    with pytest.raises(ValueError, match=r"wanted to take back 6 tokens, this cache can .* 5"):
        cache.crop(-6)
    # A document that begins in a step ends what can be taken back.
    model(ids[:, :1], position_ids=torch.zeros(1, 1).long(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"wanted to take back 1 tokens, this cache can .* 0"):
        cache.crop(-1)


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0], [1, 0, 0]], ids=str)
def test_rows_move_with_all_they_hold(model: Any, order: list[int]) -> None:
    ids, more, cache = _ids(2, 27), _ids(len(order), 8), _static(model)
    _feed(model, ids, cache, [20] + [1] * 7)
    cache.reorder_cache(torch.tensor(order))
    expected = _whole(model, torch.cat((ids[order], more), dim=1))[:, 27:]
    torch.testing.assert_close(_feed(model, more, cache), expected, **EXACT)
    cache.batch_repeat_interleave(2)
    assert cache.max_batch_size == 2 * len(order)


@pytest.mark.parametrize("batch", [2, 3])
def test_an_emptied_cache_holds_nothing_of_before(model: Any, batch: int) -> None:
    cache, ids = _static(model), _ids(batch, 30)
    _feed(model, _ids(2, 40), cache, [35] + [1] * 5)
    for store in cache._stores():
        if store.data is not None and store.data.is_floating_point():
            store.data.fill_(torch.nan)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    found = _feed(model, ids, cache, [12] + [1] * 18)
    torch.testing.assert_close(found, _whole(model, ids), **EXACT)


def test_a_full_cache_says_so_and_stays_as_it_was(model: Any) -> None:
    ids, cache = _ids(1, 20), _static(model, length=20)
    assert cache.get_max_cache_shape() == 20
    _feed(model, ids[:, :18], cache, [12] + [1] * 6)
    with pytest.raises(ValueError, match=r"room for 20 .* holds 18, the input has 3 more.*=21\)"):
        _feed(model, ids[:, :3], cache, 3)
    found = _feed(model, ids[:, 18:], cache)
    torch.testing.assert_close(found, _whole(model, ids)[:, 18:], **EXACT)
    with pytest.raises(ValueError, match="or without max_length, which grows"):
        _feed(model, ids[:, :1], cache)
    with pytest.raises(ValueError, match="wanted at least 1 column, got 0"):
        _static(model, length=0)


@torch.no_grad()
def test_a_refused_step_leaves_the_cache_as_it_was(model: Any) -> None:
    ids, cache = _ids(1, 12), _static(model)
    _feed(model, ids[:, :11], cache, 11)
    with pytest.raises(ValueError, match="masks of four dimensions are not taken"):
        model(ids[:, 11:], attention_mask=torch.ones(1, 1, 1, 12), past_key_values=cache)
    with pytest.raises(ValueError, match="numbers for 1 tokens, got"):
        model(ids[:, 11:], position_ids=torch.tensor([[10, 11]]), past_key_values=cache)
    found = _feed(model, ids[:, 11:], cache)
    torch.testing.assert_close(found, _whole(model, ids)[:, 11:], **EXACT)


# --- compiled -----------------------------------------------------------------------------------


class _Asked(TorchDispatchMode):
    """Counts what makes the host wait for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_number(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, cache = _ids(2, 30), torch.ones(2, 30), _static(model)
    _feed(model, ids[:, :21], cache, 20)
    monkeypatch.setattr(moe, "_may_not_wait", lambda x: True)
    with torch.no_grad(), _Asked() as asked:
        for i in range(21, 30):
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
    assert asked.names == []


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _decode(model: Any, step: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    cache = _static(model, ids.shape[1])
    found = [_feed(model, ids[:, :prompt], cache, prompt)]
    places = _places(cache)
    with torch.no_grad():
        for i in range(prompt, ids.shape[1]):
            found.append(step(ids[:, i : i + 1], past_key_values=cache).logits)
    assert _places(cache) == places and cache.get_seq_length() == ids.shape[1]
    return torch.cat(found, dim=1)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_step_is_one_graph_that_is_made_once(model: Any) -> None:
    ids = _ids(3, LENGTH)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=backend)
    found = _decode(model, step, ids, 11)
    torch.testing.assert_close(found, _whole(model, ids), **EXACT)
    # Once with the number of columns as it stands, once more for any number of them.
    assert 1 <= len(graphs) <= 2
    # No generated code multiplies complex numbers.
    assert all(node.target is not torch.view_as_complex for node in graphs[0].graph.nodes)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", list(KINDS))
def test_generated_code_gives_the_same_numbers(tiny: Callable[..., Any], kind: str) -> None:
    model, ids = tiny(kind, hc_sinkhorn_iters=1, **KINDS[kind]), _ids(2, LENGTH)
    step = torch.compile(model, fullgraph=True)
    found = _decode(model, step, ids, 11)
    torch.testing.assert_close(found, _whole(model, ids), atol=2e-4, rtol=0)
