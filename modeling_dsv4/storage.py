# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a release's storage formats and compute with them.

Codes and scales are frozen parameters that no cast touches: `.to(bfloat16)` and `.float()` move
them between devices at most. Every product works in the dtype of its input on freshly dequantized
rows, a tile at a time, and dequantizes again in the backward pass: the wide weight never exists
as a whole and is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from . import linear_ops
from .configuration_dsv4 import Dsv4Config
from .formats import (
    FP8_ROWS32,
    Shape,
    WeightFormat,
    fp8_block_format,
    get_format,
)
from .kernel_choice import use_cpu_linear, use_triton
from .layers import Float32Head
from .moe import Dsv4Experts, ExpertsBase, Linear, StackedWeight, Tiles
from .ops import fp32
from .tiled_products import frozen_linear, packed_linear, weight_tiles
from .weight_map import opaque_inventory


class FrozenStorage(nn.Module):
    """A module whose own tensors are frozen, and keep dtype and bytes through every cast."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Asked of an empty tensor first, so that a cast never makes a wide copy.
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype is tensor.dtype else tensor.to(probe.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(move, recurse=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # transformers loads every float as a parameter that wants a gradient.
        if param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)


def _frozen(dtype: torch.dtype, shape: Shape) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


# --- dense weights in FP8 blocks ----------------------------------------------------------------


class GroupedLinear(nn.Module):
    """One linear map per group: [..., G, in] -> [..., G, O], the groups' rows in one weight.

    Not an `nn.Linear`: its input has one axis more, and adapters for plain linears would be wrong.
    """

    weight: torch.Tensor
    kernels = "auto"  # see kernel_choice.py

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        """Make groups of `in_features` inputs each; `out_features` = G * O counts all groups."""
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self._make_weight()

    def _make_weight(self) -> None:
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features))

    def forward(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """[..., G, in] -> [..., G, O]; `plus` [..., G, O] is added before the one rounding."""
        return linear_ops.grouped_linear(x, self.weight, self.groups, plus, self.kernels)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, groups={self.groups}"


class _Fp8Blocks(FrozenStorage):
    """What the two FP8 maps share: weight [out, in] E4M3, weight_scale_inv E8M0, one a block."""

    weight: torch.Tensor
    weight_scale_inv: torch.Tensor
    format: WeightFormat

    def _make_parts(self, shape: Shape, block: int) -> None:
        self.format = fp8_block_format(block)
        self.kernels = "auto"  # see kernel_choice.py
        parts = self.format.parts(shape)
        self.weight = _frozen(*parts[""])
        self.weight_scale_inv = _frozen(*parts["_scale"])

    def parts(self) -> dict[str, torch.Tensor]:
        return {"": self.weight, "_scale": self.weight_scale_inv}

    def _by_kernel(
        self, x: torch.Tensor, groups: int | None, plus: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Few rows [..., in], or [..., G, in], by a kernel; None where it does not compute this."""
        if use_cpu_linear(self.kernels, x, self.weight, plus, groups=groups or 1):
            return self._in_c(x, groups, plus)
        found = self._by_triton(x, groups)
        return found if found is None or plus is None else (fp32(found) + plus).to(x.dtype)

    def _in_c(
        self, x: torch.Tensor, groups: int | None, plus: torch.Tensor | None
    ) -> torch.Tensor | None:
        from .cpu import linear as in_c

        if not in_c.covers(self.weight_scale_inv, self.format.group):
            return None
        if groups is not None:
            x, plus = x.flatten(-2), None if plus is None else plus.flatten(-2)
        block = self.format.group
        y = in_c.linear(x, self.weight, self.weight_scale_inv, plus, block=block)
        return y if groups is None else y.unflatten(-1, (groups, -1))

    def _by_triton(self, x: torch.Tensor, groups: int | None) -> torch.Tensor | None:
        if not use_triton(self.kernels, x):
            return None
        from .kernels import experts

        if not experts.covers_linear(x, self.parts(), self.format, groups or 1):
            return None
        tail = x.shape[-1:] if groups is None else x.shape[-2:]
        y = experts.linear(x.reshape(-1, *tail), self.parts(), self.format)
        return y.view(*x.shape[:-1], -1)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Round a wide weight [out, in] into place."""
        packed = self.format.pack(weight)
        self.weight = nn.Parameter(packed[""], requires_grad=False)
        self.weight_scale_inv = nn.Parameter(packed["_scale"], requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in], exact in bfloat16 and wider."""
        return self.format.unpack(self.parts(), dtype)


class Fp8Linear(_Fp8Blocks, nn.Linear):
    """A bias-free linear map with its weight in FP8 blocks; [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int, block: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.round_input: Linear | None = None  # see simulation.py
        self._make_parts((out_features, in_features), block)

    @classmethod
    def from_plain(cls, linear: nn.Linear, block: int) -> Fp8Linear:
        """Round the weight of a linear map without bias."""
        _refuse_bias(linear)
        with torch.device("meta"):
            out = cls(linear.in_features, linear.out_features, block)
        out.set_weight(linear.weight)
        return out

    def to_plain(self, dtype: torch.dtype) -> nn.Linear:
        out = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        out.weight = nn.Parameter(self.dequantized(dtype))
        return out

    def forward(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in] -> [..., out]; `plus` [..., out] is added, where it can before rounding."""
        if self.round_input is not None:
            x = self.round_input(x)
        found = self._by_kernel(x, None, plus)
        return packed_linear(x, self.parts(), self.format, plus) if found is None else found

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}"


