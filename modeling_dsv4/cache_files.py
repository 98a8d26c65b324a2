# SPDX-License-Identifier: Apache-2.0
"""A cache as a file: one safetensors file whose metadata says what it is and for which model.

The file holds no weights: it continues only with the model that wrote it, of which the
configuration is compared field by field.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import safe_open

from .cache_stores import Store
from .configuration_dsv4 import Dsv4Config
from .safetensors_file import DTYPES, read_header, write_file
from .segments import RowState

if TYPE_CHECKING:
    from .cache import Dsv4Cache

Place: TypeAlias = str | torch.device
Places: TypeAlias = Place | Sequence[Place]

_KIND, _VERSION = "dsv4-cache", "1"
# Fields that change nothing in a cache; all others of `Dsv4Config` must agree.
_IGNORED = frozenset(
    "attention_dropout bos_token_id carries_vision draft_kind dspark_block_size "
    "dspark_markov_rank dspark_n_routed_experts dspark_noise_token_id "
    "dspark_num_experts_per_tok dspark_reads_outputs dspark_target_layer_ids eos_token_id "
    "image_token_id "
    "initializer_range max_position_embeddings num_draft_layers official_config "
    "output_router_logits pad_token_id router_aux_loss_coef use_cache vision_config".split()
)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


_COUNTERS = ("seen", "start", "offset")
_FACTS = ("storage", "max_rewind", "columns", "rewindable")


def save(cache: Dsv4Cache, path: str | Path, input_ids: torch.Tensor | None) -> None:
    """What `Dsv4Cache.save` does."""
    state = cache.state
    if state is None or state.blank or not cache.finished:
        raise ValueError("save: wanted a cache whose last pass has finished; read a prompt first")
    facts = {name: getattr(cache, name) for name in _FACTS}
    facts["ids"] = None if input_ids is None else _digest(cache, input_ids)
    tensors = {f"state.{name}": getattr(state, name) for name in _COUNTERS}
    tensors |= {f"state.entries.{ratio}": count for ratio, count in state.entries.items()}
    _leave_out_room(cache, state)
    # What a draft head keeps stays out: any model of this backbone may go on from the file.
    stores = (x for x in cache.named_stores() if not x[0].startswith("drafts."))
    held = {name: store for name, store in stores if store.batch}
    _write(Path(path), tensors, held, _architecture(cache.config), facts)


def _leave_out_room(cache: Dsv4Cache, state: RowState) -> None:
    """A step of a static cache reads all its room; a file wants the longest row alone."""
    for ratio, layer in zip(cache.config.compress_ratios, cache.layers, strict=False):
        if ratio:
            longest = max(int(state.entries[ratio].max()), 1)
            for rows in (layer.entries, layer.index_keys):
                rows.length = min(rows.length, longest)


def load(
    kind: type[Dsv4Cache],
    path: str | Path,
    config: Dsv4Config,
    input_ids: torch.Tensor | None,
    device: Places,
    offload: str | Path | None,
) -> Dsv4Cache:
    """What `Dsv4Cache.load` does; `kind` is that class."""
    path = Path(path)
    first, of_layers = _by_layer(device, config.num_hidden_layers)
    tensors, saved, facts = _read(path)
    _check_same(path, saved, _architecture(config))
    try:
        cache = kind(config, facts["max_rewind"], facts["storage"], offload=offload)
        cache.columns, cache.rewindable = facts["columns"], facts["rewindable"]
        entries = {ratio: tensors.pop(f"state.entries.{ratio}") for ratio in cache.ratios}
        counters = {name: tensors.pop(f"state.{name}") for name in _COUNTERS}
        # Copied: the cache is written in place, and the file may be replaced meanwhile.
        counters = {name: x.to(first, copy=True) for name, x in counters.items()}
        entries = {ratio: x.to(first, copy=True) for ratio, x in entries.items()}
        cache.state = RowState(**counters, entries=entries, blank=False)
        for name, store in cache.named_stores():
            if name in tensors or name.endswith(".window"):
                layer = name.split(".")[1] if name.startswith("layers.") else None
                store.restore(tensors.pop(name), of_layers[int(layer)] if layer else first)
        ids = facts["ids"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: wanted all parts of a cache, got none of {error}") from None
    _check_rows(path, cache, tensors)
    if input_ids is not None and ids != _digest(cache, input_ids):
        raise ValueError(
            f"{path}: wanted the cache of these input_ids, got that of other "
            f"{cache.columns} tokens, or one saved without them; read the prompt again"
        )
    return cache


def _by_layer(device: Places, layers: int) -> tuple[Place, list[Place]]:
    """Where counters lie, and the stores of each layer."""
    if isinstance(device, str | torch.device):
        return device, [device] * layers
    if len(device) != layers:
        raise ValueError(
            f"device: wanted one, or one for each of {layers} layers, got {len(device)}"
        )
    return device[0], list(device)


def _architecture(config: Dsv4Config) -> dict[str, Any]:
    """The fields on which a cache depends, as JSON gives them back."""
    names = [name for name in Dsv4Config.__annotations__ if name not in _IGNORED]
    found: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in names}))
    return found


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: wanted a cache of this model, got one of another configuration: {name} "
                f"is {saved.get(name)!r} there and {wanted.get(name)!r} here; read the prompt again"
            )


def _check_rows(path: Path, cache: Dsv4Cache, left: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that belong nowhere, and stores of another number of rows."""
    batch = {cache.max_batch_size}
    batch |= {store.batch for _, store in cache.named_stores() if store.batch}
    if left or len(batch) != 1:
        raise ValueError(
            f"{path}: wanted the stores of one cache, got batches of {sorted(batch)} rows and "
            f"unknown tensors {sorted(left)[:3]}"
        )


def _digest(cache: Dsv4Cache, input_ids: torch.Tensor) -> str:
    """SHA-256 of the ids that the cache has read, the first columns of these."""
    ids = input_ids[:, : cache.columns].detach().to("cpu", torch.int64).contiguous()
    wanted = [cache.max_batch_size, cache.columns]
    if list(ids.shape) != wanted:
        raise ValueError(
            f"input_ids: wanted {wanted} or more columns, pads included, as the cache has read "
            f"them, got {list(input_ids.shape)}"
        )
    return hashlib.sha256(repr(wanted).encode() + ids.numpy().tobytes()).hexdigest()


def _write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    stores: Mapping[str, Store],
    architecture: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    layouts = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    layouts |= {name: store.layout() for name, store in stores.items()}
    entries = {name: (_DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in layouts.items()}
    metadata = {
        "kind": _KIND,
        "version": _VERSION,
        "config": json.dumps(architecture),
        "facts": json.dumps(facts),
    }
    try:
        # One store after the other: what lies in files does not come into memory as a whole.
        write_file(
            temporary, entries, lambda n: tensors[n] if n in tensors else stores[n].held(), metadata
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, mapped from the file, configuration and facts."""
    names = read_header(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{path}: wanted a file of Dsv4Cache.save, got other safetensors")
        if metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path}: wanted version {_VERSION} of cache files, got "
                f"{metadata.get('version')!r}; read the prompt again and save it anew"
            )
        try:
            saved, facts = dict(json.loads(metadata["config"])), dict(json.loads(metadata["facts"]))
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{path}: wanted config and facts as JSON in its metadata") from None
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, saved, facts
