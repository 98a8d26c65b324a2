# SPDX-License-Identifier: Apache-2.0
"""Engram addressing: which table rows a token reads (Engram §2.2; V4.1 release file engram.py).

Everything here is integer arithmetic, and part of the checkpoint format: one different bit reads
other rows. Token ids are first *compressed* (spellings that differ in case, accents or spaces share
an id), then the last n compressed ids are mixed, once per order, and reduced by one prime per head:

```
x_i   compressed id at look-back i = 0..n-1     from the first break on: pad
r_1   = x_0 m_0 ^ x_1 m_1                       2-grams
r_j   = r_{j-1} ^ x_j m_j                       (j+1)-grams
row   = r_{order-1} mod prime + offset          order 2 head 0, 1, ..; order 3; order 4
```

A break is the start of the document or a dead token (an image position).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

if TYPE_CHECKING:
    import tokenizers

    from .configuration_dsv4 import Dsv4Config

DEAD = -1
"""Compressed id of a position that is not text; also fills a token map that was never set."""

_INT64_MAX = 2**63 - 1
_ROWS_MAX = 2**31
_LAYER_SEED = 10007
# Deterministic for every integer below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Miller-Rabin with a fixed set of witnesses: exact for all sizes used here."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    twos = ((n - 1) & -(n - 1)).bit_length() - 1
    odd = (n - 1) >> twos
    for a in _WITNESSES:
        x = pow(a, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def next_primes(start: int, count: int, used: set[int]) -> list[int]:
    """The first `count` primes >= `start` that are not in `used`, ascending."""
    found: list[int] = []
    candidate = start
    while len(found) < count:
        if candidate not in used and is_prime(candidate):
            found.append(candidate)
        candidate += 1
    return found


def table_primes(
    layer_ids: Sequence[int], vocab_size: int, max_ngram: int, n_heads: int
) -> torch.Tensor:
    """Table sizes [layers, orders, heads], int64, all different.

    Every order of every layer starts again at `vocab_size` and takes what no one before it has
    taken, so a layer's sizes depend on how many layers precede it in `layer_ids`.
    """
    if vocab_size < 2 or max_ngram < 2 or n_heads < 1:
        raise ValueError(
            "Engram tables want engram_vocab_size >= 2, engram_max_ngram_size >= 2 and "
            f"engram_n_heads >= 1, got {vocab_size}, {max_ngram} and {n_heads}"
        )
    used: set[int] = set()
    layers = []
    for _ in layer_ids:
        orders = []
        for _ in range(max_ngram - 1):
            orders.append(next_primes(vocab_size, n_heads, used))
            used.update(orders[-1])
        layers.append(orders)
    primes = torch.tensor(layers, dtype=torch.int64, device="cpu")
    return primes.view(len(layers), max_ngram - 1, n_heads)


def table_rows(
    layer_ids: Sequence[int], vocab_size: int, max_ngram: int, n_heads: int
) -> list[int]:
    """Rows of each layer's table: the sum of its primes (`engram_num_embeddings`)."""
    primes = table_primes(layer_ids, vocab_size, max_ngram, n_heads)
    return [int(n) for n in primes.sum((1, 2)).tolist()]


def multipliers(layer_id: int, compressed_vocab_size: int, max_ngram: int) -> np.ndarray:
    """Odd factors [max_ngram] int64 of one layer, index 0 for the current token.

    `layer_id` is the 0-based block index. The draw is bounded so that the product with any
    compressed id fits int64; with raw ids it would not.
    """
    if compressed_vocab_size < 1 or max_ngram < 2:
        raise ValueError(
            "Engram multipliers want engram_compressed_vocab_size >= 1 and "
            f"engram_max_ngram_size >= 2, got {compressed_vocab_size} and {max_ngram}"
        )
    bound = _INT64_MAX // compressed_vocab_size // 2
    drawn = np.random.default_rng(_LAYER_SEED * layer_id).integers(0, max(bound, 1), size=max_ngram)
    factors = drawn.astype(np.int64) * 2 + 1
    largest = int(factors.max()) * (compressed_vocab_size - 1)
    if largest > _INT64_MAX:
        raise ValueError(
            f"Engram layer {layer_id}: multiplier times the largest of {compressed_vocab_size} "
            f"compressed ids is {largest}, which does not fit int64; use a smaller vocabulary"
        )
    return factors


