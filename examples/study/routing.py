# SPDX-License-Identifier: Apache-2.0
"""How evenly experts are used: a loss that evens them out for comparison, and what is measured.

| kind | what moves |
|---|---|
| bias | selection biases by a fixed step (`finetune.expert_balance`; Wang et al., 2024) |
| loss | the router, by a loss beside the language model's (Switch §2.2, arXiv 2101.03961) |
| none | nothing |
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modeling_dsv4 import Dsv4ForCausalLM

# An expert is dead on held-out text if it gets less than this part of its fair share.
DEAD = 0.01


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """`sum_layers E * sum_e f_e P_e`: 1 a layer where all experts are equally busy.

    `f` is the share of choices that an expert got, `P` its mean share of the scores of a token.

    Args:
        router_logits: [tokens, E] of each layer.
        top_k: experts of a token.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        experts = logits.shape[-1]
        scores = F.softplus(logits).sqrt()
        chosen = scores.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=experts) / chosen.numel()
        total = total + experts * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    return total


def spread(counts: list[torch.Tensor]) -> dict[str, float]:
    """What a batch's choices [E] of each layer say.

    Returns:
        busiest: the largest load over the mean load, of the worst layer; entropy: of the loads,
        over that of equal ones, mean over layers; idle: experts without a token, all layers.
    """
    shares = [c.double() / c.sum() for c in counts]
    return {
        "busiest": max(float(s.max() * len(s)) for s in shares),
        "entropy": float(np.mean([-torch.special.xlogy(s, s).sum() / math.log(len(s))
                                  for s in shares])),
        "idle": float(sum(int((s == 0).sum()) for s in shares)),
    }  # fmt: skip


@contextmanager
def counted(model: Dsv4ForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Count the choices [E] of each layer's router over the passes in the block."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    counts = [torch.zeros(len(gate.weight), dtype=torch.int64) for gate in gates]

    def keep(into: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        into += torch.bincount(output[2].flatten(), minlength=len(into))

    handles = [
        gate.register_forward_hook(lambda _m, _a, out, into=into: keep(into, out))
        for gate, into in zip(gates, counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def describe(counts: Mapping[str, list[torch.Tensor]]) -> dict[str, Any]:
    """What the choices [E] of each layer on held-out text of each domain say.

    Returns:
        counts: {domain: [layers][E]}; dead: experts with less than `DEAD` of their fair share of
        all domains together, and `spread` of the same.
    """
    total = [torch.stack(parts).sum(0) for parts in zip(*counts.values(), strict=True)]
    dead = sum(int((c < DEAD * c.double().mean()).sum()) for c in total)
    told = {name: [c.tolist() for c in layers] for name, layers in counts.items()}
    return {"counts": told, "dead": dead, **spread(total)}
