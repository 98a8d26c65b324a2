# SPDX-License-Identifier: Apache-2.0
"""What a forward pass returns besides its result, and which keywords it takes.

Attention probabilities are returned as `[B, H, S, keys + entries]`, float32, one tensor a layer:

```
columns   | window keys, oldest first                   | compressed entries of the layer, in order
at first  | the S input columns                         | T
cached    | sliding_window - 1 keys before them, then S | T, those of earlier passes included
a step of a static cache: the same keys                 | all that the cache has room for
```

What a query may not read has probability 0. The sink has no column: a row sums to 1 less its share.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.generic import TransformersKwargs

from .configuration_dsv4 import Dsv4Config
from .segments import Segments

if TYPE_CHECKING:
    from .draft import Dsv4DraftHead

# All attention probabilities of one pass may have this many float32 numbers (4 GiB).
_ATTENTION_NUMBERS = 1 << 30
# Keywords of transformers' collators, Trainer and tokenizers that the backbone need not look at.
_HARMLESS = frozenset(TransformersKwargs.__annotations__) | {"token_type_ids", "shift_labels"}
_IMAGES = ("pixel_values", "images", "image_grid_thw")

States = bool | int | Sequence[int] | None


@dataclass(frozen=True)
class Wanted:
    """What is kept of a pass. `states`: numbers of the hidden states, None for none of them.

    `drafts`: the head that keeps its keys of the pass in the cache, if one drafts.
    """

    states: frozenset[int] | None
    attentions: bool
    routers: bool
    drafts: Dsv4DraftHead | None = None

    @classmethod
    def of(
        cls, config: Dsv4Config, states: States, attentions: bool | None, routers: bool | None
    ) -> Wanted:
        """Read the arguments of `forward`; the configuration answers for those not given."""
        given: States = config.output_hidden_states if states is None else states
        every = range(config.num_hidden_layers + 1)
        numbers: frozenset[int] | None = None
        if given is True:
            numbers = frozenset(every)
        elif given is not False and given is not None:
            asked = [given] if isinstance(given, int) else list(given)
            numbers = frozenset(every[i] for i in asked if -len(every) <= i < len(every))
        attentions = config.output_attentions if attentions is None else attentions
        routers = config.output_router_logits if routers is None else routers
        return cls(numbers, bool(attentions), bool(routers))

    def anything(self) -> bool:
        """Whether any of it is."""
        return self.states is not None or self.attentions or self.routers

    def check_size(self, config: Dsv4Config, batch: int, columns: int, past: int) -> None:
        """Refuse attention probabilities that would fill the memory.

        Raises:
            ValueError: more numbers than 4 GiB hold, all layers together.
        """
        if not self.attentions:
            return
        keys = columns + (config.sliding_window - 1 if past else 0)
        width = sum(
            keys + ((past + columns) // ratio if ratio else 0) for ratio in config.compress_ratios
        )
        numbers = batch * config.num_attention_heads * columns * width
        if numbers > _ATTENTION_NUMBERS:
            raise ValueError(
                f"output_attentions: wanted at most {_ATTENTION_NUMBERS} probabilities, all layers "
                f"together, got {numbers} for an input of [{batch}, {columns}]; look at a shorter "
                "input, or at the last tokens of a cached one"
            )


@dataclass
class Kept:
    """What a pass has kept, layer by layer; the first `past` window keys come from a cache.

    `blank`: nothing is in that cache yet, and those keys are no one's.
    """

    past: int = 0
    blank: bool = True
    states: list[torch.Tensor | None] = field(default_factory=list)
    attentions: list[torch.Tensor] = field(default_factory=list)
    routers: list[torch.Tensor] = field(default_factory=list)

    def add_state(self, streams: torch.Tensor, number: int, want: Wanted) -> None:
        """Keep the streams if they were asked for, else their place, if any were."""
        if want.states is not None:
            self.states.append(streams if number in want.states else None)

    def restored(self, segments: Segments, columns: int) -> dict[str, Any]:
        """Fields of the output: tuples at the input's columns, None where nothing was kept."""
        shape = segments.row.shape
        states = [None if h is None else segments.restore(h, columns) for h in self.states]
        routers = [
            segments.restore(r.unflatten(0, shape), columns).flatten(0, 1) for r in self.routers
        ]
        attentions = [self._restore(p, segments, columns) for p in self.attentions]
        return {
            "hidden_states": tuple(states) or None,
            "attentions": tuple(attentions) or None,
            "router_logits": tuple(routers) or None,
        }

    def _restore(self, p: torch.Tensor, segments: Segments, columns: int) -> torch.Tensor:
        """Queries, and keys of this pass, at the input's columns; pads get zeros."""
        past = self.past
        if past and self.blank:
            p, past = p[..., past:], 0
        if segments.columns is None:
            return p
        p = segments.restore(p.transpose(1, 2), columns).transpose(1, 2)
        s = segments.row.shape[1]
        before, own, entries = p.split([past, s, p.shape[-1] - past - s], dim=-1)
        own = segments.restore(own.permute(0, 3, 1, 2), columns).permute(0, 2, 3, 1)
        return torch.cat((before, own, entries), dim=-1)


