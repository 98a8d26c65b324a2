# SPDX-License-Identifier: Apache-2.0
"""What is worth knowing of preferences beyond other records: their sides, and contradictions."""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .encoding import Encoded
from .preference_records import opposite, sides_of
from .records import Record

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


class Preferences:
    """What a file's preferences say: answers by side, prompts, and who contradicts whom.

    `answers`: how many are on each side. `sizes`: tokens of those that are learned from. `longer`:
    pairs whose chosen answer has more tokens than the rejected one. `prompts`: distinct ones.
    """

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.sizes: dict[str, array[int]] = {"chosen": array("i"), "rejected": array("i")}
        self.longer = 0
        self.prompts: set[str] = set()
        self._said: set[str] = set()
        self._contraries: list[str] = []

    def add(self, record: Record, encoded: Encoded | None) -> None:
        self.answers.update(sides_of(record).values())
        self.prompts.add(record.split_digest())
        self._said.add(record.digest())
        self._contraries.append(opposite(record).digest())
        sizes = [one.num_labels for one in encoded.examples] if encoded is not None else []
        for side, size in zip(encoded.sides if encoded is not None else (), sizes, strict=False):
            self.sizes[side].append(size)
        self.longer += len(sizes) == 2 and sizes[0] > sizes[1]

    def contradicted(self) -> int:
        """Records that prefer what another one of the same prompt rejects."""
        return sum(one in self._said for one in self._contraries)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": len(self.prompts),
            "contradicted": self.contradicted(),
            "chosen_longer": self.longer,
            "sides": {
                side: {
                    "answers": self.answers[side],
                    "tokens": sum(sizes),
                    "mean": sum(sizes) / max(len(sizes), 1),
                    "quantiles": quantiles(sizes),
                }
                for side, sizes in self.sizes.items()
            },
        }


def quantiles(sizes: Sequence[int]) -> dict[str, int]:
    """Sizes by quantile, each one that occurs; nothing for none."""
    if not sizes:
        return {}
    found = np.quantile(np.array(sizes), QUANTILES, method="higher")
    return {f"p{q * 100:g}": int(v) for q, v in zip(QUANTILES, found, strict=True)}
