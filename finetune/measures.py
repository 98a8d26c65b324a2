# SPDX-License-Identifier: Apache-2.0
"""Figures before and after, and how they are said."""

from dataclasses import dataclass

EVAL_FILE = "eval.json"
WORDS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "exact": "exact match",
    "regex": "regex found",
    "choice": "right choice",
    "answer_loss": "loss of the answers",
    "general_perplexity": "perplexity, general text",
}
# Of these, more is better.
_SHARES = ("exact", "regex", "choice")


@dataclass(frozen=True)
class Measure:
    """One figure before and after; `after` is None without an adapter."""

    name: str
    before: float
    after: float | None

    @property
    def better(self) -> bool | None:
        """Whether the adapter improved it; None if nothing changed, or there is no adapter."""
        if self.after is None or self.after == self.before:
            return None
        return (self.after > self.before) == (self.name in _SHARES)

    def words(self) -> tuple[str, str, str, str]:
        """Name, both figures and their difference, as people read them."""
        share = self.name in _SHARES
        show = "{:.1%}".format if share else "{:.4g}".format
        if self.after is None:
            return WORDS[self.name], show(self.before), "", ""
        change = (
            f"{100 * (self.after - self.before):+.1f} points"
            if share
            else f"{self.after / self.before - 1:+.1%}"
        )
        return WORDS[self.name], show(self.before), show(self.after), change
