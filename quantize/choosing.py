# SPDX-License-Identifier: Apache-2.0
"""A recipe by name or by size, with or without calibration: settled once, kept while it is needed.

What was gathered and chosen lies in the target's `.source` until the conversion is complete, so a
run that continues does not calibrate or choose again; the recipe itself ends in config.json.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .allocation import choose_recipe
from .calibration import Calibration, calibrate, token_batches
from .checksums import Checksums, write_text
from .config import Recipe, get_recipe
from .encode import Statistics
from .job import plan_job
from .origin import STAGING
from .sizes import format_size
from .source import Source, small_bytes

_CALIBRATION = "calibration.safetensors"
_CHOICE = "choice.json"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What a user asks a conversion for.

    Attributes:
        recipe: its name, unless a size is asked for.
        bits: of a weight of the routed experts on average, scales and all.
        target_size: bytes of the whole target.
        calibrate: a text, or statistics that were gathered before (.safetensors).
        model: runs over the text; None is the source.
    """

    recipe: str = "fp4"
    bits: float | None = None
    target_size: int | None = None
    calibrate: Path | None = None
    model: Path | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.target_size is not None:
            raise ValueError("wanted --bits or --target-size, got both; leave one out")
        if self.calibrate is not None and not self.calibrate.is_file():
            raise ValueError(f"{self.calibrate}: wanted a text to calibrate with, found no file")

    @property
    def plain(self) -> bool:
        """Nothing has to be chosen or gathered."""
        return self.bits is None and self.target_size is None and self.calibrate is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data by which a later run knows the same wish again."""
        text = None if self.calibrate is None else _checksum(self.calibrate)
        sizes = {"bits": self.bits, "target_size": self.target_size}
        return {"recipe": self.recipe, **sizes, "calibrate": text}


@dataclass(frozen=True)
class Settled:
    """What a wish became.

    Attributes:
        recipe: formats of the routed experts.
        wish: plain data of the wish; None if it was a recipe's name alone.
        statistics: of the experts' inputs, None without calibration.
    """

    recipe: Recipe
    wish: dict[str, Any] | None = None
    statistics: Statistics | None = None


def settle(wish: Wish, source: Source, target: Path, tell: Tell | None = None) -> Settled:
    """Gather statistics and choose a recipe, or take up what an earlier run did.

    Raises:
        ValueError: a budget below what the smallest formats take, a source on the Hub.
    """
    if wish.plain:
        return Settled(get_recipe(wish.recipe))
    tell = tell or (lambda line: None)
    data, staging = wish.to_dict(), target / STAGING
    sums = Checksums.load(target) if target.is_dir() else None
    if sums is not None and sums.complete and sums.job.get("wish") == data:
        return Settled(Recipe.from_dict(sums.job["recipe"]), data)
    if source.origin.fetched:
        raise ValueError(
            f"{source.origin.name}: wanted a directory to choose or calibrate by, got a repository "
            "whose shards come one by one; fetch it first, or name a recipe"
        )
    kept = _read_choice(staging, data)
    calibration = None
    if wish.calibrate is not None:
        path = _gather(wish, source, staging, kept is not None, tell)
        calibration = Calibration.load(path)
    if kept is None:
        recipe = _choose(wish, source, calibration, tell)
        staging.mkdir(parents=True, exist_ok=True)
        choice = {"wish": data, "recipe": recipe.to_dict()}
        write_text(staging / _CHOICE, json.dumps(choice))
    else:
        recipe = kept
    return Settled(recipe, data, None if calibration is None else _one_by_one(calibration))


def _read_choice(staging: Path, wish: dict[str, Any]) -> Recipe | None:
    """The recipe that an earlier run chose for the same wish."""
    path = staging / _CHOICE
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return Recipe.from_dict(data["recipe"]) if data["wish"] == wish else None


def _gather(wish: Wish, source: Source, staging: Path, again: bool, tell: Tell) -> Path:
    """Statistics of the wish's text; `again` trusts those that lie in the target."""
    assert wish.calibrate is not None
    if wish.calibrate.suffix == ".safetensors":
        return wish.calibrate
    path = staging / _CALIBRATION
    if again and path.is_file():
        return path
    # Imported when needed: loading a model registers what it needs with transformers.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = wish.model or source.directory
    tell(f"calibrating: {directory} over {wish.calibrate}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    found = calibrate(model, token_batches(tokenizer, wish.calibrate))
    staging.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return path


def _choose(wish: Wish, source: Source, calibration: Calibration | None, tell: Tell) -> Recipe:
    if wish.bits is None and wish.target_size is None:
        return get_recipe(wish.recipe)
    budget = _budget(wish, source)
    tell(f"choosing formats for {format_size(budget)} of experts")
    return choose_recipe(source, budget, calibration, lambda name: tell(f"measured {name}"))


def _budget(wish: Wish, source: Source) -> int:
    """Bytes that all experts' records may take."""
    config = source.config
    count = sum(experts.num_experts for experts in source.experts.values())
    if wish.bits is not None:
        return int(wish.bits / 8 * count * 3 * config.hidden_size * config.moe_intermediate_size)
    assert wish.target_size is not None
    job = plan_job(source, get_recipe("fp4"))
    records = sum(layout.nbytes for _, layout in job.packs.values())
    # What is no record stays as large whatever the recipe; a megabyte covers what is written last.
    rest = job.nbytes - records + small_bytes(source.directory) + 2**20
    return wish.target_size - rest


def _one_by_one(calibration: Calibration) -> Statistics:
    """Statistics that many threads may ask for."""
    lock = Lock()

    def statistics(module: str, expert: int, projection: str) -> torch.Tensor | None:
        with lock:
            return calibration.statistics(module, expert, projection)

    return statistics


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc
