# SPDX-License-Identifier: Apache-2.0
"""Which layers lie on which GPU: known sizes in, known runs out, and nothing beyond its memory."""

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from modeling_dsv4 import Dsv4Config
from modeling_dsv4.weight_map import official_inventory
from quantize.config import Recipe, get_recipe
from quantize.inventory import (
    cache_bytes,
    model_sizes,
    part_bytes,
    sizes_by_context,
    whole_sizes,
)
from quantize.layer_split import LayerSizes, Run, device_map, layers_that_fit, split_layers
from quantize.placement import Machine, place
from quantize.planning import SizesOf, load_options, make_plan

GB = 10**9
Release = tuple[Dsv4Config, SizesOf]


def even(layers: int = 6, **changes: object) -> LayerSizes:
    """Layers of 10 dense, 2 cache, 8 experts of 5."""
    sizes = {
        "dense": (10,) * layers, "cache": (2,) * layers, "handed": (0,) * layers,
        "experts": (40,) * layers, "count": 8, "record": 5, "first": 6, "last": 9,
        "first_modules": ("embed",), "last_modules": ("norm", "head"),
    }  # fmt: skip
    return LayerSizes(**{**sizes, **changes})


def spans(runs: Sequence[Run] | None) -> list[tuple[int, tuple[int, int], int]]:
    return [(run.card, run.layers, run.slots) for run in runs or ()]


def test_two_unequal_gpus_hold_layers_in_proportion_to_what_is_left() -> None:
    # 4 layers: 54 fixed of 140, 17 slots of 32; 2 layers: 33 fixed of 80, 9 slots of 16.
    runs = split_layers(even(), (140, 80))
    assert spans(runs) == [(0, (0, 4), 17), (1, (4, 6), 9)]
    assert runs is not None
    assert [(run.dense, run.cache, run.slot_bytes) for run in runs] == [(46, 8, 85), (29, 4, 45)]
    assert not any(run.whole for run in runs)
    assert spans(split_layers(even(), (80, 140))) == [(0, (0, 2), 10), (1, (2, 6), 16)]


def test_a_model_that_fits_on_one_gpu_stays_there() -> None:
    whole = 6 * 52 + 15
    assert spans(split_layers(even(), (whole, whole))) == [(0, (0, 6), 48)]
    assert spans(split_layers(even(), (50, whole))) == [(1, (0, 6), 48)]
    runs = split_layers(even(), (whole - 1, whole - 1))
    assert runs is not None and len(runs) == 2 and all(run.whole for run in runs)


def test_a_gpu_that_is_too_small_for_a_layer_is_left_out() -> None:
    assert spans(split_layers(even(), (120, 21, 120))) == [(0, (0, 3), 15), (2, (3, 6), 15)]


def test_a_gpu_wants_room_for_two_experts() -> None:
    dense = 6 * 12 + 15
    assert split_layers(even(), (dense + 9,)) is None
    assert spans(split_layers(even(), (dense + 10,))) == [(0, (0, 6), 2)]


def test_what_a_source_hands_over_counts_where_it_arrives() -> None:
    # Layers 3 to 5 read layer 2's entries: a run that begins there holds them once more.
    cheap, dear = (even(handed=(0, 0, 0, size, size, size)) for size in (12, 60))
    runs = split_layers(cheap, (100, 100))
    assert runs is not None and runs[1].layers == (3, 6) and runs[1].cache == 6 + 12
    runs = split_layers(dear, (100, 100))
    assert runs is not None and runs[1].layers == (2, 6) and runs[1].cache == 8


def test_no_other_way_serves_its_slowest_run_better() -> None:
    draw = random.Random(0)
    for _ in range(60):
        count = draw.randint(2, 6)
        sizes = LayerSizes(
            tuple(draw.randint(4, 12) for _ in range(count)),
            tuple(draw.randint(0, 3) for _ in range(count)),
            tuple(draw.choice((0, 0, 5)) for _ in range(count)),
            tuple(8 * draw.randint(3, 5) for _ in range(count)),
            count=8, record=5, first=draw.randint(0, 9), last=draw.randint(0, 9),
        )  # fmt: skip
        rooms = [draw.randint(10, 120) for _ in range(3)]
        found, best = split_layers(sizes, rooms), best_by_trying(sizes, rooms)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            least = min(share(sizes, rooms[run.card], *run.layers) for run in found)
            assert (least, -len(found)) == best
            assert all(run.nbytes <= rooms[run.card] for run in found)
            assert [x for run in found for x in range(*run.layers)] == list(range(count))


def share(sizes: LayerSizes, room: int, low: int, high: int) -> float:
    """What the module says of a run, told once more from its words."""
    part = slice(low, high)
    held = sum(sizes.dense[part]) + sum(sizes.cache[part])
    held += sizes.first if low == 0 else sizes.handed[low]
    held += sizes.last if high == len(sizes.dense) else 0
    left, experts = room - held, sum(sizes.experts[part])
    if left >= experts:
        return 1.0
    return left / experts if left >= 2 * sizes.record else -1.0


def best_by_trying(sizes: LayerSizes, rooms: Sequence[int]) -> tuple[float, int] | None:
    found = []
    for cuts in itertools.combinations_with_replacement(range(len(sizes.dense) + 1), 2):
        borders = (0, *cuts, len(sizes.dense))
        runs = [
            (room, *span) for room, span in zip(rooms, itertools.pairwise(borders), strict=True)
        ]
        shares = [share(sizes, *run) for run in runs if run[1] < run[2]]
        if min(shares) >= 0:
            found.append((min(shares), -len(shares)))
    return max(found, default=None)


