# SPDX-License-Identifier: Apache-2.0
"""A model's directory and a machine's memory, turned into a loaded model or a reason against it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modeling_dsv4 import Dsv4Config

from ..config import METHOD, Recipe, get_recipe
from ..inventory import sizes_by_context
from ..machine import MachineProfile
from ..placement import Machine
from ..planning import Planned, direct_note, make_plan, this_ram, with_rates
from ..sizes import format_size

# Who computes experts outside of a GPU's memory: words of `--cold`, and those of from_pretrained.
COLD = {"cpu": "host", "gpu": "device", "auto": "auto"}
# Tokens that a plan makes room for, where the model's context is longer.
DEFAULT_CONTEXT = 65536
# Memory for the rows of Engram tables that are left on disk; out of what a plan keeps free.
_ENGRAM = "256MiB"


@dataclass(frozen=True)
class Source:
    """What a directory holds.

    Attributes:
        directory: of the model.
        config: its configuration.
        recipe: formats of its experts; those of a conversion to fp4 if it is none.
        converted: whether its experts are packs, which can stay on disk.
    """

    directory: Path
    config: Dsv4Config
    recipe: Recipe
    converted: bool


def look(directory: Path) -> Source:
    """Read a model's configuration.

    Raises:
        ValueError: there is no config.json.
    """
    file = directory / "config.json" if directory.is_dir() else directory
    if not file.is_file():
        raise ValueError(
            f"{directory}: wanted a model directory or config.json, found neither; "
            "name a directory that from_pretrained reads"
        )
    raw = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    converted = raw.get("quant_method") == METHOD and "recipe" in raw
    recipe = Recipe.from_dict(raw["recipe"]) if converted else get_recipe("fp4")
    return Source(directory, Dsv4Config.from_pretrained(directory), recipe, converted)


def plan_here(
    source: Source, ram: int | None, vram: int | tuple[int, ...] | None, context: int
) -> Planned:
    """Where the model's parts go on the machine at hand: memory as wished, or as there is."""
    if vram is None:
        vram = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else 0
    profile = MachineProfile.load()
    machine, measured = with_rates(Machine(this_ram(ram), vram), profile, source.directory)

    sizes_of = sizes_by_context(source.config, source.recipe)
    planned = make_plan(sizes_of, context, machine, measured=measured)
    notes = (*planned.notes, *direct_note(profile, source.directory))
    return replace(planned, notes=notes)


def load(
    source: Source, ram: int | None, vram: int | tuple[int, ...] | None, cold: str = ""
) -> tuple[Any, Any]:
    """Model and tokenizer, under budgets of memory if some are wished.

    Args:
        source: what `look` found.
        ram: bytes of host memory, None for what there is.
        vram: of a GPU, likewise.
        cold: where experts outside of a GPU's memory are computed, a key of `COLD`, or "".

    Raises:
        ValueError: no tokenizer, a budget that the model does not fit into, several GPUs, or `cold`
            without a GPU or without packed experts.
        OSError: files are missing.
    """
    from transformers import AutoTokenizer

    from modeling_dsv4 import Dsv4ForCausalLM

    if not source.directory.is_dir():
        raise ValueError(f"{source.directory}: wanted a model's directory, got a file")
    if isinstance(vram, tuple):
        raise ValueError("--vram: wanted one size to run, several are planned with --plan alone")
    on_gpu = vram != 0 and torch.cuda.is_available()
    if vram and not on_gpu:
        raise ValueError(f"--vram: wanted a CUDA device for {format_size(vram)}, found none")
    options: dict[str, Any] = {"device_map": "cuda:0"} if on_gpu else {}
    if ram is not None or vram:
        options |= _budget(source, ram, vram or 0)
    if cold:
        if not on_gpu or not source.converted:
            lacking = "a CUDA device" if source.converted else "a converted model"
            raise ValueError(f"--cold: wanted {lacking}: there are no experts outside of a GPU")
        options["cold_experts"] = COLD[cold]
    tokenizer = AutoTokenizer.from_pretrained(source.directory)
    model = Dsv4ForCausalLM.from_pretrained(source.directory, dtype="auto", **options)
    return model.eval(), tokenizer


def _budget(source: Source, ram: int | None, vram: int) -> dict[str, Any]:
    if source.converted:
        context = min(source.config.max_position_embeddings, DEFAULT_CONTEXT)
        planned = plan_here(source, ram, vram, context)
        plan = planned.plan
        if plan.problem:
            ways = f"; would fit: {', or '.join(planned.nearest)}" if planned.nearest else ""
            raise ValueError(f"{source.directory}: does not fit: {plan.problem}{ways}")
        device = {"expert_device_memory": plan.sizes.expert * plan.experts_in["vram"]}
        tables = {"engram_memory": _ENGRAM} if plan.lookup_in == "disk" else {}
        return {"expert_memory": plan.expert_memory, **tables, **(device if vram else {})}
    files = list(source.directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if size > this_ram(ram) + vram:
        raise ValueError(
            f"--ram: wanted at least {format_size(size)} for {source.directory}, which is loaded "
            f"whole, got {format_size(this_ram(ram))}; write its experts as packs, which can stay "
            f"on disk: dsv4-quantize convert {source.directory} NEW --recipe fp4"
        )
    return {}
