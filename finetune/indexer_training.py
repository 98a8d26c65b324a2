# SPDX-License-Identifier: Apache-2.0
"""Training the lightning indexer by a loss of its own (V3.2-Exp §2.1.1; V4 §2.3.1).

The language-model loss never reaches the indexer: a choice has no gradient. It learns from what
attention did with the entries:

```
p_t = L1-normalised sum over heads of attention's probabilities      over the entries of query t
q_t = softmax of the index scores                                    over the same entries
kl  = mean over queries and index layers of sum p (log p - log q)
```

Everything that enters is detached, so the indexer watches attention without being catered to, and
no other weight is moved. Entries of a query are all that it may see ("visible": also what was
missed is learned, quadratic in the context), or those that were chosen ("selected": V3.2's sparse
stage, linear). A layer's indexer learns from its own layer's heads. Queries with fewer than two
entries have nothing to choose and are not counted.

Scores and probabilities exist for one block of queries at a time: each block's gradient is taken
at once, and only the parameters' gradients are kept until the backward pass wants them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from modeling_dsv4 import ops
from modeling_dsv4.attention import Dsv4Attention, Shared
from modeling_dsv4.indexer import Indexer
from modeling_dsv4.outputs import Reading
from modeling_dsv4.segments import Segments

Entries = Literal["visible", "selected"]
# One block of queries may hold so many float32 numbers of probabilities and scores (64 MiB).
_BLOCK_NUMBERS = 1 << 24
_BLOCK_QUERIES = 256


class KeySource(NamedTuple):
    """What index keys are made of, by the indexer that owns them."""

    indexer: Indexer
    hidden_states: torch.Tensor
    latents: torch.Tensor
    segments: Segments


class Divergence(NamedTuple):
    """Sums over some queries, in nats: of the indexer, of a uniform guess; how many queries."""

    kl: float
    uniform: float
    queries: int

    def __add__(self, other: tuple) -> "Divergence":
        return Divergence(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Divergence(0.0, 0.0, 0)


class IndexerTeacher:
    """Adds the indexers' loss to a model's own, in training and nowhere else.

    Attributes:
        weight: factor of the loss; with gradient accumulation 1 / steps.
        entries: "visible" or "selected".
        added: what the last pass in training added to the model's own loss, in nats.
    """

    def __init__(
        self, model: nn.Module, *, weight: float = 1.0, entries: Entries = "visible"
    ) -> None:
        """Hook a causal LM, with or without PEFT around it.

        Raises:
            ValueError: nothing of an indexer trains, or an unknown word.
        """
        if entries not in get_args(Entries):
            wanted = ", ".join(get_args(Entries))
            raise ValueError(f"entries: wanted one of {wanted}, got {entries!r}")
        self.weight, self.entries = weight, entries
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, Dsv4Attention) and module.indexer is not None
        ]
        if not any(p.requires_grad for p in self._parameters()):
            raise ValueError(
                "teach_indexer: wanted an indexer that trains, got none; attach adapters with "
                "train_indexer=True"
            )
        self.added = 0.0
        self._watching = False
        self._latents: torch.Tensor | None = None
        self._keys: KeySource | None = None
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._losses: list[float] = []
        self._total = NOTHING
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]
        for layer in self._layers:
            self._handles.append(layer.register_forward_hook(self._watch))
            if layer.compressor is not None:
                self._handles.append(layer.compressor.register_forward_hook(self._see_latents))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def metrics(self) -> dict[str, float]:
        """Means since the last call; empty if there was nothing to choose.

        `kl` and `kl_uniform` in nats per query; `captured`: which part of what a uniform guess
        does not know the indexer knows, 1 - kl / kl_uniform.
        """
        (kl, uniform, queries), self._total = self._total, NOTHING
        if not queries:
            return {}
        captured = 1 - kl / max(uniform, 1e-12)
        return {"kl": kl / queries, "kl_uniform": uniform / queries, "captured": captured}

    def callback(self) -> "IndexerMetrics":
        """Writes the metrics into what the Trainer logs."""
        return IndexerMetrics(self)

    def _parameters(self) -> list[nn.Parameter]:
        indexers = [cast(Indexer, layer.indexer) for layer in self._layers]
        return [p for indexer in indexers for p in indexer.parameters()]

    # --- the pass: begin, watch every index layer, end ------------------------------------------

    def _begin(self, model: nn.Module, args: Any) -> None:
        # A layer that is computed again in the backward pass is not watched again.
        self._watching = model.training and torch.is_grad_enabled()
        self._latents = self._keys = None
        self._gradients.clear()
        self._losses.clear()

    def _end(self, model: nn.Module, args: Any, output: Any) -> Any:
        watched, self._watching = self._watching, False
        if watched:
            self.added = 0.0
        self._latents = self._keys = None
        if not watched or not self._losses:
            return None
        if not isinstance(output, ModelOutput):
            raise NotImplementedError(
                "teach_indexer: wanted return_dict=True, whose loss can be added to; got a tuple"
            )
        if output.loss is None:
            return None
        scale = self.weight / len(self._losses)
        gradients = {p: g * scale for p, g in self._gradients.items()}
        self.added = sum(self._losses) * scale
        loss = output.loss.new_tensor(self.added)
        output.loss = output.loss + _WithGradients.apply(
            loss, list(gradients.values()), *gradients.keys()
        )
        self._gradients.clear()
        return output

    def _see_latents(self, module: nn.Module, args: Any, latents: torch.Tensor) -> None:
        if self._watching:
            self._latents = latents.detach()

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watching:
            return
        attention = cast(Dsv4Attention, module)
        x, segments, turns, _, cache = args
        if cache is not None:
            raise ValueError("teach_indexer: wanted use_cache=False in training, got a cache")
        shared: Shared = output[1]
        indexer = cast(Indexer, attention.indexer)
        if indexer.owns_keys:
            assert self._latents is not None
            self._keys = KeySource(indexer, x.detach(), self._latents, segments)
        entries = shared.entries
        # Without a cache they are a tensor.
        if not isinstance(entries, torch.Tensor) or entries.shape[1] < 2:
            return
        assert self._keys is not None
        ids = shared.ids if self.entries == "selected" else None
        lesson = _Lesson(attention, x.detach(), segments, turns[True], entries.detach(), ids)
        with _own_graph():
            found, gradients = lesson.learn(self._keys)
        if found.queries:
            self._total += found
            self._losses.append(found.kl / found.queries)
            for parameter, gradient in gradients.items():
                gradient /= found.queries
                held = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if held is None else held + gradient


class _Lesson:
    """One index layer's pass: what its heads read, and what its indexer should have said."""

    def __init__(
        self,
        attention: Dsv4Attention,
        x: torch.Tensor,
        segments: Segments,
        turn: torch.Tensor,
        entries: torch.Tensor,
        ids: torch.Tensor | None,
    ) -> None:
        self.attention, self.indexer = attention, cast(Indexer, attention.indexer)
        self.x, self.segments, self.turn = x, segments, turn
        self.entries, self.ids = entries, ids
        with torch.no_grad():
            self.q, self.q_latent = attention._query(x, turn)
            self.k = attention.key(x, turn)

    def learn(self, source: KeySource) -> tuple[Divergence, dict[nn.Parameter, torch.Tensor]]:
        """Sum of the divergences, and its gradients by parameter of the indexers involved."""
        owners = {id(i): i for i in (self.indexer, source.indexer)}.values()
        parameters = [p for i in owners for p in i.parameters() if p.requires_grad]
        made = source.indexer.make_keys(*source[1:], None)
        keys = made.detach().requires_grad_()
        sums: list[torch.Tensor | None] = [None] * (len(parameters) + 1)
        total = NOTHING
        for part in self._parts():
            kl, found = self._block(part, keys)
            if kl is None:
                continue
            total += found
            _add(sums, torch.autograd.grad(kl, [*parameters, keys], allow_unused=True))
        if made.requires_grad and sums[-1] is not None:
            _add(sums, torch.autograd.grad(made, parameters, sums[-1], allow_unused=True))
        pairs = zip(parameters, sums, strict=False)
        return total, {p: g for p, g in pairs if g is not None}

    def _parts(self) -> Iterator[slice]:
        b, s = self.x.shape[:2]
        heads, t = self.attention.heads + self.indexer.heads + 4, self.entries.shape[1]
        window = 2 * self.attention.config.sliding_window
        step = min(_BLOCK_NUMBERS // (b * heads * (t + window)), _BLOCK_QUERIES)
        for at in range(0, s, max(step, 1)):
            yield slice(at, min(at + max(step, 1), s))

    def _block(self, part: slice, keys: torch.Tensor) -> tuple[torch.Tensor | None, Divergence]:
        """Divergence of one block of queries: with a gradient, and as numbers."""
        attention = self.attention
        read = attention._read(part, self.k, 0, self.entries, self.ids, self.segments)
        if read.entries is None or read.entries_keep is None:
            return None, NOTHING
        # Behind the end of a shorter row stand tokens that are none: they see nothing.
        some = read.entries_keep.sum(-1) >= 2
        if not bool(some.any()):
            return None, NOTHING
        with torch.no_grad():
            q = self.q[:, part]
            p = ops.sink_probabilities(q, *read[2:6], attention.sinks, attention.scaling)
            target = p[..., read.window.shape[1] :].sum(1)[some]  # [n, T]
            target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
        keep = read.entries_keep[some]
        guess = self._scores(part, read, keys)[some].masked_fill(~keep, -math.inf).log_softmax(-1)
        known = torch.special.xlogy(target, target).sum(-1)
        kl = (known - (target * guess.masked_fill(~keep, 0)).sum(-1)).sum()
        uniform = (known + keep.sum(-1).log()).sum()
        return kl, Divergence(kl.item(), uniform.item(), len(target))

    def _scores(self, part: slice, read: Reading, keys: torch.Tensor) -> torch.Tensor:
        """Index scores of the entries that are read: [B, s, T], or [B, s, K] of the chosen."""
        query, weight = self.indexer._queries(self.x, self.q_latent, self.turn, part)
        if read.ids is None:
            assert read.entries is not None
            return ops.index_scores(query, keys[:, : read.entries.shape[1]], weight)
        some = ops.gather_entries(keys, read.ids)  # [B, s, K, J]
        flat = (query.flatten(0, 1)[:, None], some.flatten(0, 1), weight.flatten(0, 1)[:, None])
        return ops.index_scores(*flat).view(read.ids.shape)


def _add(sums: list[torch.Tensor | None], more: Sequence[torch.Tensor | None]) -> None:
    """Add gradients to running sums, place by place, in float32."""
    for i, gradient in enumerate(more):
        if gradient is not None:
            held = sums[i]
            sums[i] = gradient.float() if held is None else held + gradient.float()


@contextmanager
def _own_graph() -> Iterator[None]:
    """A graph that is used up inside the block, whatever checkpoints are taken around it."""
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.enable_grad(), keep:
        yield


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return (None, None, *(g * upstream[0] for g in ctx.gradients))


class IndexerMetrics(TrainerCallback):
    """Writes `indexer_kl`, `indexer_kl_uniform` and `indexer_captured` beside the loss."""

    def __init__(self, teacher: IndexerTeacher) -> None:
        self.teacher = teacher

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        found = {f"indexer_{name}": value for name, value in self.teacher.metrics().items()}
        logs.update(found)
        # The history holds a copy that was made before.
        if state.log_history:
            state.log_history[-1].update(found)


def teach_indexer(
    model: nn.Module, *, weight: float = 1.0, entries: Entries = "visible"
) -> IndexerTeacher:
    """Add the indexers' loss to what a model's forward pass in training returns as its loss.

    Args:
        model: what is called in training: a PEFT model, or a causal LM some of whose indexer
            parameters want gradients.
        weight: factor of the loss; with gradient accumulation 1 / steps.
        entries: over which entries of a query, "visible" or "selected"; see the module's text.

    Returns:
        the teacher: `metrics()`, `callback()` for a Trainer, `remove()`.
    """
    return IndexerTeacher(model, weight=weight, entries=entries)
