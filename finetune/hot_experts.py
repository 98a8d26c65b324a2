# SPDX-License-Identifier: Apache-2.0
"""Which experts a text routes to, and the fewest that carry a share of it (ESFT, arXiv 2407.01906).

The frozen model reads some of the training data. Two scores of an expert (ESFT §3.2), both summing
to 1 over a layer:

| score | what is counted |
|---|---|
| `token` | token-expert pairs: how often it was chosen |
| `gate` | routing weights: how much of the layer's output it was asked for |

Per layer the experts are ranked, and the smallest set that reaches the share gets adapters. ESFT
trains whole experts and stays at shares of 0.1 (gate) and 0.2 (token); a low-rank adapter costs a
hundredth of an expert, so the default share here is larger. An expert that is left out would have
seen few of the updates anyway: less than (1 - share) of them go to all of those together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig
from rich.table import Table
from torch import nn

from modeling_dsv4.moe import Dsv4MoE, Dsv4Router

from .ranks import deal, num_ranks, sum_ranks

Score = Literal["token", "gate"]
SCORES: tuple[Score, ...] = ("token", "gate")
DEFAULT_SHARE = 0.5
# What ESFT reads: 32 sequences of 4,096 tokens.
DEFAULT_TOKENS = 1 << 17
# Where adapter_config.json keeps the choice: beside the base's identity, which PEFT stores unread.
HOT_KEY = "hot_experts"


class Rows(Protocol):
    """A run's examples, such as `data.Examples`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True)
class RoutingMass:
    """What was counted: by experts module, scores [E] float64 that sum to 1.

    Names are relative to the backbone (`layers.3.mlp.experts`). `tokens`: how many were read.
    """

    token: Mapping[str, torch.Tensor]
    gate: Mapping[str, torch.Tensor]
    tokens: int

    def of(self, score: Score) -> Mapping[str, torch.Tensor]:
        return self.token if score == "token" else self.gate


@dataclass(frozen=True)
class HotExperts:
    """The chosen experts of every experts module, ascending, and how they were chosen.

    Attributes:
        ids: by module name relative to the backbone.
        mass: share of the score that they cover, at least `share`.
        num_experts: E.
        share: what was asked for.
        score: "token" or "gate"; "given" for a choice that was not counted.
        tokens: how many tokens were read.
    """

    ids: Mapping[str, Sequence[int]]
    mass: Mapping[str, float]
    num_experts: int
    share: float
    score: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter_config.json."""
        return {
            "ids": {name: list(ids) for name, ids in self.ids.items()},
            "mass": dict(self.mass),
            "num_experts": self.num_experts,
            "share": self.share,
            "score": self.score,
            "tokens": self.tokens,
        }

    @classmethod
    def of(cls, config: LoraConfig) -> "HotExperts | None":
        """The choice that an adapter was made with; None for an adapter on all experts."""
        return cls.read(config.auto_mapping)

    @classmethod
    def read(cls, mapping: Mapping[str, Any] | None) -> "HotExperts | None":
        """The choice that adapter_config.json's `auto_mapping` holds, if any.

        Raises:
            ValueError: its values are damaged.
        """
        values = (mapping or {}).get(HOT_KEY)
        return None if values is None else cls(**_checked(values))

    @classmethod
    def given(cls, ids: Mapping[str, Sequence[int]], num_experts: int) -> "HotExperts":
        """A choice that somebody else made; names with or without the `model.` in front."""
        named = {relative(name): sorted(set(chosen)) for name, chosen in ids.items()}
        return cls(named, {}, num_experts, 0.0, "given", 0)

    def ids_of(self, module: str) -> list[int]:
        """The chosen experts of a module.

        Raises:
            ValueError: none were chosen for it, or ids that it does not have.
        """
        ids = list(self.ids.get(relative(module), ()))
        if not ids or not 0 <= ids[0] <= ids[-1] < self.num_experts or ids != sorted(set(ids)):
            raise ValueError(
                f"hot experts of {module}: wanted ascending ids below {self.num_experts}, got "
                f"{ids[:8] or 'none'}; choose them with choose_hot_experts for this model"
            )
        return ids


def _checked(values: Any) -> dict[str, Any]:
    """What adapter_config.json says of chosen experts, if each value is of its kind."""
    place = f"adapter_config.json: {HOT_KEY}"
    if not isinstance(values, dict):
        raise ValueError(f"{place}: wanted an object, got {str(values)[:40]}")
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "ids": (lambda v: _has(v, _is_ids), "lists of ids by module"),
        "mass": (lambda v: _has(v, _is_number), "numbers by module"),
        "num_experts": (_is_count, "a whole number"),
        "share": (_is_number, "a number"),
        "score": (lambda v: isinstance(v, str), "a word"),
        "tokens": (_is_count, "a whole number"),
    }
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(f"{place}: wanted {', '.join(kinds)}, got {', '.join(unknown)} too")
    for key, (fits, wanted) in kinds.items():
        if not fits(values.get(key)):
            got = str(values[key])[:40] if key in values else "none"
            raise ValueError(
                f"{place}.{key}: wanted {wanted}, got {got}; the file is damaged: save the adapter "
                "again"
            )
    return values


def _has(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def relative(module: str) -> str:
    """A module's name from the backbone on, so that a causal LM and its backbone agree."""
    return module.removeprefix("model.")