class Reading(NamedTuple):
    """What one block of queries reads: window keys from number `low` on, and entries.

    `window` [B, X, C], `keep` [B, s, X]; `entries` [B, T, C] or, gathered by `ids` [B, s, K],
    [B, s, K, C], with `entries_keep`; None where there are none.
    """

    part: slice
    low: int
    window: torch.Tensor
    keep: torch.Tensor
    entries: torch.Tensor | None
    entries_keep: torch.Tensor | None
    ids: torch.Tensor | None

    def spread(self, p: torch.Tensor, keys: int, entries: int) -> torch.Tensor:
        """Put a block's probabilities [B, H, s, X + K] at [B, H, s, keys + entries]."""
        x = self.window.shape[1]
        window, chosen = p[..., :x], p[..., x:]
        window = F.pad(window, (self.low, keys - self.low - x))
        if self.ids is None:
            return torch.cat((window, F.pad(chosen, (0, entries - chosen.shape[-1]))), dim=-1)
        # Where nothing was chosen the probability is 0, so that adding it to entry 0 is harmless.
        at = self.ids.clamp(min=0).long()[:, None].expand_as(chosen)
        zeros = chosen.new_zeros(*chosen.shape[:-1], entries)
        return torch.cat((window, zeros.scatter_add(-1, at, chosen)), dim=-1)

    def collect(self, p: torch.Tensor, keys: int) -> torch.Tensor:
        """Take the block's probabilities back out of [B, H, S, keys + entries]."""
        x, p = self.window.shape[1], p[:, :, self.part]
        window, chosen = p[..., self.low : self.low + x], p[..., keys:]
        if self.entries is None:
            return window
        if self.ids is None:
            return torch.cat((window, chosen[..., : self.entries.shape[1]]), dim=-1)
        ids = self.ids.long()[:, None].expand(-1, p.shape[1], -1, -1)
        chosen = chosen.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
        return torch.cat((window, chosen), dim=-1)


def refuse_unknown(forward: Callable[..., Any], given: Mapping[str, object]) -> None:
    """Refuse keywords that `forward` does not know: images, and typing errors.

    Raises:
        ValueError: images.
        TypeError: a keyword that is neither this model's nor a known one of transformers.
    """
    images = [name for name in _IMAGES if given.get(name) is not None]
    if images:
        raise ValueError(
            f"got {', '.join(images)}: the vision tower is carried as weights but not run; give "
            "`forward` image spans as `inputs_embeds` with `input_ids` and `token_types`"
        )
    unknown = sorted(set(given) - _HARMLESS - set(_IMAGES))
    if unknown:
        names = list(inspect.signature(forward).parameters)[1:-1]
        near = difflib.get_close_matches(unknown[0], [*names, *_HARMLESS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
        raise TypeError(f"forward got unknown keywords {unknown}; {hint}")
