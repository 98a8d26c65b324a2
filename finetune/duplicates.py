# SPDX-License-Identifier: Apache-2.0
"""Records that repeat others: exactly, but for case and signs, or nearly.

| repeat | test |
|---|---|
| exact | equal content |
| normalised | equal words: NFKC, lower case, without signs and blanks |
| near | MinHash of word triples (Broder 1997), estimated Jaccard similarity of at least 0.8 |

Candidates for the last come from 16 bands of 4 of the 64 minima, so that two records of true
similarity 0.8 meet with probability 0.9998. System messages and tools are not compared: chats of
one application share them. A record takes 272 bytes here, however long it is.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .records import Record

Kind = Literal["exact", "normalised", "near"]
SIMILAR = 0.8
_MINIMA, _BANDS, _SHINGLE = 64, 16, 3
# Shingles hashed at once, which bounds memory to 4 MiB.
_CHUNK = 8192
# A word is a run of letters and digits; scripts without blanks count sign by sign.
_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u9fff\uac00-\ud7af]+")
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_random = np.random.Generator(np.random.PCG64(20260730))
_FACTORS = _random.integers(0, 2**63, _MINIMA, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, _MINIMA, dtype=np.uint64)


@dataclass(frozen=True)
class Repeat:
    """What record `of` (an index, smaller than its own) is repeated, and how well."""

    of: int
    kind: Kind


class Fingerprints:
    """Fingerprints of records, in the order in which they were added."""

    def __init__(self) -> None:
        self._exact: list[int] = []
        self._normal: list[int] = []
        self._minima: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, record: Record) -> None:
        words = [word for text in compared_texts(record) for word in normal_words(text)]
        self._exact.append(int(record.digest()[:16], 16))
        joined = "\n".join(words).encode()
        self._normal.append(zlib.crc32(joined) << 32 | zlib.adler32(joined))
        self._minima.append(minima(words))

    def extend(self, others: "Fingerprints") -> None:
        self._exact += others._exact
        self._normal += others._normal
        self._minima += others._minima

    def choose(self, wanted: Sequence[bool]) -> "Fingerprints":
        """Those of the wanted records."""
        chosen = Fingerprints()
        for i, keep in enumerate(wanted):
            if keep:
                chosen._exact.append(self._exact[i])
                chosen._normal.append(self._normal[i])
                chosen._minima.append(self._minima[i])
        return chosen

    def repeats(self) -> list[Repeat | None]:
        """For every record the first one that it repeats, None for those that are new."""
        found: list[Repeat | None] = [None] * len(self)
        roots = list(range(len(self)))
        near = self._near_pairs()
        steps: tuple[tuple[Kind, Iterator[tuple[int, int]]], ...] = (
            ("exact", _equal_pairs(self._exact)),
            ("normalised", _equal_pairs(self._normal)),
            ("near", near),
        )
        for kind, pairs in steps:
            for first, second in pairs:
                low, high = sorted((_root(roots, first), _root(roots, second)))
                if low != high:
                    roots[high] = low
                    found[high] = Repeat(low, kind)
        return [
            None if repeat is None else Repeat(_root(roots, i), repeat.kind)
            for i, repeat in enumerate(found)
        ]

    def _near_pairs(self) -> Iterator[tuple[int, int]]:
        """Pairs that share a band and are similar: each with the first of its band."""
        if len(self) < 2:
            return
        table = np.stack(self._minima)
        for band in np.split(table, _BANDS, axis=1):
            keys = np.ascontiguousarray(band).view(np.dtype((np.void, band[0].nbytes)))[:, 0]
            order = np.argsort(keys, kind="stable")
            same = keys[order[1:]] == keys[order[:-1]]
            head = order[0]
            for i, equal in enumerate(same, start=1):
                if not equal:
                    head = order[i]
                elif np.mean(table[head] == table[order[i]]) >= SIMILAR:
                    yield int(head), int(order[i])


def find_overlaps(prints: Fingerprints, others: Fingerprints) -> list[Repeat | None]:
    """For every record which of `others` it repeats, if any."""
    both = Fingerprints()
    both.extend(others)
    both.extend(prints)
    found = both.repeats()[len(others) :]
    return [repeat if repeat and repeat.of < len(others) else None for repeat in found]


def compared_texts(record: Record) -> Iterator[str]:
    """What two records are compared by: questions, answers and results, or the text."""
    for key, value in record.content.items():
        if key == "tools":
            continue
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            # A label is a word: the same answer with another one is no repeat.
            yield from _strings(str(value) if isinstance(value, bool) else value)
            continue
        for message in value:
            if message.get("role") not in ("system", "latest_reminder"):
                yield from _strings([message.get(key) for key in ("content", "tool_calls")])
                yield from _strings([message.get(key) for key in ("answer", "regex")])


def normal_words(text: str) -> list[str]:
    """Words in lower case, without signs and blanks."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def minima(words: Sequence[str]) -> np.ndarray:
    """MinHash of word triples, uint32 [64]; fewer than three words are one shingle."""
    ids = np.array([zlib.crc32(word.encode()) for word in words] or [0], dtype=np.uint64)
    ids = np.pad(ids, (0, max(0, _SHINGLE - len(ids))))
    count = len(ids) - _SHINGLE + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for i, prime in enumerate(_PRIMES):
        shingles = (shingles ^ ids[i : i + count]) * prime
        shingles ^= shingles >> np.uint64(29)
    found = np.full(_MINIMA, 2**32 - 1, dtype=np.uint32)
    for start in range(0, count, _CHUNK):
        some = shingles[start : start + _CHUNK, None]
        hashed = ((some * _FACTORS + _OFFSETS) >> np.uint64(32)).astype(np.uint32)
        np.minimum(found, hashed.min(axis=0), out=found)
    return found


def _equal_pairs(keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    first: dict[int, int] = {}
    for i, key in enumerate(keys):
        earlier = first.setdefault(key, i)
        if earlier != i:
            yield earlier, i


def _root(roots: list[int], i: int) -> int:
    while roots[i] != i:
        roots[i] = roots[roots[i]]
        i = roots[i]
    return i


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