def measure_routing(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    tokens: int = DEFAULT_TOKENS,
    progress: Callable[[int], None] | None = None,
    *,
    dealt: bool = False,
) -> RoutingMass:
    """Let a model read batches until `tokens` are reached, and count where they are routed.

    Args:
        model: a Dsv4 model; experts in any form, on disk too. Its weights are not touched.
        batches: what its `forward` takes; `labels` are left out, pads are not counted.
        tokens: at least so many are read, if there are as many.
        progress: called with the number of tokens read.
        dealt: every process of a run calls this with batches of its own; their counts are summed.

    Raises:
        ValueError: no layers with experts, or no tokens.
    """
    layers = _routers(model)
    counts = {n: torch.zeros(2, len(r.weight), dtype=torch.float64) for n, r in layers.items()}
    read, training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            valid = _real_tokens(batch)
            with _counting(layers, counts, valid), torch.no_grad():
                model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
            read += int(valid.sum())
            if progress is not None:
                progress(read)
            if read >= tokens:
                break
    finally:
        model.train(training)
    if dealt:
        read = int(sum_ranks(torch.tensor(read)))
        counts = {name: sum_ranks(both) for name, both in counts.items()}
    if not read:
        raise ValueError("hot experts: wanted some tokens to count, got none")
    shares = {name: both / both.sum(-1, keepdim=True) for name, both in counts.items()}
    return RoutingMass(
        {name: both[0] for name, both in shares.items()},
        {name: both[1] for name, both in shares.items()},
        read,
    )


def _routers(model: nn.Module) -> dict[str, Dsv4Router]:
    """The routers of a backbone's layers, by the names of their experts.

    Raises:
        ValueError: there are none.
    """
    found = {relative(n): m for n, m in model.named_modules() if isinstance(m, Dsv4MoE)}
    layers = {f"{n}.experts": m.gate for n, m in found.items() if n.startswith("layers.")}
    if not layers:
        raise ValueError("hot experts: wanted a dsv4 model with routed experts, got none")
    return layers


def _real_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which of the rows that pass the layers are tokens: [B * S] bool. The model drops pads."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or bool(mask.bool().all()):
        return torch.ones(ids.numel(), dtype=torch.bool)
    sizes = mask.bool().sum(1).cpu()
    return (torch.arange(max(int(sizes.max()), 1)) < sizes[:, None]).flatten()


