# SPDX-License-Identifier: Apache-2.0
"""Memory adapters beside a model: attach one, have several active at once, see what they share."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modeling_dsv4.engram import lookup_rows
from modeling_dsv4.segments import RowState, find_segments

from .memory_layers import MEMORY_KEY, fill_rows, make_record, memory_layers
from .memory_rows import MemoryRows, engram_identity, find_hashing
from .targets import ENGRAM

OnCollision = Literal["error", "warn", "allow"]
_SHOWN = 5


def attach_memory(
    model: PreTrainedModel, config: LoraConfig, memory: MemoryRows | None, adapter_name: str
) -> PeftModel:
    """Freeze a model and put empty memory beside its Engram layers.

    Raises:
        ValueError: no rows were chosen, for another model, or for a preset without memory.
    """
    if memory is None:
        raise ValueError(
            'preset "memory": wanted the rows that it may write, got none; give '
            "memory=choose_memory_rows(model, tokenizer, corpus, background)"
        )
    if ENGRAM not in str(config.target_modules):
        raise ValueError('memory: wanted preset "memory" for chosen rows, got another')
    if memory.identity != engram_identity(find_hashing(model)):
        raise ValueError("memory: wanted rows that were chosen for this model, got another's")
    config.auto_mapping = {**(config.auto_mapping or {}), MEMORY_KEY: make_record(model, memory)}
    out = get_peft_model(model, config, adapter_name=adapter_name)
    fill_rows(out, adapter_name, memory)
    return out


@dataclass(frozen=True)
class Collision:
    """What two adapters both edit in one layer.

    Attributes:
        layer: the model's number of it.
        names: of the two.
        rows: [n] int64 table rows in both. Each adapter still acts on its own n-grams alone.
        grams: n-grams that both have written, as token ids: there both deltas are added.
    """

    layer: int
    names: tuple[str, str]
    rows: torch.Tensor
    grams: tuple[tuple[int, ...], ...]


def find_collisions(model: nn.Module, names: Sequence[str] | None = None) -> list[Collision]:
    """Rows and n-grams that any two of some loaded adapters edit; None asks for all."""
    ids = find_hashing(model).config.engram_layer_ids
    found = []
    for layer in memory_layers(model):
        held = [name for name in layer.lora_rows if names is None or name in names]
        for pair in combinations(held, 2):
            one, other = (layer.lora_rows[name] for name in pair)
            rows = one.ids[torch.isin(one.ids, other.ids)]
            if not len(rows):
                continue
            both = torch.isin(one.ids[one.places.long()], other.ids).all(-1)
            grams = tuple(tuple(i for i in gram if i >= 0) for gram in one.grams[both].tolist())
            found.append(Collision(ids[layer.position], pair, rows, grams))
    return found


def activate_memory(
    model: PeftModel, names: Sequence[str], *, collisions: OnCollision = "error"
) -> list[Collision]:
    """Make several loaded adapters active at once, and report what they share.

    Where no n-gram is shared, each acts on its own text as if it were alone. Where one is, both
    deltas are added.

    Args:
        model: with these adapters loaded.
        names: which; adapters of other kinds may be among them.
        collisions: what to do about shared n-grams: refuse, warn, or only return them.

    Raises:
        ValueError: an adapter that is not loaded, or shared n-grams under "error". What was active
            stays active then.
    """
    if collisions not in get_args(OnCollision):
        wanted = ", ".join(get_args(OnCollision))
        raise ValueError(f"collisions: wanted one of {wanted}, got {collisions!r}")
    missing = [name for name in names if name not in model.peft_config]
    if missing or not names:
        raise ValueError(
            f"adapters: wanted some of {', '.join(model.peft_config)}, got "
            f"{', '.join(missing) or 'none'}"
        )
    found = find_collisions(model, names)
    if any(collision.grams for collision in found):
        text = "; ".join(_say(collision) for collision in found if collision.grams)
        if collisions == "error":
            raise ValueError(f'memory: {text}; allow it with collisions="warn"')
        if collisions == "warn":
            warnings.warn(f"memory: {text}", stacklevel=2)
    model.base_model.set_adapter(list(names))
    return found


def _say(collision: Collision) -> str:
    shown = ", ".join(str(int(row)) for row in collision.rows[:_SHOWN])
    more = ", ..." if len(collision.rows) > _SHOWN else ""
    return (
        f"{' and '.join(collision.names)} have both written {len(collision.grams)} n-grams of "
        f"layer {collision.layer} (rows {shown}{more})"
    )


@torch.no_grad()
def find_touched(
    model: nn.Module, input_ids: torch.Tensor, names: Sequence[str] | None = None
) -> torch.Tensor:
    """Where documents [B, S] have a written n-gram: [B, S] bool, at its last token.

    A document without any is answered bit for bit as by the base.

    Args:
        model: with memory adapters.
        input_ids: [B, S], one document a row, without pads.
        names: adapters that count; None is all that are loaded.
    """
    hashing = find_hashing(model)
    ids = input_ids.to(hashing.token_map.device)
    segments = find_segments((ids.shape[0], ids.shape[1]), RowState.empty(len(ids), ids.device))
    rows = lookup_rows(hashing, ids, None, segments, None)
    touched = torch.zeros_like(ids, dtype=torch.bool)
    for layer in memory_layers(model):
        for name, edited in layer.lora_rows.items():
            if names is None or name in names:
                hit = edited.find(rows[layer.position].to(edited.ids.device))[1]
                touched |= hit.any(-1).to(ids.device)
    return touched
