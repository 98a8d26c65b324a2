# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of other tools: their names, their shapes, and one form for all of them.

The common form is a pair per linear map, experts one by one: `layers.3.self_attn.q_a_proj`,
`layers.3.mlp.experts.17.gate_proj`. Each file layout is read into it and written from it.

| layout | routed experts in the file |
|---|---|
| `official` | `layers.3.ffn.experts.17.w1.lora_A.weight` [r, D]: the release's names |
| `hf` | `model.layers.3.mlp.experts.17.gate_proj.lora_A.weight` [r, D] |
| `vllm` | `base_model.model.` + the release's names; zeros for experts without an adapter |
| `peft` | `model.layers.3.mlp.experts.base_layer.lora_A.weight` [E r, D]: `target_parameters` |
| `peft-0.18` | the same with inputs and outputs exchanged, as PEFT before 0.19 wrote it |
| `dsv4` | ours: banks [E, r, D] |

PEFT's fused layout: `base_layer` is gate_up, the outer level down; rows of A go by expert, then by
rank; columns of B by rank, then by expert.

Where a map is made of others, low ranks are put together exactly. Gate and up with A's of their own
become one A of twice the rank with a B in two blocks. A grouped projection is one matrix elsewhere:
its groups' A's stand one under the other, B's along a diagonal; and a B that is not a diagonal of
blocks becomes one B per group, with the columns that do something in that group.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from modeling_dsv4.storage import GroupedLinear
from modeling_dsv4.weight_table import BLOCK

Layout = Literal["official", "hf", "vllm", "peft", "peft-0.18"]
LAYOUTS: tuple[Layout, ...] = ("official", "hf", "vllm", "peft", "peft-0.18")
PARTS = ("gate_proj", "up_proj", "down_proj")
_OFFICIAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Official name of a linear map -> ours, within a layer; experts apart.
_OFFICIAL = {
    rule.official.removesuffix(".weight"): rule.ours.removesuffix(".weight")
    for rule in BLOCK
    if rule.official.endswith(".weight") and rule.kind != "expert"
}
_EXPERT = re.compile(r"(?:mlp|ffn)\.experts\.(\d+)\.(\w+)")
_LAYER = re.compile(r"(?:model\.)*(layers\.\d+)\.(.+)")
# Some tools keep the adapter's name in the tensor's.
_TENSOR = re.compile(r"(.+)\.lora_(down_)?([AB])(?:\.\w+)?\.weight")


class Pair(NamedTuple):
    """`scale B A` beside a weight: a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def fits(self, module: nn.Linear | GroupedLinear) -> bool:
        """Whether it can stand beside a module's weight."""
        sizes = (module.out_features, module.in_features)
        return sizes == (self.b.shape[0], self.a.shape[1])

    def folded(self) -> "Pair":
        """The same with scale 1: the scale goes into B."""
        return self if self.scale == 1 else Pair(self.a, self.b * self.scale, 1.0)

    def is_empty(self) -> bool:
        """Whether this is filling: a trained or fresh A is never zero."""
        return not bool(self.a.any() or self.b.any())


Pairs = dict[str, Pair]


class Names(NamedTuple):
    """What a tensor's name says: the module as the file calls it, A or B, and whether `down_`."""

    module: str
    side: str
    down: bool


def split_name(name: str) -> Names | None:
    """Read a tensor's name; None for a tensor that is no low rank."""
    match = _TENSOR.fullmatch(name.removeprefix("base_model.model."))
    return None if match is None else Names(match[1], match[3], match[2] is not None)


def common_name(module: str) -> str:
    """A module's name in the common form, whichever tool named it."""
    match = _LAYER.fullmatch(module)
    if match is None:
        return module
    layer, rest = match.groups()
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        part = _OFFICIAL_PARTS.get(expert[2], expert[2])
        return f"{layer}.mlp.experts.{expert[1]}.{part}"
    return f"{layer}.{_OFFICIAL.get(rest, rest)}"


