# SPDX-License-Identifier: Apache-2.0
"""Traces of routing: which experts every token chose in every layer, as a small file.

A trace holds for any budget and policy, since where experts are changes no bit of a result.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_dsv4.moe import Dsv4Router


@dataclass
class Trace:
    """Expert ids of tokens in the order in which they passed.

    Attributes:
        choices: [L, tokens, K] int16 or wider.
        num_experts: E of a layer.
    """

    choices: torch.Tensor
    num_experts: int

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (layer, ids) as decoding asks for them: layer by layer for each token."""
        layers = self.choices.shape[0]
        for token in self.choices.transpose(0, 1).tolist():
            yield from zip(range(layers), token, strict=True)

    def save(self, path: str | Path) -> None:
        """Write it as safetensors; the file appears under its name only when complete."""
        target = Path(path)
        beside = target.with_name(target.name + ".tmp")
        counted = torch.tensor(self.num_experts)
        save_file({"choices": self.choices.contiguous(), "num_experts": counted}, beside)
        beside.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Inverse of `save`.

        Raises:
            ValueError: the file holds something else.
        """
        found = load_file(path)
        if set(found) != {"choices", "num_experts"} or found["choices"].dim() != 3:
            raise ValueError(f"{path}: wanted a trace of routing, got {sorted(found)}")
        return cls(found["choices"], int(found["num_experts"]))


class Recorder:
    """What routers chose while `record_routing` was open."""

    def __init__(self, num_experts: int, layers: int) -> None:
        self._num_experts = num_experts
        self._heard: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def hear(self, layer: int, indices: torch.Tensor) -> None:
        """Add tokens' choices [n, K] of one layer."""
        self._heard[layer].append(indices.detach().to("cpu", torch.int16))

    def trace(self) -> Trace:
        """Everything so far.

        Raises:
            ValueError: layers that saw different numbers of tokens.
        """
        parts = [torch.cat(heard) for heard in self._heard if heard]
        if len({len(part) for part in parts}) != 1:
            sizes = [sum(map(len, heard)) for heard in self._heard]
            raise ValueError(f"wanted as many tokens in every layer, got {sizes}")
        return Trace(torch.stack(parts), self._num_experts)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recorder]:
    """Listen to the routers of a model's layers, draft stages left out.

    ```python
    with record_routing(model) as recorder:
        model(ids, logits_to_keep=0)
    recorder.trace().save("routing.safetensors")
    ```
    """
    named = model.named_modules()
    routers = [m for n, m in named if isinstance(m, Dsv4Router) and not n.startswith("mtp.")]
    if not routers:
        raise ValueError("wanted a model with routed experts, found no router")
    recorder = Recorder(routers[0].weight.shape[0], len(routers))
    handles = []
    for layer, router in enumerate(routers):

        def hear(
            _: nn.Module, __: object, out: tuple[torch.Tensor, ...], layer: int = layer
        ) -> None:
            recorder.hear(layer, out[2])

        handles.append(router.register_forward_hook(hear))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def zipf_trace(
    layers: int,
    experts: int,
    per_token: int,
    tokens: int,
    exponent: float,
    repeat: float,
    generator: torch.Generator,
) -> Trace:
    """Draw a trace: popularity by Zipf's law in an order of each layer's own, and some memory.

    Args:
        layers, experts, per_token, tokens: L, E, K and how many tokens.
        exponent: popularity of the r-th expert is r^-exponent.
        repeat: share of the choices that are kept from the token before.
        generator: of the draws.
    """
    popularity = torch.arange(1, experts + 1, dtype=torch.float64).pow(-exponent).log()
    out = torch.empty(layers, tokens, per_token, dtype=torch.int16)
    for layer in range(layers):
        ranks = torch.randperm(experts, generator=generator)
        # Gumbel's trick draws without putting back.
        noise = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
        score = popularity[ranks] - (-noise.log()).log()
        fresh = score.argsort(1, descending=True)[:, : 2 * per_token].to(torch.int16).tolist()
        stay = (torch.rand(tokens, per_token, generator=generator) < repeat).tolist()
        before: list[int] = []
        for t in range(tokens):
            kept = [e for e, s in zip(before, stay[t], strict=False) if s]
            new = itertools.islice((e for e in fresh[t] if e not in kept), per_token - len(kept))
            before = [*kept, *new]
            out[layer, t] = torch.tensor(before, dtype=torch.int16)
    return Trace(out, experts)
