# SPDX-License-Identifier: Apache-2.0
"""Adapters of other tools, onto our models: `import_adapter`.

The file is read into pairs by linear map (`layouts.py`), and these become an ordinary adapter of
ours: experts that the file has no adapter for get none, like those that are not hot.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from modeling_dsv4.moe import ExpertsBase
from modeling_dsv4.storage import GroupedLinear

from .foreign_read import Sizes, read_files, read_pairs
from .hot_experts import HOT_KEY, HotExperts
from .layouts import PARTS, Layout, Pair, Pairs, dense_to_group, expert_of, fuse, pad_rank
from .targets import EXPERTS, PRESETS, target_regex
from .tuner import IDENTITY_KEY, check_identity, register


def import_adapter(
    path: str | Path,
    model: PreTrainedModel,
    *,
    layout: Layout | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Put another tool's adapter beside a model's weights; what it computes is the same.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        model: base, plain or packed, without adapters.
        layout: wanted only where PEFT's two fused layouts have equal shapes.
        adapter_name: PEFT's name for it.

    Returns:
        a PEFT model; its `save_pretrained` writes our layout.

    Raises:
        ValueError: anything in the file that has no place in the model, with counts and names.
    """
    register()
    config, tensors = read_files(path)
    check_identity(model, config)
    made = _Import(model)
    for name, pair in read_pairs(config, tensors, _sizes(model), layout).items():
        made.add(name, pair)
    made.check(len(tensors))
    built = made.config(config)
    tuned = get_peft_model(model, built, adapter_name=adapter_name)
    state = {f"base_model.model.{name}": tensor for name, tensor in made.tensors().items()}
    if IDENTITY_KEY not in (config.auto_mapping or {}):
        # What the file does not say of its base is not known of ours either.
        (built.auto_mapping or {}).pop(IDENTITY_KEY, None)
    set_peft_model_state_dict(tuned, state, adapter_name=adapter_name)
    return tuned.eval()


def _sizes(model: nn.Module) -> Sizes:
    config: Any = model.config
    return Sizes(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)


@dataclass
class _Built:
    """One module's adapter in our layout: tensors by their names in it, and its scale."""

    tensors: dict[str, torch.Tensor]
    rank: int
    scale: float
    ids: list[int] | None = None