class Fp8GroupedLinear(_Fp8Blocks, GroupedLinear):
    """`GroupedLinear` with its weight in FP8 blocks, which may reach across groups."""

    def __init__(self, in_features: int, out_features: int, groups: int, block: int) -> None:
        self._block = block
        GroupedLinear.__init__(self, in_features, out_features, groups)

    def _make_weight(self) -> None:
        self._make_parts((self.out_features, self.in_features), self._block)

    @classmethod
    def from_plain(cls, linear: GroupedLinear, block: int) -> Fp8GroupedLinear:
        """Round the weight of a plain one."""
        with torch.device("meta"):
            out = cls(linear.in_features, linear.out_features, linear.groups, block)
        out.set_weight(linear.weight)
        return out

    def to_plain(self, dtype: torch.dtype) -> GroupedLinear:
        with torch.device("meta"):
            out = GroupedLinear(self.in_features, self.out_features, self.groups)
        out.weight = nn.Parameter(self.dequantized(dtype))
        return out

    def forward(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        found = self._by_kernel(x, self.groups, plus)
        if found is not None:
            return found
        o, parts = self.out_features // self.groups, self.parts()

        def tiles(group: int) -> Tiles:
            at = group * o, (group + 1) * o
            return lambda dtype: (self.format.unpack_rows(parts, *at, dtype),)

        y = [
            frozen_linear(x[..., g, :], tiles(g), None if plus is None else plus[..., g, :])
            for g in range(self.groups)
        ]
        return torch.stack(y, dim=-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format.name}"


def _refuse_bias(linear: nn.Linear) -> None:
    if linear.bias is not None:
        raise ValueError("wanted a linear map without bias to store in FP8, got one with a bias")


# --- routed experts, Engram rows, weights that are only carried ---------------------------------


class PackedExperts(FrozenStorage, ExpertsBase):
    """Routed experts that stay packed; each hit expert is dequantized in tiles as it is used.

    `gate_up_proj` and `down_proj` hold codes [E, 2F, ...] and [E, D, ...], `*_scale` the scales.
    w1 and w3 are packed apart and stacked, so a block never reaches from one into the other.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        swiglu_limit: float | None,
        weight_format: WeightFormat | str = "fp4",
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, swiglu_limit)
        self.format = get_format(weight_format)
        half = self.format.parts((num_experts, intermediate_size, hidden_size))
        for suffix, (dtype, (e, rows, *rest)) in half.items():
            setattr(self, f"gate_up_proj{suffix}", _frozen(dtype, (e, 2 * rows, *rest)))
        down = self.format.parts((num_experts, hidden_size, intermediate_size))
        for suffix, (dtype, shape) in down.items():
            setattr(self, f"down_proj{suffix}", _frozen(dtype, shape))
        self._suffixes = tuple(down)

    @classmethod
    def from_plain(
        cls, experts: Dsv4Experts, weight_format: WeightFormat | str = "fp4"
    ) -> PackedExperts:
        """Round plain experts."""
        with torch.device("meta"):
            out = cls(
                experts.num_experts,
                experts.hidden_size,
                experts.intermediate_size,
                experts.swiglu_limit,
                weight_format,
            )
        packed = {
            "gate_up_proj": out.format.pack(experts.gate_up_proj.detach().unflatten(1, (2, -1))),
            "down_proj": out.format.pack(experts.down_proj.detach()),
        }
        for name, parts in packed.items():
            for suffix, part in parts.items():
                part = part.flatten(1, 2) if part.dim() == 4 else part
                setattr(out, name + suffix, nn.Parameter(part, requires_grad=False))
        return out

    def to_plain(self, dtype: torch.dtype) -> Dsv4Experts:
        with torch.device("meta"):
            out = Dsv4Experts(
                self.num_experts, self.hidden_size, self.intermediate_size, self.swiglu_limit
            )
        weights = [self.expert_weights(e, dtype) for e in range(self.num_experts)]
        gate_up, down = (torch.stack(w) for w in zip(*weights, strict=True))
        out.gate_up_proj, out.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        return out

    def expert_parts(self, expert: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Parts of one expert's [2, F, D] (w1, then w3) and [D, F]."""
        gate_up = {
            suffix: getattr(self, f"gate_up_proj{suffix}")[expert].unflatten(0, (2, -1))
            for suffix in self._suffixes
        }
        return gate_up, {s: getattr(self, f"down_proj{s}")[expert] for s in self._suffixes}

    def expert_weights(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert dequantized: [2F, D] and [D, F]."""
        gate_up, down = self.expert_parts(expert)
        return self.format.unpack(gate_up, dtype).flatten(0, 1), self.format.unpack(down, dtype)

    def stacked(self) -> tuple[StackedWeight, StackedWeight]:
        gate_up, down = (
            StackedWeight({s: getattr(self, name + s) for s in self._suffixes}, self.format)
            for name in ("gate_up_proj", "down_proj")
        )
        return gate_up, down

    def expert_tiles(self, expert: int, device: torch.device) -> tuple[Tiles, Tiles]:
        gate_up, down = self.expert_parts(expert)
        return (
            lambda dtype: weight_tiles(gate_up, self.format, dtype),
            lambda dtype: weight_tiles(down, self.format, dtype),
        )

    def open_expert(self, expert: int) -> tuple[Linear, Linear]:
        gate_up, down = self.expert_parts(expert)
        return (
            lambda x: packed_linear(x, gate_up, self.format),
            lambda x: packed_linear(x, down, self.format),
        )

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}"
        return f"{sizes}, {self.format.name}"


def stored_name(suffix: str) -> str:
    """Name of a part beside a module's `weight`: scales are called as the releases call them."""
    return f"weight{'_scale_inv' if suffix == '_scale' else suffix}"


class _PackedRows(FrozenStorage):
    """A weight [rows, in] in a format whose rows stand alone."""

    format: WeightFormat

    def _make_rows(self, shape: Shape, weight_format: WeightFormat | str) -> None:
        self.format = get_format(weight_format)
        if self.format.row_block != 1:
            raise ValueError(
                "wanted a format whose rows can be read alone, such as fp8_rows32 or fp4, got "
                f"{self.format.name}"
            )
        for suffix, entry in self.format.parts(shape).items():
            setattr(self, stored_name(suffix), _frozen(*entry))
        self._suffixes = tuple(self.format.parts(shape))

    def parts(self) -> dict[str, torch.Tensor]:
        return {suffix: getattr(self, stored_name(suffix)) for suffix in self._suffixes}

    def set_weight(self, weight: torch.Tensor) -> None:
        """Round a wide weight [rows, in] into place."""
        for suffix, part in self.format.pack(weight).items():
            setattr(self, stored_name(suffix), nn.Parameter(part, requires_grad=False))


class PackedEmbedding(_PackedRows):
    """An embedding table in packed rows; only the rows asked for are read and dequantized."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        weight_format: WeightFormat | str = FP8_ROWS32,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Make an empty table that gives rows in `dtype`; bfloat16 holds the releases' exactly."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype
        self._make_rows((num_embeddings, embedding_dim), weight_format)

    @classmethod
    def from_plain(
        cls,
        embedding: nn.Embedding,
        weight_format: WeightFormat | str = FP8_ROWS32,
        dtype: torch.dtype = torch.bfloat16,
    ) -> PackedEmbedding:
        """Round a plain table."""
        with torch.device("meta"):
            out = cls(embedding.num_embeddings, embedding.embedding_dim, weight_format, dtype)
        out.set_weight(embedding.weight)
        return out

    def to_plain(self, dtype: torch.dtype) -> nn.Embedding:
        out = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        out.weight = nn.Parameter(self.format.unpack(self.parts(), dtype))
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ids [...]: [..., embedding_dim]."""
        flat = ids.flatten()
        # Gathered as bytes: indexing is not implemented for every 8-bit float.
        rows = {
            suffix: part.view(torch.uint8).index_select(0, flat).view(part.dtype)
            for suffix, part in self.parts().items()
        }
        return self.format.unpack(rows, self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


class PackedHead(_PackedRows, nn.Linear):
    """`lm_head` in packed rows: [..., D] in float32, logits [..., V] in float32."""

    def __init__(
        self, in_features: int, out_features: int, weight_format: WeightFormat | str
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self._make_rows((out_features, in_features), weight_format)

    @classmethod
    def from_plain(cls, linear: nn.Linear, weight_format: WeightFormat | str) -> PackedHead:
        """Round a plain head."""
        with torch.device("meta"):
            out = cls(linear.in_features, linear.out_features, weight_format)
        out.set_weight(linear.weight)
        return out

    def to_plain(self, dtype: torch.dtype) -> Float32Head:
        out = Float32Head(self.in_features, self.out_features, bias=False, device="meta")
        out.weight = nn.Parameter(self.format.unpack(self.parts(), dtype))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x.float(), self.parts(), self.format)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}"


class OpaqueWeights(FrozenStorage):
    """Tensors of a release that are carried from load to save and never computed with.

    They are named as in the release, with `__` for dots.
    """

    def __init__(self, entries: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        super().__init__()
        for name, (dtype, shape) in entries.items():
            carried = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(name.replace(".", "__"), carried)

    @classmethod
    def for_config(cls, config: Dsv4Config) -> OpaqueWeights | None:
        """Hold what a configuration's release has beside the text model, if anything."""
        if not config.carries_vision:
            return None
        dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
        found = opaque_inventory(config)
        return cls({name: (dtypes[dtype], shape) for name, (dtype, shape) in found.items()})
