# SPDX-License-Identifier: Apache-2.0
"""Learning-rate range test (Smith, arXiv 1506.01186): a short training while the rate rises.

The loss falls slowly, then fast, then rises. Adapters are trained in memory and put back; on disk
only the test's own files are written.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modeling_dsv4 import Dsv4Config
from quantize.report import import_pyplot

from .config import RunConfig
from .files import staged, write_json
from .loading import load_tokenizer
from .optimizers import make_optimizer, make_rules
from .overfit_gate import unchanged
from .prepare import check_vocabulary, prepare_data
from .running import build_model
from .trainer import RunTrainer, make_trainer

RESULT_FILE = "lr_find.json"
# Share of the past in the smoothed loss.
_MEMORY = 0.8
# The test ends where the smoothed loss is so many times its least.
_DIVERGED = 2.0
# Below this fall, as a share of the first loss, the test has seen noise alone.
_LEAST_FALL = 0.01


@dataclass(frozen=True)
class RateTest:
    """A range test's curve, and what follows from it.

    Attributes:
        rates: ascending.
        losses: of the batch before each step.
        smoothed: exponential mean of `losses`, without the bias of its start.
        steepest: rate at which the smoothed loss fell fastest per decade.
        lowest: rate at its minimum.
        suggestion: the smaller of `steepest` and a tenth of `lowest`; None where nothing fell.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    lowest: float | None
    suggestion: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def range_test(
    trainer: RunTrainer,
    batches: Iterator[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    max_grad_norm: float = 1.0,
) -> RateTest:
    """Take one optimizer step at each rate, and put the model back.

    Args:
        trainer: with the model and the loss.
        batches: as many as there are rates, or more.
        optimizer: its groups' rates are taken as shares of the tested one.
        rates: ascending.
        max_grad_norm: longer gradients are scaled down to it.
    """
    model = trainer.model
    shares = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    with unchanged(model):
        for rate, batch in zip(rates, batches, strict=False):
            optimizer.zero_grad()
            loss = trainer.learn_alone(batch)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed = smooth(losses)
            if smoothed[-1] > _DIVERGED * min(smoothed):
                break
            torch.nn.utils.clip_grad_norm_(trained(model), max_grad_norm)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            optimizer.step()
    return judge(list(rates)[: len(losses)], losses)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential mean, divided by the weights that it has seen."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        found.append(mean / (1 - _MEMORY**count))
    return found


def judge(rates: list[float], losses: list[float]) -> RateTest:
    """Read a curve. The loss at place i has seen the rates before i."""
    smoothed = smooth(losses)
    low = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    if low < 2 or smoothed[0] - smoothed[low] < _LEAST_FALL * smoothed[0]:
        return RateTest(rates, losses, smoothed, None, None, None)
    falls = [
        (smoothed[i] - smoothed[i + 1]) / math.log10(rates[i + 1] / rates[i]) for i in range(low)
    ]
    steepest = rates[max(range(low), key=falls.__getitem__)]
    return RateTest(rates, losses, smoothed, steepest, rates[low], min(steepest, rates[low] / 10))


def find_rate(
    config: RunConfig,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 60,
    plot: bool = True,
) -> RateTest:
    """Test a run's rates before it is begun; writes a table and a plot into `config.output`.

    Args:
        config: the run; its learning rate is not read, and its output may be any directory.
        low: first rate.
        high: last one, if the loss does not rise before.
        steps: rates between them, evenly on a logarithmic scale.
        plot: write `lr_find.svg` and `.png` too.

    Raises:
        ValueError: bad data or settings; a plot without matplotlib.
    """
    if not 0 < low < high:
        raise ValueError(f"lr-find: wanted 0 < low < high, got {low:g} and {high:g}")
    if steps < 10:
        raise ValueError(f"lr-find: wanted at least 10 steps, got {steps}")
    if plot:
        import_pyplot()
    config = replace(config, report_to="none", patience=None)
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(config, data.train)
    check_vocabulary(data, Dsv4Config.from_pretrained(config.model).vocab_size)
    trainer = make_trainer(model, config, data, tokenizer)
    rules = make_rules(config.lr_ratios, config.lora_plus_ratio)
    optimizer = make_optimizer(config.optimizer, model, 1.0, config.weight_decay, rules)
    rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    loader = trainer.get_train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    found = range_test(trainer, batches, optimizer, rates, config.max_grad_norm)
    with staged(config.output) as folder:
        write_json(folder / RESULT_FILE, found.to_dict())
        if plot:
            draw(found, folder)
    return found


def table(found: RateTest, rows: int = 12) -> list[str]:
    """The curve in at most so many lines."""
    every = math.ceil(len(found.rates) / rows)
    shown = list(zip(found.rates, found.losses, found.smoothed, strict=True))[::every]
    return [
        f"{'rate':>9} {'loss':>8} {'smoothed':>9}",
        *(f"{rate:9.2e} {loss:8.4f} {mean:9.4f}" for rate, loss, mean in shown),
    ]


def draw(found: RateTest, folder: Path) -> None:
    """Draw the loss over the rate as `lr_find.svg` and `.png`."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1, label="loss")
    axes.plot(found.rates, found.smoothed, color="C0", label="smoothed")
    if found.suggestion is not None:
        words = f"suggested {found.suggestion:.1e}"
        axes.axvline(found.suggestion, color="C1", linestyle="--", label=words)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss per label token")
    axes.legend(frameon=False)
    figure.tight_layout()
    for kind in ("svg", "png"):
        figure.savefig(
            folder / f"lr_find.{kind}", dpi=120, metadata={"Date": None} if kind == "svg" else {}
        )
    pyplot.close(figure)
