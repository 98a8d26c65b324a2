# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft: a cost model in bytes, and counters of what drafting brought.

Decoding waits for weights, so a pass is counted in the bytes that it moves: what every pass reads
(dense), the experts that its tokens are routed to, and, many times dearer, what a store had to
fetch from disk; a layer's start counts like bytes too. T tokens that choose K of E experts
independently meet `E (1 - (1 - K/E)^T)` of them. Neighbours choose more alike than that and a store
keeps what was used, so the bytes fetched are learned: by tokens a pass where seen, else in
proportion to the experts met.

A step with k guesses is worth `1 + sum_i prod_{j<=i} c_j` tokens, c the confidences, scaled by how
often they came true of late. It checks as many as give most tokens for a byte, and after a number
of steps that checked nothing it leaves the head alone for a while, twice as long each time.

Confidences tell which tokens were drawn, and to drop an unlikely draw and draw again is not to
sample the model. Where texts are samples, c is how often each place came true in earlier steps, and
the number stands before anything is drawn; a place not seen for long is hoped to be right.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from .moe import Dsv4MoE

# A byte from disk takes as long as so many from memory.
_DISK = 16.0
# Starting a layer's operations takes as long as so many bytes: some 0.3 ms at 100 GB/s.
_LAYER = 32 << 20
# Passes of a size that are averaged before they are believed, and the weight of a new one after.
_FIRST, _NEW = 4, 0.1
# Steps without a guess before the head pauses, and the first and longest pause.
_PATIENCE, _PAUSE, _LONGEST = 4, 8, 512
# Guesses that a head's word counts for before it is seen to be right, and what a step forgets.
_TRUST, _KEEP = 8.0, 0.98
# Right guesses that each place is given in advance where its past decides: it is tried before it is
# judged, and again once that is forgotten.
_HOPE = 2.0


@dataclass(frozen=True)
class Weights:
    """Bytes that one part of a model moves: `dense` in every pass, `expert` for each one met.

    `layers` of `experts`, of which a token chooses `active`.
    """

    dense: float
    expert: float
    layers: int
    experts: int
    active: int

    def met(self, tokens: float) -> float:
        """Experts of all layers that `tokens` tokens meet, if each chooses for itself."""
        return self.layers * self.experts * (1 - (1 - self.active / self.experts) ** tokens)

    def moved(self, tokens: float) -> float:
        """Bytes from memory of a pass of so many tokens, its layers' starts included."""
        return self.dense + self.layers * _LAYER + self.expert * self.met(tokens)

    @classmethod
    def of(cls, parts: list[nn.Module]) -> Weights:
        """Measure modules; tables that are looked up by id are not read as a whole."""
        mixtures = [m for part in parts for m in part.modules() if isinstance(m, Dsv4MoE)]
        inside = {id(t) for m in mixtures for t in _tensors(m.experts)}
        tables = [m for part in parts for m in part.modules() if isinstance(m, nn.Embedding)]
        inside |= {id(t) for m in tables for t in _tensors(m)}
        dense = sum(t.nbytes for part in parts for t in _tensors(part) if id(t) not in inside)
        expert = 0.0
        for m in mixtures:
            kept: Any = m.experts
            held = kept.memory_bytes()["disk"] if getattr(kept, "store", None) else 0
            here = sum(t.nbytes for t in _tensors(m.experts))
            expert += (here + held) / m.experts.num_experts / len(mixtures)
        first = mixtures[0] if mixtures else None
        experts = first.experts.num_experts if first else 1
        return cls(dense, expert, len(mixtures), experts, first.gate.top_k if first else 0)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass
class CostModel:
    """What a pass of the backbone, and one of the head, cost: bytes, disk's weighted."""

    backbone: Weights
    head: Weights
    disk: float = _DISK
    _fetched: dict[int, float] = field(default_factory=dict)
    _passes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _guessing: float = 0.0
    _guesses: int = 0

    def observe(self, tokens: int, fetched: float) -> None:
        """Learn that a pass of the backbone over `tokens` tokens fetched so many bytes."""
        self._passes[tokens] += 1
        self._fetched[tokens] = _mean(self._fetched.get(tokens), fetched, self._passes[tokens])

    def observe_head(self, fetched: float) -> None:
        """Learn what a pass of the head fetched."""
        self._guesses += 1
        self._guessing = _mean(self._guessing, fetched, self._guesses)

    def fetched(self, tokens: int) -> float:
        """Bytes from disk that a pass of so many tokens is expected to fetch."""
        if self._passes.get(tokens, 0) >= _FIRST:
            return self._fetched[tokens]
        met = sum(n * self.backbone.met(t) for t, n in self._passes.items())
        seen = sum(n * self._fetched[t] for t, n in self._passes.items())
        return seen / met * self.backbone.met(tokens) if met else 0.0

    def cost(self, tokens: int) -> float:
        """Of a pass of the backbone over so many tokens."""
        return self.backbone.moved(tokens) + self.disk * self.fetched(tokens)

    def head_cost(self, tokens: int) -> float:
        """Of a pass of the head over so many tokens."""
        return self.head.moved(tokens) + self.disk * self._guessing

    def best(self, confidence: torch.Tensor, spent: float) -> int:
        """How many guesses to check: most tokens for a byte.

        Args:
            confidence: [B, k] probability of each guess, if those before it are right.
            spent: cost of having made them.
        """
        rows = confidence.shape[0]
        right = confidence.double().cumprod(1).sum(0).tolist()
        best, rate = 0, rows / (self.cost(rows) + spent)
        worth = float(rows)
        for k, gain in enumerate(right, start=1):
            worth += gain
            if worth / (self.cost(rows * (k + 1)) + spent) > rate:
                best, rate = k, worth / (self.cost(rows * (k + 1)) + spent)
        return best if rate > rows / self.cost(rows) else 0


