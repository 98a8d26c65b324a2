# SPDX-License-Identifier: Apache-2.0
"""The release's rounding of activations and caches, as a run-time switch.

The released models were trained with these roundings (V4 §2.4; inference/model.py), so each is a
floor below which nothing can be told apart. Gradients pass straight through.

| place | V4 | V4.1 |
|---|---|---|
| input of every linear map stored in FP8 or FP4 | FP8, 128 channels | FP8, 32 channels |
| window key, after rotation | FP8, 64, all but the rotary channels | FP8, 32, all channels |
| compressed entry, after rotation | as the window key | FP4 with E4M3 scales, 16, all channels |
| index query and key, after rotation | Hadamard, then FP4, 32 | FP4, 32 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .attention import Dsv4Attention
from .configuration_dsv4 import Dsv4Config
from .formats import hadamard, simulate_fp4, simulate_fp4_e4m3, simulate_fp8
from .indexer import Indexer
from .moe import Dsv4Experts, ExpertsBase, Fp8Inputs
from .storage import Fp8Linear

MODES = ("off", "official", "activations")


@dataclass(frozen=True)
class Rounding:
    """How one family rounds; every method maps [..., C] to [..., C].

    V4 leaves `plain_channels` out of its keys' rounding and turns index vectors by Hadamard.
    """

    activation_group: int
    key_group: int
    plain_channels: int
    entries_in_fp4: bool
    turns_index: bool

    @classmethod
    def of(cls, config: Dsv4Config) -> Rounding:
        """The rounding of a configuration's family, told by its indexer."""
        if config.index_key == "compressor":
            return cls(128, 64, config.qk_rope_head_dim, False, config.index_hadamard)
        return cls(32, 32, 0, True, config.index_hadamard)

    @property
    def activation(self) -> Fp8Inputs:
        return Fp8Inputs(self.activation_group)

    def key(self, k: torch.Tensor) -> torch.Tensor:
        rounded = k.shape[-1] - self.plain_channels
        return torch.cat((simulate_fp8(k[..., :rounded], self.key_group), k[..., rounded:]), -1)

    def entry(self, e: torch.Tensor) -> torch.Tensor:
        return simulate_fp4_e4m3(e, 16) if self.entries_in_fp4 else self.key(e)

    def index(self, x: torch.Tensor) -> torch.Tensor:
        return simulate_fp4(hadamard(x) if self.turns_index else x, 32)


def set_simulation(model: nn.Module, config: Dsv4Config, mode: str) -> None:
    """Switch the rounding of all layers on or off; nothing is saved.

    Args:
        model: whose modules are told.
        config: of it.
        mode: "official" everything, "activations" inputs of packed linear maps and experts
            alone, "off" nothing.
    """
    if mode not in MODES:
        raise ValueError(f"simulation: wanted one of {', '.join(MODES)}, got {mode!r}")
    rounding = None if mode == "off" else Rounding.of(config)
    for module in model.modules():
        if isinstance(module, Dsv4Attention | Indexer):
            module.rounding = rounding if mode == "official" else None
        elif isinstance(module, Fp8Linear) or (
            isinstance(module, ExpertsBase) and not isinstance(module, Dsv4Experts)
        ):
            module.round_input = None if rounding is None else rounding.activation
