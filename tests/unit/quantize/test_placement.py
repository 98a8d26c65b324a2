# SPDX-License-Identifier: Apache-2.0
"""Placement is arithmetic: fixed sizes in, known places and rates out."""

import dataclasses
import re

import pytest

from quantize.placement import (
    PUBLISHED,
    UNIFORM,
    HitRates,
    Machine,
    ModelSizes,
    ceiling,
    place,
    read_hit_rates,
)

GB = 10**9
FLASH = ModelSizes(
    expert=13_369_344, num_experts=11_008, experts_per_token=258,
    dense=7_770_000_000, embedding=1_060_000_000, cache=450_000_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("link", "hit", "rate"),
    [(55, 0, 14.7), (55, 0.5, 26.5), (55, 0.9, 74), (80, 0, 20.7), (14, 0.8, 17.8), (7, 0, 2.0)],
)
def test_the_ceiling_of_v4_flash_is_what_sizes_and_links_give(
    link: int, hit: float, rate: float
) -> None:
    assert ceiling(FLASH, hit, link * GB, 1500 * GB) == pytest.approx(rate, rel=0.02)


def test_a_hit_rate_is_a_share() -> None:
    with pytest.raises(ValueError, match="hit_rate: wanted 0 to 1"):
        ceiling(FLASH, 1.2, GB, GB)


def test_every_expert_has_one_place() -> None:
    for vram, ram in ((0, 16), (0, 256), (32, 32), (32, 128), (192, 64)):
        plan = place(FLASH, Machine(ram=ram * GB, vram=vram * GB))
        assert sum(plan.experts_in.values()) == FLASH.num_experts
        assert min(plan.experts_in.values()) >= 0


def test_no_tier_is_filled_beyond_its_size() -> None:
    for vram, ram in ((0, 16), (0, 256), (32, 32), (32, 128), (192, 64)):
        plan = place(FLASH, Machine(ram=ram * GB, vram=vram * GB))
        fast = FLASH.dense + FLASH.cache
        in_vram = plan.experts_in["vram"] * FLASH.expert + (fast if vram else 0)
        in_ram = plan.experts_in["ram"] * FLASH.expert + FLASH.embedding + (0 if vram else fast)
        assert in_vram <= vram * GB
        assert in_ram <= ram * GB


def test_about_a_seventh_of_the_experts_fits_beside_the_dense_part_in_32_gb() -> None:
    plan = place(FLASH, Machine(ram=16 * GB, vram=32 * GB))
    assert plan.experts_in["vram"] / FLASH.num_experts == pytest.approx(0.14, abs=0.01)


def test_more_memory_is_never_slower() -> None:
    rates = [place(FLASH, Machine(ram=ram * GB, vram=32 * GB)).serial for ram in (8, 32, 64, 128)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_overlapping_is_never_slower_and_bound_by_the_slowest_link() -> None:
    plan = place(FLASH, Machine(ram=32 * GB, vram=32 * GB, disk_rate=12 * GB))
    assert plan.overlapped > plan.serial
    assert plan.limit == "disk"
    assert place(FLASH, Machine(ram=256 * GB, vram=256 * GB)).limit == "vram"


def test_what_all_fits_is_loaded_whole() -> None:
    plan = place(FLASH, Machine(ram=256 * GB))
    assert plan.experts_in == {"vram": 0, "ram": FLASH.num_experts, "disk": 0}
    assert plan.expert_memory == FLASH.experts
    assert place(FLASH, Machine(ram=8 * GB, vram=256 * GB)).expert_memory == FLASH.experts


def test_big_lookup_tables_stay_on_disk_and_small_ones_do_not() -> None:
    tables = dataclasses.replace(FLASH, lookup=203 * GB)
    assert place(tables, Machine(ram=128 * GB, vram=32 * GB)).lookup_in == "disk"
    assert place(tables, Machine(ram=512 * GB, vram=32 * GB)).lookup_in == "ram"


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        (Machine(ram=64 * GB, vram=8 * GB), "read for every token .* want 9.39 GB of VRAM, got 8"),
        (Machine(ram=4 * GB), "read for every token .* want 10.6 GB of RAM, got 4 GB"),
        (Machine(ram=GB, vram=16 * GB), "embedding and one expert want 1.23 GB of RAM, got 1 GB"),
    ],
)
def test_what_does_not_fit_is_named_with_the_memory_that_would(machine: Machine, told: str) -> None:
    problem = place(FLASH, machine).problem
    assert re.search(told, problem or "")


