# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps, per sequence (V4 §2.3, V4.1 release file inference/model.py).

Three kinds of store hold everything:

- `Ring`: the last tokens of a row (window keys, a compressor's values and gates, Engram ids), slot
  = row index mod capacity. It is a little longer than needed, so that a few tokens can be taken
  back by moving the counters alone.
- `Rows`: compressed entries and index keys, appended; `CodedRows` keeps them packed.
- `RowState`: the counters.

Rows of a batch may stand at different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.cache_utils import Cache

from . import cache_files
from .cache_storage import (
    PackedRows,
    RowCodec,
    bytes_per_token,
    check_storage,
    entry_codec,
    key_codec,
)
from .configuration_dsv4 import Dsv4Config
from .segments import RowState, Segments


class Ring:
    """The last tokens of every row: [B, capacity, ...], slot = row index mod capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: torch.Tensor | None = None

    def tail(self, seen: torch.Tensor, length: int, like: torch.Tensor) -> torch.Tensor:
        """The `length` tokens before row index `seen` [B] -> [B, length, ...].

        Slots before the row's first token hold anything finite; callers mask them.
        """
        if self.data is None:
            return like.new_zeros(like.shape[0], length, *like.shape[2:])
        slot = (seen[:, None] - length + torch.arange(length, device=seen.device)) % self.capacity
        return self.data[torch.arange(seen.shape[0], device=seen.device)[:, None], slot]

    def write(self, x: torch.Tensor, segments: Segments) -> None:
        """Keep the last real tokens of x [B, S, ...]."""
        x = x.detach()
        if self.data is None:
            self.data = x.new_zeros(x.shape[0], self.capacity, *x.shape[2:])
        keep = min(self.capacity, x.shape[1])
        column = segments.count[:, None] - keep + torch.arange(keep, device=x.device)
        batch = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(column)
        real = column >= 0
        slot = (segments.state.seen[:, None] + column) % self.capacity
        self.data[batch[real], slot[real]] = x[batch[real], column[real]]

    def held(self) -> torch.Tensor | None:
        """All that a file must keep; None while empty."""
        return self.data

    def restore(self, data: torch.Tensor) -> None:
        """Take what `held` gave."""
        if data.shape[1] != self.capacity:
            raise ValueError(f"wanted {self.capacity} slots of a ring, got {list(data.shape)}")
        self.data = data


class Rows:
    """Entries appended per row: [B, capacity, ...], grown by half when full."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.length = 0

    def extend(
        self, new: torch.Tensor, before: torch.Tensor | None, count: torch.Tensor
    ) -> torch.Tensor:
        """Append the first `count[b]` of new [B, M, ...] behind `before[b]`; give all [B, T, ...].

        In training the past is a constant and the returned rows carry the gradient of `new`.
        """
        if before is None or self.data is None:
            self._hold(new.detach())
            return new
        after = before + count
        length = max(int(after.max()), 1)
        self._reserve(length, new)
        batch, at = torch.nonzero(
            torch.arange(new.shape[1], device=new.device) < count[:, None], as_tuple=True
        )
        to = before[batch] + at
        assert self.data is not None
        if torch.is_grad_enabled() and new.requires_grad:
            past = self.data[:, :length].clone()
            out = past.index_put((batch, to), new[batch, at])
        else:
            out = self.data[:, :length]
        self.data[batch, to] = new[batch, at].detach()
        self.length = length
        return out

    def held(self) -> torch.Tensor | None:
        """All that a file must keep, without room to grow; None while empty."""
        return None if self.data is None else self.data[:, : self.length]

    def restore(self, data: torch.Tensor) -> None:
        """Take what `held` gave."""
        self.data, self.length = data, data.shape[1]

    def _hold(self, new: torch.Tensor) -> None:
        self.data, self.length = new.clone(), new.shape[1]

    def _reserve(self, length: int, like: torch.Tensor) -> None:
        assert self.data is not None
        if length > self.data.shape[1]:
            capacity = length + max(length // 2, 16)
            grown = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
            grown[:, : self.data.shape[1]] = self.data
            self.data = grown


class CodedRows(Rows):
    """`Rows` of bytes [B, capacity, bytes] uint8, made of entries or keys by a codec."""

    def __init__(self, codec: RowCodec) -> None:
        super().__init__()
        self.codec = codec

    def extend(  # type: ignore[override]
        self, new: torch.Tensor, before: torch.Tensor | None, count: torch.Tensor
    ) -> PackedRows:
        """As `Rows.extend`; all [B, T, C] stay packed, so that all passes read the same numbers."""
        data = super().extend(self.codec.encode(new), before, count)
        return PackedRows(data, self.codec, new.dtype)


class LayerCache:
    """Stores of one layer; those that the layer does not need stay empty."""

    def __init__(
        self, config: Dsv4Config, layer_idx: int, slack: int, storage: str = "plain"
    ) -> None:
        ratio = config.compress_ratios[layer_idx]
        span = 2 * ratio if ratio == config.compressor_overlap_ratio else ratio
        self.window = Ring(config.sliding_window - 1 + slack)
        self.pool = Ring(span + slack)
        packed = storage == "packed"
        self.entries: Rows | CodedRows = CodedRows(entry_codec(config)) if packed else Rows()
        self.index_pool = Ring(span + slack)
        self.index_keys: Rows | CodedRows = CodedRows(key_codec(config)) if packed else Rows()

    def stores(self) -> dict[str, Ring | Rows]:
        """All stores by name, for whatever moves rows of the batch or writes them."""
        names = ("window", "pool", "entries", "index_pool", "index_keys")
        return {name: getattr(self, name) for name in names}


class Dsv4Cache(Cache):
    """The cache of a Dsv4 model; `generate` makes one, or pass your own as `past_key_values`.

    Args:
        config: the model's configuration.
        max_rewind: how many of the last tokens `crop` can take back. Costs that many more slots in
            each ring, nothing else.
        storage: "plain" keeps compressed entries and index keys as computed; "packed" keeps them in
            the release's own formats (`cache_storage.py`), half the bytes for V4 and less than a
            third for V4.1. After `model.set_simulation("official")` packing changes no bit. Without
            it packing loses precision: entries and index keys are rounded as the simulation rounds
            the cache (index keys without its Hadamard turn), and logits change by that. Windows
            stay plain; there are no gradients.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, config: Dsv4Config, max_rewind: int = 64, storage: str = "plain") -> None:
        check_storage(storage)
        layers = range(config.num_hidden_layers)
        self.layers = [LayerCache(config, i, max_rewind, storage) for i in layers]
        self.config, self.storage = config, storage
        self.layer_class_to_replicate = None
        self.offloading = False
        self.max_rewind = max_rewind
        self.ngrams = Ring(max(config.engram_max_ngram_size - 1, 1) + max_rewind)
        self.ratios = sorted({r for r in config.compress_ratios if r})
        self.state: RowState | None = None
        self.columns = 0
        # Tokens that `crop` can still take back: since the start, the last pad, or the last border,
        # and no further than the rings reach.
        self.rewindable = 0
        # Between `open` and `advance` the stores are ahead of the counters.
        self._open = False

    def begin(self, batch: int, device: torch.device) -> RowState:
        """The row state before a pass over `batch` rows."""
        if self.storage == "packed" and torch.is_grad_enabled():
            raise ValueError(
                'storage="packed" has no gradients: wanted torch.no_grad() around the pass, or in '
                'training a cache with storage="plain"'
            )
        if self._open:
            raise ValueError(
                "past_key_values: the last pass with this cache did not finish and has overwritten "
                "older tokens; call reset() and start again from the prompt"
            )
        if self.state is None:
            self.state = RowState.empty(batch, device)
        if self.state.seen.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.state.seen.shape[0]} rows, the input has {batch}; "
                "use a new cache, or batch_repeat_interleave / batch_select_indices"
            )
        return self.state

    def open(self) -> None:
        """Say that layers write from here on; until `advance`, the cache cannot be used again."""
        self._open = True

    def advance(self, segments: Segments, columns: int) -> None:
        """Close a pass: move the counters, once, behind the last layer."""
        self._open = False
        old, self.state = self.state, segments.after(self.ratios)
        assert old is not None
        self.columns += columns
        if segments.fresh:
            self.rewindable = columns
        elif segments.columns is None and bool((self.state.start == old.start).all()):
            self.rewindable += columns
        else:
            self.rewindable = _unbroken(segments, self.state, columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, pads included, as `generate` counts them."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit."""
        return -1

    @property
    def finished(self) -> bool:
        """Whether the last pass went through all layers; if not, only `reset` helps."""
        return not self._open

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def max_batch_size(self) -> int:
        return 0 if self.state is None else self.state.seen.shape[0]

    def activate_past_recording(self) -> None:
        """Rings always keep `max_rewind` tokens more than needed; nothing to switch on."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns; a positive number says how many to keep.

        Raises:
            ValueError: more than `max_rewind` tokens, or across pads or a document border; the
                cache is unchanged then.
        """
        keep = tokens_to_remove
        target = self.columns + keep if keep <= 0 else keep
        back = self.columns - target
        if back <= 0:
            return
        if target <= 0:
            self.reset()
            return
        limit = min(self.max_rewind, self.rewindable)
        if back > limit:
            raise ValueError(
                f"crop: wanted to take back {back} tokens, this cache can take back {limit}; make "
                f"it with Dsv4Cache(config, max_rewind={back}) or start again from the prompt"
            )
        state = self.state
        assert state is not None
        seen = state.seen - back
        for ratio, count in state.entries.items():
            was, now = (state.seen - state.start) // ratio, (seen - state.start) // ratio
            state.entries[ratio] = count - (was - now)
        state.seen = seen
        # Behind what was taken back, the rings reach less far by as much.
        self.columns, self.rewindable = target, limit - back

    def reset(self) -> None:
        """Forget everything."""
        for _, store in self.named_stores():
            store.data = None
        self.state, self.columns, self.rewindable, self._open = None, 0, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes old row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        for _, store in self.named_stores():
            if store.data is not None:
                store.data = store.data.index_select(0, indices.to(store.data.device))
        if self.state is not None:
            s, at = self.state, indices.to(self.state.seen.device)
            entries = {w: n[at] for w, n in s.entries.items()}
            self.state = RowState(s.seen[at], s.start[at], s.offset[at], entries, s.blank)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, in place."""
        if self.state is not None:
            rows = torch.arange(self.max_batch_size, device=self.state.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def save(self, path: str | Path, input_ids: torch.Tensor | None = None) -> None:
        """Write the cache to one file, from which `load` continues bit for bit.

        Args:
            path: written beside and renamed.
            input_ids: [B, columns] what the cache has read, so that `load` can compare; their
                SHA-256 is kept, not the text. The cache itself holds the text's content.

        Raises:
            ValueError: nothing read yet, a pass that did not finish, ids of another shape.
        """
        cache_files.save(self, path, input_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: Dsv4Config,
        input_ids: torch.Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> Dsv4Cache:
        """Read a cache that `save` wrote, for the model that made it.

        Args:
            path: the file.
            config: the model's; must agree with the one saved. Weights are not compared.
            input_ids: [B, >= columns]; refused unless they begin with what was saved.
            device: where the cache is to lie.

        Raises:
            ValueError: a truncated or foreign file, another configuration, other ids.
        """
        return cache_files.load(cls, path, config, input_ids, device)

    def memory_bytes(self) -> int:
        """Bytes held by all stores."""
        return sum(s.data.nbytes for _, s in self.named_stores() if s.data is not None)

    @staticmethod
    def bytes_per_token(
        config: Dsv4Config, storage: str = "plain", dtype: torch.dtype = torch.bfloat16
    ) -> float:
        """Bytes that every further token adds to a cache over a model of `dtype`."""
        return bytes_per_token(config, storage, dtype)

    def named_stores(self) -> Iterator[tuple[str, Ring | Rows]]:
        """All stores of all layers by name, empty ones too."""
        for i, layer in enumerate(self.layers):
            for name, store in layer.stores().items():
                yield f"layers.{i}.{name}", store
        yield "ngrams", self.ngrams


def _unbroken(segments: Segments, state: RowState, columns: int) -> int:
    """Last columns of a pass that hold, in every row, a token of the document that stands open.

    The document's first token does not count: which document came before is not remembered.
    """
    run = state.seen - state.start - 1
    if segments.columns is not None:
        # Columns ascend in a row, so those that equal their place from the end are a suffix.
        left = segments.count[:, None] - torch.arange(segments.row.shape[1], device=run.device)
        real = segments.valid & (segments.columns == columns - left)
        run = run.minimum(real.sum(1))
    return min(max(int(run.min()), 0), columns)
