# SPDX-License-Identifier: Apache-2.0
"""What a conversion will take is what it then takes."""

import shutil
from pathlib import Path

import pytest

from quantize.cli import app
from quantize.config import Recipe
from quantize.convert import convert, plan_job
from quantize.forecast import forecast
from quantize.source import Source, small_bytes


def test_parts_add_up_to_what_is_written(release: Path, tmp_path: Path) -> None:
    rules = (
        ("model.layers.0.mlp.experts.*", "fp8_block32"),
        ("*.mlp.experts.*", "fp4"),
        ("lm_head.weight", "fp8_rows32"),
    )
    recipe = Recipe("mixed", rules)
    source = Source(release)
    job = plan_job(source, recipe)
    found = forecast(source, job, tmp_path / "out")
    by_format = {part.formats: part for part in found.parts}
    assert by_format["fp4"].count == 8
    assert by_format["fp8_block32"].count == 4
    assert by_format["fp8_block32"].after > by_format["fp8_block32"].before
    assert (by_format["fp8_rows32"].count, by_format["fp8_rows32"].before) == (1, 2 * 96 * 128)
    assert found.seconds is not None
    assert found.seconds > 0
    target = convert(release, tmp_path / "out", recipe)
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert found.disk == written + small_bytes(release)
    headers = sum(len(file.header) for file in job.files.values()) + 12 * 8
    assert sum(part.after for part in found.parts) == written - headers
    before = sum(part.before for part in found.parts)
    header = 8 + int.from_bytes((release / "model.safetensors").read_bytes()[:8], "little")
    assert before == (release / "model.safetensors").stat().st_size - header


def test_nothing_is_tried_of_a_source_that_is_not_here(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(release)
    job = plan_job(source, Recipe("fp4", (("*.mlp.experts.*", "fp4"),)))
    monkeypatch.setattr("quantize.origin.LocalOrigin.holds", lambda self, shard: False)
    assert forecast(source, job, tmp_path / "out").seconds is None


def test_a_disk_without_room_for_a_trial_is_refused_as_too_small(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("quantize.forecast._write_rate", lambda where: pytest.fail("it writes"))
    with pytest.raises(ValueError, match=r"wanted .* of free disk, got 1 kB"):
        app(["convert", str(release), str(tmp_path / "out")], standalone_mode=False)
    assert not (tmp_path / "out").exists()
