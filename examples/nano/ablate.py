# SPDX-License-Identifier: Apache-2.0
"""Does every mechanism earn its place? Take one away from the trained model, measure the loss.

Nothing is retrained: a row says how much the trained weights rely on a mechanism, not how good a
model without it could have become.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from finetune.pretraining import every_entry
from modeling_dsv4 import Dsv4ForCausalLM, hyper_ops
from modeling_dsv4.hyper_connection import HyperConnection
from modeling_dsv4.indexer import Indexer, Selection

from .data import Corpus
from .train import held_out_loss

Hook = Callable[..., Any]
WHOLE = "whole model"


@contextmanager
def hooked(model: nn.Module, kind: type[nn.Module], hook: Hook) -> Iterator[None]:
    """Replace what every module of a kind returns, for as long as the block runs."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, kind):
                handle = module.register_forward_hook(hook)
                stack.callback(handle.remove)
        yield


@contextmanager
def shuffled_engram(model: Dsv4ForCausalLM) -> Iterator[None]:
    """Every token under the compressed id of another: rows of other n-grams."""
    token_map = model.model.engram_hash.token_map
    kept = token_map.clone()
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    token_map.copy_(kept[order])
    try:
        yield
    finally:
        token_map.copy_(kept)


def identity_mixing(module: HyperConnection, args: Any, output: tuple) -> tuple:
    """Streams keep to themselves: `comb` is the identity."""
    x, pre, post, comb, streams = output
    return x, pre, post, torch.eye(comb.shape[-1]).expand_as(comb), streams


def plain_residual(module: HyperConnection, args: Any, output: tuple) -> tuple:
    """All of mHC away: read the mean of the streams, add to each, mix nothing."""
    x, pre, post, comb, streams = output
    n = comb.shape[-1]
    mean = torch.full_like(pre, 1 / n)
    if len(args) < 2 or args[1] is None:  # a site that collapses with its own `pre`
        x = hyper_ops.collapse(streams, mean)
    return x, mean, torch.ones_like(post), torch.eye(n).expand_as(comb), streams


def newest(module: Indexer, args: tuple, output: Selection) -> Selection:
    """The last k entries a query sees, whatever it looks for."""
    upto, own, k = _visible(module, args)
    ids = upto - k + torch.arange(k)
    return Selection(ids.masked_fill(ids < upto - own, -1).to(torch.int32), None)


def anywhere(module: Indexer, args: tuple, output: Selection) -> Selection:
    """k different entries a query sees, drawn blindly."""
    upto, own, k = _visible(module, args)
    entries = args[2].shape[1]
    at = torch.arange(entries)
    noise = torch.rand(*upto.shape[:2], entries, generator=torch.Generator().manual_seed(0))
    noise = noise.masked_fill((at >= upto) | (at < upto - own), -1)
    best = noise.topk(k, dim=-1)
    ids = best.indices.masked_fill(best.values < 0, entries).sort(-1).values
    return Selection(ids.masked_fill(ids == entries, -1).to(torch.int32), None)


def nothing(module: Indexer, args: tuple, output: Selection) -> Selection:
    """The sliding window alone."""
    upto, _, k = _visible(module, args)
    return Selection(torch.full((*upto.shape[:2], k), -1, dtype=torch.int32), None)


def _visible(module: Indexer, args: tuple) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Entries [B, S, 1] up to which, and how many of which, a query sees; and k."""
    keys, segments = args[2], args[4]
    windows = segments.windows(module.ratio)
    k = min(module.config.index_topk, keys.shape[1])
    return windows.upto[..., None], windows.own[..., None], k


ABLATIONS: dict[str, Callable[[Dsv4ForCausalLM], Any]] = {
    "Engram: ids shuffled": shuffled_engram,
    "mHC: mixing replaced by the identity": lambda m: hooked(m, HyperConnection, identity_mixing),
    "mHC: plain residual": lambda m: hooked(m, HyperConnection, plain_residual),
    "top-k: the newest entries": lambda m: hooked(m, Indexer, newest),
    "top-k: random entries": lambda m: hooked(m, Indexer, anywhere),
    "top-k: none, window only": lambda m: hooked(m, Indexer, nothing),
    "top-k: every entry (dense)": every_entry,
}


def ablate(model: Dsv4ForCausalLM, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Held-out loss in nats by ablation and domain; the whole model comes first."""
    rows = {name: domain.held_out for name, domain in corpus.domains.items()}
    table = {WHOLE: {k: held_out_loss(model, v) for k, v in rows.items()}}
    for name, without in ABLATIONS.items():
        with without(model):
            table[name] = {k: held_out_loss(model, v) for k, v in rows.items()}
    return table