class _Import:
    """Pairs on their way into a model's own adapter layout."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {n.removeprefix("model."): (n, m) for n, m in model.named_modules()}
        self.plain: Pairs = {}
        self.experts: dict[str, dict[int, Pairs]] = defaultdict(lambda: defaultdict(dict))
        self.lost: list[str] = []
        self._built: dict[str, _Built] | None = None

    def add(self, name: str, pair: Pair) -> None:
        """Take a pair whose map the model has; remember one that it has not."""
        expert = expert_of(name)
        _, module = self.modules.get(expert[0] if expert else name, (None, None))
        if expert is not None:
            outer, number, part = expert
            shape = self._expert_shape(module, number, part)
            if shape == (pair.b.shape[0], pair.a.shape[1]):
                if not pair.is_empty():
                    self.experts[outer][number][part] = pair
                return
        elif isinstance(module, nn.Linear | GroupedLinear) and pair.fits(module):
            self.plain[name] = pair
            return
        self.lost.append(f"{name} [{pair.b.shape[0]}, {pair.a.shape[1]}]")

    def _expert_shape(self, module: object, number: int, part: str) -> tuple[int, int] | None:
        if not isinstance(module, ExpertsBase) or number >= module.num_experts:
            return None
        f, d = module.intermediate_size, module.hidden_size
        return {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.get(part)

    def check(self, tensors: int) -> None:
        """Refuse an adapter of which anything was lost.

        Raises:
            ValueError: how many maps found no place, and some of them with their shapes.
        """
        if self.lost or not (self.plain or self.experts):
            some = ", ".join(self.lost[:3]) or "only zeros"
            raise ValueError(
                f"adapter: {len(self.lost)} low ranks ({tensors} tensors in the file) have no "
                f"place in this model: {some}; it was made for another model or layout"
            )

    def built(self) -> dict[str, _Built]:
        """Every module's adapter, by its name in the model."""
        if self._built is None:
            self._built = {
                self.modules[name][0]: self._plain(name, pair) for name, pair in self.plain.items()
            }
            for name, experts in self.experts.items():
                self._built[self.modules[name][0]] = self._banks(name, experts)
        return self._built

    def _plain(self, name: str, pair: Pair) -> _Built:
        module = self.modules[name][1]
        a, b = pair.a, pair.b
        if isinstance(module, GroupedLinear):
            a, b = dense_to_group(a, b, module.groups)
        tensors = {"lora_A": a.contiguous(), "lora_B": b.contiguous()}
        return _Built(tensors, a.shape[-2], pair.scale)

    def _banks(self, name: str, experts: Mapping[int, Pairs]) -> _Built:
        base: Any = self.modules[name][1]
        scales = {pair.scale for parts in experts.values() for pair in parts.values()}
        # One scale for all is kept as it is; different ones go into the B's.
        scale = scales.pop() if len(scales) == 1 else 1.0
        first, second, ids = [], [], sorted(experts)
        some = next(iter(next(iter(experts.values())).values())).a
        for number in ids:
            parts = experts[number]
            if scale == 1:
                parts = {part: pair.folded() for part, pair in parts.items()}
            gate, up, down = (parts.get(part) for part in PARTS)
            f, d = base.intermediate_size, base.hidden_size
            nothing = Pair(some.new_zeros(0, d), some.new_zeros(2 * f, 0), scale)
            first.append(fuse(gate, up, f) if gate or up else nothing)
            second.append(down or Pair(some.new_zeros(0, f), some.new_zeros(d, 0), scale))
        rank = max(pair.rank for pair in (*first, *second))
        tensors = {}
        for prefix, pairs in (("lora_", first), ("lora_down_", second)):
            padded = [pad_rank(pair, rank) for pair in pairs]
            tensors[f"{prefix}A"] = torch.stack([pair.a for pair in padded])
            tensors[f"{prefix}B"] = torch.stack([pair.b for pair in padded])
        return _Built(tensors, rank, scale, ids if len(ids) < base.num_experts else None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors under the names that PEFT gives them, without its prefix."""
        return {
            f"{name}.{leaf}.weight": tensor
            for name, built in self.built().items()
            for leaf, tensor in built.tensors.items()
        }

    def config(self, source: LoraConfig) -> LoraConfig:
        """The config that makes adapters of exactly these shapes and scales."""
        built = self.built()
        # PEFT's own value where most modules agree, patterns where they differ.
        usual = Counter((b.rank, b.scale * b.rank) for b in built.values()).most_common(1)[0][0]
        ranks, alphas = {}, {}
        routed = {(b.rank, b.scale) for n, b in built.items() if re.fullmatch(EXPERTS, n)}
        for name, one in built.items():
            if (one.rank, one.scale * one.rank) != usual:
                alike = re.fullmatch(EXPERTS, name) and len(routed) == 1
                key = EXPERTS if alike else re.escape(name)
                ranks[key], alphas[key] = one.rank, one.scale * one.rank
        return LoraConfig(
            task_type=source.task_type or TaskType.CAUSAL_LM,
            target_modules=self._targets(set(built)),
            r=usual[0],
            lora_alpha=usual[1],
            rank_pattern=ranks,
            alpha_pattern=alphas,
            auto_mapping=self._hot(built),
        )

    def _targets(self, names: set[str]) -> str:
        every = [name for name, _ in self.model.named_modules()]
        for preset, meant in PRESETS.items():
            patterns = [re.compile(pattern) for pattern in meant.patterns]
            if {name for name in every for p in patterns if p.fullmatch(name)} == names:
                return target_regex(preset)
        return "|".join(re.escape(name) for name in sorted(names))

    def _hot(self, built: Mapping[str, _Built]) -> dict[str, Any] | None:
        """Which experts have adapters, if in some layer not all have."""
        if all(one.ids is None for one in built.values()):
            return None
        number = _sizes(self.model).experts
        routed = {name: one for name, one in built.items() if re.fullmatch(EXPERTS, name)}
        ids = {n: range(number) if one.ids is None else one.ids for n, one in routed.items()}
        return {HOT_KEY: HotExperts.given(ids, number).to_dict()}
