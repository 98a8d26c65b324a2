# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps, per sequence (V4 §2.3, V4.1 release file inference/model.py).

Three kinds of store hold everything:

- `Ring`: the last tokens of a row (window keys, a compressor's values and gates, Engram ids), slot
  = row index mod capacity. It is a little longer than needed, so that a few tokens can be taken
  back by moving the counters alone.
- `Rows`: compressed entries and index keys, appended; `CodedRows` keeps them packed, `FarStore`
  keeps entries elsewhere (`cache_offload.py`).
- `RowState`: the counters.

Rows of a batch may stand at different lengths. With `max_length` everything is allocated in the
first pass and stays where it is, counters included: a step of one token then runs in fixed shapes
(`segments.find_step`), which `torch.compile` traces whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers.cache_utils import Cache

from . import cache_files
from .cache_offload import FarStore, OffloadCounts, check_offload
from .cache_storage import PlainCodec, bytes_per_token, check_storage, entry_codec, key_codec
from .cache_stores import CodedRows, DraftRings, Ring, Rows
from .cache_tiers import far_store
from .configuration_dsv4 import Dsv4Config
from .segments import RowState, Segments


class LayerCache:
    """Stores of one layer; those that the layer does not need stay empty."""

    def __init__(
        self,
        config: Dsv4Config,
        layer_idx: int,
        slack: int,
        storage: str = "plain",
        max_length: int | None = None,
        far: Callable[[], FarStore] | None = None,
    ) -> None:
        ratio = config.compress_ratios[layer_idx]
        span = 2 * ratio if ratio == config.compressor_overlap_ratio else ratio
        self.window = Ring(config.sliding_window - 1 + slack)
        self.pool = Ring(span + slack)
        packed = storage == "packed"
        most = None if max_length is None else max(max_length // max(ratio, 1), 1)
        entry, key = (entry_codec(config), key_codec(config)) if packed else (None, None)
        near = CodedRows(entry, most) if entry else Rows(most)
        self.entries: Rows = far() if far else near
        self.index_pool = Ring(span + slack)
        self.index_keys = CodedRows(key, most) if key else Rows(most)

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
        max_length: columns, pads and drafts included, that the cache has room for. All of it is
            allocated in the first pass and keeps its place, and a step of one column runs in fixed
            shapes that `torch.compile(model, fullgraph=True)` traces once; compiled, or on a
            device, a step takes any position but 0 to continue. None grows as needed.
        offload: where compressed entries lie, of which a query reads a bounded number: "cpu" keeps
            them in host memory beside a model on a GPU, a directory in files without names there,
            which end with the cache; None where the model computes. No bit changes. There are no
            gradients, and no `max_length`.

    Whoever replays a captured step moves `columns` too: it is Python's, the other counters are the
    device's.
    """

    # `generate` would compile by itself, with masks of four dimensions.
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        config: Dsv4Config,
        max_rewind: int = 64,
        storage: str = "plain",
        max_length: int | None = None,
        offload: str | Path | None = None,
    ) -> None:
        check_storage(storage)
        offload = check_offload(offload, max_length)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: wanted at least 1 column, got {max_length}")
        layers = range(config.num_hidden_layers)
        self.offload_counts = OffloadCounts()
        far = None
        if offload is not None:
            codec = entry_codec(config) if storage == "packed" else PlainCodec(config.head_dim)
            far = far_store(offload, codec, self.offload_counts)
        self.layers = [LayerCache(config, i, max_rewind, storage, max_length, far) for i in layers]
        self.config, self.storage, self.max_length = config, storage, max_length
        self.offload = offload
        self.layer_class_to_replicate = None
        self.offloading = False
        self.max_rewind = max_rewind
        self.ngrams = Ring(max(config.engram_max_ngram_size - 1, 1) + max_rewind)
        self.drafts = DraftRings(config, max_rewind)
        self.ratios = sorted({r for r in config.compress_ratios if r})
        self.state: RowState | None = None
        self.columns = 0
        # [B] columns by which rows are shorter than the longest, after `rewind`; None: by none.
        self._shorter: torch.Tensor | None = None
        # Tokens that `crop` can still take back: since the start, the last pad, or the last border,
        # and no further than the rings reach. On the device, [], so that a step need not wait.
        self._rewindable: torch.Tensor | None = None
        # Between `open` and `advance` the stores are ahead of the counters.
        self._open = False

    @property
    def is_static(self) -> bool:
        """Whether everything is allocated once, for `max_length` columns."""
        return self.max_length is not None

    @property
    def rewindable(self) -> int:
        """How many tokens `crop` can still take back, as far as the rings reach."""
        return 0 if self._rewindable is None else int(self._rewindable)

    @rewindable.setter
    def rewindable(self, tokens: int) -> None:
        if self._rewindable is None:
            self._rewindable = torch.zeros((), dtype=torch.long)
        self._rewindable.fill_(tokens)

    def begin(self, batch: int, device: torch.device, columns: int = 0) -> RowState:
        """The row state before a pass over `batch` rows of `columns` more."""
        if (self.storage == "packed" or self.offload is not None) and torch.is_grad_enabled():
            what = 'storage="packed"' if self.storage == "packed" else "a cache with offload"
            raise ValueError(
                f"{what} has no gradients: wanted torch.no_grad() around the pass, or in "
                'training a cache with storage="plain" and no offload'
            )
        if self._open:
            raise ValueError(
                "past_key_values: the last pass or reordering of this cache did not finish and has "
                "overwritten older tokens; call reset() and start again from the prompt"
            )
        shorter = 0 if self._shorter is None else int(self._shorter.max())
        if self.max_length is not None and self.columns - shorter + columns > self.max_length:
            raise ValueError(
                f"past_key_values has room for {self.max_length} columns and holds {self.columns}, "
                f"the input has {columns} more; make it with Dsv4Cache(config, max_length="
                f"{self.columns + columns}) or longer, or without max_length, which grows"
            )
        held = self.state
        # Emptied memory serves only as many rows, on the same device.
        if held and held.blank and (held.seen.shape[0], held.seen.device) != (batch, device):
            self._drop()
        if self.state is None:
            self.state = RowState.empty(batch, device)
            self._rewindable = torch.zeros((), dtype=torch.long, device=device)
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
        assert self.state is not None and self._rewindable is not None
        self._open = False
        state = segments.after(self.ratios)
        same = state.start == self.state.start
        if segments.step:
            plain = (segments.count == columns).all() & same.all()
            self._rewindable.copy_(torch.where(plain, self._rewindable + columns, 0))
        elif segments.fresh:
            self.rewindable = columns
        elif segments.columns is None and bool(same.all()):
            self.rewindable += columns
        else:
            self.rewindable = _unbroken(segments, state, columns)
        self._keep(state)
        self.columns += columns
        if self._shorter is not None:
            self._shorter = self._shorter + columns - segments.count
            self._count_columns()

    def _keep(self, new: RowState) -> None:
        """Take over counters; those of a static cache stay where a compiled step reads them."""
        old = self.state
        same = old is not None and old.entries.keys() == new.entries.keys()
        if old is None or not same or not self.is_static or old.seen.shape != new.seen.shape:
            self.state = new
            return
        for held, value in zip(old.tensors(), new.tensors(), strict=True):
            held.copy_(value)
        old.blank = new.blank

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, pads included, as `generate` counts them."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Columns that the cache has room for; -1: no limit."""
        return -1 if self.max_length is None else self.max_length

    @property
    def finished(self) -> bool:
        """Whether the last pass or reordering went through all layers; if not, `reset` helps."""
        return not self._open

    @property
    def is_initialized(self) -> bool:
        return self.state is not None and not self.state.blank

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
        self._take_back(back, back)
        self.columns = target

    def rewind(self, back: torch.Tensor) -> None:
        """Take back the last `back[b]` tokens of every row, which then differ in length.

        Columns are those of the longest row; passes go on from where each row stands.

        Raises:
            ValueError: as `crop`; the cache is unchanged then.
        """
        self._take_back(back, int(back.max()))
        self._shorter = back if self._shorter is None else self._shorter + back
        self._count_columns()

    def _take_back(self, back: int | torch.Tensor, most: int) -> None:
        state = self.state
        assert state is not None
        limit = min(self.max_rewind, self.rewindable)
        if most > limit:
            raise ValueError(
                f"crop: wanted to take back {most} tokens, this cache can take back {limit}; make "
                f"it with Dsv4Cache(config, max_rewind={most}) or start again from the prompt"
            )
        seen, entries = state.seen - back, {}
        for ratio, count in state.entries.items():
            was, now = (state.seen - state.start) // ratio, (seen - state.start) // ratio
            entries[ratio] = count - (was - now)
        self._keep(RowState(seen, state.start, state.offset, entries, state.blank))
        # Behind what was taken back, the rings reach less far by as much.
        self.rewindable = limit - most

    def _count_columns(self) -> None:
        """Let the columns be those of the longest row."""
        assert self._shorter is not None
        none = int(self._shorter.min())
        self.columns -= none
        self._shorter = self._shorter - none
        if not int(self._shorter.max()):
            self._shorter = None

    def reset(self) -> None:
        """Forget everything; a static cache keeps its memory, emptied."""
        self.columns, self._open, self._shorter = 0, False, None
        self.drafts.since.zero_()
        if self.state is None or not self.is_static:
            self._drop()
            return
        for _, store in self.named_stores():
            if store.data is not None:
                store.data.zero_()
        for counter in self.state.tensors():
            counter.zero_()
        self.state.blank = True
        self.rewindable = 0

    def _drop(self) -> None:
        for _, store in self.named_stores():
            store.drop()
        self.state = self._rewindable = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes old row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        state, open_before = None, self._open
        if self.state is not None:
            # First, since rows that are not there are noticed here and nothing has moved yet.
            s, at = self.state, indices.to(self.state.seen.device)
            entries = {w: n[at] for w, n in s.entries.items()}
            state = RowState(s.seen[at], s.start[at], s.offset[at], entries, s.blank)
        self._open = True
        for _, store in self.named_stores():
            store.select(indices, in_place=self.is_static)
        if state is not None:
            self._keep(state)
        self.drafts.select(indices)
        if self._shorter is not None:
            self._shorter = self._shorter[indices.to(self._shorter.device)]
        self._open = open_before

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
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        offload: str | Path | None = None,
    ) -> Dsv4Cache:
        """Read a cache that `save` wrote, for the model that made it.

        Args:
            path: the file. What comes back grows as needed, also if the one saved was static.
            config: the model's; must agree with the one saved. Weights are not compared; a model
                of another dtype refuses the cache in its first pass.
            input_ids: [B, >= columns]; refused unless they begin with what was saved.
            device: where the cache is to lie; one for each layer of a model that is split.
            offload: where its entries are to lie, as the constructor takes it; whatever it was for
                the cache saved.

        Raises:
            ValueError: a truncated or foreign file, another configuration, other ids.
        """
        return cache_files.load(cls, path, config, input_ids, device, offload)

    def counters(self) -> list[torch.Tensor]:
        """All numbers on the device that a pass moves on; none before the first pass."""
        if self.state is None or self._rewindable is None:
            return []
        return [*self.state.tensors(), self._rewindable]

    def memory_bytes(self) -> int:
        """Bytes of memory held by all stores, of the host and of the model's device."""
        return sum(store.nbytes for _, store in self.named_stores())

    def disk_bytes(self) -> int:
        """Bytes of entries that lie in files."""
        return sum(store.disk_bytes for _, store in self.named_stores())

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
        yield from self.drafts.named()


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