@pytest.mark.parametrize(("vram", "ram"), [(0, 10.7), (9.4, 1.3), (32, 64)])
def test_the_memory_that_was_asked_for_is_enough(vram: float, ram: float) -> None:
    assert place(FLASH, Machine(ram=int(ram * GB), vram=int(vram * GB))).problem is None


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="disk_rate: wanted more than 0"):
        Machine(ram=GB, disk_rate=0)


@pytest.mark.parametrize("hits", [UNIFORM, PUBLISHED, HitRates("x", fixed=(0.3,))])
def test_every_read_is_served_once(hits: HitRates) -> None:
    for vram, ram in ((0, 16), (0, 256), (32, 32), (32, 128), (192, 64), (32, 512)):
        served = place(FLASH, Machine(ram=ram * GB, vram=vram * GB), hits).served
        assert sum(served.values()) == pytest.approx(1)
        assert min(served.values()) >= 0


def test_the_published_curve_is_met_at_its_points_and_straight_between_them() -> None:
    assert PUBLISHED.at(0.1) == pytest.approx(0.693)
    assert PUBLISHED.at(0.125) == pytest.approx((0.693 + 0.774) / 2)
    assert [PUBLISHED.at(0), PUBLISHED.at(1)] == [0, 1]
    assert UNIFORM.at(0.37) == pytest.approx(0.37)
    assert PUBLISHED.split([0.1, 0.4, 0.5]) == pytest.approx([0.693, 0.261, 0.046])


def test_what_is_known_goes_before_a_curve_and_whole_memory_hits_always() -> None:
    assert read_hit_rates("0.6,0.9").split([0.1, 0.4, 0.5]) == pytest.approx([0.6, 0.3, 0.1])
    assert read_hit_rates("0.6").split([0.0, 0.4, 0.6]) == pytest.approx([0.0, 0.6, 0.4])
    assert read_hit_rates("0.6").split([0.4, 0.6, 0.0]) == pytest.approx([0.6, 0.4, 0.0])
    for wrong in ("often", "0.9,0.6", "1.1", "0.1,0.2,0.3", ""):
        with pytest.raises(ValueError, match="hit rate"):
            read_hit_rates(wrong)


def test_cold_experts_cost_the_slower_of_link_and_memory_and_both_share_it() -> None:
    machine = Machine(ram=256 * GB, vram=32 * GB, link_rate=50 * GB, ram_rate=80 * GB)
    rate = {
        cold: dataclasses.replace(machine, cold=cold, expert_rate=20 * GB).cold_rate / GB
        for cold in ("device", "host", "both")
    }
    assert rate == {"device": 50, "host": 20, "both": 70}
    assert dataclasses.replace(machine, cold="both").cold_rate == 80 * GB
    assert dataclasses.replace(machine, link_rate=90 * GB).cold_rate == 80 * GB
    assert place(FLASH, dataclasses.replace(machine, cold="host", expert_rate=GB)).limit == "cpu"
    with pytest.raises(ValueError, match="cold: wanted device, host or both"):
        dataclasses.replace(machine, cold="fridge")


def test_without_a_gpu_the_cpu_computes_what_the_disk_gives_too() -> None:
    slow = place(FLASH, Machine(ram=256 * GB, expert_rate=GB))
    assert slow.serial == pytest.approx(1 / (FLASH.routed / GB + FLASH.dense / (80 * GB)))
    some = place(FLASH, Machine(ram=64 * GB, expert_rate=GB, disk_rate=1000 * GB))
    assert some.seconds["ram"] == pytest.approx(slow.seconds["ram"])
