# SPDX-License-Identifier: Apache-2.0
"""What a memory adapter's files say: every n-gram that was written, without loading a model."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from modeling_dsv4.engram_hash import table_primes

from .loading import load_tokenizer
from .memory_layers import MEMORY_KEY

_TENSOR = re.compile(r".*\.layers\.(\d+)\.engram\.lora_rows\.(ids|places|grams|uses|delta)")


def is_memory(adapter: str | Path) -> bool:
    """Whether a directory holds a memory adapter."""
    file = Path(adapter, "adapter_config.json")
    if not file.is_file():
        return False
    config = json.loads(file.read_text(encoding="utf-8"))
    return MEMORY_KEY in (config.get("auto_mapping") or {})


def describe_memory(adapter: str | Path, tokenizer: Any = None) -> dict[str, Any]:
    """List what a memory adapter has written.

    Args:
        adapter: its directory.
        tokenizer: of the base model; with it n-grams are text beside token ids.

    Returns:
        Plain values: `rank`, `bytes` of the tensors' file, `hash_identity`, `layers` (per Engram
        layer: `layer`, `rows`, `width`, `delta_norm`, `written` rows whose delta is not zero, and
        `chance`, that an n-gram of another text meets written rows by the hash alone), and
        `ngrams`: `tokens`, `text`, `in_corpus`, `in_background`, and `rows`, one entry per layer
        and hash head with `layer`, `head`, `row`, `norm` of its delta and `shared_by` n-grams;
        those with the largest `norm` over all their rows first.

    Raises:
        ValueError: no memory adapter there.
    """
    if not is_memory(adapter):
        raise ValueError(f"memory: wanted the directory of a memory adapter, got {adapter}")
    config = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))
    record = config["auto_mapping"][MEMORY_KEY]
    file = Path(adapter, "adapter_model.safetensors")
    layers = _read_layers(file)
    grams = _list_grams(layers, tokenizer)
    grams.sort(key=lambda gram: -gram["norm"])
    return {
        "rank": config["r"],
        "bytes": file.stat().st_size,
        "hash_identity": record["hash_identity"],
        "layers": [_sum_up(layer, of, record["hash"]) for layer, of in layers.items()],
        "ngrams": grams,
    }


def find_tokenizer(base: str | None) -> Any:
    """The tokenizer beside a base model, None if there is no such directory or none in it."""
    if base is None or not Path(base).is_dir():
        return None
    try:
        return load_tokenizer(base)
    except ValueError:
        return None


def memory_table(told: dict[str, Any], most: int = 20) -> Table:
    """The strongest n-grams of `describe_memory`, for people."""
    chance = max((layer["chance"] for layer in told["layers"]), default=0.0)
    table = Table(
        title=f"{len(told['ngrams'])} n-grams written, strongest first",
        caption=f"a token of another text meets one by the hash alone: {chance:.1e} a layer",
    )
    for name in ("n-gram", "corpus", "background", "norm", "rows by layer"):
        table.add_column(name, justify="left" if name == "n-gram" else "right")
    for gram in told["ngrams"][:most]:
        text = " ".join(map(str, gram["tokens"])) if gram["text"] is None else repr(gram["text"])
        rows: dict[int, list[str]] = {}
        for row in gram["rows"]:
            rows.setdefault(row["layer"], []).append(str(row["row"]))
        places = "; ".join(f"{layer}: {', '.join(ids)}" for layer, ids in rows.items())
        counts = (str(gram["in_corpus"]), str(gram["in_background"]))
        table.add_row(escape(text), *counts, f"{gram['norm']:.3f}", places)
    return table


def _read_layers(file: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Tensors of `EditedRows` by layer and name."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    if not file.is_file():
        raise ValueError(f"memory: wanted {file}, found none; the adapter was not saved whole")
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            match = _TENSOR.fullmatch(key)
            if match:
                found.setdefault(int(match[1]), {})[match[2]] = tensors.get_tensor(key)
    return dict(sorted(found.items()))


def _sum_up(layer: int, of: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    norms = of["delta"].norm(dim=-1)
    return {
        "layer": layer,
        "rows": len(of["ids"]),
        "width": of["delta"].shape[-1],
        "delta_norm": float(of["delta"].norm()),
        "written": int((norms > 0).sum()),
        "chance": _stray_chance(layer, of["ids"], settings),
    }


def _stray_chance(layer: int, ids: torch.Tensor, settings: dict[str, Any]) -> float:
    """The chance that evenly hashed n-grams of one token meet edited rows in all heads of an order.

    Of each head's table some share is edited; an order meets by the product of its heads' shares.
    """
    names = ("layer_ids", "vocab_size", "max_ngram_size", "n_heads")
    primes = table_primes(*(settings[name] for name in names))[settings["layer_ids"].index(layer)]
    ends = primes.flatten().cumsum(0)
    held = torch.bucketize(ids, ends, right=True).bincount(minlength=primes.numel())
    shares = held.view_as(primes).double() / primes
    return float(1 - (1 - shares.prod(-1)).prod())


def _list_grams(layers: dict[int, dict[str, torch.Tensor]], tokenizer: Any) -> list[dict[str, Any]]:
    """All n-grams, with their rows in every layer."""
    if not layers:
        return []
    first = next(iter(layers.values()))
    listed: list[dict[str, Any]] = []
    for gram, (corpus, background) in zip(
        first["grams"].tolist(), first["uses"].tolist(), strict=True
    ):
        tokens = [token for token in gram if token >= 0]
        text = None if tokenizer is None else tokenizer.decode(tokens)
        told = {"tokens": tokens, "text": text, "in_corpus": corpus, "in_background": background}
        listed.append({**told, "norm": 0.0, "rows": []})
    for layer, of in layers.items():
        norms, places = of["delta"].norm(dim=-1), of["places"].long()
        shared = places.flatten().bincount(minlength=len(norms))
        for told, its in zip(listed, places.tolist(), strict=True):
            for head, place in enumerate(its):
                row = {"layer": layer, "head": head, "row": int(of["ids"][place])}
                size = {"norm": float(norms[place]), "shared_by": int(shared[place])}
                told["rows"].append({**row, **size})
    for told in listed:
        told["norm"] = sum(row["norm"] ** 2 for row in told["rows"]) ** 0.5
    return listed