def official_name(common: str) -> str:
    """The release's name of a module in the common form."""
    match = _LAYER.fullmatch(common)
    if match is None:
        return common
    layer, rest = match.groups()
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        part = {ours: theirs for theirs, ours in _OFFICIAL_PARTS.items()}[expert[2]]
        return f"{layer}.ffn.experts.{expert[1]}.{part}"
    return f"{layer}.{ {ours: theirs for theirs, ours in _OFFICIAL.items()}.get(rest, rest) }"


def expert_of(common: str) -> tuple[str, int, str] | None:
    """(`layers.3.mlp.experts`, 17, `gate_proj`) of an expert's map in the common form, or None."""
    match = re.fullmatch(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)", common)
    return None if match is None else (match[1], int(match[2]), match[3])


# --- putting low ranks together -----------------------------------------------------------------


def pad_rank(pair: Pair, rank: int) -> Pair:
    """The same with more rank: zeros in A and B."""
    more = rank - pair.rank
    if not more:
        return pair
    return Pair(F.pad(pair.a, (0, 0, 0, more)), F.pad(pair.b, (0, more)), pair.scale)


def fuse(gate: Pair | None, up: Pair | None, width: int) -> Pair:
    """Gate and up [F, D] as one map [2F, D], exactly; scales must be equal.

    `width` is F, for a half without an adapter.
    """
    some = gate if gate is not None else up
    assert some is not None
    empty = Pair(some.a[:0], some.b.new_zeros(width, 0), some.scale)
    gate, up = gate or empty, up or empty
    if gate.rank and gate.a.shape == up.a.shape and torch.equal(gate.a, up.a):
        return Pair(gate.a, torch.cat((gate.b, up.b)), gate.scale)
    return Pair(torch.cat((gate.a, up.a)), torch.block_diag(gate.b, up.b), some.scale)


def split_fused(pair: Pair) -> tuple[Pair, Pair]:
    """One map [2F, D] as gate and up, which share its A."""
    gate, up = pair.b.chunk(2)
    return Pair(pair.a, gate, pair.scale), Pair(pair.a, up, pair.scale)


def group_to_dense(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Banks [G, r, in] and [G, O, r] -> the low rank [G r, in], [G O, G r] of one weight."""
    return a.flatten(0, 1), torch.block_diag(*b)


def dense_to_group(
    a: torch.Tensor, b: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The low rank [R, in], [G O, R] of one weight -> banks [G, r, in] and [G, O, r].

    r is the largest number of columns that do something in one group: R at most.
    """
    blocks = b.unflatten(0, (groups, -1))
    used = [block.any(0).nonzero()[:, 0] for block in blocks]
    # A fresh B is all zeros: then rows of A are dealt out as a diagonal would have them.
    if not any(len(u) for u in used):
        even = len(a) // groups if len(a) % groups == 0 else len(a)
        used = [torch.arange(even) + (g * even if even < len(a) else 0) for g in range(groups)]
    rank = max(len(u) for u in used)
    pairs = [
        pad_rank(Pair(a[u], block[:, u], 1.0), rank) for u, block in zip(used, blocks, strict=True)
    ]
    return torch.stack([p.a for p in pairs]), torch.stack([p.b for p in pairs])


# --- PEFT's fused experts -----------------------------------------------------------------------


def unstack(
    a: torch.Tensor, b: torch.Tensor, experts: int, swapped: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's fused pair as (a [r, in], b [out, r]) of every expert; `swapped` as before 0.19."""
    a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return list(zip(a, b, strict=True))


def stack(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back: A [E r, in] and B [out, r E]."""
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    if swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def fused_kind(
    a: torch.Tensor, b: torch.Tensor, hidden: int, inner: int
) -> set[tuple[str, Layout]]:
    """What a fused pair of these shapes can be: projection and layout."""
    shapes: Mapping[tuple[str, Layout], tuple[int, int]] = {
        ("gate_up_proj", "peft"): (hidden, 2 * inner),
        ("gate_up_proj", "peft-0.18"): (2 * inner, hidden),
        ("down_proj", "peft"): (inner, hidden),
        ("down_proj", "peft-0.18"): (hidden, inner),
    }
    return {kind for kind, shape in shapes.items() if shape == (a.shape[1], b.shape[0])}
