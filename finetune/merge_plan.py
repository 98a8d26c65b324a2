# SPDX-License-Identifier: Apache-2.0
"""What a merge will write, known from headers alone: plain weights, or a recipe's packs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.safetensors_file import DTYPES, lay_out_file
from modeling_dsv4.weight_map import our_inventory
from quantize.config import RECIPES, Recipe, get_recipe
from quantize.convert import quantized_config
from quantize.dense import TableSource
from quantize.job import Item, Job, TargetFile, entry_bytes, plan_job
from quantize.pack import PROJECTIONS, PackLayout, pack_file_name, pack_header
from quantize.source import Entry, Source
from quantize.tables import blocks, table_file_name, table_header

from .base_weights import ConvertedSource, expert_held, is_plain

PLAIN = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CHOICES = ("source", *PLAIN, *RECIPES)
_EXPERTS = "*.mlp.experts.*"


@dataclass(frozen=True)
class Plan:
    """Files of a merged model and the configuration beside them.

    Attributes:
        job: the files.
        config: config.json.
        form: what the result is in, for people.
        plain: experts are stacked tensors, no packs.
    """

    job: Job
    config: Dsv4Config
    form: str
    plain: bool


def plan_merge(source: Source, to: str, max_shard_size: int) -> Plan:
    """Lay out a merged model.

    Args:
        source: the base.
        to: a dtype of plain weights, a recipe by name, or "source" for what the base is in.
        max_shard_size: bytes of a file of dense tensors.

    Raises:
        ValueError: an unknown form.
    """
    if to not in CHOICES:
        raise ValueError(f"--to: wanted one of {', '.join(CHOICES)}, got {to!r}")
    if to in PLAIN or (to == "source" and is_plain(source)):
        return _plan_plain(source, PLAIN.get(to), max_shard_size)
    if isinstance(source, ConvertedSource):
        return _plan_converted(source, None if to == "source" else get_recipe(to), max_shard_size)
    recipe = _release_recipe(source) if to == "source" else get_recipe(to)
    job = plan_job(source, recipe, max_shard_size)
    return Plan(job, quantized_config(source.config, recipe, job), _form(source, recipe), False)


def _form(source: Source, recipe: Recipe) -> str:
    return f"{recipe.name} ({_dense_form(source)} outside of the experts)"


def _dense_form(source: Source) -> str:
    storage = getattr(source.config, "quantization_config", None) or {}
    return "FP8 blocks" if storage.get("weight_block_size") else "plain weights"


def _release_recipe(source: Source) -> Recipe:
    """The recipe that a release's own experts are in."""
    module = next(iter(source.experts))
    held = expert_held(source, module, 0, "gate_up_proj")
    if held is None:
        raise ValueError("--to source: wanted a base with packed experts, got plain ones in FP8")
    return Recipe(held.name, ((_EXPERTS, held.name),))


def _plan_plain(source: Source, dtype: str | None, max_shard_size: int) -> Plan:
    """Our own layout in numbers; `dtype` None keeps each tensor's."""
    config = copy.deepcopy(source.config)
    for field in ("quantization_config", "official_config"):
        if getattr(config, field, None) is not None:
            setattr(config, field, None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    entries = {
        name: (_plain_dtype(source, name, held, dtype), shape)
        for name, (held, shape) in our_inventory(config).items()
    }
    shares: dict[str, int] = {}
    for entry in entries.values():
        shares[entry[0]] = shares.get(entry[0], 0) + entry_bytes(entry)
    names = {code: name for name, code in PLAIN.items()}
    most = names[max((code for code in shares if code in names), key=lambda code: shares[code])]
    config.dtype = DTYPES[PLAIN[most]]
    files = _dense_files(entries, max_shard_size)
    return Plan(Job(files), config, f"plain {most}", True)


def _plain_dtype(source: Source, name: str, held: str, dtype: str | None) -> str:
    if held != "BF16" or name.startswith("vision."):
        return source.dense[name][0] if name in source.dense and held != "F32" else held
    if dtype is not None:
        return dtype
    module, _, projection = name.rpartition(".")
    if module in source.experts:
        return source.expert_slices(module, 0)[projection, ""][0].dtype
    return source.dense[name][0]


def _plan_converted(source: ConvertedSource, recipe: Recipe | None, max_shard_size: int) -> Plan:
    """A converted model again: its dense part as it is, its experts in their formats or others."""
    hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
    files: dict[str, TargetFile] = {}
    for name, experts in source.experts.items():
        layout = source.packs[name].layout
        if recipe is not None:
            layout = PackLayout.build(name, experts.num_experts, hidden, width, recipe.format_of)
        file, header = pack_file_name(name), pack_header(name, layout)
        items = tuple(
            Item(file, str(e), len(header) + layout.starts[e], layout.of(e).nbytes, frozenset())
            for e in range(layout.num_experts)
        )
        files[file] = TargetFile(header, items, (experts, layout), {})
    for module, table in source.tables.items():
        file, row = table_file_name(module), table.layout.nbytes
        header = table_header(module, table.layout, table.num_rows)
        items = tuple(
            Item(file, str(i), len(header) + start * row, (stop - start) * row, frozenset())
            for i, (start, stop) in enumerate(blocks(table.num_rows))
        )
        what = TableSource(module, table.layout, table.num_rows, rounded=False)
        files[file] = TargetFile(header, items, None, {}, table=what)
    files |= _dense_files(source.dense, max_shard_size)
    job, own = Job(files), source.recipe
    if recipe is not None:
        # The base's rules still say what its embedding, head and tables are in.
        own = Recipe(recipe.name, (*recipe.rules, *own.rules))
    calibrated = recipe is None and source.config.quantization_config.get("calibrated", False)
    config = quantized_config(source.config, own, job, calibrated)
    return Plan(job, config, _form(source, own), False)


def _dense_files(entries: Mapping[str, Entry], max_shard_size: int) -> dict[str, TargetFile]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry_bytes(entry) > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry_bytes(entry)
    files = {}
    for number, some in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, spans = lay_out_file(some)
        items = tuple(
            Item(file, name, start, end - start, frozenset())
            for name, (start, end) in spans.items()
        )
        files[file] = TargetFile(header, items, None, some)
    return files


def written_formats(plan: Plan) -> dict[str, Any]:
    """Formats of the experts by projection, for a report."""
    found: dict[str, set[str]] = {projection: set() for projection in PROJECTIONS}
    for _, layout in plan.job.packs.values():
        for record in layout.layouts:
            for projection, name in record.formats:
                found[projection].add(name)
    return {projection: sorted(names) for projection, names in found.items() if names}
