# SPDX-License-Identifier: Apache-2.0
"""Kinds of held-out tokens: how often a run has read their trigram, and whether they end a name.

A name is, in prose, two or more capitalised words in a row of which the first stands inside a
sentence ("of the Federal Reserve Board"); in code, an identifier of several tokens with a capital,
a digit or an underscore behind its first character (`dup_rem`, `MatrixSymbol`), so that no plain
English word of a comment counts. Tokens that end one are those behind its first word (prose) or
behind its first token (code): what a reader can know from the n-gram alone.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np
from nano.data import ROW, SOURCES, SPECIALS, Corpus, encode
from nano.ngram import Counts
from tokenizers import Tokenizer

UNSEEN, RARE, FREQUENT = range(3)
# Times that a run has read a trigram from which on it is frequent.
OFTEN = 10
# Names are seldom in prose: so many held-out rows have some hundreds of them.
_PROSE_ROWS = 160
_BASE = 1 << 20
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)+")
_IDENTIFIER = re.compile(r"(?<![A-Za-z0-9_])[A-Za-z_](?=\w*[A-Z0-9_])[A-Za-z0-9_]+")


def held_out(corpus: Corpus) -> dict[str, np.ndarray]:
    """Held-out rows [r, 512] of each domain: of prose more than the nano's, the nano's first."""
    found = {name: domain.held_out for name, domain in corpus.domains.items()}
    if "prose" in found:
        stream = encode(corpus.tokenizer, SOURCES["prose"].split()[1])
        found["prose"] = stream[: _PROSE_ROWS * ROW].reshape(-1, ROW)
    return found


def trigram_kinds(read: np.ndarray, rows: np.ndarray, often: int = OFTEN) -> np.ndarray:
    """Kind of the trigram that each predicted token completes.

    Args:
        read: [n, s] tokens that training has read; no trigram crosses a row.
        rows: [r, t] held-out tokens.
        often: a trigram read so many times is frequent.

    Returns:
        [r, t - 1] of UNSEEN, RARE and FREQUENT; a row's second token has no trigram: UNSEEN.
    """
    count = Counts.of(_trigrams(read).ravel())
    keys = _trigrams(rows)
    seen = count[keys.ravel()].reshape(keys.shape)
    kinds = np.where(seen == 0, UNSEEN, np.where(seen < often, RARE, FREQUENT))
    return np.pad(kinds, ((0, 0), (1, 0)), constant_values=UNSEEN)


def _trigrams(rows: np.ndarray) -> np.ndarray:
    a, b, c = (rows[:, i : rows.shape[1] - 2 + i].astype(np.int64) for i in range(3))
    return (a * _BASE + b) * _BASE + c


def ends_name(tokenizer: Tokenizer, rows: np.ndarray, domain: str) -> np.ndarray:
    """Whether each predicted token of rows [r, t] ends a name: [r, t - 1] bool.

    Args:
        tokenizer: byte-level; its pieces spell ASCII as itself.
        rows: held-out tokens.
        domain: "prose" or "code".
    """
    spans = {"prose": _behind_first_word, "code": _behind_first_letter}[domain]
    pieces = [_spelled(tokenizer, i) for i in range(tokenizer.get_vocab_size())]
    return np.stack([_inside(spans, [pieces[i] for i in row])[1:] for row in rows.tolist()])


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.id_to_token(token)
    return "\n" if piece in SPECIALS else piece.replace("Ġ", " ").replace("Ċ", "\n")


def _behind_first_word(text: str) -> Iterator[tuple[int, int]]:
    for found in _NAME.finditer(text):
        yield text.index(" ", found.start()), found.end()


def _behind_first_letter(text: str) -> Iterator[tuple[int, int]]:
    for found in _IDENTIFIER.finditer(text):
        yield found.start() + 1, found.end()


def _inside(spans: Callable[[str], Iterator[tuple[int, int]]], pieces: list[str]) -> np.ndarray:
    """Which pieces lie within a span of the text they spell: [t] bool."""
    ends = np.cumsum([len(p) for p in pieces])
    starts = ends - [len(p) for p in pieces]
    found = np.zeros(len(pieces), dtype=bool)
    for start, stop in spans("".join(pieces)):
        found |= (starts >= start) & (ends <= stop)
    return found
