# SPDX-License-Identifier: Apache-2.0
"""Where the bits go: a format for every expert's projections, the least error under a byte budget.

The error of an expert is its share of what the layer puts out, times how much of its own output is
wrong in each format, measured on rows of its weights and on inputs of the calibration (or on random
ones, without). Every layer counts the same. What is left is one option for each expert: along the
convex hull of its options, the steps that gain most for a byte are taken first.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from modeling_dsv4 import ops
from modeling_dsv4.formats import get_format

from .calibration import Calibration
from .config import Recipe
from .pack import RecordLayout
from .sizes import format_size
from .source import ExpertsSource, Source
from .trellis import TRELLISES

# For sources that are not in few bits already.
_WIDEST = "fp8_rows32"
# Rows of a weight that formats are measured on, and inputs where none were gathered.
_ROWS = 64
_INPUTS = 64

Sensitivity = Mapping[str, Mapping[str, float]]
Pair = tuple[str, str]


def allocate(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Choose one option for each item: the least total error under a budget of bytes.

    It is the best choice for the bytes it takes; what is left of the budget is less than the next
    step of any item that would still gain.

    Args:
        errors: of each option of each item.
        sizes: bytes of the same.
        budget: bytes of all items together.

    Raises:
        ValueError: the smallest options take more than the budget.
    """
    hulls = [_hull(e, s) for e, s in zip(errors, sizes, strict=True)]
    left = budget - sum(s[hull[0]] for hull, s in zip(hulls, sizes, strict=True))
    if left < 0:
        raise ValueError(
            f"wanted a budget of at least {format_size(budget - left)} for the smallest formats, "
            f"got {format_size(budget)}; raise it"
        )
    at = [0] * len(hulls)

    def step(item: int) -> tuple[float, int, int]:
        """Minus the gain for a byte, item and bytes of its next step."""
        here, there = hulls[item][at[item]], hulls[item][at[item] + 1]
        grown = sizes[item][there] - sizes[item][here]
        return (errors[item][there] - errors[item][here]) / grown, item, grown

    steps = [step(item) for item, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, item, grown = heapq.heappop(steps)
        if grown > left:
            continue
        left -= grown
        at[item] += 1
        if at[item] + 1 < len(hulls[item]):
            heapq.heappush(steps, step(item))
    return [hull[place] for hull, place in zip(hulls, at, strict=True)]


def _hull(errors: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Options on the lower convex hull of error over size, from the smallest on."""
    hull: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda o: (sizes[o], errors[o])):
        if hull and errors[option] >= errors[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            before = (errors[a] - errors[b]) * (sizes[option] - sizes[b])
            if before > (errors[b] - errors[option]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def choose_recipe(
    source: Source,
    budget: int,
    calibration: Calibration | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recipe:
    """Choose a format for every expert of a source, under a budget for all expert records.

    Every expert is read once; from a repository on the Hub the shards are fetched, one layer's at a
    time, and dropped. Where the source's experts are in a release's format, that
    format, which loses nothing, is one of the options.

    Args:
        source: the checkpoint.
        budget: bytes of all experts' records together.
        calibration: how often experts are chosen and with which inputs; None counts all alike.
        progress: called with the name of each module that was measured.

    Returns:
        Recipe "mixed": names of single experts, then one rule for the rest of each layer.

    Raises:
        ValueError: a budget below what the smallest formats take; nothing has been read then.
    """
    check_budget(source, budget)
    hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
    items: list[tuple[str, int]] = []
    options: dict[str, list[Pair]] = {}
    errors: list[list[float]] = []
    sizes: list[list[int]] = []
    modules = [
        (experts, calibration if calibration and name in calibration.modules else None)
        for name, experts in source.experts.items()
    ]
    for number, (experts, known) in enumerate(modules):
        name, count = experts.name, experts.num_experts
        share = known.share(name) if known else torch.full((count,), 1 / count)
        wrong = measure(source, experts, known)
        if source.origin.fetched:
            _drop_shards(source, [module for module, _ in modules[number : number + 2]])
        options[name] = [(g, d) for g in wrong[0]["gate_up_proj"] for d in wrong[0]["down_proj"]]
        size = [RecordLayout.build(hidden, width, *pair).nbytes for pair in options[name]]
        items += [(name, e) for e in range(count)]
        errors += [
            [part * (one["gate_up_proj"][g] + one["down_proj"][d]) for g, d in options[name]]
            for part, one in zip(share.tolist(), wrong, strict=True)
        ]
        sizes += [size] * count
        if progress is not None:
            progress(name)
    chosen: dict[str, list[Pair]] = {name: [] for name in options}
    for (name, _), option in zip(items, allocate(errors, sizes, budget), strict=True):
        chosen[name].append(options[name][option])
    return Recipe("mixed", tuple(rule for name in chosen for rule in _rules(name, chosen[name])))


def check_budget(source: Source, budget: int) -> None:
    """Refuse a budget for all expert records that no choice of formats keeps.

    Raises:
        ValueError: says the least, in bytes and in bits a weight.
    """
    hidden, width = source.config.hidden_size, source.config.moe_intermediate_size
    least = weights = 0
    for experts in source.experts.values():
        held = experts.weight_format
        names = [*TRELLISES, _WIDEST if held is None else held.name]
        sizes = [RecordLayout.build(hidden, width, g, d).nbytes for g in names for d in names]
        least += experts.num_experts * min(sizes)
        weights += experts.num_experts * 3 * hidden * width
    if budget < least:
        more = format_size(least - budget)
        raise ValueError(
            f"wanted a budget of at least {format_size(least)} for the experts in the smallest "
            f"formats, got {more} less; ask for --bits {math.ceil(800 * least / weights) / 100:g} "
            f"or a --target-size larger by {more}"
        )


def _drop_shards(source: Source, modules: Sequence[ExpertsSource]) -> None:
    """Drop the shards that the first of these was measured by, but for those of the second."""
    wanted = [
        source.needs(_norm_before(module.name)).union(
            *(source.needs(module.name, e) for e in range(module.num_experts))
        )
        for module in modules
    ]
    for shard in wanted[0].difference(*wanted[1:]):
        source.origin.release(shard)


def _rules(name: str, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Rules for one module's experts: those that differ by name, then the most common."""
    common = [Counter(formats).most_common(1)[0][0] for formats in zip(*pairs, strict=True)]
    rules = []
    for expert, pair in enumerate(pairs):
        for projection, found, usual in zip(
            ("gate_up_proj", "down_proj"), pair, common, strict=True
        ):
            if found != usual:
                rules.append((f"{name}.{expert}.{projection}", found))
    # Expert numbers stand between the module's name and the projection's, or nothing does.
    return [*rules, (f"{name}.*down_proj", common[1]), (f"{name}.*gate_up_proj", common[0])]


def measure(
    source: Source, experts: ExpertsSource, known: Calibration | None
) -> list[Sensitivity]:
    """How much of each expert's output is wrong in each format, by projection."""
    held = experts.weight_format
    x = known.sample(experts.name) if known else _random_inputs(source, experts.name)
    formats = [*TRELLISES, _WIDEST if held is None else held.name]
    found: list[Sensitivity] = []
    for expert in range(experts.num_experts):
        gate_up, down = (
            parts[""].float() if held is None else held.unpack(parts, torch.float32)
            for parts in source.expert(experts.name, expert).values()
        )
        wrong = sensitivity(gate_up, down, x, source.config.swiglu_limit, formats)
        if held is not None:
            for errors in wrong.values():
                errors[held.name] = 0.0
        found.append(wrong)
    return found


def _random_inputs(source: Source, name: str) -> torch.Tensor:
    """Inputs as the norm before the experts makes them, without a direction of their own."""
    x = torch.randn(_INPUTS, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    norm = _norm_before(name)
    return x * source.get(norm).float() if norm in source.dense else x


def _norm_before(name: str) -> str:
    return name.removesuffix(".mlp.experts") + ".post_attention_layernorm.weight"


def sensitivity(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x: torch.Tensor,
    limit: float | None,
    formats: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Measure how much of an expert's output is wrong if one projection is in a format.

    Some rows stand for all: errors of different rows of one weight are independent.

    Args:
        gate_up: [2, F, D] float32.
        down: [D, F] float32.
        x: inputs [n, D] float32.
        limit: of SwiGLU.
        formats: names.

    Returns:
        {projection: {format: squared error over squared output}}.
    """
    gate, up = gate_up
    u = ops.swiglu(F.linear(x, gate_up.flatten(0, 1)), limit)
    power = F.linear(u, down).square().sum()
    rows = torch.arange(0, len(gate), max(len(gate) // _ROWS, 1))
    outs = torch.arange(0, len(down), max(len(down) // _ROWS, 1))
    reach = down[:, rows].square().sum(0)
    found: dict[str, dict[str, float]] = {"gate_up_proj": {}, "down_proj": {}}
    for name in formats:
        fmt = get_format(name)
        some = torch.stack((gate[rows], up[rows]))
        rounded = fmt.unpack(fmt.pack(some), torch.float32).flatten(0, 1)
        wrong = ops.swiglu(F.linear(x, rounded), limit) - u[:, rows]
        error = (wrong.square() * reach).sum() * len(gate) / len(rows)
        found["gate_up_proj"][name] = float(error / power)
        rounded = fmt.unpack(fmt.pack(down[outs]), torch.float32)
        error = F.linear(u, rounded - down[outs]).square().sum() * len(down) / len(outs)
        found["down_proj"][name] = float(error / power)
    return found