def build_token_map(
    tokenizer: tokenizers.Tokenizer | Any | str | Path, vocab_size: int | None = None
) -> torch.Tensor:
    """Compressed id of every token id: [vocab_size] int64, numbered by first occurrence.

    Two ids are one if their texts, decoded alone, normalise alike (NFKC, no accents, lower case,
    blanks folded). A piece that is not whole UTF-8 is known by its raw token instead.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, a fast transformers tokenizer, a tokenizer.json, or
            the directory of one.
        vocab_size: length of the map, if the model has more ids than the tokenizer. Each id
            without a token becomes a new compressed id of its own.

    Raises:
        ValueError: no tokenizer.json behind it, or more tokens than `vocab_size`.
    """
    raw = _raw_tokenizer(tokenizer)
    known = 1 + max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
    size = known if vocab_size is None else vocab_size
    if known > size:
        raise ValueError(
            f"token map: the tokenizer has ids up to {known - 1}, the model has vocab_size {size}; "
            "use the tokenizer that belongs to this checkpoint"
        )
    normalise = _text_normalizer().normalize_str
    texts = raw.decode_batch([[i] for i in range(known)], skip_special_tokens=False)
    numbers: dict[object, int] = {}
    ids = []
    for i in range(size):
        token = raw.id_to_token(i) if i < known else None
        key: object
        if token is None:
            # Never equal to a text.
            key = i
        elif "\ufffd" in texts[i]:
            key = token
        else:
            key = normalise(texts[i]) or texts[i]
        ids.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def check_token_map(token_map: torch.Tensor, config: Dsv4Config) -> None:
    """Refuse a map that cannot be the one this configuration was trained with.

    Raises:
        ValueError: wrong shape or type, negative ids, or a number of compressed ids other than
            `engram_compressed_vocab_size`.
    """
    if token_map.is_floating_point() or token_map.dtype is torch.bool:
        raise ValueError(f"Engram token map wants integers, got {token_map.dtype}")
    if token_map.shape != (config.vocab_size,):
        raise ValueError(
            f"Engram token map wants one id for each of {config.vocab_size} tokens, got shape "
            f"{list(token_map.shape)}; build it with build_token_map(tokenizer, vocab_size)"
        )
    if int(token_map.min()) < 0:
        raise ValueError(
            f"Engram token map wants ids >= 0, got {int(token_map.min())}: the map was never set"
        )
    want = config.engram_compressed_vocab_size
    got, largest = token_map.unique().numel(), int(token_map.max())
    if got != want or largest != want - 1:
        raise ValueError(
            f"Engram token map wants the compressed ids 0..{want - 1} "
            f"(engram_compressed_vocab_size), got {got} ids up to {largest}: this is not the "
            "tokenizer of this checkpoint"
        )


def cut_context(context: torch.Tensor, pad: torch.Tensor | int) -> torch.Tensor:
    """Compressed ids [..., n] by look-back; from the first `DEAD` on, all are `pad`."""
    return torch.where((context == DEAD).cumsum(-1) > 0, pad, context)


