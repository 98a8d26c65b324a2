# SPDX-License-Identifier: Apache-2.0
"""Which rows of the Engram tables a corpus may write: those of its own n-grams, rare ones first.

```
corpus ──── n-grams of ordinary tokens, compressed ──── c = times in the corpus ──────┐
background ─ its n-grams, compressed ────────────────── b = times in the background ──┤
                                             score c / (1 + b), the best that fit ────┘
best n-grams ── hash of each layer ── H rows each ── their union: the rows that are written
```

A text meets a written n-gram only where all H rows of an order are edited: n-grams that share one
row by the hash's chance meet nothing. N-grams with a special token, or cut short by a document's
start, are never chosen, nor are rows that they read: every text has some of these. The hash cannot
be inverted, so the n-grams are kept beside the rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_dsv4.engram import lookup_rows
from modeling_dsv4.engram_hash import EngramHash
from modeling_dsv4.segments import RowState, find_segments

Ints = npt.NDArray[np.int64]
Text = str | Sequence[int]

DEFAULT_TOP = 4096
# n-grams hashed at a time.
_TILE = 1 << 18
# Left of n-grams that are shorter than the longest.
NO_TOKEN = -1


@dataclass(frozen=True)
class LayerRows:
    """Rows of one table.

    Attributes:
        ids: [t] int64, ascending.
        places: [n-grams, H] int32, where in `ids` each n-gram's rows are.
    """

    ids: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class MemoryRows:
    """What a memory adapter may write.

    Attributes:
        layers: rows of each Engram layer, in the model's order.
        grams: [n-grams, n] int32 token ids as the corpus has them most often, best first; shorter
            ones are filled with -1 on the left.
        uses: [n-grams, 2] int32: times in the corpus, and in the background.
        identity: of the hashing, see `engram_identity`.
        report: see `choose_memory_rows`.
    """

    layers: tuple[LayerRows, ...]
    grams: torch.Tensor
    uses: torch.Tensor
    identity: str
    report: dict[str, float | None]


def find_hashing(model: nn.Module) -> EngramHash:
    """The model's Engram addressing.

    Raises:
        ValueError: it has none.
    """
    for module in model.modules():
        if isinstance(module, EngramHash):
            return module
    raise ValueError("memory: wanted a model with Engram layers (V4.1), got one without")


def hash_settings(hashing: EngramHash) -> dict[str, Any]:
    """What decides a row beside the token map, in plain values."""
    names = ("layer_ids", "vocab_size", "max_ngram_size", "n_heads", "head_dim", "pad_token_id")
    return {name: getattr(hashing.config, f"engram_{name}") for name in names}


def engram_identity(hashing: EngramHash) -> str | None:
    """Identity of the way from tokens to rows, "sha256:..."; None on the meta device.

    Covers the settings, the factors and the token map: where it is equal, the same text reads the
    same rows.
    """
    if hashing.token_map.is_meta:
        return None
    digest = hashlib.sha256(repr(sorted(hash_settings(hashing).items())).encode())
    for name in ("multipliers", "primes", "offsets", "token_map"):
        digest.update(getattr(hashing, name).cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def choose_memory_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Sequence[Text],
    background: Sequence[Text] = (),
    *,
    top: int = DEFAULT_TOP,
) -> MemoryRows:
    """Rank the n-grams of a corpus and keep the rows of the best in every Engram layer.

    An n-gram scores `c / (1 + b)` for c times in the corpus and b in the background; of equal ones
    the rarer in the background goes first, then the longer. Without a background that is frequency
    alone. Spellings that the token map takes for one are one n-gram.

    Args:
        model: with Engram layers; with adapters or without.
        tokenizer: the model's; its special and added tokens are in no written n-gram.
        corpus: documents, as text or as token ids.
        background: ordinary documents, whose n-grams are to be left alone.
        top: rows of each layer, at most.

    Returns:
        Rows, n-grams and a report: `candidates` and `kept` n-grams, `rows` of all layers,
        `covered` and `disturbed`, the shares of the corpus's and of the background's n-grams that
        are kept (None without a background), and `background_tokens`.

    Raises:
        ValueError: no Engram layers, ids beyond the vocabulary, less rows than one n-gram has, or
            nothing to write.
    """
    hashing = find_hashing(model)
    heads, longest = hashing.config.engram_n_heads, hashing.config.engram_max_ngram_size
    if top < heads:
        raise ValueError(f"memory_rows: wanted at least {heads}, one n-gram's rows, got {top}")
    # Added tokens are a format's markers, declared special or not.
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special = np.array(sorted(markers), np.int64)
    own, other = (_tokens(texts, tokenizer, hashing) for texts in (corpus, background))
    taboo = _broken_rows(hashing, own, special)
    found = [_Ranked.of(hashing, own, other, n, special) for n in range(2, longest + 1)]
    for ranked in found:
        ranked.drop_taboo(taboo)
    grams = np.concatenate([x.padded(longest) for x in found])
    uses = np.concatenate([x.uses for x in found])
    rows = np.concatenate([x.rows for x in found], axis=1)  # [layers, n-grams, H]
    length = np.concatenate([np.full(len(x.grams), x.grams.shape[1]) for x in found])
    score = -uses[:, 0] / (1 + uses[:, 1])
    best = np.lexsort((*grams.T, -length, uses[:, 1], score))[: top // heads]
    if not len(best):
        raise ValueError(
            "memory: wanted a corpus with n-grams of ordinary tokens, got none to write"
        )
    layers = []
    for of_layer in rows[:, best]:
        ids, places = np.unique(of_layer, return_inverse=True)
        places = places.reshape(of_layer.shape).astype(np.int32)
        layers.append(LayerRows(torch.from_numpy(ids), torch.from_numpy(places)))
    every = np.array([x.total for x in found]).sum(0)
    kept = uses[best].sum(0)
    report: dict[str, float | None] = {
        "candidates": len(grams),
        "kept": len(best),
        "rows": sum(len(layer.ids) for layer in layers),
        "covered": float(kept[0] / every[0]),
        "disturbed": float(kept[1] / every[1]) if every[1] else None,
        "background_tokens": sum(len(ids) for ids in other),
    }
    identity = engram_identity(hashing)
    assert identity is not None
    some, counts = (torch.from_numpy(x[best].astype(np.int32)) for x in (grams, uses))
    return MemoryRows(tuple(layers), some, counts, identity, report)


@dataclass
class _Ranked:
    """Distinct n-grams of one length: as they are written [U, n], `uses` [U, 2], `rows`
    [layers, U, H]; `total` [2] counts all n-grams of corpus and background."""

    grams: Ints
    uses: Ints
    rows: Ints
    total: Ints

    @classmethod
    def of(
        cls, hashing: EngramHash, own: list[Ints], other: list[Ints], n: int, special: Ints
    ) -> "_Ranked":
        written, often = _count_grams(own, n, special)
        usual, usually = _count_grams(other, n, special)
        names = _compress(hashing, np.concatenate((written, usual)))
        _, which = np.unique(names, axis=0, return_inverse=True)
        mine, theirs = np.split(which.reshape(-1), [len(written)])
        size = len(names)
        times = [np.bincount(mine, often, size), np.bincount(theirs, usually, size)]
        # Of each in the corpus, the spelling that it has most often.
        order = np.lexsort((-often, mine))
        distinct, first = np.unique(mine[order], return_index=True)
        grams = written[order][first]
        uses = np.stack([x[distinct] for x in times], axis=1).astype(np.int64)
        rows = _gram_rows(hashing, names[: len(written)][order][first])
        return cls(grams, uses, rows, np.array([often.sum(), usually.sum()]))

    def drop_taboo(self, taboo: Sequence[Ints]) -> None:
        """Leave out n-grams that read one of the rows [layers][...]."""
        bad = [np.isin(rows, some).any(1) for rows, some in zip(self.rows, taboo, strict=True)]
        free = ~np.logical_or.reduce(bad)
        self.grams, self.uses, self.rows = self.grams[free], self.uses[free], self.rows[:, free]

    def padded(self, longest: int) -> Ints:
        fill = ((0, 0), (longest - self.grams.shape[1], 0))
        return np.pad(self.grams, fill, constant_values=NO_TOKEN)


def _tokens(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, hashing: EngramHash
) -> list[Ints]:
    size = len(hashing.token_map)
    out = []
    for text in texts:
        if isinstance(text, str):
            text = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray(text, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"memory: wanted token ids from 0 to {size - 1}, got {ids.min()} to {ids.max()}; "
                "this is another model's tokenizer"
            )
        out.append(ids)
    return out


def _count_grams(documents: Sequence[Ints], n: int, special: Ints) -> tuple[Ints, Ints]:
    """Distinct n-grams [U, n] inside documents, none with a special token, and counts [U]."""
    found = [np.empty((0, n), np.int64)]
    for ids in documents:
        if len(ids) >= n:
            windows = np.lib.stride_tricks.sliding_window_view(ids, n)
            found.append(windows[~np.isin(windows, special).any(1)])
    grams, counts = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return grams, counts


def _compress(hashing: EngramHash, grams: Ints) -> Ints:
    ids = torch.from_numpy(grams).to(hashing.token_map.device)
    return hashing.compress(ids).cpu().numpy()


def _gram_rows(hashing: EngramHash, names: Ints) -> Ints:
    """Rows [layers, U, H] that compressed n-grams [U, n] read."""
    (count, n), config = names.shape, hashing.config
    out = np.empty((len(config.engram_layer_ids), count, config.engram_n_heads), np.int64)
    for start in range(0, count, _TILE):
        # By look-back: the last token first. Only longer n-grams than these look at the fill.
        ids = torch.from_numpy(names[start : start + _TILE, ::-1].copy())
        ids = ids.to(hashing.token_map.device)
        ids = torch.cat((ids, ids.new_zeros(len(ids), config.engram_max_ngram_size - n)), 1)
        for layer, rows in enumerate(out):
            found = hashing.rows(layer, ids).unflatten(-1, (-1, config.engram_n_heads))
            rows[start : start + _TILE] = found[:, n - 2].cpu().numpy()
    return out


def _broken_rows(hashing: EngramHash, documents: Sequence[Ints], special: Ints) -> list[Ints]:
    """Rows of each layer that n-grams with special tokens or cut by a start read."""
    layers = len(hashing.config.engram_layer_ids)
    found: list[list[Ints]] = [[np.empty(0, np.int64)] for _ in range(layers)]
    back = hashing.config.engram_max_ngram_size - 1
    device = hashing.token_map.device
    for ids in documents:
        if not len(ids):
            continue
        outside = np.concatenate((np.full(back, True), np.isin(ids, special)))
        windows = np.lib.stride_tricks.sliding_window_view(outside, back + 1)[:, ::-1]
        broken = np.logical_or.accumulate(windows, axis=1)[:, 1:]  # [S, orders]
        given = torch.from_numpy(ids)[None].to(device)
        segments = find_segments((1, len(ids)), RowState.empty(1, device))
        rows = lookup_rows(hashing, given, None, segments, None)[:, 0].cpu().numpy()
        by_order = rows.reshape(layers, len(ids), back, -1)
        for some, of_layer in zip(found, by_order, strict=True):
            some.append(np.unique(of_layer[broken]))
    return [np.unique(np.concatenate(parts)) for parts in found]
