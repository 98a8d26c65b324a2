# SPDX-License-Identifier: Apache-2.0
"""Learning-rate range test (Smith, arXiv 1506.01186): a short training while the rate rises.

The loss falls slowly, then fast, then rises. Adapters are trained in memory and put back; on disk
only the test's own files are written.
"""

import itertools
import math
import statistics
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
# Below this fall, as a share of the first losses, the test has seen noise alone.
_LEAST_FALL = 0.01
# Slopes are of so many decades: a batch more or less decides nothing.
_WINDOW = 0.5
# Why there is no suggestion, and what to do.
_NO_FALL = (
    "no clear fall: the loss never went below its first values by more than it scatters; try more "
    "steps, larger batches or higher rates, or lower ones if it rises from the start"
)
_BEFORE = "no clear fall: it is steepest at the first rates; begin lower, or take larger batches"
_BEHIND = "no clear fall: it is steepest at the last rates; end higher"


@dataclass(frozen=True)
class RateTest:
    """A range test's curve, and what follows from it.

    Attributes:
        rates: ascending.
        losses: of the batch before each step.
        smoothed: exponential mean of `losses`, without the bias of its start.
        steepest: rate at which the smoothed loss fell fastest per decade.
        lowest: rate at its minimum.
        suggestion: the smaller of `steepest` and a tenth of `lowest`; None without a clear fall
            between the first rates and the last.
        reason: why there is none, and what to do.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    lowest: float | None
    suggestion: float | None
    reason: str | None = None

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
    return judge(rates, losses)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential mean, divided by the weights that it has seen."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        found.append(mean / (1 - _MEMORY**count))
    return found


def judge(rates: Sequence[float], losses: Sequence[float]) -> RateTest:
    """Read a curve. The loss at place i has seen the rates before i.

    Args:
        rates: ascending, evenly on a logarithmic scale; more than losses where a test ended early.
        losses: of the batch before each step.
    """
    tested, smoothed = list(rates[: len(losses)]), smooth(losses)
    size = _window(rates)
    if len(losses) <= size:
        return RateTest(tested, list(losses), smoothed, None, None, None, _NO_FALL)
    level = min(smoothed[:size])
    low = min(range(len(smoothed)), key=smoothed.__getitem__)
    enough = max(_LEAST_FALL * level, _scatter(losses[: max(low, size)]))
    if low < size or level - smoothed[low] < enough:
        return RateTest(tested, list(losses), smoothed, None, None, None, _NO_FALL)
    # What comes down from noise to where the losses began is no learning.
    starts = [i for i in range(low - size + 2) if smoothed[i + size - 1] <= level]
    start = min(starts, key=lambda i: _slope(tested[i : i + size], smoothed[i : i + size]))
    # The rate in the middle of those that made the fall.
    steepest, lowest = tested[start + (size - 2) // 2], tested[low]
    suggestion = min(steepest, lowest / 10)
    reason = None
    if start == 0 or suggestion <= tested[0]:
        reason = _BEFORE
    elif start + size == len(rates):
        reason = _BEHIND
    return RateTest(
        tested, list(losses), smoothed, steepest, lowest, None if reason else suggestion, reason
    )


def _window(rates: Sequence[float]) -> int:
    """How many rates a slope is taken over: at least three."""
    if len(rates) < 2:
        return 3
    spacing = math.log10(rates[-1] / rates[0]) / (len(rates) - 1)
    return max(3, round(_WINDOW / spacing) + 1)


def _slope(rates: Sequence[float], values: Sequence[float]) -> float:
    """Of a line through values by least squares, per decade."""
    places = [math.log10(rate) for rate in rates]
    return statistics.linear_regression(places, values).slope


def _scatter(losses: Sequence[float]) -> float:
    """By how much a loss usually differs from the one before it: noise, as long as few fall."""
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))


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
