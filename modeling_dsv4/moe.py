# SPDX-License-Identifier: Apache-2.0
"""Fine-grained mixture of experts (V4 §2.1, release file inference/model.py: Gate, Expert, MoE).

Unusual here: scores are `sqrt(softplus(logits))`, the bias only selects, the routing weight enters
*before* the down projection, both halves of SwiGLU are clamped, and the first layers of V4 choose
experts by token id instead of by score.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .configuration_dsv4 import Dsv4Config
from .formats import WeightFormat, simulate_fp8
from .kernel_choice import use_triton
from .linear_ops import float32_linear
from .precision import Float32Parameters

Linear = Callable[[torch.Tensor], torch.Tensor]
Tiles = Callable[[torch.dtype], Iterable[torch.Tensor]]

# So many tokens may copy the weights of their experts where grouping them is not possible.
_GATHERED_UP_TO = 64


class StackedWeight(NamedTuple):
    """One projection of all experts: parts [E, rows, ...] of a format, or plain without one."""

    parts: Mapping[str, torch.Tensor]
    format: WeightFormat | None

    @property
    def rows(self) -> int:
        """Outputs of one expert."""
        return self.parts[""].shape[1]


@dataclass(frozen=True)
class Fp8Inputs:
    """Rounds inputs [..., C] to FP8, one scale for `group` channels; kernels know it as well."""

    group: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return simulate_fp8(x, self.group)


class ExpertsBase(nn.Module):
    """What every store of routed experts obeys: plain, packed, on disk, or with adapters.

    A subclass says how one expert is opened; grouping the tokens, the activation and the weighted
    sum are written once, here.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, swiglu_limit: float | None
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.swiglu_limit = swiglu_limit
        self.round_input: Linear | None = None  # see simulation.py
        self.kernels = "auto"  # see kernel_choice.py

    def stacked(self) -> tuple[StackedWeight, StackedWeight] | None:
        """All experts' gate_up [E, 2F, D] and down [E, D, F] where both are in memory, or None."""
        return None

    def open_expert(self, expert: int) -> tuple[Linear, Linear]:
        """Return the two projections of one expert: [M, D] -> [M, 2F] and [M, F] -> [M, D]."""
        raise NotImplementedError(f"{type(self).__name__} does not say how an expert is opened")

    def expert_tiles(self, expert: int, device: torch.device) -> tuple[Tiles, Tiles] | None:
        """The same two weights as tiles on a device, each asked for once forward and once back.

        None where a store does not hold its experts packed.
        """
        return None

    def expect(self, top_k_index: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Hear what the router has chosen, [n, K] for [n, D], ahead of `forward`."""

    def foresee(self, top_k_index: torch.Tensor, sure: bool = True) -> None:
        """Hear before this layer's turn what its router will choose, or may if not `sure`."""

    def prepare(self, experts: list[int]) -> None:
        """Hear once per forward which experts are hit, before the first is opened."""

    def arrivals(self, experts: list[int]) -> Iterable[int]:
        """Give the order in which these are best computed; the sum does not depend on it."""
        return experts

    def run_expert(self, expert: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One expert on its own rows: x [M, D] and weights [M] to [M, D]."""
        gate_up, down = self.open_expert(expert)
        if self.round_input is not None:
            x = self.round_input(x)
        u = ops.swiglu(gate_up(x), self.swiglu_limit, weights)
        return down(u if self.round_input is None else self.round_input(u))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum the chosen experts of every token.

        Args:
            hidden_states: [n, D].
            top_k_index: [n, K] int64; ids from `num_experts` on are left out.
            top_k_weights: [n, K] float32.

        Returns:
            [n, D] float32; the caller rounds once, after adding the shared expert.
        """
        found = self._by_kernel(hidden_states, top_k_index, top_k_weights)
        if found is not None:
            return found
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

    def _by_kernel(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The same by Triton kernels, or None where they do not compute this."""
        found = self._for_kernels(x)
        if found is None:
            return None
        launcher, gate_up, down = found
        # Experts that another process holds: kernels read the first one, which then counts nothing.
        here = index < self.num_experts
        index, weights = torch.where(here, index, 0), weights * here
        group = self.input_group(x)
        return launcher.run(x, index, weights, gate_up, down, self.swiglu_limit, group)

    def grouped(self, x: torch.Tensor, index: torch.Tensor) -> tuple[Linear, Linear] | None:
        """Both projections of sorted rows by kernels, or None where they do not compute this.

        Args:
            x: [M, D], the rows of `ops.group_by_expert`; the products take rows in that order.
            index: [n, K], what was sorted.
        """
        # Between these two products others add, and would have to round as well.
        found = None if self.round_input is not None else self._for_kernels(x)
        if found is None:
            return None
        launcher, gate_up, down = found
        return launcher.grouped(index, gate_up, down)

    def input_group(self, x: torch.Tensor) -> int | None:
        """Channels of x that share a scale, if inputs are rounded to FP8; 0 if they are not.

        None where kernels do not round as the reference does.
        """
        if self.round_input is None:
            return 0
        # Kernels would cast first, and round then.
        cast = torch.is_autocast_enabled(x.device.type)
        if cast or not isinstance(self.round_input, Fp8Inputs):
            return None
        group = self.round_input.group
        # A row of another length is the reference's to refuse.
        known = group in (32, 64, 128)
        whole = self.hidden_size % group == self.intermediate_size % group == 0
        return group if known and whole else None

    def _for_kernels(self, x: torch.Tensor) -> tuple[Any, StackedWeight, StackedWeight] | None:
        """What launches kernels and both weights, if any compute with them and with x."""
        if self.input_group(x) is None or not use_triton(self.kernels, x):
            return None
        stacked = self.stacked()
        if stacked is None:
            return None
        launcher = self.launcher(x, *stacked)
        return None if launcher is None else (launcher, *stacked)

    def launcher(self, x: torch.Tensor, gate_up: StackedWeight, down: StackedWeight) -> Any | None:
        """Module whose `run`, `run_part` and `grouped` compute with these by kernels, or None.

        A store of other formats names one of its own; all have the functions of kernels/experts.py.
        """
        from .kernels import experts

        return experts if experts.covers(x, gate_up, down) else None

    def _one_by_one(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The reference: each hit expert is opened once, whatever holds it."""
        rows = ops.group_by_expert(top_k_index, self.num_experts)
        x, weights = hidden_states[rows.token], top_k_weights.flatten()[rows.order]
        hit = [e for e, size in enumerate(rows.counts) if size]
        self.prepare(hit)
        sizes = [rows.counts[e] for e in hit]
        given = dict(zip(hit, zip(x.split(sizes), weights.split(sizes), strict=True), strict=True))
        done = {e: self.run_expert(e, *given[e]) for e in self.arrivals(hit)}
        parts = [done[e] for e in hit]
        if not parts:
            # No rows, but of this graph: the backward's collectives want every process.
            parts.append(x * weights[:, None])
        return ops.scatter_rows(torch.cat(parts), rows.token, hidden_states)


class Dsv4Experts(ExpertsBase):
    """Routed experts as two 3-D parameters, in transformers' layout (w1 then w3, and w2)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, swiglu_limit: float | None
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, swiglu_limit)
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def open_expert(self, expert: int) -> tuple[Linear, Linear]:
        gate_up, down = self.gate_up_proj[expert], self.down_proj[expert]
        return lambda x: F.linear(x, gate_up), lambda x: F.linear(x, down)

    def stacked(self) -> tuple[StackedWeight, StackedWeight]:
        return StackedWeight({"": self.gate_up_proj}, None), StackedWeight(
            {"": self.down_proj}, None
        )

    def _one_by_one(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if len(hidden_states) <= _GATHERED_UP_TO and _may_not_wait(hidden_states):
            return ops.gathered_experts(
                hidden_states,
                self.gate_up_proj,
                self.down_proj,
                top_k_index,
                top_k_weights,
                self.swiglu_limit,
            )
        # Few rows: a loop of matrix-vector products reads each hit expert once and beats grouping.
        if top_k_index.numel() < 2 * self.num_experts or not ops.can_group(self.gate_up_proj):
            return super()._one_by_one(hidden_states, top_k_index, top_k_weights)
        rows = ops.group_by_expert(top_k_index, self.num_experts)
        if not rows.token.numel():
            return super()._one_by_one(hidden_states, top_k_index, top_k_weights)
        x, weights = hidden_states[rows.token], top_k_weights.flatten()[rows.order]
        h = ops.grouped_linear(x, self.gate_up_proj, rows.counts)
        u = ops.swiglu(h, self.swiglu_limit, weights)
        y = ops.grouped_linear(u, self.down_proj, rows.counts)
        return ops.scatter_rows(y, rows.token, hidden_states)


def _may_not_wait(x: torch.Tensor) -> bool:
    """Whether the host is traced or captured, and cannot be told which experts were hit."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Dsv4Router(Float32Parameters):
    """Chooses the experts of every token, and how much each counts.

    Scores are always computed, in float32. The choice is by token id in hash layers, else the
    top-k of score + bias (a second bias where the token belongs to an image). The weights are
    gathered from the *unbiased* scores.
    """

    tid2eid: torch.Tensor
    e_score_correction_bias: torch.Tensor
    e_score_correction_bias_vl: torch.Tensor

    def __init__(self, config: Dsv4Config, num_experts: int, top_k: int, hashed: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.kernels = "auto"
        self.normalize = config.norm_topk_prob
        self.weight_eps = config.router_weight_eps
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.hashed = hashed
        if hashed:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, top_k, dtype=torch.long))
        else:
            bias = torch.zeros(num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
            if config.router_bias_vl:
                self.register_buffer("e_score_correction_bias_vl", bias.clone())
        self.bias_vl = not hashed and config.router_bias_vl

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens [n, D] (ids and types [n]).

        Returns:
            logits [n, E] float32, weights [n, K] float32, indices [n, K] int64.
        """
        logits = float32_linear(hidden_states, self.weight, self.kernels)
        scores = F.softplus(logits).sqrt()
        if self.hashed:
            if input_ids is None:
                raise ValueError(
                    "hash-routed layers choose experts by token id: wanted `input_ids` beside "
                    "`inputs_embeds`, got none; pass both"
                )
            indices = self.tid2eid[input_ids]
        else:
            bias = self.e_score_correction_bias
            if self.bias_vl and token_types is not None:
                bias = torch.where(
                    (token_types >= 0)[:, None], self.e_score_correction_bias_vl, bias
                )
            indices = (scores.detach() + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, indices)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.weight_eps)
        return logits, weights * self.routed_scaling_factor, indices


class Dsv4MLP(nn.Module):
    """The shared expert: clamped SwiGLU that every token passes."""

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__()
        width = config.moe_intermediate_size * config.n_shared_experts
        self.swiglu_limit = config.swiglu_limit
        self.kernels = "auto"
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)
        return self.down_proj(ops.swiglu(gate_up, self.swiglu_limit, kernels=self.kernels))


class Dsv4MoE(nn.Module):
    """Routed experts plus the shared one; the sum is float32 and rounded once."""

    def __init__(self, config: Dsv4Config, layer_idx: int) -> None:
        super().__init__()
        draft = layer_idx >= config.num_hidden_layers
        num_experts = (draft and config.dspark_n_routed_experts) or config.n_routed_experts
        top_k = (draft and config.dspark_num_experts_per_tok) or config.num_experts_per_tok
        hashed = layer_idx < config.num_hash_layers
        self.gate = Dsv4Router(config, num_experts, top_k, hashed)
        self.experts = Dsv4Experts(
            num_experts, config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
        )
        self.shared_experts = Dsv4MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> ([B, S, D], router logits [B * S, E])."""
        flat = hidden_states.flatten(0, 1)
        ids = None if input_ids is None else input_ids.flatten()
        types = None if token_types is None else token_types.flatten()
        logits, weights, indices = self.gate(flat, ids, types)
        # What has to be read is read while the shared expert is computed.
        self.experts.expect(indices, flat)
        # With its rows, which adapters may tell apart.
        shared = ops.fp32(self.shared_experts(hidden_states)).flatten(0, 1)
        out = self.experts(flat, indices, weights) + shared
        return out.to(hidden_states.dtype).view_as(hidden_states), logits

    def foresee(self, input_ids: torch.Tensor) -> None:
        """Tell the experts what the tokens [...] will want, where ids alone decide it."""
        if self.gate.hashed:
            table = self.gate.tid2eid
            self.experts.foresee(table[input_ids.flatten().to(table.device)])
