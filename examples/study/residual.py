# SPDX-License-Identifier: Apache-2.0
"""Residual connections for comparison: plain, unconstrained hyper-connections, and what they gain.

Every kind runs in the same model: a site's coefficients are replaced, its parameters stay.

| kind | read (`pre`) | write (`post`) | mix (`comb`) |
|---|---|---|---|
| plain | mean of the streams | 1 | identity |
| hc | free (HC, arXiv 2409.19606) | free | free, starts at the identity |
| mhc | in (0, 1) | in (0, 2) | doubly stochastic (mHC, arXiv 2512.24880) |
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from modeling_dsv4 import Dsv4ForCausalLM, hyper_ops
from modeling_dsv4.hyper_connection import HyperConnection


class FreeConnection(nn.Module):
    """Unconstrained hyper-connections in the place of a site: `comb = tanh(x fn) * scale + base`.

    HC §3 with a tanh on the dynamic part; nothing keeps a product of such matrices near anything.
    """

    def __init__(self, site: HyperConnection, streams: int) -> None:
        super().__init__()
        self.fn, self.base, self.scale = site.fn, site.base, site.scale
        self.rms_eps, self.streams, self.kernels = site.rms_eps, streams, "torch"
        n = streams
        with torch.no_grad():
            self.base[:n] = 1 / n
            self.base[n : 2 * n] = 1
            self.base[2 * n :] = torch.eye(n).flatten()

    def forward(
        self, streams: torch.Tensor, handed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """[B, S, N, D] -> what `HyperConnection.forward` returns."""
        n = self.streams
        mix = torch.tanh(hyper_ops.project(streams, self.fn, self.rms_eps))
        pre, post, comb = (
            part * self.scale[i] + self.base[rows]
            for i, (part, rows) in enumerate(
                zip(
                    mix.split([n, n, n * n], -1),
                    (slice(0, n), slice(n, 2 * n), slice(2 * n, None)),
                    strict=True,
                )
            )
        )
        comb = comb.unflatten(-1, (n, n))
        x = hyper_ops.collapse(streams, pre if handed is None else handed)
        return x, pre, post, comb, streams


class PlainConnection(nn.Module):
    """A residual connection as in every transformer: all streams carry the same sum."""

    def __init__(self, site: HyperConnection, streams: int) -> None:
        super().__init__()
        self.streams, self.kernels = streams, "torch"

    def forward(
        self, streams: torch.Tensor, handed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """[B, S, N, D] -> what `HyperConnection.forward` returns."""
        n = self.streams
        pre = streams.new_full(streams.shape[:-1], 1 / n, dtype=torch.float32)
        comb = torch.eye(n).expand(*streams.shape[:-2], n, n)
        return hyper_ops.collapse(streams, pre), pre, torch.ones_like(pre), comb, streams


KINDS = {"plain": PlainConnection, "hc": FreeConnection}


def replace_sites(model: Dsv4ForCausalLM, kind: str) -> None:
    """Put another kind of connection in the place of every site; "mhc" leaves them."""
    if kind == "mhc":
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HyperConnection):
                setattr(module, name, KINDS[kind](child, model.config.hc_mult))


@contextmanager
def recorded(model: Dsv4ForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Collect `comb` [tokens, N, N] of every site that runs in the block, in their order."""
    found: list[torch.Tensor] = []

    def keep(_m: nn.Module, _a: object, output: tuple[torch.Tensor, ...]) -> None:
        found.append(output[3].detach().flatten(0, -3))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (HyperConnection, *KINDS.values())):
                stack.callback(module.register_forward_hook(keep).remove)
        yield found


def gains(combs: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Amax gains of the composite mapping (mHC §3): forward and backward, by depth.

    `h' = comb^T h`, so the signal that enters site l reaches the end through the product of all
    later transposes. Forward: the largest absolute row sum of the product of sites 0..l; backward:
    the largest absolute column sum of the product of sites l..end; means over tokens.

    Args:
        combs: [tokens, N, N] of each site.

    Returns:
        forward gain behind each site, backward gain before each.
    """
    forward, total = [], None
    for comb in combs:
        step = comb.double().transpose(-1, -2)
        total = step if total is None else step @ total
        forward.append(float(total.abs().sum(-1).amax(-1).mean()))
    backward, total = [], None
    for comb in reversed(combs):
        step = comb.double().transpose(-1, -2)
        total = step if total is None else total @ step
        backward.append(float(total.abs().sum(-2).amax(-1).mean()))
    return forward, backward[::-1]
