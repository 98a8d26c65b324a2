# SPDX-License-Identifier: Apache-2.0
"""The preset `full`: the weights themselves train, except those that a text should not teach.

| left as they are | why |
|---|---|
| indexer, all of it | the language-model loss does not reach it: a choice has no gradient |
| compressors | they make the keys that the frozen indexer was tuned on |
| router weights and biases | their balance was made on trillions of tokens |
| tables of token ids (routing, n-gram hashes) | numbers that name things, no weights |
| Engram tables | every step would touch all rows; row adapters exist for them |
| sinks | fused attention computes with fixed ones |
| draft heads, the vision tower | not in the pass that is trained |

`also` gives groups back.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from modeling_dsv4.moe import Dsv4Experts, ExpertsBase
from modeling_dsv4.storage import FrozenStorage

from .beside import PLAIN

# Group -> pattern of its parameters, from the backbone on.
LEFT_OUT: dict[str, str] = {
    "indexer": r"layers\.\d+\.self_attn\.indexer\..*",
    "compressors": r"layers\.\d+\.self_attn\.compressor\..*",
    "router": r"layers\.\d+\.mlp\.gate\..*",
    "tables": r"layers\.\d+\.engram\.embed\..*",
    "sinks": r"layers\.\d+\.self_attn\.sinks",
    "drafts": r"mtp\..*",
    "vision": r"vision\..*",
}
# What the pass that trains does not run: asking for it would be a mistake.
_NEVER = ("drafts", "vision")


def train_weights(model: PreTrainedModel, also: Sequence[str] = ()) -> dict[str, int]:
    """Let the weights of a model train, and freeze the rest.

    Args:
        model: with plain weights only.
        also: groups that are left out otherwise: "compressors", "router", "tables", "sinks", or
            "indexer", which `teach_indexer` trains.

    Returns:
        numbers of "tensors" and "parameters" that train.

    Raises:
        ValueError: packed weights, or a group that cannot train. Nothing has been changed then.
    """
    wrong = [name for name in also if name not in LEFT_OUT or name in _NEVER]
    if wrong:
        allowed = ", ".join(name for name in LEFT_OUT if name not in _NEVER)
        raise ValueError(f"also: wanted some of {allowed}, got {', '.join(wrong)}")
    out = re.compile("|".join(p for name, p in LEFT_OUT.items() if name not in also))
    _refuse_packed(model, out)
    count = {"tensors": 0, "parameters": 0}
    for name, parameter in model.named_parameters():
        trains = out.fullmatch(name.removeprefix("model.")) is None
        parameter.requires_grad_(trains)
        count["tensors"] += trains
        count["parameters"] += trains * parameter.numel()
    return count


def as_base(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside the block adapters are off; a model without any is its own base."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def restore_weights(model: nn.Module, directory: str | Path) -> None:
    """Put the weights that train back to what `save_pretrained` wrote.

    Raises:
        ValueError: one of them is not there.
    """
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob("model*.safetensors")):
        stored |= load_file(file)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensor = stored.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            raise ValueError(f"{directory}: wanted {name} {list(parameter.shape)}, found none such")
        parameter.data.copy_(tensor)


def _refuse_packed(model: nn.Module, left_out: re.Pattern[str]) -> None:
    """Check that every weight that would train is plain numbers.

    Raises:
        ValueError: names the first modules that hold codes instead.
    """
    wrong = [
        name
        for name, module in model.named_modules()
        if _is_packed(module) and not left_out.fullmatch(f"{name}.weight".removeprefix("model."))
    ]
    if wrong:
        raise ValueError(
            f"preset 'full': wanted plain weights, got {len(wrong)} packed modules, e.g. "
            f"{', '.join(wrong[:3])}; codes of a few bits cannot take small steps. Put adapters "
            "beside them (preset 'all'), or load the base with dequantize=True"
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether a module keeps a weight as bytes, in float8, or outside the model."""
    if isinstance(module, ExpertsBase):
        return not isinstance(module, Dsv4Experts)
    own = [p.dtype for p in module.parameters(recurse=False)]
    return isinstance(module, FrozenStorage) or any(dtype not in PLAIN for dtype in own)
