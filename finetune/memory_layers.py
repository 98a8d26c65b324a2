# SPDX-License-Identifier: Apache-2.0
"""The memory adapter's layer: deltas of chosen table rows, and a low rank where they are read.

```
rows ─┬─ table (frozen) ───────── + delta of its rows ─┬─ kv_proj (frozen) ── + ── gate ── streams
      └─ is an n-gram written? ── touched [B, S] ──────┴─ A ── B where touched ┘
```

An n-gram is written if all its rows, one a head, are edited. Elsewhere zero is added, and nothing
is rounded again: the bits are those of the base. The low rank lets the gate open for the new rows;
it too acts at touched positions alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from modeling_dsv4 import ops
from modeling_dsv4.engram import Engram

from .layers import BesideLora, reset_pair
from .memory_rows import MemoryRows, engram_identity, find_hashing, hash_settings

# Where adapter_config.json keeps what a layer has to know before its tensors are read: in the
# field that PEFT stores unread.
MEMORY_KEY = "engram_memory"
VERSION = 1

NO_MERGE = (
    "merge: a memory adapter acts only where a text reads one of its rows, which no weight can "
    "say; merged, its low rank would reach every position. Keep it beside the model, and "
    "delete_adapter to unlearn it"
)


class EditedRows(nn.Module):
    """Deltas of some rows of one table, and which n-grams they were written for.

    Attributes:
        ids: [t] int64, ascending; -1 until they are filled or loaded, which no text reads.
        places: [n-grams, H] int32, see `LayerRows`.
        grams: [n-grams, n] int32, see `MemoryRows`.
        uses: [n-grams, 2] int32, likewise.
        delta: [t, width] float32, what is added to each row.
    """

    ids: torch.Tensor
    places: torch.Tensor
    grams: torch.Tensor
    uses: torch.Tensor

    def __init__(self, rows: int, table: Any, grams: int, longest: int, heads: int) -> None:
        super().__init__()
        self.table_rows, self.heads = table.num_embeddings, heads
        for name, shape, dtype in (
            ("ids", (rows,), torch.int64),
            ("places", (grams, heads), torch.int32),
            ("grams", (grams, longest), torch.int32),
            ("uses", (grams, 2), torch.int32),
        ):
            self.register_buffer(name, torch.full(shape, -1, dtype=dtype))
        self.delta = nn.Parameter(torch.zeros(rows, table.embedding_dim))

    def fill(self, memory: MemoryRows, layer: int) -> None:
        """Take chosen rows, with nothing written yet."""
        rows = memory.layers[layer]
        self._check(rows.ids)
        for mine, given in (
            (self.ids, rows.ids),
            (self.places, rows.places),
            (self.grams, memory.grams),
            (self.uses, memory.uses),
        ):
            mine.copy_(given)

    def find(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look table rows [..., P] up.

        Returns:
            their places [..., P] among the edited ones, and which belong to a written n-gram.
        """
        if not len(self.ids):
            return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        at = torch.searchsorted(self.ids, rows.contiguous()).clamp(max=len(self.ids) - 1)
        by_order = (self.ids[at] == rows).unflatten(-1, (-1, self.heads))
        return at, by_order.all(-1, keepdim=True).expand_as(by_order).flatten(-2)

    def _check(self, ids: torch.Tensor) -> None:
        ordered = bool((ids[1:] > ids[:-1]).all())
        if len(ids) and not (ordered and int(ids[0]) >= 0 and int(ids[-1]) < self.table_rows):
            raise ValueError(
                f"memory adapter: wanted ascending rows from 0 to {self.table_rows - 1}, got "
                f"others ({len(ids)} from {int(ids[0])} to {int(ids[-1])}); the file is damaged"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        ids = state_dict.get(f"{prefix}ids")
        if ids is not None and not ids.is_meta:
            self._check(ids)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoraEngram(BesideLora):
    """An Engram module with edited rows and a low rank beside `kv_proj`, per adapter."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_rows")

    def _make_containers(self) -> None:
        self.lora_rows: Any = nn.ModuleDict()

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.kv_proj.in_features, module.kv_proj.out_features

    def _make_banks(self, name: str, r: int, config: LoraConfig) -> None:
        record = (config.auto_mapping or {}).get(MEMORY_KEY)
        if record is None:
            raise ValueError(
                "memory adapter: wanted the rows that it may write, got none; choose them with "
                'choose_memory_rows and give them to attach_adapters(model, "memory", memory=rows)'
            )
        base = self.get_base_layer()
        p = config.lora_dropout
        self.lora_dropout[name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_A[name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[name] = nn.Linear(r, self.out_features, bias=False)
        reset_pair(self.lora_A[name], self.lora_B[name], config.init_lora_weights)
        shape = record["hash"]["max_ngram_size"], record["hash"]["n_heads"]
        rows = record["rows"][base.position]
        self.lora_rows[name] = EditedRows(rows, base.embed, record["ngrams"], *shape)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype]:
        # A table may be elsewhere than the layer.
        weight: Any = base_layer.q_weight
        return weight.device, torch.float32

    def place(self, device: torch.device) -> None:
        """Move all adapters beside the layer, unless they are empty yet."""
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] or device
        for container in (self.lora_A, self.lora_B, self.lora_rows):
            for module in container.values():
                if not any(p.is_meta for p in module.parameters()):
                    module.to(device)

    # What the model and its table store ask an Engram module for.
    @property
    def position(self) -> int:
        return int(self.get_base_layer().position)

    @property
    def embed(self) -> nn.Module:
        table: nn.Module = self.get_base_layer().embed
        return table

    def forward(
        self,
        streams: torch.Tensor,
        rows: torch.Tensor,
        live: torch.Tensor | None,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """As `Engram.forward`; `adapter_names` gives each row of a batch its adapter."""
        self._check_forward_args(streams, adapter_names=adapter_names)
        base = self.base_layer
        active = self._active()
        if adapter_names is not None and not self.disable_adapters:
            active = [name for name in self.lora_A if name in adapter_names]
        if not active:
            return base(streams, rows, live)
        memory = base.embed(rows).to(streams)  # [B, S, P, width]
        rows = rows.to(streams.device)
        edits, touched = torch.zeros((), device=rows.device), {}
        for name in active:
            at, hit = self.lora_rows[name].find(rows)
            if adapter_names is not None:
                mine = torch.tensor([n == name for n in adapter_names], device=rows.device)
                hit = hit & mine[:, None, None]
            delta = self.lora_rows[name].delta[at]
            edits = edits + torch.where(hit[..., None], delta, 0)
            touched[name] = hit.any(-1)
        memory = (ops.fp32(memory) + edits).to(memory.dtype).flatten(-2)
        projected = self._project(base.kv_proj, memory, touched)
        return base.add(streams, projected, live)

    def _project(
        self,
        kv_proj: Callable[[torch.Tensor], torch.Tensor],
        memory: torch.Tensor,
        touched: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Keys and values [B, S, out] of memory [B, S, in], each low rank where it is touched."""
        projected = kv_proj(memory)
        extra = torch.zeros((), device=memory.device)
        for name, places in touched.items():
            x = self.lora_dropout[name](memory.to(self.lora_A[name].weight.dtype))
            low = self.lora_A[name](x)
            up = self.lora_B[name](low) * self.scaling[name]
            extra = extra + torch.where(places[..., None], up, 0)
        return (ops.fp32(projected) + extra).to(projected.dtype)

    def base_weights(self) -> list[nn.Parameter]:
        raise ValueError(NO_MERGE)

    def get_delta_weight(self, adapter: str) -> list[torch.Tensor]:
        raise ValueError(NO_MERGE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)


MEMORY_KINDS: tuple[tuple[type[nn.Module], type[BesideLora]], ...] = ((Engram, LoraEngram),)


def memory_record(config: LoraConfig) -> dict[str, Any] | None:
    """What an adapter's config says of its rows; None for adapters without any."""
    record: dict[str, Any] | None = (config.auto_mapping or {}).get(MEMORY_KEY)
    return record


def refuse_mixing(configs: dict[str, LoraConfig], names: Sequence[str]) -> None:
    """Memory adapters have no weighted sums: rows are a set, and each belongs to its n-grams."""
    if any(name in configs and memory_record(configs[name]) for name in names):
        raise NotImplementedError(
            "add_weighted_adapter: memory adapters are not mixed by weights; have several active "
            "at once with activate_memory"
        )


def make_record(model: nn.Module, memory: MemoryRows) -> dict[str, Any]:
    """What is kept of chosen rows in an adapter's config."""
    return {
        "version": VERSION,
        "hash_identity": memory.identity,
        "hash": hash_settings(find_hashing(model)),
        "ngrams": len(memory.grams),
        "rows": [len(layer.ids) for layer in memory.layers],
    }


def check_memory(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a memory adapter that was written for another hashing.

    Raises:
        ValueError: other settings, factors or token map, or a newer format.
    """
    record = memory_record(config)
    if record is None:
        return
    if record.get("version") != VERSION:
        raise ValueError(
            f"memory adapter: wanted format {VERSION}, got {record.get('version')}; use the "
            "version of dsv4 that wrote it"
        )
    hashing = find_hashing(model)
    for name, wanted in hash_settings(hashing).items():
        if record["hash"].get(name) != wanted:
            raise ValueError(
                f"memory adapter: it was written for engram_{name} {record['hash'].get(name)}, "
                f"got a model with {wanted}; the same text would read other rows"
            )
    found = engram_identity(hashing)
    if found is not None and found != record["hash_identity"]:
        raise ValueError(
            "memory adapter: it was written under another Engram token map, so the same text "
            "would read other rows; load it onto its own base, with that base's tokenizer"
        )


def memory_layers(model: nn.Module) -> list[LoraEngram]:
    """All layers with memory adapters, in the order of the model's layers."""
    return [module for module in model.modules() if isinstance(module, LoraEngram)]


def fill_rows(model: nn.Module, name: str, memory: MemoryRows) -> None:
    """Give a new adapter's layers their chosen rows."""
    for layer in memory_layers(model):
        layer.lora_rows[name].fill(memory, layer.position)
