# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a fresh model learn how, and how fast.

| group | what | how |
|---|---|---|
| matrix | matrices inside blocks: attention, experts, Engram's projection | Muon, decayed |
| rest | norms, routers, mHC's coefficients, sinks, gates | AdamW, no decay |
| embed, head | both ends | AdamW at rates of their own |
| table | Engram tables | AdamW at five times the common rate, no decay (Engram §4.1) |
| index | the indexer, which has a loss of its own | AdamW |

A step reads few rows of a table. With `sparse_tables` gradients and steps are of these rows alone
(torch.optim.SparseAdam): what was not read stays as it is, and no gradient is as large as a table.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_dsv4.engram import Engram

from .muon import Muon, Together

_BETAS, _EPS = (0.9, 0.95), 1e-10


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by group; `matrix` is Muon's."""

    matrix: float
    rest: float
    embed: float
    head: float
    table: float
    index: float


@dataclass
class Groups:
    """Parameters by group; `halves` are those of `matrix` that stack two matrices."""

    matrix: list[nn.Parameter] = field(default_factory=list)
    rest: list[nn.Parameter] = field(default_factory=list)
    embed: list[nn.Parameter] = field(default_factory=list)
    head: list[nn.Parameter] = field(default_factory=list)
    table: list[nn.Parameter] = field(default_factory=list)
    index: list[nn.Parameter] = field(default_factory=list)
    halves: list[nn.Parameter] = field(default_factory=list)


def group_parameters(model: nn.Module) -> Groups:
    """Sort everything that trains into its group.

    Raises:
        ValueError: nothing trains.
    """
    groups = Groups()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = _group(name, parameter)
        getattr(groups, group).append(parameter)
        if group == "matrix" and name.endswith("experts.gate_up_proj"):
            groups.halves.append(parameter)
    if not groups.matrix:
        raise ValueError("pretraining: wanted matrices that train, got none; thaw the model first")
    return groups


def _group(name: str, p: nn.Parameter) -> str:
    if ".indexer." in name:
        return "index"
    if "embed_tokens" in name:
        return "embed"
    if "lm_head" in name:
        return "head"
    if "engram.embed" in name:
        return "table"
    small = p.dim() < 2 or "_hc." in name or ".gate.weight" in name or "engram." in name
    return "matrix" if not small or "engram.kv_proj" in name else "rest"


def make_optimizer(
    model: nn.Module, rates: Rates, matrix_decay: float = 0.0, sparse_tables: bool = False
) -> Together:
    """Muon for matrices and Adam for the rest, as one optimizer.

    Args:
        model: whose parameters learn.
        rates: peaks; a schedule scales them.
        matrix_decay: decoupled, of the matrices alone.
        sparse_tables: sets Engram's tables to sparse gradients, and steps through rows read.
    """
    groups = group_parameters(model)
    dense = ["rest", "embed", "head", *(() if sparse_tables else ("table",)), "index"]
    parts: list[torch.optim.Optimizer] = [
        Muon(groups.matrix, rates.matrix, weight_decay=matrix_decay, halves=groups.halves),
        torch.optim.AdamW(
            [{"params": getattr(groups, k), "lr": getattr(rates, k)} for k in dense],
            betas=_BETAS,
            eps=_EPS,
            weight_decay=0.0,
            foreach=True,
        ),
    ]
    if sparse_tables and groups.table:
        for module in model.modules():
            if isinstance(module, Engram):
                module.embed.sparse = True
        parts.append(torch.optim.SparseAdam(groups.table, rates.table, betas=_BETAS, eps=_EPS))
    return Together(parts)
