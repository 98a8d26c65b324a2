# SPDX-License-Identifier: Apache-2.0
"""Exact, normalised and near repeats, and an estimate that is one."""

import random

import numpy as np
import pytest

from finetune.duplicates import Fingerprints, Repeat, find_overlaps, minima, normal_words
from finetune.records import Record

WORDS = [f"word{i}" for i in range(400)]


def _text(text: str) -> Record:
    return Record(1, "text", {"text": text})


def _chat(question: str, answer: str, system: str = "") -> Record:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Record(1, "messages", {"messages": messages})


def _prints(*records: Record) -> Fingerprints:
    prints = Fingerprints()
    for record in records:
        prints.add(record)
    return prints


def _repeats(*records: Record) -> list[Repeat | None]:
    return _prints(*records).repeats()


def test_each_kind_is_named_and_points_at_the_first() -> None:
    long = " ".join(random.Random(0).choices(WORDS, k=200))
    changed = long.split()
    changed[100] = "other"
    texts = ["A b, c!", "a  B c", "A b, c!", long, " ".join(changed), "quite another thing here"]
    assert _repeats(*map(_text, texts)) == [
        None,
        Repeat(0, "normalised"),
        Repeat(0, "exact"),
        None,
        Repeat(3, "near"),
        None,
    ]


def test_a_copy_of_a_near_repeat_is_still_a_copy() -> None:
    long = random.Random(1).choices(WORDS, k=200)
    near = [*long[:-1], "other"]
    found = _repeats(*(_text(" ".join(words)) for words in (long, near, near)))
    assert found == [None, Repeat(0, "near"), Repeat(0, "exact")]


def test_a_shared_system_message_makes_no_repeat() -> None:
    system = " ".join(WORDS)
    assert _repeats(_chat("one", "two", system), _chat("three", "four", system)) == [None, None]
    # The same question and answer without it is one.
    assert _repeats(_chat("one", "two", system), _chat("One", "two"))[1] == Repeat(0, "normalised")


def test_form_does_not_hide_a_repeat() -> None:
    pair = Record(1, "prompt", {"prompt": "the question", "completion": "the answer"})
    assert _repeats(_chat("the question", "the answer"), pair)[1] == Repeat(0, "normalised")


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.9])
def test_equal_minima_estimate_the_similarity_of_word_triples(wanted: float) -> None:
    rng = random.Random(2)
    found, true = [], []
    for _ in range(40):
        words = rng.choices(WORDS, k=300)
        # Replacing a share of the words at the end leaves the triples before them alone.
        keep = round(300 * 2 * wanted / (1 + wanted))
        others = words[:keep] + [f"new{i}" for i in range(300 - keep)]
        sets = [set(zip(w, w[1:], w[2:], strict=False)) for w in (words, others)]
        true.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        found.append(float(np.mean(minima(words) == minima(others))))
    # 40 means of 64 coin throws: three standard errors.
    error = 3 * (wanted * (1 - wanted) / (40 * 64)) ** 0.5
    assert np.mean(found) == pytest.approx(np.mean(true), abs=error)


def test_long_texts_are_hashed_in_chunks_to_the_same_minima() -> None:
    words = random.Random(3).choices(WORDS, k=20_000)
    pieces = [minima(words[i : i + 5002]) for i in range(0, 20_000, 5000)]
    assert np.array_equal(minima(words), np.min(pieces, axis=0))


def test_words_are_split_in_every_script() -> None:
    assert normal_words("Ｆull Ⅳ, e.g. naïve_x 日本 한국") == [
        *("full iv e g naïve x".split()),
        *"日本한국",
    ]
    assert len(set(map(str, [minima([]), minima(["a"]), minima(["a", "b"])]))) == 3


def test_overlap_is_with_the_other_side_alone() -> None:
    train = _prints(_text("one"), _text("two"), _text("One!"), _text("two"))
    found = find_overlaps(train, _prints(_text("three"), _text("ONE")))
    assert found == [Repeat(1, "normalised"), None, Repeat(1, "normalised"), None]