@contextmanager
def _counting(
    layers: Mapping[str, Dsv4Router], counts: Mapping[str, torch.Tensor], valid: torch.Tensor
) -> Iterator[None]:
    """Inside the block every router adds its choices of the valid rows to its counts [2, E]."""

    def watch(count: torch.Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            weights, indices = (x.detach().cpu()[valid] for x in output[1:])
            ids = indices.flatten()
            count[0] += torch.bincount(ids, minlength=count.shape[1])
            count[1].index_add_(0, ids, weights.flatten().double())

        return hook

    handles = [r.register_forward_hook(watch(counts[name])) for name, r in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_hot_experts(
    mass: RoutingMass, share: float = DEFAULT_SHARE, score: Score = "token"
) -> HotExperts:
    """The fewest experts of every layer that together reach a share of its score.

    Raises:
        ValueError: a share outside (0, 1], or an unknown score.
    """
    if not 0 < share <= 1:
        raise ValueError(f"hot_share: wanted more than 0 and at most 1, got {share}")
    if score not in SCORES:
        raise ValueError(f"hot_score: wanted one of {', '.join(SCORES)}, got {score!r}")
    ids, covered, experts = {}, {}, 0
    for name, values in mass.of(score).items():
        experts = len(values)
        # Stable: among equals the lower id is chosen, on every machine.
        order = values.argsort(descending=True, stable=True)
        reached = values[order].cumsum(0)
        count = int((reached < share - 1e-9).sum()) + 1
        ids[name] = sorted(order[:count].tolist())
        covered[name] = float(reached[min(count, experts) - 1])
    return HotExperts(ids, covered, experts, share, score, mass.tokens)


def find_hot_experts(
    model: nn.Module,
    rows: Rows,
    *,
    share: float = DEFAULT_SHARE,
    score: Score = "token",
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
) -> HotExperts:
    """Count and choose in one call.

    Args:
        model: without adapters.
        rows: a run's examples (`data.Examples`), read one at a time in the seed's order.
        share: of the score that is to be covered.
        score: "token" or "gate".
        tokens: how many are read at most, to the end of a row.
        seed: of the order.
        progress: called with the number of tokens read.
        dealt: every process of a run calls this with all the rows and reads its part of them.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if dealt:
        order, tokens = deal(order), -(-tokens // num_ranks())
    device = next(model.parameters()).device
    batches = (
        {key: torch.tensor([ids], device=device) for key, ids in _inputs(rows[i]).items()}
        for i in order
    )
    mass = measure_routing(model, batches, tokens, progress, dealt=dealt)
    return choose_hot_experts(mass, share, score)


def _inputs(row: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """What a model reads of a row; of preferences, the prompt with the wanted answer."""
    if "prompt_ids" in row:
        answer = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
        return {"input_ids": [*row["prompt_ids"], *answer]}
    return {key: list(row[key]) for key in ("input_ids", "position_ids") if key in row}


def check_hot(hot: HotExperts, model: nn.Module) -> None:
    """Compare a choice with a model.

    Raises:
        ValueError: another number of experts, or a layer without a choice.
    """
    for name, router in _routers(model).items():
        if len(router.weight) != hot.num_experts:
            raise ValueError(
                f"hot experts: wanted a choice among {len(router.weight)} experts, got one among "
                f"{hot.num_experts}; it was made for another model"
            )
        hot.ids_of(name)


def hot_table(hot: HotExperts, parameters_per_expert: int) -> Table:
    """A row per layer: how many experts, how much of the routing they cover, and what they cost."""
    title = f"hot experts: {hot.share:.0%} of {hot.score} mass, {hot.tokens:,} tokens read"
    if hot.score == "given":
        title = "hot experts, as given"
    table = Table(title=title)
    for heading in ("layer", "experts", "of", "mass covered", "parameters"):
        table.add_column(heading, justify="right")
    for name, ids in hot.ids.items():
        mass = hot.mass.get(name)
        table.add_row(
            name.split(".")[1],
            str(len(ids)),
            str(hot.num_experts),
            "-" if mass is None else f"{mass:.1%}",
            f"{len(ids) * parameters_per_expert:,}",
        )
    chosen = sum(len(ids) for ids in hot.ids.values())
    mean = sum(hot.mass.values()) / len(hot.mass) if hot.mass else None
    table.add_section()
    table.add_row(
        "all",
        str(chosen),
        str(hot.num_experts * len(hot.ids)),
        "-" if mean is None else f"{mean:.1%}",
        f"{chosen * parameters_per_expert:,}",
    )
    return table
