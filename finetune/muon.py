# SPDX-License-Identifier: Apache-2.0
"""Muon for matrices of any number of axes, and several optimizers as one.

Muon (Jordan et al., 2024) steps along the nearest orthogonal matrix of the momentum, so every
direction of a weight learns equally fast. torch.optim.Muon takes two axes only and one matrix at a
time; routed experts have three, and all matrices of one shape are orthogonalised in one batch here.
On matrices of two axes both take the same steps.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

# Quintic iteration whose slope at zero is steep: singular values end within [0.7, 1.2].
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of [n, rows, columns], by Newton-Schulz in bfloat16."""
    a, b, c = _QUINTIC
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.transpose(-1, -2)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.transpose(-1, -2)).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; parameters are [..., rows, columns], one matrix per leading index.

    A parameter in `halves` stacks two matrices along its rows (gate over up), stepped apart.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        halves: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._halves = {id(p) for p in halves}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            batches: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                matrices = self._matrices(p, nesterov)
                batches[matrices.shape[1:]].append((p, matrices))
            for shape, batch in batches.items():
                flat = orthogonalize(torch.cat([m for _, m in batch]))
                # A step of the same root mean square whatever the shape.
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), step in zip(batch, flat.split([len(m) for _, m in batch]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(step.reshape(p.shape), alpha=scale)

    def _matrices(self, p: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        rows = p.shape[-2] // (2 if id(p) in self._halves else 1)
        return value.reshape(-1, rows, p.shape[-1])


class Together(torch.optim.Optimizer):
    """Several optimizers as one: a Trainer, a schedule and a checkpoint know a single one.

    Groups and states are shared with the parts, in their order: a rate set here is theirs.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self._sizes = [len(part.param_groups) for part in self.parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.state = self.state
            part.param_groups = list(islice(groups, size))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back, the parts with it."""
        super().load_state_dict(state_dict)
        self._share()
