# SPDX-License-Identifier: Apache-2.0
"""Rates are measured, kept whole, and never a reason to fail."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from quantize import machine, planning
from quantize.machine import Disk, MachineProfile
from quantize.placement import Machine, ModelSizes


def test_a_profile_is_kept_and_read_back(tmp_path: Path) -> None:
    profile = MachineProfile({"/": Disk(1e9, True, 5)}, ram_rate=2e9, when=1.5)
    path = profile.save(tmp_path / "machine.json")
    assert MachineProfile.load(path) == profile
    assert [p.name for p in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "x": 2}'])
def test_a_profile_of_another_version_is_as_if_there_were_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    assert MachineProfile.load(path) is None
    assert MachineProfile.load(tmp_path / "none.json") is None


def test_the_cache_directory_can_be_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "here"))
    assert machine.profile_path() == tmp_path / "here" / "machine.json"


@pytest.mark.parametrize("direct", [True, False])
def test_the_disk_is_read_to_its_last_byte(tmp_path: Path, monkeypatch, direct: bool) -> None:
    if not direct:
        monkeypatch.setattr(machine, "allows_direct", lambda _: False)
    sizes = (9 * 2**20 + 5, 2**20)
    files = [tmp_path / f"{i}.bin" for i in range(2)]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(b"x" * size)
    disk = machine.measure_disk(files)
    assert disk.sample == sum(sizes)
    assert disk.rate > 0
    assert direct or not disk.direct
    assert machine.measure_disk(files, limit=4 * 2**20).sample < sum(sizes)
    with pytest.raises(ValueError, match="not empty"):
        machine.measure_disk([])


def test_rates_are_positive_and_a_profile_keeps_other_disks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2**26)
    monkeypatch.setattr(machine, "profile_path", lambda: tmp_path / "machine.json")
    MachineProfile({"/elsewhere": Disk(3.0, False, 1)}).save()
    file = tmp_path / "a.bin"
    file.write_bytes(b"x" * 2**20)
    told: list[str] = []
    found = MachineProfile.measure([file], (64, 32), tell=told.append)
    assert found.disks["/elsewhere"].rate == 3.0
    assert found.disk(file) is not None
    assert found.ram_rate and found.ram_rate > 1e8
    assert found.expert_rate and found.expert_rate > 0
    assert told[:3] == ["disk", "memory", "experts on the CPU"]


def test_experts_are_rotated_over_more_than_one(monkeypatch) -> None:
    from quantize.experts import StoredExperts

    seen: list[int] = []
    monkeypatch.setattr(StoredExperts, "run_expert", lambda self, e, *_: seen.append(e))
    machine.measure_experts((64, 32), size=2**16)
    assert len(set(seen)) > 4
    assert all(a != b for a, b in pairwise(seen))


def test_measured_rates_replace_assumed_ones_and_are_named(tmp_path: Path) -> None:
    mount = machine.mount_point(tmp_path)
    profile = MachineProfile({mount: Disk(5e9, True, 1)}, ram_rate=6e9)
    found, names = planning.with_rates(Machine(ram=1), profile, tmp_path)
    assert (found.disk_rate, found.ram_rate, names) == (5e9, 6e9, ("disk_rate", "ram_rate"))
    assert planning.with_rates(Machine(ram=1), None, tmp_path) == (Machine(ram=1), ())


def test_windows_subsystem_and_missing_direct_reads_are_told(tmp_path: Path, monkeypatch) -> None:
    sizes = ModelSizes(expert=10**9, num_experts=100, experts_per_token=5, dense=10**9)
    wished = Machine(ram=64 * 10**9, vram=16 * 10**9)
    assert planning.make_plan(lambda _: sizes, 1, wished).notes == ()
    monkeypatch.setattr(planning, "is_wsl", lambda: True)
    notes = planning.make_plan(lambda _: sizes, 1, wished).notes
    assert len(notes) == 1
    assert "WSL2 limits pinned memory" in notes[0]
    assert "exceeds 32 GB" in notes[0]
    profile = MachineProfile({machine.mount_point(tmp_path): Disk(1e9, False, 1)})
    assert "no O_DIRECT" in planning.direct_note(profile, tmp_path)[0]
    assert planning.direct_note(None, tmp_path) == []


def test_links_have_the_names_that_statistics_have(tmp_path: Path) -> None:
    profile = MachineProfile({"/": Disk(1.0, True, 1)}, link_rate=2.0)
    assert profile.links() == {"disk": 1.0, "host to device": 2.0}
    two = MachineProfile({"/": Disk(1.0, True, 1), "/x": Disk(2.0, True, 1)})
    assert two.links() == {}
    assert json.dumps(two.links(Path("/"))) == '{"disk": 1.0}'
