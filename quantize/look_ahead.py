# SPDX-License-Identifier: Apache-2.0
"""Guesses of what a layer's router will choose, made before its turn.

What a router sees is what it would have seen some work earlier, plus what that work adds. So it is
asked early, with what there is, and reads start behind those that are wanted for sure:

    next-layer   as a layer's experts begin, the next one's router is asked with their input
    same-layer   as its attention begins, a layer's own router is asked as if that added nothing

A guess that is wrong costs reads and no bit of the result. Only few tokens are guessed for: many
want nearly all experts.
"""

import copy
import itertools
import weakref
from typing import Any

import torch
from torch import nn

from modeling_dsv4 import hyper_ops
from modeling_dsv4.blocks import Dsv4DecoderLayer
from modeling_dsv4.moe import Dsv4MoE

from .experts import GUESSED_UP_TO, StoredExperts

WAYS = ("off", "next-layer", "same-layer")


def look_ahead(model: nn.Module, way: str) -> None:
    """Let the layers of a model guess, one of `WAYS`; hash layers know and need not.

    Draft stages do not guess.
    """
    if way == "next-layer":
        _ask_next_layers(model)
    elif way == "same-layer":
        for name, layer in model.named_modules():
            if isinstance(layer, Dsv4DecoderLayer) and not name.startswith("mtp."):
                experts: nn.Module = layer.mlp.experts
                stored = isinstance(experts, StoredExperts) and experts.store is not None
                if stored and not layer.mlp.gate.hashed:
                    layer.attn_hc.register_forward_hook(_SameLayer(layer))


def _ask_next_layers(model: nn.Module) -> None:
    named = model.named_modules()
    layers = [m for n, m in named if isinstance(m, Dsv4MoE) and not n.startswith("mtp.")]
    for here, following in itertools.pairwise(layers):
        experts: nn.Module = here.experts
        if not isinstance(experts, StoredExperts) or following.gate.hashed:
            continue

        @torch.no_grad()
        def guess(x: torch.Tensor, asked: Dsv4MoE = following) -> None:
            # Not by a call: who records what routers choose hears nothing of guesses.
            asked.experts.foresee(asked.gate.forward(x)[2], sure=False)

        experts.look_ahead = guess


class _SameLayer:
    """Hook of a layer's first mHC site, whose result says how the streams mix without attention."""

    def __init__(self, layer: Dsv4DecoderLayer) -> None:
        # The layer holds the hook: the other way round it would not end with its model.
        self._layer = weakref.ref(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SameLayer":
        layer = self._layer()
        assert layer is not None, "copied with its layer"
        return _SameLayer(copy.deepcopy(layer, memo))

    @torch.no_grad()
    def __call__(self, _: nn.Module, __: Any, opened: tuple[torch.Tensor, ...]) -> None:
        layer = self._layer()
        x, pre, post, comb, streams = opened
        if layer is None or x.shape[:-1].numel() > GUESSED_UP_TO:
            return
        streams = hyper_ops.expand(torch.zeros_like(x), streams, post, comb)
        x = layer.ffn_hc.forward(streams, pre if layer.single_pass else None)[0]
        x = layer.post_attention_layernorm.forward(x).flatten(0, 1)
        layer.mlp.experts.foresee(layer.mlp.gate.forward(x)[2], sure=False)
