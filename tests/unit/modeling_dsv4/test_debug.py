# SPDX-License-Identifier: Apache-2.0
"""Looking inside gives what the pass computed, and leaves nothing behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import run_layer, trace

Make = Callable[..., Any]


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_trace_names_every_intermediate(tiny: Make) -> None:
    model, ids = tiny("v41"), torch.randint(3, 64, (2, 40))
    found = trace(model, input_ids=ids)
    shapes = {
        "layers.3.attn_hc.collapsed": (2, 40, 32),
        "layers.3.attn_hc.pre": (2, 40, 4),
        "layers.3.attn_hc.post": (2, 40, 4),
        "layers.3.ffn_hc.comb": (2, 40, 4, 4),
        "layers.5.self_attn.indexer.ids": (2, 40, 4),
        "layers.3.self_attn.indexer.candidates": (2, 40, 3),
        "layers.3.mlp.gate.logits": (80, 4),
        "layers.3.mlp.gate.weights": (80, 2),
        "layers.3.mlp.gate.indices": (80, 2),
        "layers.4.engram.gate.gate": (2, 40, 4),
        "layers.4.engram.rows": (2, 40, 6),
        "layers.6.streams": (2, 40, 4, 32),
        "layers.6.pre": (2, 40, 4),
        "logits": (2, 40, 64),
    }
    for name, shape in shapes.items():
        assert tuple(found[name].shape) == shape, name
    assert "layers.2.engram.rows" not in found and "layers.2.self_attn.indexer.ids" not in found
    with torch.no_grad():
        assert torch.equal(found["logits"], model(ids, use_cache=False).logits)
        last = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found["layers.2.streams"], last[3])
    assert not any(t.requires_grad for t in found.values())


def test_a_trace_removes_its_hooks_even_after_an_error(tiny: Make) -> None:
    model = tiny("v4")
    before = _hooks(model)
    trace(model, input_ids=torch.randint(3, 64, (1, 9)))
    with pytest.raises(ValueError, match="got neither"):
        trace(model)
    assert _hooks(model) == before


def test_a_backbone_is_traced_too(tiny: Make) -> None:
    model, ids = tiny("v4"), torch.randint(3, 64, (1, 9))
    found = trace(model.model, input_ids=ids)
    assert "logits" not in found and found["last_hidden_state"].shape == (1, 9, 32)
    whole = trace(model, input_ids=ids)
    assert torch.equal(found["layers.3.streams"], whole["layers.3.streams"])


@pytest.mark.parametrize("kind", ["v4", "v41"])
@torch.no_grad()
def test_single_layers_repeat_the_pass(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind, torch.float64), torch.randint(3, 64, (1, 40))
    types = torch.full_like(ids, -1)
    if kind == "v41":
        types[0, 20:23] = 0
    entering: dict[int, Any] = {}
    # After Engram and before attention: what a site reads first.
    for i, layer in enumerate(model.model.layers):
        layer.attn_hc.register_forward_pre_hook(lambda m, a, i=i: entering.update({i: a[0]}))
    found = trace(model, input_ids=ids, token_types=types)
    entering, shared, pre = dict(entering), None, None
    for i in range(model.config.num_hidden_layers):
        streams, pre, shared = run_layer(
            model, i, entering[i], pre, types, input_ids=ids, shared=shared
        )
        torch.testing.assert_close(streams, found[f"layers.{i}.streams"], atol=1e-12, rtol=0)
    kept = [i for i, layer in enumerate(model.model.layers) if layer.engram is not None]
    assert kept == model.config.engram_layer_ids


def _streams(tokens: int = 12) -> torch.Tensor:
    return torch.randn(1, tokens, 4, 32)


@pytest.mark.parametrize("layer", [2, 4, 5, 6])
def test_a_layer_that_reuses_entries_says_whose(tiny: Make, layer: int) -> None:
    # Without them it would run, and answer as if it had a window alone.
    source = 1 if layer == 2 else 3
    with pytest.raises(ValueError, match=f"reuses the entries of layer {source}: wanted `shared`"):
        run_layer(tiny("v41"), layer, _streams())


def test_entries_handed_on_are_enough_and_are_used(tiny: Make) -> None:
    model, streams = tiny("v41"), _streams(40)
    shared = run_layer(model, 3, streams)[2]
    for layer in (4, 5, 6):
        out, _, shared = run_layer(model, layer, streams, shared=shared)
        other = shared._replace(entries=shared.entries + 1)
        changed, _, _ = run_layer(model, layer, streams, shared=other)
        assert (out - changed).abs().max() > 1e-3


def test_a_layer_routed_by_token_id_says_that_it_wants_ids(tiny: Make) -> None:
    with pytest.raises(ValueError, match="wanted `input_ids`"):
        run_layer(tiny("v4"), 0, _streams())


@pytest.mark.parametrize(
    ("layer", "shape", "complaint"),
    [
        (4, (1, 5, 4, 32), r"wanted a layer 0\.\.3, got 4"),
        (-1, (1, 5, 4, 32), r"wanted a layer 0\.\.3, got -1"),
        (1, (1, 5, 32), r"wanted \[B, S, 4, 32\], got \[1, 5, 32\]"),
        (1, (1, 5, 4, 16), r"wanted \[B, S, 4, 32\], got \[1, 5, 4, 16\]"),
    ],
)
def test_a_layer_that_is_not_there_and_other_streams_are_refused(
    tiny: Make, layer: int, shape: tuple[int, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        run_layer(tiny("v4"), layer, torch.randn(shape))


@torch.no_grad()
def test_a_trace_of_a_padded_batch_begins_with_the_real_tokens(tiny: Make) -> None:
    model, ids = tiny("v4"), torch.randint(3, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 9:] = 0, 0
    found = trace(model, input_ids=ids, attention_mask=mask)
    for row, real in ((0, slice(5, 12)), (1, slice(0, 9))):
        alone, n = trace(model, input_ids=ids[row : row + 1, real]), real.stop - real.start
        streams = found["layers.3.streams"][row, :n]
        torch.testing.assert_close(streams, alone["layers.3.streams"][0], atol=1e-4, rtol=0)
        logits = found["logits"][row, real]
        torch.testing.assert_close(logits, alone["logits"][0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_decoding_step_is_traced_with_its_cache(tiny: Make) -> None:
    model, ids = tiny("v41", torch.float64), torch.randint(3, 64, (1, 30))
    cache = model(ids[:, :29], use_cache=True).past_key_values
    found = trace(model, input_ids=ids[:, 29:], past_key_values=cache)
    assert cache.get_seq_length() == 30
    full = trace(model, input_ids=ids)
    for name in ("layers.4.engram.rows", "layers.5.self_attn.indexer.ids"):
        assert torch.equal(found[name][0, -1], full[name][0, -1]), name
