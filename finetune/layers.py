# SPDX-License-Identifier: Apache-2.0
"""Adapter layers for the module kinds that PEFT does not know.

| base | weight | adapter |
|---|---|---|
| grouped linear (`o_a_proj`) | [G * O, in] | A [G, r, in], B [G, O, r]: one low rank per group |
| routed experts | gate_up [E, 2F, D], down [E, D, F] | A and B per expert, for both projections |
| linear with packed weights | bytes and scales | A [r, in], B [out, r], as PEFT has it |

All stand *beside* the frozen weight, in float32: `y = x W^T + s (x A^T) B^T`. Materializing W + BA
in bfloat16 would round away most of a small update, and would unpack every expert of a layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from modeling_dsv4 import ops
from modeling_dsv4.moe import Dsv4Experts, ExpertsBase
from modeling_dsv4.storage import GroupedLinear
from quantize.experts import StoredExperts

if TYPE_CHECKING:
    # PEFT is untyped: a checker would take what it puts on a layer for tensors.
    Layer = Any
else:
    Layer = nn.Module

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        if ops.can_group(self.weight):
            return ops.grouped_linear(x, self.weight, counts)
        # Unbound once: taking each slice by itself would make its gradient as large as the bank.
        parts = zip(x.split(counts), self.weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, weight) for rows, weight in parts])


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
                weight.data.view(len(a[name].weight), -1, weight.shape[-1]),
                a[name].weight,
                b[name].weight,
                strict=True,
            )
            for matrix, down, up in matrices:
                merged = ops.fp32(matrix) + scale * (up @ down).to(matrix.device)
                if safe and not bool(merged.isfinite().all()):
                    raise ValueError(f"adapter {name!r}: wanted finite merged weights, got NaN")
                matrix.copy_(merged)


class LoraGroupedLinear(BesideLora):
    """A grouped linear layer with one low rank per group: x [..., G, in] -> [..., G, O]."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        groups = base.groups
        p = config.lora_dropout
        self.lora_dropout[name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_A[name] = Bank(groups, r, base.in_features)
        self.lora_B[name] = Bank(groups, base.out_features // groups, r)
        reset_pair(self.lora_A[name], self.lora_B[name], config.init_lora_weights)

    def base_weights(self) -> list[nn.Parameter]:
        return [plain_weight(self.get_base_layer(), "weight")]

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """[..., G, in] -> [..., G, O]; `adapter_names` gives each row of a batch its adapter."""
        self._check_forward_args(x, adapter_names=adapter_names)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        # Asked first: it may take merged deltas out of the base.
        active = self._active()
        result = self.base_layer(x)
        for name in active:
            a, b = self.lora_A[name], self.lora_B[name]
            low = a(self.lora_dropout[name](x.to(a.weight.dtype)))
            result = (result + b(low) * self.scaling[name]).to(result.dtype)
        return result


class LoraExperts(BesideLora):
    """Routed experts, whatever holds them, with a low rank beside each projection of each.

    ```
    x ─┬─ gate_up of expert e (frozen) ─ + ─ SwiGLU ─┬─ down of expert e (frozen) ─ + ─ sum
       └─ A_e ── B_e ────────────────────┘           └─ A_e ── B_e ─────────────────┘
    ```

    The frozen side opens one expert at a time; the low ranks run over all rows at once. There is
    no dropout here: an expert sees few tokens as it is.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_down_A", "lora_down_B")

    def _make_containers(self) -> None:
        self.lora_down_A: Any = nn.ModuleDict()
        self.lora_down_B: Any = nn.ModuleDict()

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.hidden_size, 2 * module.intermediate_size

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        e, d, f = base.num_experts, base.hidden_size, base.intermediate_size
        self.lora_dropout[name] = nn.Identity()
        self.lora_A[name], self.lora_B[name] = Bank(e, r, d), Bank(e, 2 * f, r)
        self.lora_down_A[name], self.lora_down_B[name] = Bank(e, r, f), Bank(e, d, r)
        for a, b in self._bank_pairs():
            reset_pair(a[name], b[name], config.init_lora_weights)

    def _bank_pairs(self) -> Sequence[tuple[Banks, Banks]]:
        return [(self.lora_A, self.lora_B), (self.lora_down_A, self.lora_down_B)]

    def base_weights(self) -> list[nn.Parameter]:
        base = self.get_base_layer()
        return [plain_weight(base, name) for name in ("gate_up_proj", "down_proj")]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """[n, D], ids and weights [n, K] -> [n, D] float32, like every store of experts."""
        if adapter_names is not None:
            raise NotImplementedError(
                "adapter_names: routed experts see tokens, not rows of a batch, so batches of "
                "mixed adapters are not there yet; run one adapter at a time"
            )
        base = self.base_layer
        active = self._active()
        if not active:
            return base(hidden_states, top_k_index, top_k_weights)
        if isinstance(base, StoredExperts):
            base.counts.tokens += len(hidden_states)
        rows = ops.group_by_expert(top_k_index, base.num_experts)
        x, weights = hidden_states[rows.token], top_k_weights.flatten()[rows.order]
        first = self._low_ranks(x, rows.counts, active, self.lora_A, self.lora_B)
        if isinstance(base, Dsv4Experts) and ops.can_group(base.gate_up_proj):
            h = _sum(ops.grouped_linear(x, base.gate_up_proj, rows.counts), first)
            u = ops.swiglu(h, base.swiglu_limit, weights)
            y = ops.grouped_linear(u, base.down_proj, rows.counts)
        elif len(x) and (by_kernels := base.grouped(x, top_k_index)) is not None:
            gate_up, down = by_kernels
            u = ops.swiglu(_sum(gate_up(x), first), base.swiglu_limit, weights)
            y = down(u)
        else:
            u, y = _run_frozen(base, x, first, weights, rows.counts)
        second = self._low_ranks(u, rows.counts, active, self.lora_down_A, self.lora_down_B)
        return ops.scatter_rows(_sum(y, second), rows.token, hidden_states)

    def expect(self, top_k_index: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Pass on what the router has chosen."""
        self.get_base_layer().expect(top_k_index, hidden_states)

    def foresee(self, top_k_index: torch.Tensor, sure: bool = True) -> None:
        """Pass on what the router will choose."""
        self.get_base_layer().foresee(top_k_index, sure)

    def _low_ranks(
        self,
        x: torch.Tensor,
        counts: list[int],
        active: list[str],
        a: Banks,
        b: Banks,
    ) -> torch.Tensor:
        """Sum over the adapters of `s (x A_e^T) B_e^T`: rows [M, in] -> [M, out] float32."""
        parts = []
        for name in active:
            low = a[name].rows(x.to(a[name].weight.dtype), counts)
            parts.append(b[name].rows(low, counts) * self.scaling[name])
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _sum(y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Add in the wider type, rounded once to y's."""
    return (y + delta).to(y.dtype)


def _run_frozen(
    base: ExpertsBase,
    x: torch.Tensor,
    first: torch.Tensor,
    weights: torch.Tensor,
    counts: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk the hit experts once: rows [M, D] -> inner [M, F] and their down projection [M, D].

    `first` [M, 2F] is added before the activation; the caller adds what belongs after `down`,
    so that each expert is opened, and read, one time.
    """
    hit = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in hit]
    base.prepare(hit)
    inner, outer = [], []
    for expert, xe, de, we in zip(
        hit, x.split(sizes), first.split(sizes), weights.split(sizes), strict=True
    ):
        gate_up, down = base.open_expert(expert)
        inner.append(ops.swiglu(_sum(gate_up(xe), de), base.swiglu_limit, we))
        outer.append(down(inner[-1]))
    return torch.cat(inner), torch.cat(outer)


class LoraPackedLinear(PeftLinear):
    """PEFT's linear adapter beside a weight that is stored in bytes: float32, never merged."""

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype]:
        # PEFT would make the adapter float8, since it follows the weight's dtype.
        tensor = next(base_layer.parameters(), next(base_layer.buffers(), None))
        return None if tensor is None else tensor.device, torch.float32

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        plain_weight(self.get_base_layer(), "weight")


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


def is_packed_linear(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in another form than plain numbers."""
    if not isinstance(module, nn.Linear):
        return False
    weight = getattr(module, "weight", None)
    return not isinstance(weight, torch.Tensor) or weight.dtype not in PLAIN


LAYER_KINDS: tuple[tuple[type[nn.Module], type[BesideLora]], ...] = (
    (GroupedLinear, LoraGroupedLinear),
    (ExpertsBase, LoraExperts),
)
