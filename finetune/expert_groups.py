# SPDX-License-Identifier: Apache-2.0
"""Routed experts over the tokens of all micro-batches at once, a group of experts at a time.

Each record is read once going forward and once going back, whatever the budget of the store and
the number of micro-batches: in the backward pass a group computes its outputs and at once their
gradients, then makes room for the next.

```
records of group i+1, i+2, ... on their way from disk (and of the next layer, half of the budget)
records of group i    ── held ──> outputs of its tokens ──> gradients of its tokens, of its adapters
```

Going back, groups come in the opposite order: what was read last is still there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_dsv4 import ops
from quantize.experts import StoredExperts
from quantize.store import ReadCounts

# Numbers that one token's visit to an expert leaves for its backward pass, in units of D and F.
_KEPT_D, _KEPT_F = 4, 6
# Bytes of these that one group may leave.
GROUP_BYTES = 512 << 20
# Of the budget of experts on disk, what one group may hold while the next is read.
GROUP_SHARE = 0.5
# So many records keep a disk and a CPU busy; more of them only wait for each other.
GROUP_RECORDS = 32


@dataclass
class Routed:
    """Tokens of all micro-batches at one layer's experts.

    `x` [n, D], `index` [n, K] int64, `weights` [n, K] float32.
    """

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def counts(self, num_experts: int) -> list[int]:
        """Tokens of each expert."""
        flat = self.index.flatten()
        return torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()


class _Lender:
    """Stands in for a store while a group's records are held: nothing is read, nothing leaves."""

    def __init__(self, counts: list[ReadCounts], records: dict[int, torch.Tensor]) -> None:
        self.counts, self.records = counts, records

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """Whoever holds the records has announced them."""

    def arrivals(self, layer: int, experts: Sequence[int]) -> Iterator[int]:
        return iter(experts)

    @contextmanager
    def record(self, layer: int, expert: int, last: bool = True) -> Iterator[torch.Tensor]:
        yield self.records[expert]


