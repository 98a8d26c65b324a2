# SPDX-License-Identifier: Apache-2.0
"""Reading an adapter of any layout into pairs by linear map: see `layouts.py`.

Nothing is passed over: a tensor that has no place, or half of a pair, is an error.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from .deltas import CONFIG, check_weights, read_config
from .hot_experts import HotExperts
from .layouts import (
    LAYOUTS,
    Layout,
    Names,
    Pair,
    Pairs,
    common_name,
    fused_kind,
    group_to_dense,
    split_fused,
    split_name,
    unstack,
)

Sides = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the experts: E, D and F."""

    experts: int
    hidden: int
    inner: int


def read_files(directory: str | Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An adapter's config and tensors.

    Raises:
        ValueError: one of the files is missing or is not what its name says.
    """
    values = read_config(directory)
    weights = check_weights(directory)
    if values.get("use_dora") or values.get("lora_bias"):
        file = Path(directory, CONFIG)
        raise ValueError(f"{file}: wanted plain low ranks, got DoRA or biases; merge it elsewhere")
    return LoraConfig.from_pretrained(str(directory)), load_file(weights)


def read_pairs(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    sizes: Sizes | None = None,
    layout: Layout | None = None,
) -> Pairs:
    """Tensors of one adapter as pairs by common name.

    Args:
        config: says rank, alpha, and for ours which experts were chosen.
        tensors: by name in the file.
        sizes: of the model's experts; only PEFT's fused layout wants them.
        layout: "peft" or "peft-0.18" where shapes alone do not tell.

    Raises:
        ValueError: tensors that are no low ranks, halves of pairs, names that occur twice, or
            shapes that do not fit.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: wanted one of {', '.join(LAYOUTS)}, got {layout!r}")
    found = _pair_up(tensors)
    pairs: Pairs = {}
    fused: dict[tuple[str, bool], tuple[str, Sides]] = {}
    for (module, down), sides in found.items():
        a, b = sides["A"], sides["B"]
        if a.dim() == 3:
            _add(pairs, _from_banks(config, module, down, a, b))
        elif module.endswith((".experts", ".experts.base_layer")):
            outer = module.removesuffix(".base_layer")
            fused[outer, outer != module] = (module, sides)
        elif a.dim() == 2 and b.dim() == 2 and a.shape[0] == b.shape[1]:
            _add(pairs, {common_name(module): Pair(a, b, scale_of(config, module))})
        else:
            raise ValueError(
                f"adapter: wanted A [r, in] and B [out, r] of {module}, got {list(a.shape)} and "
                f"{list(b.shape)}"
            )
    if fused:
        if sizes is None:
            raise ValueError("adapter: PEFT's fused experts are read with their model alone")
        _add(pairs, _from_fused(config, fused, sizes, layout))
    return pairs


def scale_of(config: LoraConfig, module: str) -> float:
    """The factor that PEFT gives a module's low rank."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    key = get_pattern_key(config.alpha_pattern, module)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return float(alpha / (r**0.5 if config.use_rslora else r))


def _pair_up(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, bool], Sides]:
    """A and B of every module; of ours, `down_` apart."""
    found: dict[tuple[str, bool], Sides] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        names: Names | None = split_name(name)
        if names is None or names.side in found[names.module, names.down]:
            unknown.append(name)
        else:
            found[names.module, names.down][names.side] = tensor
    if unknown:
        raise ValueError(
            f"adapter: {len(unknown)} of {len(tensors)} tensors are no low ranks of a linear map, "
            f"or occur twice: {_some(unknown)}"
        )
    halves = [module for (module, _), sides in found.items() if len(sides) < 2]
    if halves:
        raise ValueError(f"adapter: {len(halves)} modules have A or B alone: {_some(halves)}")
    if not found:
        raise ValueError("adapter: wanted low ranks, got a file without tensors")
    return found


def _from_banks(
    config: LoraConfig, module: str, down: bool, a: torch.Tensor, b: torch.Tensor
) -> Pairs:
    """Our own banks, of a grouped projection or of experts."""
    name, scale = common_name(module), scale_of(config, module)
    if not name.endswith("mlp.experts"):
        return {name: Pair(*group_to_dense(a, b), scale)}
    hot = HotExperts.of(config)
    ids: Sequence[int] = range(len(a)) if hot is None else hot.ids_of(name)
    if len(ids) != len(a):
        raise ValueError(f"adapter: {module} names {len(ids)} experts, got banks of {len(a)}")
    return _by_expert(name, zip(ids, a, b, strict=True), down, scale)


def _by_expert(module: str, banks: Any, down: bool, scale: float) -> Pairs:
    pairs: Pairs = {}
    for expert, a, b in banks:
        pair = Pair(a, b, scale)
        if down:
            pairs[f"{module}.{expert}.down_proj"] = pair
        else:
            gate, up = split_fused(pair)
            pairs[f"{module}.{expert}.gate_proj"] = gate
            pairs[f"{module}.{expert}.up_proj"] = up
    return pairs


def _from_fused(
    config: LoraConfig,
    fused: Mapping[tuple[str, bool], tuple[str, Sides]],
    sizes: Sizes,
    layout: Layout | None,
) -> Pairs:
    """PEFT's `target_parameters`: all pairs of a file are of one layout."""
    kinds = {
        key: fused_kind(sides["A"], sides["B"], sizes.hidden, sizes.inner)
        for key, (_, sides) in fused.items()
    }
    possible = {"peft", "peft-0.18"} if layout is None else {layout}
    for found in kinds.values():
        possible &= {version for _, version in found}
    if len(possible) != 1:
        shapes = [list(side.shape) for side in next(iter(fused.values()))[1].values()]
        what = "ambiguous shapes; give layout" if possible else f"shapes {shapes}"
        raise ValueError(
            f"adapter: wanted fused experts as PEFT writes them for {sizes.experts} experts of "
            f"{sizes.hidden} x {sizes.inner}, got {what}"
        )
    version = cast(Layout, possible.pop())
    pairs: Pairs = {}
    for (outer, inner), (module, sides) in fused.items():
        projections = {name for name, of in kinds[outer, inner] if of == version}
        a, b = sides["A"], sides["B"]
        if len(projections) != 1 or a.shape[0] % sizes.experts or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"adapter: wanted {sizes.experts} experts in {module}, got {list(a.shape)} and "
                f"{list(b.shape)}"
            )
        projection = projections.pop()
        parts = unstack(a, b, sizes.experts, version == "peft-0.18")
        banks = ((e, *pair) for e, pair in enumerate(parts))
        scale = scale_of(config, f"{outer}.{projection}")
        _add(pairs, _by_expert(common_name(outer), banks, projection == "down_proj", scale))
    return pairs


def _add(pairs: Pairs, more: Pairs) -> None:
    twice = sorted(set(pairs) & set(more))
    if twice:
        raise ValueError(f"adapter: {len(twice)} maps have two low ranks: {_some(twice)}")
    pairs.update(more)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
