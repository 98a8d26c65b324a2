# SPDX-License-Identifier: Apache-2.0
"""What an adapter layer is whose low ranks come in banks, one for each group or expert.

They stand *beside* the frozen weight, in float32: `y = x W^T + s (x A^T) B^T`. Materializing
W + BA in bfloat16 would round away most of a small update, and would unpack every expert of a
layer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from modeling_dsv4 import ops

from .grouped import bank_linear

if TYPE_CHECKING:
    # PEFT is untyped: a checker would take what it puts on a layer for tensors.
    Layer = Any
else:
    Layer = nn.Module

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# PEFT's word for rows of a batch that no adapter touches.
BASE = "__base__"


class Bank(nn.Module):
    """One matrix per group or expert: weight [n, out, in]."""

    def __init__(self, count: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n, in] -> [..., n, out]."""
        return torch.einsum("...ni,noi->...no", x, self.weight)

    def rows(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows [M, in], sorted by expert, `counts` of each -> [M, out]."""
        return bank_linear(x, self.weight, counts)


# By adapter name. At run time a ModuleDict.
Banks = Mapping[str, Bank]


def reset_pair(a: Bank, b: Bank, init: bool | str) -> None:
    """Start like PEFT does: A uniform over its inputs, B zero; False makes both uniform."""
    if init not in (True, False):
        raise ValueError(f"init_lora_weights: wanted true or false for this layer, got {init!r}")
    nn.init.uniform_(a.weight, -1, 1)
    a.weight.data.mul_(a.weight.shape[-1] ** -0.5)
    if init:
        nn.init.zeros_(b.weight)
    else:
        nn.init.uniform_(b.weight, -1, 1)
        b.weight.data.mul_(b.weight.shape[-1] ** -0.5)


class BesideLora(Layer, LoraLayer):
    """What the two banked layers share: settings of an adapter, and merging."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._make_containers()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _make_containers(self) -> None:
        """Add what a subclass keeps per adapter beyond `lora_A` and `lora_B`."""

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or replace the one of that name."""
        if r < 1:
            raise ValueError(f"r: wanted at least 1, got {r}")
        if config.lora_bias:
            raise ValueError("lora_bias: this layer has no bias; leave it off")
        # Raises for variants (DoRA and the like) that need the weight as one matrix.
        self.resolve_lora_variant(config=config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_bias[adapter_name] = False
        self.use_dora[adapter_name] = False
        self._make_banks(adapter_name, r, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        raise NotImplementedError

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype]:
        # The base may hold bytes, or nothing at all while it is on disk: never follow its dtype,
        # and follow earlier adapters' device where it has none.
        tensor = next(iter((*base_layer.parameters(), *base_layer.buffers())), None)
        if tensor is None:
            tensor = next(self.parameters())
        return tensor.device, torch.float32

    def place(self, device: torch.device) -> None:
        """Move all adapters to a device, unless they are empty yet."""
        for banks in (bank for pair in self._bank_pairs() for bank in pair):
            for bank in banks.values():
                if not bank.weight.is_meta:
                    bank.to(device)

    def _active(self) -> list[str]:
        """Adapters that act now; none while the layer is switched off or merged."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.lora_A]

    def _who_acts(
        self, x: torch.Tensor, adapter_names: list[str] | None
    ) -> dict[str, torch.Tensor | None]:
        """Adapters that act, and on which rows [len(x)] bool; None: on all.

        `adapter_names` gives each row of a batch its adapter; a row is len(x) / rows places of x,
        together.
        """
        if adapter_names is None or self.disable_adapters:
            return dict.fromkeys(self._active())
        if self.merged:
            raise ValueError(
                "adapter_names: wanted adapters beside the weights, got merged ones "
                f"({', '.join(self.merged_adapters)}); call unmerge_adapter first"
            )
        if not adapter_names or len(x) % len(adapter_names):
            raise ValueError(
                f"adapter_names: wanted one name for each row of the batch, got "
                f"{len(adapter_names)} names for {len(x)} rows or tokens"
            )
        each = len(x) // len(adapter_names)
        found: dict[str, torch.Tensor | None] = {}
        # In the order in which they first appear.
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.lora_A:
                mask = torch.tensor([n == name for n in adapter_names], device=x.device)
                found[name] = mask.repeat_interleave(each)
        return found

    def base_weights(self) -> list[nn.Parameter]:
        """The base's matrices, one row of banks each.

        Raises:
            ValueError: they are packed, so that adding to them would round the update away.
        """
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> list[torch.Tensor]:
        """`s B A` for each of `base_weights`, [n, out, in] in float32."""
        return [
            (b[adapter].weight @ a[adapter].weight) * self.scaling[adapter]
            for a, b in self._bank_pairs()
        ]

    def _bank_pairs(self) -> Sequence[tuple[Banks, Banks]]:
        return [(self.lora_A, self.lora_B)]

    def _matrices(self, name: str, weight: torch.Tensor) -> Iterable[torch.Tensor]:
        """Views of a base's weight [n * out, in] or [n, out, in], one for each matrix of a bank."""
        return weight.view(len(self.lora_A[name].weight), -1, weight.shape[-1])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base's weights, computed in float32, rounded once."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add(name, 1, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged deltas out again; exact up to the weights' rounding."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1, safe=False)

    @torch.no_grad()
    def _add(self, name: str, sign: int, safe: bool) -> None:
        scale = sign * self.scaling[name]
        pairs = zip(self.base_weights(), self._bank_pairs(), strict=True)
        for weight, (a, b) in pairs:
            # One matrix at a time: a layer's experts in float32 can outgrow the memory.
            matrices = zip(
                self._matrices(name, weight.data),
                a[name].weight,
                b[name].weight,
                strict=True,
            )
            for matrix, down, up in matrices:
                merged = ops.fp32(matrix) + scale * (up @ down).to(matrix.device)
                if safe and not bool(merged.isfinite().all()):
                    raise ValueError(f"adapter {name!r}: wanted finite merged weights, got NaN")
                matrix.copy_(merged)


def plain_weight(base: nn.Module, name: str) -> nn.Parameter:
    """A base's weight, if deltas can be added to it.

    Raises:
        ValueError: it is packed.
    """
    weight = getattr(base, name, None)
    if isinstance(weight, nn.Parameter) and weight.dtype in PLAIN:
        return weight
    raise ValueError(
        f"merge: wanted plain weights, got packed ones ({type(base).__name__}), whose grid would "
        "round most of the update away; keep the adapter beside the model, or load the base with "
        "dequantize=True and merge into that"
    )