def _mean(old: float | None, new: float, count: int) -> float:
    weight = max(1 / count, _NEW)
    return new if old is None else old + weight * (new - old)


class Plan:
    """Decides for every step whether the head drafts and how many guesses are checked.

    Args:
        most: guesses at most.
        costs: None checks all that were made.
        samples: the text is sampled, so that the number follows from earlier steps alone.
    """

    def __init__(self, most: int, costs: CostModel | None, samples: bool = False) -> None:
        self.most, self.costs, self.samples = most, costs, samples
        self._idle, self._wait, self._pause, self._run = 0, 0, _PAUSE, 0
        self._promised, self._kept = 0.0, 0.0
        # By place: guesses whose forerunners were right, and those that were right as well.
        self._reached = torch.zeros(most, dtype=torch.float64)
        self._right = torch.zeros(most, dtype=torch.float64)

    def ask(self, rows: int) -> int:
        """How many guesses the head is to make now for each of `rows` rows; 0 while it pauses."""
        if self._wait:
            self._wait -= 1
            return 0
        if self.costs is None or not self.samples:
            return self.most
        hoped = (self._right + _HOPE) / (self._reached + _HOPE)
        made = self.costs.best(hoped.expand(rows, -1), self.costs.head_cost(rows * self.most))
        if not made:
            self._rest()
            return 0
        self._run += 1
        if self._run > self._pause:
            self._pause = _PAUSE
        return made

    def keep(self, confidence: torch.Tensor) -> int:
        """How many of the guesses to check; `confidence` [B, k] probabilities."""
        if self.costs is None or self.samples:
            return confidence.shape[1]
        rows = confidence.shape[0]
        scale = (self._kept + _TRUST) / (self._promised + _TRUST)
        confidence = (confidence * scale).clamp(max=1)
        kept = self.costs.best(confidence, self.costs.head_cost(rows * self.most))
        if kept:
            self._idle, self._pause = 0, _PAUSE
            return kept
        self._idle += 1
        if self._idle >= _PATIENCE:
            self._rest()
        return 0

    def _rest(self) -> None:
        self._idle, self._run, self._wait = 0, 0, self._pause
        # Another text may suit the head better.
        self._promised, self._kept = self._promised / 2, self._kept / 2
        self._reached, self._right = self._reached / 2, self._right / 2
        self._pause = min(2 * self._pause, _LONGEST)

    def observe(self, confidence: torch.Tensor, count: torch.Tensor) -> None:
        """Learn which guesses were right: of `confidence` [B, k] the first `count` [B].

        Guesses behind a wrong one say nothing.
        """
        k = confidence.shape[1]
        places = torch.arange(k, device=count.device)
        reached, right = places <= count[:, None], places < count[:, None]
        self._promised = _KEEP * self._promised + float(confidence[reached].sum())
        self._kept = _KEEP * self._kept + float(right.sum())
        self._reached, self._right = _KEEP * self._reached, _KEEP * self._right
        self._reached[:k] += reached.sum(0).cpu()
        self._right[:k] += right.sum(0).cpu()


@dataclass
class DraftCounts:
    """What drafting did: passes of the backbone behind the prompt, tokens they gave, guesses.

    `made`, `right`: guesses that were checked and accepted, by place in the block. `fetched`: bytes
    that stores read from disk meanwhile, the head's included.
    """

    passes: int = 0
    tokens: int = 0
    head_passes: int = 0
    fetched: float = 0.0
    made: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    def add(self, made: int, right: int, tokens: int) -> None:
        """Count one row of one pass."""
        self.made = _sum(self.made, [1] * made)
        self.right = _sum(self.right, [int(i < right) for i in range(made)])
        self.tokens += tokens

    def merge(self, other: DraftCounts) -> None:
        """Add the counts of another call."""
        self.passes += other.passes
        self.tokens += other.tokens
        self.head_passes += other.head_passes
        self.fetched += other.fetched
        self.made, self.right = _sum(self.made, other.made), _sum(self.right, other.right)

    def stats(self) -> dict[str, float]:
        """The counters, flat, and what follows from them."""
        found: dict[str, float] = {
            "draft_passes": self.passes,
            "draft_tokens": self.tokens,
            "draft_head_passes": self.head_passes,
            "draft_bytes_read": self.fetched,
            "draft_tokens_per_pass": self.tokens / max(self.passes, 1),
            "draft_bytes_per_token": self.fetched / max(self.tokens, 1),
        }
        for i, (made, right) in enumerate(zip(self.made, self.right, strict=True), start=1):
            found[f"draft_made_{i}"], found[f"draft_right_{i}"] = made, right
        return found


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
