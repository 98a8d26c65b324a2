# SPDX-License-Identifier: Apache-2.0
"""How far a model's predictions are from its source's, token by token on identical tokens.

The source runs first and leaves, in files that are mapped and not loaded: its logits of every
token, whole and in float32, since the divergence of a few largest logits would be a bound and no
measurement; and what leaves each of its layers on the first rows. Then one model after another is
compared with them, so that no two models are ever in memory together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Progress = Callable[[str, int], None]

# Tokens whose logits are widened to float64 at a time.
_TOKENS = 64


@dataclass(frozen=True)
class Quality:
    """What a model is worth against its source.

    Attributes:
        tokens: positions compared.
        kld_mean: mean of KL(source || model) over positions, in nats.
        kld_error: standard error of that mean.
        kld_median: median.
        kld_p99: 99th percentile.
        kld_max: largest.
        top1: share of positions where both have the same most probable token.
        perplexity: of the text itself.
        layer_error: of each layer alone: relative error of what leaves it when the source's own
            streams enter it (teacher-forced).
        layer_drift: the same where every layer gets what the model's layers before it made.
    """

    tokens: int
    kld_mean: float
    kld_error: float
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: float
    perplexity: float
    layer_error: tuple[float, ...] = ()
    layer_drift: tuple[float, ...] = ()


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of logits [n, V] in nats: [n] float64."""
    log_p, log_q = (F.log_softmax(x.double(), dim=-1) for x in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def surprise(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-log p of the token that follows each position: [S - 1] float64 of [S, V] and ids [S]."""
    return F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """|x - reference|^2 and |reference|^2, which add up over parts of a tensor."""
    x, reference = x.double(), reference.double()
    return (x - reference).square().sum().item(), reference.square().sum().item()


class Reference:
    """What a source said about rows of tokens, in files inside a folder.

    Args:
        rows: [R, S] int64, at least two tokens a row.
        folder: existing; gets `logits.bin` and `streams.bin`, which may be deleted afterwards.
        layer_rows: rows whose layers are kept.
    """

    logits: torch.Tensor
    streams: torch.Tensor

    def __init__(self, rows: torch.Tensor, folder: Path, layer_rows: int = 1) -> None:
        if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
            raise ValueError(f"wanted rows [R, S] of two tokens or more, got {list(rows.shape)}")
        self.rows = rows.long()
        self.folder = folder
        self.layer_rows = min(layer_rows, rows.shape[0])
        self._pre: dict[tuple[int, int], torch.Tensor] = {}

    @torch.no_grad()
    def fill(self, model: nn.Module, progress: Progress | None = None) -> Quality:
        """Run the source; its own quality counts perplexity alone."""
        for i, ids in enumerate(self.rows):
            if i < self.layer_rows:
                with self._keeping(model, i):
                    logits = run(model, ids)
            else:
                logits = run(model, ids)
            if i == 0:
                self.logits = _mapped(
                    self.folder / "logits.bin", (*self.rows.shape, logits.shape[-1])
                )
            self.logits[i] = logits
            if progress:
                progress("source", ids.numel())
        return self.judge(lambda i: self.logits[i])

    def judge(self, logits_of: Callable[[int], torch.Tensor]) -> Quality:
        """Compare logits [S, V] of each row with the source's."""
        klds, same, losses = [], 0, []
        for i, ids in enumerate(self.rows):
            logits = logits_of(i)
            for p, q in zip(self.logits[i].split(_TOKENS), logits.split(_TOKENS), strict=True):
                klds.append(divergence(p, q))
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses.append(surprise(logits, ids))
        kld, loss = torch.cat(klds), torch.cat(losses)
        return Quality(
            tokens=kld.numel(),
            kld_mean=kld.mean().item(),
            kld_error=kld.std().item() / math.sqrt(kld.numel()),
            kld_median=kld.median().item(),
            kld_p99=_percentile(kld, 0.99),
            kld_max=kld.max().item(),
            top1=same / kld.numel(),
            perplexity=math.exp(loss.mean().item()),
        )

    @contextmanager
    def _keeping(self, model: nn.Module, row: int) -> Iterator[None]:
        """Keep what leaves each layer while the row runs."""
        layers = list(layers_of(model))

        def hook(i: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                out = _first(output)
                if row == 0 and i == 0:
                    shape = (self.layer_rows, len(layers), *out.shape[1:])
                    self.streams = _mapped(self.folder / "streams.bin", shape)
                self.streams[row, i] = out[0]
                pre = _handed(output)
                if pre is not None:
                    self._pre[row, i] = pre.clone()

            return keep

        with _hooks([layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]):
            yield

    def layer_errors(self, model: nn.Module, teacher: bool) -> tuple[float, ...]:
        """Relative error of what leaves each layer: |x - source| / |source|.

        Args:
            model: with as many layers as the source.
            teacher: give every layer the source's streams instead of the model's own.
        """
        layers = list(layers_of(model))
        sums = [[0.0, 0.0] for _ in layers]

        def hear(row: int, i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                error, size = relative_error(_first(output)[0], self.streams[row, i])
                sums[i][0] += error
                sums[i][1] += size

            return hook

        def feed(row: int, i: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any) -> Any:
                streams = self.streams[row, i - 1][None].to(args[0])
                pre = self._pre.get((row, i - 1))
                return (streams, *args[1:]) if pre is None else (streams, pre, *args[2:])

            return hook

        for row in range(self.layer_rows):
            handles = [m.register_forward_hook(hear(row, i)) for i, m in enumerate(layers)]
            if teacher:
                handles += [
                    m.register_forward_pre_hook(feed(row, i)) for i, m in enumerate(layers) if i
                ]
            with _hooks(handles):
                run(model, self.rows[row])
        return tuple(math.sqrt(error / size) if size else 0.0 for error, size in sums)


@torch.no_grad()
def compare(
    model: nn.Module, reference: Reference, name: str = "", progress: Progress | None = None
) -> Quality:
    """Measure a model against a source that ran before."""

    def logits_of(i: int) -> torch.Tensor:
        logits = run(model, reference.rows[i])
        if logits.shape != reference.logits[i].shape:
            raise ValueError(
                f"{name or 'model'}: wanted logits {list(reference.logits[i].shape)} as the source "
                f"gives, got {list(logits.shape)}; compare models with one vocabulary"
            )
        if progress:
            progress(name, logits.shape[0])
        return logits

    quality = reference.judge(logits_of)
    error, drift = (reference.layer_errors(model, teacher) for teacher in (True, False))
    return Quality(**{**vars(quality), "layer_error": error, "layer_drift": drift})


@torch.no_grad()
def noise_floor(
    model: nn.Module, reference: Reference, progress: Progress | None = None
) -> Quality:
    """Compare the source with itself, each row cut in two uneven chunks behind one cache.

    The same mathematics in matrices of other shapes: what differs is rounding, and the choices
    (experts, entries) that rounding tips over.
    """

    def logits_of(i: int) -> torch.Tensor:
        ids = reference.rows[i]
        cut = ids.numel() // 3 or 1
        first = model(ids[None, :cut], use_cache=True)
        rest = model(ids[None, cut:], past_key_values=first.past_key_values, use_cache=True)
        if progress:
            progress("source against itself", ids.numel())
        return torch.cat((first.logits[0], rest.logits[0])).float()

    return reference.judge(logits_of)


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] float32 of one row of tokens."""
    return model(ids[None], use_cache=False).logits[0].float()


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a causal language model of transformers."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ValueError(f"wanted a model with base_model.layers, got {type(model).__name__}")
    return layers


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _handed(output: Any) -> torch.Tensor | None:
    """What single-pass layers hand on beside the streams: `pre` [B, S, N]."""
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None


def _percentile(x: torch.Tensor, share: float) -> float:
    # torch.quantile refuses more than 16 million numbers.
    return x.sort().values[min(int(share * x.numel()), x.numel() - 1)].item()


def _mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
