# SPDX-License-Identifier: Apache-2.0
"""Planted facts: what a model can know of a token only by reading it where it was said.

A fact is two tokens, `KIND VALUE`, laid over the text. A kind has 8 values, which no other kind
has, and a row has one value of a kind, drawn at random: its first mention can only be guessed, a
later `KIND` is a question whose answer stands in the row. Kinds and values are words that the
tokenizer has as one token each, the rarest first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nano.data import Corpus
from tokenizers import Tokenizer

KINDS, VALUES, LINE = 12, 8, 2
CHANCE = 1 / VALUES
# Rows in which is asked, and tokens between fact and question; the shortest lies within a window.
PROBES = {1024: (16, 32, 128, 512), 8192: (16, 32, 128, 512, 2048, 7168)}
# How often a line of a training row asks for what was said before.
_ASKED = 0.75
# Rows grow: (up to which part of the steps, tokens in a row, part of it that facts cover). All
# steps have as many tokens, unless a single row is longer.
_PHASES = ((0.4, 128, 0.95), (0.5, 256, 0.3), (0.8, 1024, 0.1), (1.0, 1024, 0.06))
# Part of the text that is learned from, so that answers are not drowned.
_TAUGHT = 0.25
_SILENT = -100


@dataclass(frozen=True)
class Words:
    """Token ids of the kinds [12] and of their values [12, 8]."""

    kinds: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        """Words in lower case behind a space.

        Raises:
            ValueError: too few words in the vocabulary.
        """
        wanted = KINDS * (VALUES + 1)
        words = sorted((i for w, i in tokenizer.get_vocab().items() if _is_word(w)), reverse=True)
        if len(words) < wanted:
            raise ValueError(f"facts: wanted a vocabulary with {wanted} words, got {len(words)}")
        table = np.array(words[:wanted]).reshape(VALUES + 1, KINDS).T
        return cls(table[:, 0], table[:, 1:])


def _is_word(token: str) -> bool:
    word = token[1:]
    plain = word.isascii() and word.isalpha() and word.islower()
    return token[0] == "Ġ" and len(word) > 3 and plain


def plant_stream(
    row: np.ndarray, words: Words, rng: np.random.Generator, cover: float
) -> tuple[np.ndarray, np.ndarray]:
    """A training row [s] with facts, asked again at all distances, and its labels [s].

    Each line asks for an earlier one with a chance of 0.75: for the one whose distance is nearest
    to a draw that is even on a logarithmic scale. Labels are all answers and a quarter of the text;
    nothing is to be learned from a first mention.
    """
    row = row.astype(np.int64)
    labels = np.where(rng.random(len(row)) < _TAUGHT, row, _SILENT)
    lines = int(len(row) * cover / LINE)
    # Places of lines among what is left when every line is one token.
    short = np.sort(rng.choice(len(row) - lines * (LINE - 1), lines, replace=False))
    fresh = iter(rng.permutation(KINDS).tolist())
    said: list[tuple[int, np.ndarray]] = []
    for start in (short + np.arange(lines) * (LINE - 1)).tolist():
        kind = None if said and rng.random() < _ASKED else next(fresh, None)
        labels[start : start + LINE] = _SILENT
        if kind is None:
            back = np.exp(rng.uniform(np.log(LINE), np.log(len(row))))
            places = np.array([place for place, _ in said])
            fact = said[int(np.abs(places - (start - back)).argmin())][1]
            labels[start + 1] = fact[1]
        else:
            fact = np.array((words.kinds[kind], rng.choice(words.values[kind])))
        said.append((start, fact))
        row[start : start + LINE] = fact
    return row, labels


class FactBatches:
    """Training batches of text with facts; rows grow over the run.

    Args:
        corpus: whose training text is read, at random places.
        recipe: `rows * length` tokens a step, `steps` and the seed.
    """

    def __init__(self, corpus: Corpus, recipe: Any) -> None:
        self.text, self.words, self.recipe = corpus.train, Words.of(corpus.tokenizer), recipe

    def shape(self, step: int) -> tuple[int, int, float]:
        """Rows, tokens in a row and what facts cover of it, of a step counted from 0."""
        part = (step + 1) / self.recipe.steps
        _, length, cover = next(p for p in _PHASES if part <= p[0] or p[0] == 1.0)
        return max(1, self.recipe.rows * self.recipe.length // length), length, cover

    def tokens(self, steps: int) -> int:
        """Tokens of the first steps."""
        return sum(rows * length for rows, length, _ in map(self.shape, range(steps)))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng(self.recipe.seed)
        step = 0
        while True:
            rows, length, cover = self.shape(step)
            starts = rng.integers(len(self.text) - length, size=rows)
            made = [plant_stream(self.text[s : s + length], self.words, rng, cover) for s in starts]
            ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
            yield ids, labels
            step += 1


@dataclass(frozen=True)
class Probe:
    """A row [s] with facts planted once and asked once.

    Attributes:
        row: token ids.
        asked: where kinds are asked for, [n].
        kinds: which, [n].
        distances: how far before it the fact stands, [n].
    """

    row: np.ndarray
    asked: np.ndarray
    kinds: np.ndarray
    distances: np.ndarray


def plant_probe(
    row: np.ndarray, words: Words, rng: np.random.Generator, distances: Sequence[int]
) -> Probe:
    """Facts of all kinds over a held-out row [s], every distance as often.

    All questions stand behind the longest distance, whatever they ask for, so that the place in
    the row says nothing.
    """
    row, taken = row.astype(np.int64), np.zeros(len(row), dtype=bool)
    kinds, asked = rng.permutation(KINDS), []
    far = np.repeat(distances, KINDS // len(distances))
    for kind, distance in zip(kinds, far, strict=True):
        while True:
            question = int(rng.integers(max(distances), len(row) - LINE))
            both = [slice(at, at + LINE) for at in (question - distance, question)]
            if not any(taken[place].any() for place in both):
                break
        fact = words.kinds[kind], rng.choice(words.values[kind])
        for place in both:
            row[place], taken[place] = fact, True
        asked.append(question)
    return Probe(row, np.array(asked), kinds, far)


@torch.no_grad()
def recall(
    model: Callable[..., Any], rows: np.ndarray, words: Words, seed: int
) -> dict[str, list[Any]]:
    """Recall of planted facts by distance, over held-out rows [r, s], s one of `PROBES`.

    Returns:
        lists by distance: `distances`; `exact`: how often the true value is the likeliest of all
        tokens; `among`: how often it is the likeliest of its kind's 8 values; `probability`: what
        the model gives to it, mean. A guess that knows the kind has 1/8 of each.
    """
    rng = np.random.default_rng(seed)
    distances, far, found = PROBES[rows.shape[1]], [], []
    for row in rows:
        probe = plant_probe(row, words, rng, distances)
        out = model(input_ids=torch.from_numpy(probe.row)[None], use_cache=False).logits[0]
        p = out[torch.from_numpy(probe.asked)].float().softmax(-1).numpy()
        value, values = probe.row[probe.asked + 1], words.values[probe.kinds]
        choice = np.take_along_axis(p, values, 1).argmax(1)
        among = np.take_along_axis(values, choice[:, None], 1)[:, 0] == value
        given = np.take_along_axis(p, value[:, None], 1)[:, 0]
        found.append(np.stack((p.argmax(1) == value, among, given)).astype(np.float64))
        far.append(probe.distances)
    means = [np.concatenate(found, 1)[:, np.concatenate(far) == d].mean(1) for d in distances]
    exact, among, given = np.array(means).T.tolist()
    return {
        "distances": list(distances), "exact": exact, "among": among, "probability": given
    }  # fmt: skip
