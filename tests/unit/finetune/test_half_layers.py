# SPDX-License-Identifier: Apache-2.0
"""A layer cut at its experts is the layer, bit for bit; closing it has the gradient it should."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.half_layers import (
    Carried,
    begin_pass,
    close_layer,
    needed_fields,
    open_layer,
    routed_gradient,
)
from modeling_dsv4.attention import Shared
from modeling_dsv4.hyper_connection import first_pre


@pytest.mark.parametrize("kind", ["v4", "v41"])
@torch.no_grad()
def test_two_halves_are_the_layer(tiny: Callable[..., Any], kind: str) -> None:
    model = tiny(kind).train()
    ids = torch.randint(0, 64, (2, 37))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    types = torch.where(ids < 4, 0, -1)
    given = {"input_ids": ids, "attention_mask": mask}
    if kind == "v41":
        given["token_types"] = types
    backbone = model.model
    told = begin_pass(backbone, given)
    embeds = backbone.embed_tokens(told.input_ids)
    streams = embeds[:, :, None].expand(-1, -1, model.config.hc_mult, -1)
    carried, needed = Carried(streams, first_pre(streams), Shared()), needed_fields(backbone.layers)
    want, pre, shared = carried
    for layer, fields in zip(backbone.layers, needed, strict=True):
        want, pre, *handed, _, _ = layer(want, pre, *shared, told)
        # What no layer reads any more may be left out.
        kept = [x if f else None for x, f in zip(carried.shared, fields, strict=True)]
        opened = open_layer(layer, carried._replace(shared=Shared(*kept)), told)
        routed = layer.mlp.experts(opened.x, opened.index, opened.weights)
        carried = Carried(close_layer(layer, opened, routed), opened.pre, opened.shared)
        shared = Shared(*handed)
        assert torch.equal(carried.streams, want)
        assert torch.equal(carried.pre, pre)


def test_only_fields_that_are_read_are_carried(tiny: Callable[..., Any]) -> None:
    assert not any(any(fields) for fields in needed_fields(tiny("v4").model.layers))
    needed = needed_fields(tiny("v41").model.layers)
    # Sources of entries at 1 and 3, of choices at 1, 3 and 5, of candidates at 3.
    entries, keys, ids, candidates = zip(*needed, strict=True)
    assert entries == (False, False, True, False, True, True, True)
    assert keys == (False, False, False, False, True, True, False)
    assert ids == (False, False, True, False, True, False, True)
    assert candidates == (False, False, False, False, True, True, False)


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_closing_has_this_gradient(tiny: Callable[..., Any], kind: str) -> None:
    model = tiny(kind)
    layer, backbone = model.model.layers[1], model.model
    told = begin_pass(backbone, {"input_ids": torch.randint(0, 64, (2, 9))})
    streams = torch.randn(2, 9, model.config.hc_mult, model.config.hidden_size)
    opened = open_layer(layer, Carried(streams, first_pre(streams), Shared()), told)
    routed = torch.randn(opened.x.shape, requires_grad=True)
    out = close_layer(layer, opened, routed)
    gradient = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, routed, gradient)
    got = routed_gradient(layer, opened.post, opened.comb, gradient, torch.float32)
    torch.testing.assert_close(got, want)


def test_a_pass_wants_ids_and_known_keys(tiny: Callable[..., Any]) -> None:
    backbone = tiny("window").model
    with pytest.raises(ValueError, match="wanted input_ids"):
        begin_pass(backbone, {"labels": torch.zeros(1, 2)})
    with pytest.raises(TypeError, match="attention_maks"):
        begin_pass(backbone, {"input_ids": torch.zeros(1, 2).long(), "attention_maks": None})
