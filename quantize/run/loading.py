# SPDX-License-Identifier: Apache-2.0
"""A model's directory and a machine's memory, turned into a loaded model or a reason against it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modeling_dsv4 import Dsv4Config

from ..config import METHOD, Recipe, get_recipe
from ..inventory import model_sizes
from ..machine import MachineProfile
from ..memory import available_memory
from ..placement import Machine, Plan, place
from ..sizes import format_size

# Settings of a wish that a profile may replace.
_RATES = ("ram_rate", "link_rate", "vram_rate")


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
            f"{directory}: wanted a model's directory, with config.json, found none; "
            "name a directory that from_pretrained reads"
        )
    raw = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    converted = raw.get("quant_method") == METHOD and "recipe" in raw
    recipe = Recipe.from_dict(raw["recipe"]) if converted else get_recipe("fp4")
    return Source(directory, Dsv4Config.from_pretrained(directory), recipe, converted)


def this_machine(
    ram: int | None, vram: int | None, source: Path, profile: MachineProfile | None
) -> Machine:
    """The machine at hand: memory as wished or as there is, rates as measured where they were."""
    if vram is None:
        vram = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else 0
    machine = Machine(ram=available_memory() if ram is None else ram, vram=vram)
    if profile is None:
        return machine
    found: dict[str, Any] = {name: getattr(profile, name) for name in _RATES}
    disk = profile.disk(source)
    found["disk_rate"] = disk.rate if disk else None
    return replace(machine, **{name: int(rate) for name, rate in found.items() if rate})


def plan_for(source: Source, machine: Machine, context: int) -> Plan:
    """Where the model's parts go."""
    return place(model_sizes(source.config, source.recipe, context), machine)


def load(source: Source, ram: int | None, vram: int | None) -> tuple[Any, Any]:
    """Model and tokenizer, under a budget of host memory if one is wished.

    Raises:
        ValueError: no tokenizer, or a budget that the model does not fit into.
        OSError: files are missing.
    """
    from transformers import AutoTokenizer

    from modeling_dsv4 import Dsv4ForCausalLM

    if not source.directory.is_dir():
        raise ValueError(f"{source.directory}: wanted a model's directory, got a file")
    on_gpu = vram != 0 and torch.cuda.is_available()
    options: dict[str, Any] = {"device_map": "cuda:0"} if on_gpu else {}
    if ram is not None:
        options |= _budget(source, ram, 0 if vram is None else vram)
    if vram and not on_gpu:
        raise ValueError(f"--vram: wanted a CUDA device for {format_size(vram)}, found none")
    tokenizer = AutoTokenizer.from_pretrained(source.directory)
    model = Dsv4ForCausalLM.from_pretrained(source.directory, dtype="auto", **options)
    return model.eval(), tokenizer


def _budget(source: Source, ram: int, vram: int) -> dict[str, Any]:
    if source.converted:
        context = min(source.config.max_position_embeddings, 65536)
        plan = plan_for(source, Machine(ram=ram, vram=vram), context)
        if plan.problem:
            raise ValueError(f"{source.directory}: does not fit: {plan.problem}")
        return {"expert_memory": plan.expert_memory}
    files = list(source.directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if size > ram + vram:
        raise ValueError(
            f"--ram: wanted at least {format_size(size)} for {source.directory}, which is loaded "
            f"whole, got {format_size(ram)}; write its experts as packs, which can stay on disk: "
            f"dsv4-quantize convert {source.directory} NEW --recipe fp4"
        )
    return {}
