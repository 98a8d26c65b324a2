# SPDX-License-Identifier: Apache-2.0
"""Our adapters, for other tools: `export_adapter`, in any of the layouts of `layouts.py`.

vLLM's DeepSeek V4 and V4.1 (read in its source, September 2026; `lora/lora_model.py`,
`lora/lora_weights.py`, `models/deepseek_v4*/nvidia/model.py`, since vllm-project/vllm#53361):

- takes `base_model.model.` off a tensor's name, puts `model.` before `layers.`, and refuses what
  is then no module of its own; these bear the release's names, not transformers';
- reads routed experts one by one as `experts.17.w1`, and wants all of a layer, of one rank each;
- scales everything by the config's `lora_alpha / r`, and knows no patterns;
- has room for `--max-lora-rank`, which must be at least the config's `r`.

A grouped projection (`wo_a`) is one map of all groups' ranks there. Its kernel passes adapters over
until vllm-project/vllm#57245, open at that time.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from .deltas import WEIGHTS
from .files import staged
from .foreign_read import read_files, read_pairs
from .hot_experts import HotExperts
from .layouts import (
    LAYOUTS,
    Layout,
    Pair,
    Pairs,
    expert_of,
    fuse,
    official_name,
    pad_rank,
    stack,
)
from .tuner import IDENTITY_KEY

_PREFIX = "base_model.model."


@dataclass
class _Out:
    """Tensors of a layout, and what its config says beside them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, module: str, pair: Pair, prefix: str = _PREFIX) -> None:
        for side, tensor in (("A", pair.a), ("B", pair.b)):
            # Gate and up share an A, which a file may not.
            own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self.tensors[f"{prefix}{module}.lora_{side}.weight"] = own
        self.ranks[module] = pair.rank


def export_adapter(
    adapter: PeftModel | str | Path,
    output: str | Path,
    layout: Layout = "hf",
    *,
    adapter_name: str = "default",
) -> Path:
    """Write an adapter as another tool wants it. Scales go into the B's: alpha is r.

    Args:
        adapter: a PEFT model of ours, or the directory of a saved adapter.
        output: new or empty directory.
        layout: see `layouts.py`.
        adapter_name: which one of the model's.

    Returns:
        `output`.

    Raises:
        ValueError: an unknown layout, a directory with files, or no adapter of ours.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: wanted one of {', '.join(LAYOUTS)}, got {layout!r}")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: wanted an empty or new directory, got {output} with files")
    if isinstance(adapter, PeftModel):
        config: LoraConfig = adapter.peft_config[adapter_name]
        tensors = get_peft_model_state_dict(
            adapter, adapter_name=adapter_name, save_embedding_layers=False
        )
    else:
        config, tensors = read_files(adapter)
    pairs = {name: pair.folded() for name, pair in read_pairs(config, tensors).items()}
    out = _write(pairs, layout, _number_of_experts(config, pairs))
    with staged(output) as folder:
        _config(config, out, layout).save_pretrained(str(folder))
        save_file(out.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return output


def _number_of_experts(config: LoraConfig, pairs: Pairs) -> int:
    hot = HotExperts.of(config)
    if hot is not None:
        return hot.num_experts
    found = (expert_of(name) for name in pairs)
    return 1 + max((expert[1] for expert in found if expert), default=-1)


def _write(pairs: Pairs, layout: Layout, experts: int) -> _Out:
    out = _Out()
    by_layer: dict[str, dict[int, Pairs]] = defaultdict(lambda: defaultdict(dict))
    for name, pair in pairs.items():
        expert = expert_of(name)
        if expert is not None:
            by_layer[expert[0]][expert[1]][expert[2]] = pair
        if expert is None or layout in ("official", "hf", "vllm"):
            out.add(_named(name, layout), pair, "" if layout == "official" else _PREFIX)
    for name, chosen in by_layer.items():
        if layout == "vllm":
            _fill(out, name, chosen, experts, layout)
        elif layout in ("peft", "peft-0.18"):
            _fuse_layer(out, _with_model(name), chosen, experts, layout == "peft-0.18")
    return out


def _named(name: str, layout: Layout) -> str:
    """A module as the layout's readers call it."""
    return official_name(name) if layout in ("official", "vllm") else _with_model(name)


def _with_model(name: str) -> str:
    return f"model.{name}" if name.startswith("layers.") else name


def _fill(out: _Out, name: str, chosen: Mapping[int, Pairs], experts: int, layout: Layout) -> None:
    """Zeros for the experts without an adapter, in the shapes of one that has one."""
    like = next(iter(chosen.values()))
    for number in set(range(experts)) - set(chosen):
        for part, pair in like.items():
            empty = Pair(torch.zeros_like(pair.a), torch.zeros_like(pair.b), 1.0)
            out.add(_named(f"{name}.{number}.{part}", layout), empty)


def _fuse_layer(
    out: _Out, name: str, chosen: Mapping[int, Pairs], experts: int, swapped: bool
) -> None:
    """Gate_up under `base_layer`, down outside, all experts in one pair each."""
    halves = {
        number: (fuse(p["gate_proj"], p["up_proj"], len(p["gate_proj"].b)), p["down_proj"])
        for number, p in chosen.items()
    }
    for i, (level, parameter) in enumerate(((".base_layer", "gate_up_proj"), ("", "down_proj"))):
        rank = max(pair[i].rank for pair in halves.values())
        some = pad_rank(next(iter(halves.values()))[i], rank)
        empty = torch.zeros_like(some.a), torch.zeros_like(some.b)
        banks = [pad_rank(halves[e][i], rank)[:2] if e in halves else empty for e in range(experts)]
        a, b = stack(banks, swapped)
        out.add(f"{name}{level}", Pair(a, b, 1.0))
        del out.ranks[f"{name}{level}"]
        out.ranks[f"{name}.{parameter}"] = rank
        out.parameters.append(f"{name}.{parameter}")


def _config(source: LoraConfig, out: _Out, layout: Layout) -> LoraConfig:
    """Alpha is the rank everywhere: the scale is 1, whether a reader knows patterns or not."""
    rank = max(out.ranks.values())
    identity = (source.auto_mapping or {}).get(IDENTITY_KEY)
    modules = [module for module in out.ranks if module not in out.parameters]
    targets: str | list[str] = "|".join(dict.fromkeys(_numberless(name) for name in modules))
    if layout == "vllm":
        # It compares leaves with what it can serve.
        targets = sorted({module.rpartition(".")[2] for module in modules})
    others = {key: r for key, r in _patterns(out.ranks).items() if r != rank}
    return LoraConfig(
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        target_modules=targets or [],
        target_parameters=out.parameters or None,
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        inference_mode=True,
        auto_mapping=None if identity is None else {IDENTITY_KEY: identity},
    )


def _numberless(module: str) -> str:
    """A pattern for a module and its like in other layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(module))


def _patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by pattern: one for all modules that differ in numbers alone, if they agree."""
    alike: dict[str, set[int]] = defaultdict(set)
    for module, rank in ranks.items():
        alike[_numberless(module)].add(rank)
    return {
        _numberless(module) if len(alike[_numberless(module)]) == 1 else re.escape(module): rank
        for module, rank in ranks.items()
    }