class EngramHash(nn.Module):
    """Token ids to Engram rows, for all Engram layers of a model.

    Holds the token map (a saved buffer, so that a tokenizer upgrade cannot move the rows under a
    checkpoint) and three constants that follow from the configuration (not saved).

    Attributes:
        token_map: [V] int64, `DEAD` everywhere until it is loaded or set.
        multipliers: [L, n] int64; `primes` [L, orders, heads]; `offsets` [L, orders, heads], for
            the L Engram layers and n-grams up to n.
        num_rows: rows of each layer's table.
        kernels: what computes the rows of a pass.
    """

    token_map: torch.Tensor
    multipliers: torch.Tensor
    primes: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__()
        self.config = config
        self.kernels = "auto"  # see kernel_choice.py
        unset = torch.full((config.vocab_size,), DEAD, dtype=torch.int64)
        self.register_buffer("token_map", unset)
        constants = self._constants()
        self.num_rows: list[int] = [int(n) for n in constants["primes"].sum((1, 2)).tolist()]
        if max(self.num_rows, default=0) >= _ROWS_MAX:
            raise ValueError(
                f"Engram tables want fewer than 2**31 rows, got {self.num_rows}; lower "
                "engram_vocab_size, engram_n_heads or engram_max_ngram_size"
            )
        for name, value in constants.items():
            # Follows an outer `torch.device` context, as every other buffer does.
            self.register_buffer(name, value.to(unset.device), persistent=False)
        self._map_checked = False

    def reset_buffers(self) -> None:
        """Fill the buffers again, in place: after meta-device construction or `to_empty`.

        The token map becomes unset, unless transformers marked it as loaded.
        """
        for name, value in self._constants().items():
            init.copy_(getattr(self, name), value)
        init.constant_(self.token_map, DEAD)
        self._map_checked = False

    def set_token_map(self, token_map: torch.Tensor) -> None:
        """Use this map [V]; ValueError if it does not fit the configuration."""
        check_token_map(token_map, self.config)
        self.token_map.copy_(token_map)
        self._map_checked = True

    def compress(self, input_ids: torch.Tensor, live: torch.Tensor | None = None) -> torch.Tensor:
        """Raw ids [...] -> compressed ids [...] int64; `DEAD` where `live` is false.

        Ids outside the vocabulary are dead too: a defined result, on every device.
        """
        self._require_map()
        size = self.token_map.shape[0]
        alive = (input_ids >= 0) & (input_ids < size)
        if live is not None:
            alive = alive & live
        return self.token_map[input_ids.clamp(0, size - 1)].masked_fill(~alive, DEAD)

    def cut_context(self, context: torch.Tensor) -> torch.Tensor:
        """Compressed ids [..., n] by look-back, with everything behind a break made pad."""
        return cut_context(context, self.pad_id())

    def pad_id(self) -> torch.Tensor:
        """The compressed id [] that stands for everything behind a break."""
        self._require_map()
        return self.token_map[self.config.engram_pad_token_id]

    def rows(self, layer_pos: int, context: torch.Tensor) -> torch.Tensor:
        """Cut contexts [..., n] -> table rows [..., P], for the `layer_pos`-th Engram layer.

        `context[..., i]` is the compressed id at look-back i, as `cut_context` returns it.
        """
        term = context.long() * self.multipliers[layer_pos]
        mixed = [term[..., 0] ^ term[..., 1]]
        for i in range(2, term.shape[-1]):
            mixed.append(mixed[-1] ^ term[..., i])
        # [..., orders, heads]
        row = torch.stack(mixed, dim=-1)[..., None] % self.primes[layer_pos]
        return (row + self.offsets[layer_pos]).flatten(-2)

    def _constants(self) -> dict[str, torch.Tensor]:
        c = self.config
        n = c.engram_max_ngram_size
        primes = table_primes(c.engram_layer_ids, c.engram_vocab_size, n, c.engram_n_heads)
        flat = primes.flatten(1)
        factors = [multipliers(i, c.engram_compressed_vocab_size, n) for i in c.engram_layer_ids]
        return {
            "multipliers": torch.from_numpy(np.array(factors, dtype=np.int64).reshape(-1, n)),
            "primes": primes,
            "offsets": (flat.cumsum(1) - flat).view_as(primes),
        }

    def _require_map(self) -> None:
        # Once per map: the check reads the tensor, which would wait for a GPU at every step.
        if self._map_checked or self.token_map.is_meta:
            return
        if bool((self.token_map == DEAD).all()):
            raise ValueError(
                "this model has Engram layers and no token map; load a checkpoint that has one or "
                "a tokenizer.json beside it, or call model.set_engram_token_map(map)"
            )
        check_token_map(self.token_map, self.config)
        self._map_checked = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._map_checked = False


def _raw_tokenizer(tokenizer: Any) -> tokenizers.Tokenizer:
    """The `tokenizers.Tokenizer` behind whatever was given."""
    import tokenizers

    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"token map: wanted a tokenizer.json, found none at {file}")
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"token map: {file} is not a tokenizer.json: {error}") from error
    raw = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(raw, tokenizers.Tokenizer):
        raise ValueError(
            "token map: wanted a tokenizers.Tokenizer, a fast transformers tokenizer or a path, "
            f"got {type(tokenizer).__name__}"
        )
    return raw


def _text_normalizer() -> Any:
    # The library's own StripAccents decides which marks count: `unicodedata` category Mn alone
    # leaves 418 ids of the V4 tokenizer apart. A lone blank is parked where Strip cannot reach it.
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), "\ue000"),
            normalizers.Strip(),
            normalizers.Replace("\ue000", " "),
        ]
    )
