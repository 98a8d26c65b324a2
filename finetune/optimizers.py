# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, and the groups of parameters that learn at rates of their own.

Adapters are float32, and so are the states of `adamw`: 8 bytes per trained parameter. The `8bit`
ones take 2 and a scale per 256; `paged` ones live in memory that a GPU's driver moves to the host
when it runs short, and are ordinary ones on a CPU.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Name in a run's settings -> class in torch.optim, or in bitsandbytes.optim.
TORCH = {"adamw": "AdamW", "sgd": "SGD"}
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion_8bit": "Lion8bit",
    "ademamix_8bit": "AdEMAMix8bit",
}
# Second halves of low-rank pairs: PEFT's, and those of the experts' down projection.
_SECOND = r".*\.lora_(?:down_)?B\..*"


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name `pattern` matches learn `lr_ratio` times as fast.

    `weight_decay` None leaves the run's. The first rule that matches counts.
    """

    pattern: str
    lr_ratio: float = 1.0
    weight_decay: float | None = None


# Rows of memory adapters: each is read by few tokens, and nothing pulls it back.
MEMORY = Rule(r".*\.lora_rows\..*\.delta", 5.0, 0.0)


def optimizer_class(name: str) -> Any:
    """Find an optimizer's class.

    Raises:
        ValueError: its library is not installed.
    """
    if name in TORCH:
        return getattr(torch.optim, TORCH[name])
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ValueError(
            f"optimizer {name}: wanted bitsandbytes, which is not installed; pip install "
            f"'dsv4[bitsandbytes]', or take one of {', '.join(TORCH)}"
        ) from error
    return getattr(library, BITSANDBYTES[name])


def group_parameters(
    model: nn.Module, lr: float, weight_decay: float, rules: Sequence[Rule] = ()
) -> list[dict[str, Any]]:
    """Sort what trains into an optimizer's groups, in the order of the model's names.

    Rows of memory adapters have a rule of their own behind these, `MEMORY`.

    Raises:
        ValueError: nothing trains, or a rule meets nothing.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    met = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = next((r for r in (*rules, MEMORY) if re.fullmatch(r.pattern, name)), Rule(""))
        met.add(rule.pattern)
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        groups.setdefault((lr * rule.lr_ratio, decay), []).append(parameter)
    if not groups:
        raise ValueError("optimizer: wanted parameters that train, got none")
    for rule in rules:
        if rule.pattern not in met:
            raise ValueError(
                f"lr_ratios: wanted trained parameters like {rule.pattern}, got none; patterns "
                "match whole names, the first one that does counts"
            )
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def make_rules(lr_ratios: dict[str, float], lora_plus_ratio: float | None) -> list[Rule]:
    """A run's rules: named ratios first, then LoRA+ (arXiv 2402.12354): B learns faster than A."""
    rules = [Rule(pattern, ratio) for pattern, ratio in lr_ratios.items()]
    if lora_plus_ratio is not None:
        rules.append(Rule(_SECOND, lora_plus_ratio))
    return rules


def make_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    rules: Sequence[Rule] = (),
) -> torch.optim.Optimizer:
    """Build an optimizer over what trains.

    Args:
        name: as in `config.Optimizer`.
        model: with its adapters.
        lr: of parameters that no rule names.
        weight_decay: likewise; decoupled in all but sgd.
        rules: rates and decays of their own.
    """
    return optimizer_class(name)(group_parameters(model, lr, weight_decay, rules), lr=lr)
