# SPDX-License-Identifier: Apache-2.0
"""Documents longer than a row: split so that every token that counts is learned exactly once.

A chat's pieces hold its opening (system message and tools) and as many whole exchanges as fit;
an exchange is a question with all that follows up to the next question, results of tools too. A
text, a pair, or an exchange that does not fit alone is cut into windows of `max_length` tokens.
A window begins with the last token of the one before, which it only reads, so that the first new
token is predicted from something. Repeated openings do not count either. Pieces in which nothing
counts are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """Tokens [S], whether each counts, and where a chat may be cut.

    `opening`: how many tokens belong to every piece. `borders`: where later exchanges begin.
    """

    ids: Sequence[int]
    counts: Sequence[bool]
    opening: int = 0
    borders: Sequence[int] = ()


Piece = tuple[list[int], list[bool]]


def split_document(document: Document, max_length: int) -> list[Piece]:
    """Pieces of at most `max_length` tokens, each with something to learn."""
    ids, counts = list(document.ids), list(document.counts)
    if len(ids) <= max_length:
        return [(ids, counts)]
    opening = document.opening if document.opening < max_length else 0
    edges = [opening, *(at for at in document.borders if at > opening), len(ids)]
    pieces: list[Piece] = []
    first = 0
    while first < len(edges) - 1:
        last = first + 1
        while last + 1 < len(edges) and opening + edges[last + 1] - edges[first] <= max_length:
            last += 1
        start, stop = edges[first], edges[last]
        # The opening counts where it first stands, if at all.
        head = counts[:opening] if first == 0 else [False] * opening
        piece = ids[:opening] + ids[start:stop], head + counts[start:stop]
        pieces += _windows(*piece, max_length)
        first = last
    return [piece for piece in pieces if any(piece[1])]


def _windows(ids: list[int], counts: list[bool], size: int) -> Iterator[Piece]:
    """Windows of `size` tokens that overlap by one, which counts in the earlier one."""
    step = max(1, size - 1)
    starts = [0, *range(step, max(len(ids) - 1, 0), step)] if len(ids) > size else [0]
    for start in starts:
        some = counts[start : start + size]
        yield ids[start : start + size], [False, *some[1:]] if start else some
