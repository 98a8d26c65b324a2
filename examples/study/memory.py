# SPDX-License-Identifier: Apache-2.0
"""Engram for comparison: present, absent, fed with meaningless ids, or traded for experts.

Tables of a trained model can be knocked out, or read from disk row by row.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano.data import Corpus

from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.engram import Engram
from quantize.hf_quantizer import attach_tables, store_tables
from quantize.stored_table import StoredTable

from .ngrams import FREQUENT, RARE, UNSEEN, ends_name, held_out, trigram_kinds
from .routing import counted, describe

# Bytes of rows that may be resident while tables are on disk: a few hundred rows.
_RESIDENT = 1 << 16
_DISK_ROWS = 16


def shuffle_ids(model: Dsv4ForCausalLM, seed: int) -> None:
    """Control: rows are looked up under ids that say nothing of the text, drawn for each call.

    Tables, projections and gates stay, so that what they add in parameters and noise stays too.
    """
    hashing = model.model.engram_hash
    dice = torch.Generator().manual_seed(seed)
    rows = hashing.rows

    def drawn(layer: int, context: torch.Tensor) -> torch.Tensor:
        noise = torch.randint(0, int(hashing.token_map.max()) + 1, context.shape, generator=dice)
        return rows(layer, torch.where(context < 0, context, noise))

    hashing.rows = drawn


@contextmanager
def without_memory(model: Dsv4ForCausalLM) -> Iterator[None]:
    """Knock Engram out: nothing is added to the streams."""
    handles = [
        layer.engram.register_forward_hook(lambda _m, args, _o: args[0])
        for layer in model.model.layers
        if getattr(layer, "engram", None) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tables_on_disk(model: Dsv4ForCausalLM, memory: int = _RESIDENT) -> Iterator[None]:
    """Read the rows of every Engram table from a file of its own, as converted models do.

    Args:
        model: with tables in memory.
        memory: bytes of rows that may be resident.
    """
    tables = {n: m for n, m in model.named_modules() if isinstance(m, Engram)}
    plain = {name: engram.embed for name, engram in tables.items()}
    store_tables(model, {f"{name}.embed": "F32" for name in tables})
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, engram in tables.items():
                _write(engram.embed, plain[name].weight.detach(), Path(folder))
            attach_tables(model, Path(folder), memory)
            yield
    finally:
        for name, engram in tables.items():
            engram.embed = plain[name]


def _write(table: StoredTable, weight: torch.Tensor, folder: Path) -> None:
    table.packed = table.layout.encode({"": weight})
    table.save_files(folder)
    table.packed = None


@torch.no_grad()
def measure_memory(
    model: Dsv4ForCausalLM, corpus: Corpus, read: np.ndarray, meaningful: bool
) -> dict[str, Any]:
    """Held-out loss by domain and kind of token; without the memory; with its tables on disk.

    Beside it, what experts were chosen.

    Args:
        model: trained.
        corpus: what it was trained on.
        read: [n, s] tokens that it has read.
        meaningful: rows follow from the text, so that a second pass reads the same ones.
    """
    found: dict[str, Any] = {}
    counts: dict[str, list[torch.Tensor]] = {}
    has_memory = bool(model.config.engram_layer_ids)
    for name, rows in held_out(corpus).items():
        seen, names = trigram_kinds(read, rows), ends_name(corpus.tokenizer, rows, name)
        kinds = {
            "loss": np.ones_like(names),
            "unseen": seen == UNSEEN,
            "rare": seen == RARE,
            "frequent": seen == FREQUENT,
            "names": names & (seen == RARE),
        }
        with counted(model) as counts[name]:
            losses = token_losses(model, rows)
        found[name] = {kind: _mean(losses[of]) for kind, of in kinds.items()}
        found[name]["tokens"] = {kind: int(of.sum()) for kind, of in kinds.items()}
        if not has_memory:
            continue
        with without_memory(model):
            without = token_losses(model, rows)
        found[name]["knocked_out"] = {kind: _mean(without[of]) for kind, of in kinds.items()}
        if meaningful:
            found[name]["from_disk"] = _from_disk(model, rows[:_DISK_ROWS])
    return found | {"routing": describe(counts)}


def _mean(losses: np.ndarray) -> float:
    # A sum of float64: two kinds of tokens that are the same have the same mean.
    return float(losses.mean(dtype=np.float64)) if losses.size else float("nan")


def _from_disk(model: Dsv4ForCausalLM, rows: np.ndarray) -> dict[str, float]:
    """How far losses move when rows are read from disk, and how many reads that took."""
    resident = token_losses(model, rows)
    with tables_on_disk(model):
        on_disk = token_losses(model, rows)
        stats = model.stats()
    return {
        "largest_difference": float(np.abs(on_disk - resident).max()),
        "loss": _mean(on_disk),
        "loss_in_memory": _mean(resident),
        "reads": stats["engram_reads"],
        "bytes_read": stats["engram_bytes_read"],
    }


def active_parameters(model: Dsv4ForCausalLM) -> int:
    """Parameters that one token multiplies or looks up: of tables its rows, of experts its own."""
    config = model.config
    total = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    total += config.hidden_size
    for layer in model.model.layers:
        experts = layer.mlp.experts
        one = sum(p[0].numel() for p in experts.parameters())
        total -= one * (experts.num_experts - config.num_experts_per_tok)
        if getattr(layer, "engram", None) is not None:
            total -= layer.engram.embed.weight.numel() - layer.engram.kv_proj.in_features
    return total


@torch.no_grad()
def token_losses(model: Dsv4ForCausalLM, rows: np.ndarray, batch: int = 8) -> np.ndarray:
    """Cross entropy of each predicted token of rows [r, s] in nats: [r, s - 1]."""
    model.eval()
    found = []
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        found.append(loss.numpy())
    return np.concatenate(found)