def test_a_device_map_names_every_part_once() -> None:
    sizes = even()
    runs = split_layers(sizes, (140, 80))
    assert runs is not None
    found = device_map(sizes, runs, (3, 5))
    layers = {f"model.layers.{i}": 3 if i < 4 else 5 for i in range(6)}
    assert found == {"embed": 3, **layers, "norm": 5, "head": 5}


def test_what_fits_is_counted_where_not_all_does() -> None:
    assert layers_that_fit(even(), (45, 45)) == 4
    assert layers_that_fit(even(), (10, 45)) == 2


@pytest.fixture(scope="module", params=["v4-flash", "v4.1-flash"])
def release(request: pytest.FixtureRequest, golden_dir: Path) -> Release:
    config = Dsv4Config.from_pretrained(golden_dir / "configs" / f"{request.param}.json")
    return config, sizes_by_context(config, get_recipe("fp4"))


def test_a_release_by_layer_is_the_release(release: Release) -> None:
    config, sizes = release[0], release[1](65536)
    layers, parts = sizes.layers, part_bytes(config)
    assert layers is not None
    assert sum(layers.cache) == cache_bytes(config, 65536)
    assert sum(layers.experts) == pytest.approx(sizes.experts, rel=1e-3)
    token_map = 8 * config.vocab_size if config.engram_layer_ids else 0
    assert layers.first == parts["embedding"] + token_map
    inside = sum(layers.dense) + layers.last - parts["dense"] - parts["vision"]
    # Beside the dense part: hashes of V4's first layers, and drafts without their experts.
    assert 0 < inside < parts["draft"] / 4
    whole = whole_sizes(config)
    assert sum(whole.dense) + whole.first + whole.last == sum(parts.values()) + token_map
    assert not any(whole.experts)


def test_slots_take_the_records_of_drafts_as_well(release: Release) -> None:
    config = release[0]
    small = (("model.layers.*.mlp.experts.*", "int2"),)
    thin = Recipe("thin", (*small, ("mtp.*.mlp.experts.*", "int2")))
    wide = Recipe("wide", (*small, ("mtp.*.mlp.experts.*", "fp4")))
    records = [model_sizes(config, recipe, 0).layers.record for recipe in (thin, wide)]
    assert records[1] > 1.5 * records[0]


def test_plain_weights_are_counted_as_they_are_loaded(tiny_config) -> None:
    config = tiny_config("v4")
    held = []
    for config.dtype in (torch.bfloat16, torch.float32):
        sizes = whole_sizes(config)
        held.append(sum(sizes.dense) + sizes.first + sizes.last)
    narrow = [shape for dtype, shape in official_inventory(config).values() if dtype == "BF16"]
    assert narrow and held[1] - held[0] == 2 * sum(map(math.prod, narrow))


def test_entries_are_handed_over_where_a_layer_has_none_of_its_own(release: Release) -> None:
    config, sizes_of = release
    layers = sizes_of(65536).layers
    assert layers is not None
    found = [i for i, size in enumerate(layers.handed) if size]
    # V4: every layer that compresses makes its own.
    assert found == (
        [i for i in range(3, 40) if i not in (8, 14, 20)] if config.engram_layer_ids else []
    )


def test_a_plan_for_two_gpus_is_what_is_loaded(release: Release) -> None:
    sizes = release[1](65536)
    machine = Machine(ram=128 * GB, vram=(32 * GB, 16 * GB))
    plan = place(sizes, machine)
    assert [run.card for run in plan.runs] == [0, 1]
    assert plan.experts_in["vram"] == sum(run.slots for run in plan.runs)
    assert sum(plan.experts_in.values()) == sizes.num_experts
    for run, card in zip(plan.runs, machine.cards, strict=True):
        assert 0 <= card - min(4 * GB, card // 8) - run.nbytes < sizes.expert + 4096
    first, second = (run.slots / (run.layers[1] - run.layers[0]) for run in plan.runs)
    assert first == pytest.approx(second, rel=0.15)
    options = load_options(plan, (0, 1))
    assert options["expert_device_memory"] == {str(run.card): run.slot_bytes for run in plan.runs}
    assert options["device_map"]["model.embed_tokens"] == 0
    assert options["device_map"]["lm_head"] == options["device_map"]["mtp"] == 1
    assert options["expert_memory"] == plan.expert_memory


def test_what_two_gpus_lack_is_told_with_the_nearest_that_fits(
    release: Release,
) -> None:
    sizes_of = release[1]
    small = Machine(ram=64 * GB, vram=(6 * GB, 3 * GB))
    planned = make_plan(sizes_of, 65536, small)
    assert "VRAM, got 9 GB" in (planned.plan.problem or "")
    (way,) = [way for way in planned.nearest if way.startswith("--vram")]
    cards = [float(size.removesuffix("GB")) for size in way.removeprefix("--vram ").split(",")]
    assert cards[0] == pytest.approx(2 * cards[1], abs=0.1)
    enough = Machine(ram=64 * GB, vram=tuple(round(size * GB) for size in cards))
    assert place(sizes_of(65536), enough).problem is None
    scattered = Machine(ram=64 * GB, vram=(GB,) * 16)
    assert "layers" in (place(sizes_of(65536), scattered).problem or "")