class LayerExperts:
    """One layer's experts, plain, packed or on disk, with adapters or without.

    Attributes:
        module: what computes: [n, D], ids and weights [n, K] -> [n, D] float32.
        base: the module without adapters.
        hit: experts that the last forward pass used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        unwrap: Any = getattr(module, "get_base_layer", None)
        self.base: Any = module if unwrap is None else unwrap()
        self.hit: list[int] = []

    @property
    def on_disk(self) -> bool:
        """Whether records have to be read."""
        return isinstance(self.base, StoredExperts) and self.base.store is not None

    def foresee(self, experts: Sequence[int], sure: bool) -> None:
        """Start to read what this layer will want, behind what the running one wants."""
        if self.on_disk and experts:
            self.base.store.foresee(self.base.layer, experts, sure)

    @torch.no_grad()
    def forward(self, routed: Routed, ahead: Callable[[], None] | None = None) -> torch.Tensor:
        """Sum of every token's experts, [n, D] float32.

        `ahead` is called once the layer's own reads are under way; it may foresee others.
        """
        out = torch.zeros_like(ops.fp32(routed.x))
        counts = routed.counts(self.base.num_experts)
        self.hit = [e for e, count in enumerate(counts) if count]
        for group in self._groups(counts, self.hit, ahead):
            with self._lent(group, routed.x.device):
                for token, index in self._rows(routed, group):
                    y = self.module(routed.x[token], index, routed.weights[token])
                    out.index_add_(0, token, y.to(out.dtype))
        return out

    def backward(
        self, routed: Routed, gradient: torch.Tensor, ahead: Callable[[], None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs again, and gradients; adapters get theirs.

        Args:
            routed: as in the forward pass.
            gradient: [n, D] float32, of the outputs.
            ahead: as in the forward pass.

        Returns:
            outputs [n, D] float32; gradients of x [n, D] float32 and of the weights [n, K].
        """
        out = torch.zeros_like(ops.fp32(routed.x))
        dx, dw = torch.zeros_like(out), torch.zeros_like(routed.weights)
        counts = routed.counts(self.base.num_experts)
        hit = [e for e, count in enumerate(counts) if count]
        for group in self._groups(counts, hit[::-1], ahead):
            with self._lent(group, routed.x.device):
                for token, index in self._rows(routed, group):
                    x = routed.x[token].requires_grad_()
                    weights = routed.weights[token].requires_grad_()
                    with torch.enable_grad():
                        y = self.module(x, index, weights)
                    y.backward(gradient[token].to(y.dtype))
                    assert x.grad is not None
                    assert weights.grad is not None
                    out.index_add_(0, token, y.detach().to(out.dtype))
                    dx.index_add_(0, token, x.grad.to(dx.dtype))
                    dw.index_add_(0, token, weights.grad)
        return out, dx, dw

    def _rows(
        self, routed: Routed, group: list[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens [m] of a group's experts and their ids [m, K], those of other groups left out."""
        e = self.base.num_experts
        inside = torch.zeros(e + 1, dtype=torch.bool, device=routed.index.device)
        inside[torch.tensor(group, device=inside.device)] = True
        mine = inside[routed.index.clamp(max=e)]
        yield from self._bounded(mine, torch.where(mine, routed.index, e))

    def _bounded(
        self, mine: torch.Tensor, index: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """In parts whose activations fit: one expert alone may have too many tokens."""
        token = mine.any(1).nonzero().flatten()
        pairs = mine[token].sum(1).cumsum(0)
        parts = (pairs - 1) // max(1, GROUP_BYTES // self._pair_bytes())
        for part in token.split(torch.bincount(parts).tolist()):
            if len(part):
                yield part, index[part]

    def _pair_bytes(self) -> int:
        d, f = self.base.hidden_size, self.base.intermediate_size
        return 4 * (_KEPT_D * d + _KEPT_F * f)

    def _groups(
        self, counts: list[int], order: list[int], ahead: Callable[[], None] | None
    ) -> list[list[int]]:
        """Experts that are computed together: all, or as many as a part of the budget holds."""
        if not order:
            return []
        if not self.on_disk:
            return [order]
        layout, budget = self.base.layout, self.base.store.budget
        groups: list[list[int]] = [[]]
        held = rows = 0
        for e in order:
            size = layout.of(e).nbytes
            full = held + size > GROUP_SHARE * budget or len(groups[-1]) == GROUP_RECORDS
            full = full or (rows + counts[e]) * self._pair_bytes() > GROUP_BYTES
            if groups[-1] and full:
                groups.append([])
                held = rows = 0
            groups[-1].append(e)
            held, rows = held + size, rows + counts[e]
        # All of the layer, in order: its reads go on while the first group is computed.
        self.base.store.announce(self.base.layer, order)
        if ahead is not None:
            ahead()
        return groups

    @contextmanager
    def _lent(self, group: list[int], device: torch.device) -> Iterator[None]:
        """Hold a group's records, on the device that computes."""
        if not self.on_disk:
            yield
            return
        base, store, tier = self.base, self.base.store, self.base.tier
        with ExitStack() as held:
            records = {e: held.enter_context(store.record(base.layer, e)) for e in group}
            records = _on_device(records, device)
            base.store, base.tier = _Lender(store.counts, records), None
            try:
                yield
            finally:
                base.store, base.tier = store, tier


def _on_device(records: dict[int, torch.Tensor], device: torch.device) -> dict[int, torch.Tensor]:
    """Records copied to a GPU on a stream of their own, beside the group before's work."""
    if device.type != "cuda":
        return records
    copies, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = {e: record.to(device, non_blocking=True) for e, record in records.items()}
    # Waited for by the host: the record may leave its buffer once it is there.
    copies.synchronize()
    for record in moved.values():
        record.record_stream(now)
    return moved
