# SPDX-License-Identifier: Apache-2.0
"""A recipe by name or by size, with or without calibration: settled once, kept while it is needed.

What was gathered and chosen lies in the target's `.source` until the conversion is complete, so a
run that continues does not calibrate or choose again; the recipe itself ends in config.json.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from modeling_dsv4.safetensors_file import read_index

from .allocation import check_budget, choose_recipe
from .calibration import Calibration, calibrate, token_batches
from .checksums import Checksums, write_text
from .config import Recipe, get_recipe
from .disk_space import check_space
from .encode import Statistics
from .job import plan_job
from .memory import available_memory
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
        recipe: its name, unless a size is asked for; None is fp4 then.
        bits: of a weight of the routed experts on average, scales and all.
        target_size: bytes of the whole target.
        calibrate: a text, or statistics that were gathered before (.safetensors).
        model: runs over the text; None is the source.
    """

    recipe: str | None = None
    bits: float | None = None
    target_size: int | None = None
    calibrate: Path | None = None
    model: Path | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.target_size is not None:
            raise ValueError("wanted --bits or --target-size, got both; leave one out")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise ValueError(f"--bits: wanted a number above 0, got {self.bits}")
        if self.sized and self.recipe is not None:
            raise ValueError(
                f"wanted formats by name or by size, got --recipe {self.recipe} beside a size; "
                "leave --recipe out, or --bits and --target-size"
            )
        if self.model is not None and (self.calibrate is None or self.gathered):
            got = "no text" if self.calibrate is None else f"statistics ({self.calibrate})"
            raise ValueError(
                f"--calibrate-model: wanted a text that {self.model} runs over, got {got}; give "
                "one by --calibrate, or leave --calibrate-model out"
            )
        if self.calibrate is not None and not self.calibrate.is_file():
            raise ValueError(f"{self.calibrate}: wanted a text to calibrate with, found no file")

    @property
    def sized(self) -> bool:
        """Formats are to be chosen for a size."""
        return self.bits is not None or self.target_size is not None

    @property
    def gathered(self) -> bool:
        """Statistics are there already."""
        return self.calibrate is not None and self.calibrate.suffix == ".safetensors"

    @property
    def plain(self) -> bool:
        """Nothing has to be chosen or gathered."""
        return not self.sized and self.calibrate is None

    @property
    def named(self) -> Recipe:
        """The recipe asked for by name, by which sizes are reckoned until another is chosen."""
        return get_recipe(self.recipe or "fp4")

    def to_dict(self) -> dict[str, Any]:
        """Plain data by which a later run knows the same wish again."""
        text = None if self.calibrate is None else _checksum(self.calibrate)
        sizes = {"bits": self.bits, "target_size": self.target_size}
        model = {} if self.model is None else {"model": str(self.model.resolve())}
        return {"recipe": self.recipe or "fp4", **sizes, "calibrate": text, **model}


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
        ValueError: a budget below what the smallest formats take, a source on the Hub that would
            have to run for it, a disk or memory that is too small.
    """
    if wish.plain:
        return Settled(wish.named)
    tell = tell or (lambda line: None)
    data, staging = wish.to_dict(), target / STAGING
    sums = Checksums.load(target) if target.is_dir() else None
    if sums is not None and sums.complete and sums.job.get("wish") == data:
        return Settled(Recipe.from_dict(sums.job["recipe"]), data)
    alone = wish.calibrate is not None and not wish.gathered and wish.model is None
    if source.origin.fetched and alone:
        name = source.origin.name
        raise ValueError(
            f"{name}: wanted a model here to calibrate with, got a repository whose shards come "
            "one by one; convert it by --recipe fp4 first and give that as --calibrate-model, or "
            "give statistics that were gathered before"
        )
    kept = _read_choice(staging, data)
    if kept is None:
        _check_room(wish, source, target, sums)
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
    if wish.gathered:
        return wish.calibrate
    path = staging / _CALIBRATION
    if again and path.is_file():
        return path
    directory = wish.model or source.directory
    _check_memory(directory, statistics_bytes(source))
    # Imported when needed: loading a model registers what it needs with transformers.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tell(f"calibrating: {directory} over {wish.calibrate}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    found = calibrate(model, token_batches(tokenizer, wish.calibrate))
    staging.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return path


def _check_room(wish: Wish, source: Source, target: Path, sums: Checksums | None) -> None:
    """Refuse a disk that is too small before hours of work; by sizes that are not exceeded."""
    job = plan_job(source, wish.named)
    more = 0
    if wish.sized:
        check_budget(source, _budget(wish, source))
        more = _budget(wish, source) - sum(layout.nbytes for _, layout in job.packs.values())
        # Where shards go meanwhile, smaller records need not make the fullest moment smaller.
        more = more if source.origin.keeps else max(more, 0)
    if wish.calibrate is not None and not wish.gathered:
        more += statistics_bytes(source)
    check_space(source, job, sums or Checksums({}), target, more)


def statistics_bytes(source: Source) -> int:
    """What calibration gathers takes, in memory and then on the disk."""
    d, f = source.config.hidden_size, source.config.moe_intermediate_size
    matrices = sum(d * d + f * f + e.num_experts * (d + f) for e in source.experts.values())
    return 4 * matrices


def _check_memory(directory: Path, statistics: int) -> None:
    """Refuse a model whose weights would not fit; experts in packs may stay on the disk."""
    # The index names no packs.
    weights = sum(path.stat().st_size for path in set(read_index(directory).values()))
    wanted, free = weights + statistics, available_memory()
    if wanted > free:
        raise ValueError(
            f"{directory}: wanted {format_size(wanted)} of memory to calibrate with it "
            f"({format_size(weights)} of weights, {format_size(statistics)} of statistics), got "
            f"{format_size(free)}; convert it by --recipe fp4 first and give that as "
            "--calibrate-model: its experts stay on the disk"
        )


def _choose(wish: Wish, source: Source, calibration: Calibration | None, tell: Tell) -> Recipe:
    if not wish.sized:
        return wish.named
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
