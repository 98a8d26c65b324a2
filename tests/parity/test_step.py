# SPDX-License-Identifier: Apache-2.0
"""A step that is compiled or captured gives the tokens that single passes give."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, step
from modeling_dsv4.moe import ExpertsBase

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)]
KIND = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 8]}
PROMPT, LENGTH = 11, 44


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Iterator[Any]:
    torch.compiler.reset()
    yield tiny("v4", torch.float32, **KIND)
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that a compiler was handed; they are run as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(step, "COMPILE", {"fullgraph": True, "backend": backend})
    return graphs


def _ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _cache(model: Any) -> Dsv4Cache:
    return Dsv4Cache(model.config, max_rewind=5, max_length=LENGTH)


@torch.no_grad()
def _decode(model: Any, ids: torch.Tensor, cache: Dsv4Cache, **more: Any) -> torch.Tensor:
    """Logits of every token of ids [B, n] behind what the cache holds."""
    found = []
    for i in range(ids.shape[1]):
        given = {name: x[:, : cache.columns + 1] for name, x in more.items()}
        found.append(model(ids[:, i : i + 1], past_key_values=cache, **given).logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def _both(model: Any, mode: str, ids: torch.Tensor, **more: Any) -> list[torch.Tensor]:
    """Logits behind the prompt: by single passes, and by the chosen mode."""
    results = []
    for way in ("eager", mode):
        model.set_step("eager")
        cache = _cache(model)
        given = {name: x[:, :PROMPT] for name, x in more.items()}
        model(ids[:, :PROMPT], past_key_values=cache, **given)
        model.set_step(way)
        results.append(_decode(model, ids[:, PROMPT:], cache, **more))
        assert cache.get_seq_length() == LENGTH
    return results


def test_a_compiled_step_gives_the_same_and_is_traced_once_or_twice(
    model: Any, traced: list[torch.fx.GraphModule]
) -> None:
    found = _both(model, "compiled", _ids())
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    assert 1 <= len(traced) <= 2
    # Masks grow with the context; a step reads their last column alone.
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    traced.clear()
    torch.testing.assert_close(
        *_both(model, "compiled", _ids(), attention_mask=mask), atol=1e-5, rtol=0
    )
    assert 1 <= len(traced) <= 2


@pytest.mark.usefixtures("traced")
def test_generate_takes_the_step_with_a_static_cache_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, asked = _ids(2, 7), []
    more = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static"}
    wanted = model.generate(prompt, **more)
    model.set_step("compiled")
    repeat = model._repeat_step
    monkeypatch.setattr(model, "_repeat_step", lambda *x: asked.append(1) or repeat(*x))
    assert torch.equal(model.generate(prompt, **more), wanted)
    assert len(asked) == 8
    # A growing cache, gradients, or more outputs than logits: an ordinary pass.
    assert torch.equal(model.generate(prompt, **{**more, "cache_implementation": None}), wanted)
    cache = _cache(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        out = model(prompt[:, :1], past_key_values=cache, output_hidden_states=True)
    assert out.hidden_states is not None
    model(prompt[:, :1], past_key_values=cache)
    assert len(asked) == 8


def test_another_length_of_the_cache_is_traced_anew(
    model: Any, traced: list[torch.fx.GraphModule]
) -> None:
    ids = _ids(1, 60)
    model.set_step("compiled")
    for length in (LENGTH, 60, 52):
        found = []
        for way in ("eager", "compiled"):
            model.set_step(way) if way == "eager" else None
            cache = Dsv4Cache(model.config, max_rewind=5, max_length=length)
            with torch.no_grad():
                model(ids[:, :PROMPT], past_key_values=cache)
            found.append(_decode(model, ids[:, PROMPT : PROMPT + 4], cache))
            model.set_step("compiled")
        torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    # No length of a cache is a symbol: twice for each of them at most, and the same code as alone.
    assert len(traced) <= 6


def test_a_step_is_given_the_last_column_of_masks_and_positions(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    model.set_step("eager")
    one = model._one_column
    monkeypatch.setattr(
        model, "_step", lambda *x: given.append([y.shape for y in x[:3]]) or one(*x)
    )
    ids, cache = _ids(), _cache(model)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
    places = torch.arange(LENGTH).expand(2, -1)
    _decode(model, ids[:, PROMPT : PROMPT + 2], cache, attention_mask=mask, position_ids=places)
    assert given == [[(2, 1)] * 3] * 2


@pytest.mark.usefixtures("traced")
def test_a_step_can_be_taken_back(model: Any) -> None:
    ids, cache = _ids(1), _cache(model)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
    model.set_step("compiled")
    first = _decode(model, ids[:, PROMPT : PROMPT + 6], cache)
    cache.crop(-3)
    again = _decode(model, ids[:, PROMPT + 3 : PROMPT + 6], cache)
    torch.testing.assert_close(again, first[:, 3:], atol=1e-6, rtol=0)


def test_modes_are_checked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="wanted one of eager, compiled, captured, got 'fast'"):
        model.set_step("fast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        model.set_step("captured")


def test_experts_that_the_host_must_ask_for_are_refused(model: Any) -> None:
    class Packed(ExpertsBase):
        pass

    model.model.layers[0].mlp.experts = Packed(4, 8, 8, None)
    with pytest.raises(ValueError, match="'compiled' wants plain experts, got Packed"):
        model.set_step("compiled")
    model.set_step("eager")


@pytest.mark.slow
def test_generated_code_gives_the_same_numbers(model: Any) -> None:
    torch.testing.assert_close(*_both(model, "compiled", _ids()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("masked", [False, True])
def test_a_captured_step_gives_the_same(model: Any, device: str, masked: bool) -> None:
    model, ids = model.to(device), _ids().to(device)
    more = {}
    if masked:
        more["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long, device=device)
        more["attention_mask"][0, :4] = 0
    torch.testing.assert_close(*_both(model, "captured", ids, **more), atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", CUDA)
def test_a_captured_step_follows_its_cache(model: Any, device: str) -> None:
    model, ids = model.to(device), _ids().to(device)
    more = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    wanted = model.generate(ids[:, :9], **more)
    model.set_step("captured")
    assert torch.equal(model.generate(ids[:, :9], **more), wanted)
    cache = _cache(model)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        first = _decode(model, ids[:, PROMPT : PROMPT + 6], cache)
        cache.crop(-3)
        again = _decode(model, ids[:, PROMPT + 3 : PROMPT + 6], cache)
        torch.testing.assert_close(again, first[:, 3:], atol=1e-4, rtol=0)
        cache.batch_select_indices(torch.tensor([1, 0], device=device))
        cache.crop(-3)
        turned = _decode(model, ids.flip(0)[:, PROMPT + 3 : PROMPT + 6], cache)
        torch.testing.assert_close(turned, again.flip(0), atol=1e-4, rtol=0)
        # Another number of rows is captured anew.
        one = cache
        one.batch_select_indices(torch.tensor([0], device=device))
        one.crop(-3)
        alone = _decode(model, ids.flip(0)[:1, PROMPT + 3 : PROMPT + 6], one)
        torch.testing.assert_close(alone, turned[:1], atol=1e-4, rtol=0)
