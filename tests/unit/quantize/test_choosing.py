# SPDX-License-Identifier: Apache-2.0
"""A size is kept to, statistics change the rounding, and neither is worked out twice."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4.formats import get_format
from quantize.allocation import measure
from quantize.calibration import Calibration, calibrate
from quantize.checksums import Checksums, damages
from quantize.choosing import Wish, settle, statistics_bytes
from quantize.config import Dsv4QuantizationConfig, Recipe, get_recipe
from quantize.convert import convert, plan_job
from quantize.disk_space import check_space, space_wanted
from quantize.job import Job
from quantize.pack import PROJECTIONS, PackFile
from quantize.source import Source

INT2 = Recipe("int2", (("*.mlp.experts.*", "int2"),))


@pytest.fixture(autouse=True)
def _known_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of formats as their bits would have it: measuring them is tested elsewhere."""

    def sensitivity(*arguments: object) -> dict[str, dict[str, float]]:
        formats: list[str] = arguments[-1]  # type: ignore[assignment]
        found = {name: 4.0 ** -get_format(name).bits for name in formats}
        return {projection: dict(found) for projection in PROJECTIONS}

    monkeypatch.setattr("quantize.allocation.sensitivity", sensitivity)


@pytest.fixture
def statistics_file(release: Path, tmp_path: Path) -> Path:
    """What the release's experts see of some random tokens."""
    from modeling_dsv4 import Dsv4ForCausalLM

    model = Dsv4ForCausalLM.from_pretrained(release, dtype=torch.float32)
    found = calibrate(model, [torch.randint(96, (1, 64)) for _ in range(2)])
    found.save(tmp_path / "statistics.safetensors")
    return tmp_path / "statistics.safetensors"


def record_bytes(source: Path, recipe: Recipe) -> int:
    job = plan_job(Source(source), recipe)
    return sum(layout.nbytes for _, layout in job.packs.values())


def test_a_name_is_a_recipe_and_nothing_is_kept(release: Path, tmp_path: Path) -> None:
    settled = settle(Wish("q3"), Source(release), tmp_path / "out")
    assert (settled.recipe, settled.wish, settled.statistics) == (get_recipe("q3"), None, None)
    assert not (tmp_path / "out").exists()


def test_a_size_includes_a_large_tokenizer(release: Path, tmp_path: Path) -> None:
    job = plan_job(Source(release), get_recipe("fp4"))
    before = space_wanted(Source(release), job, tmp_path)
    (release / "tokenizer.json").write_text(" " * 3_000_000)
    assert space_wanted(Source(release), job, tmp_path) == before + 3_000_000
    wanted = job.nbytes - 12 * 4096 + 2**20 + 3_000_000
    settled = settle(Wish(target_size=wanted), Source(release), tmp_path / "out")
    got = plan_job(Source(release), settled.recipe).nbytes + 3_000_000 + 2**20
    assert wanted - 24 * 4096 < got <= wanted


@pytest.mark.parametrize("bits", [3.2, 4.0])
def test_bits_are_kept_to(release: Path, tmp_path: Path, bits: float) -> None:
    settled = settle(Wish(bits=bits), Source(release), tmp_path / "out")
    weights = 12 * 3 * 128 * 128
    used = record_bytes(release, settled.recipe) * 8 / weights
    # Records are whole pages, of which an expert this small has six.
    assert bits - 0.7 < used <= bits


def test_a_size_is_that_of_all_of_the_target(release: Path, tmp_path: Path) -> None:
    whole = plan_job(Source(release), get_recipe("fp4")).nbytes
    wanted = whole - 12 * 4096 + 2**20
    settled = settle(Wish(target_size=wanted), Source(release), tmp_path / "out")
    got = plan_job(Source(release), settled.recipe).nbytes
    assert whole - 24 * 4096 < got <= whole - 12 * 4096 + 4096


def test_a_choice_is_made_once(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish, target = Wish(bits=4.0), tmp_path / "out"
    first = settle(wish, Source(release), target)

    def again(*_: object) -> None:
        pytest.fail("it was chosen again")

    monkeypatch.setattr("quantize.choosing.choose_recipe", again)
    second = settle(wish, Source(release), target)
    assert second.recipe == first.recipe
    convert(release, target, first.recipe, wish=first.wish)
    assert not (target / ".source").exists()
    third = settle(wish, Source(release), target)
    assert third.recipe == first.recipe
    convert(release, target, third.recipe, wish=third.wish)
    sums = Checksums.load(target)
    assert sums is not None
    assert list(damages(target, sums)) == []
    with pytest.raises(ValueError, match="with other options"):
        convert(release, target, third.recipe, wish=Wish(bits=3.9).to_dict())


def test_statistics_change_the_rounding_and_are_said_to(
    release: Path, tmp_path: Path, statistics_file: Path
) -> None:
    wish = Wish(calibrate=statistics_file)
    settled = settle(wish, Source(release), tmp_path / "with")
    assert settled.recipe == get_recipe("fp4")
    arguments = {"statistics": settled.statistics, "wish": settled.wish}
    target = convert(release, tmp_path / "with", INT2, **arguments)
    plain = convert(release, tmp_path / "without", INT2)
    packs = [PackFile.open(d / "experts-layers-1.safetensors") for d in (target, plain)]
    assert packs[0].layout == packs[1].layout
    assert not torch.equal(packs[0].read_all(), packs[1].read_all())
    for directory, said in ((target, True), (plain, False)):
        source = Dsv4QuantizationConfig(**stored(directory))
        assert source.to_dict()["calibrated"] is said
    repeated = settle(wish, Source(release), tmp_path / "again")
    again = convert(
        release, tmp_path / "again", INT2, statistics=repeated.statistics, wish=repeated.wish
    )
    for path in target.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def stored(directory: Path) -> dict[str, object]:
    from modeling_dsv4.configuration_dsv4 import Dsv4Config

    fields = dict(Dsv4Config.from_pretrained(directory).quantization_config)
    fields.pop("quant_method")
    return fields


def test_wishes_that_cannot_be_met_are_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got both; leave one out"):
        Wish(bits=3, target_size=10**6)
    with pytest.raises(ValueError, match="wanted a text to calibrate with, found no file"):
        Wish(calibrate=tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="wanted a budget of at least"):
        settle(Wish(bits=0.5), Source(release), tmp_path / "out")


def test_options_that_would_be_ignored_are_refused(
    release: Path, tmp_path: Path, statistics_file: Path
) -> None:
    for size in ({"bits": 3.0}, {"target_size": 10**6}):
        with pytest.raises(ValueError, match="got --recipe q2 beside a size; leave --recipe out"):
            Wish("q2", **size)
    with pytest.raises(ValueError, match=r"--calibrate-model: .* got no text; give one by --cal"):
        Wish("q2", model=release)
    with pytest.raises(ValueError, match=r"--calibrate-model: .* got statistics \("):
        Wish("q2", calibrate=statistics_file, model=release)
    for bits in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--bits: wanted a number above 0"):
            Wish(bits=bits)
    assert Wish().named == get_recipe("fp4")
    assert Wish(bits=3.0).to_dict()["recipe"] == "fp4"


def test_a_model_too_large_to_calibrate_with_is_refused(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics_file: Path
) -> None:
    source, text = Source(release), tmp_path / "text.txt"
    text.write_text("a text")
    assert 0 <= statistics_file.stat().st_size - statistics_bytes(source) < 10**5
    weights = (release / "model.safetensors").stat().st_size
    wanted = weights + statistics_bytes(source)
    monkeypatch.setattr("quantize.choosing.available_memory", lambda: wanted - 1)
    with pytest.raises(ValueError, match=r"by --recipe fp4 first and give that as --calibrate-m"):
        settle(Wish("q3", calibrate=text), source, tmp_path / "out")
    converted = convert(release, tmp_path / "fp4", get_recipe("fp4"))
    loaded = []

    def load(directory: Path) -> None:
        loaded.append(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    with pytest.raises(KeyboardInterrupt):
        settle(Wish("q3", calibrate=text, model=converted), source, tmp_path / "out")
    assert loaded == [converted]


@pytest.mark.parametrize("wish", [{"calibrate": True}, {"bits": 4.0}, {"target_size": 10**8}])
def test_a_full_disk_is_told_before_the_work(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text")
    wanted = Wish(**({"recipe": "fp4", "calibrate": text} if "calibrate" in wish else wish))
    source, asked = Source(release), []
    usage = shutil.disk_usage(tmp_path)

    def room(source: Source, job: Job, sums: Checksums, target: Path, more: int) -> None:
        asked.append(space_wanted(source, job, target) + more)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=asked[0]))
        check_space(source, job, sums, target, more)

    def work(*_: object) -> None:
        pytest.fail("it has begun to work")

    for name in ("_gather", "choose_recipe"):
        monkeypatch.setattr(f"quantize.choosing.{name}", work)
    monkeypatch.setattr("quantize.choosing.check_space", room)
    with pytest.raises(ValueError, match=r"of free disk, got .*; free some, or convert to another"):
        settle(wanted, source, tmp_path / "out")
    if wanted.target_size:
        assert asked == [wanted.target_size - 2**20]
    elif wanted.calibrate:
        exact = space_wanted(source, plan_job(source, get_recipe("fp4")), tmp_path)
        assert asked == [exact + statistics_bytes(source)]
    else:
        assert asked[0] < plan_job(source, get_recipe("fp4")).nbytes


def test_every_expert_is_measured_by_itself(
    release: Path, statistics_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, known = Source(release), Calibration.load(statistics_file)
    experts = source.experts[known.modules[0]]
    errors = iter(range(1, 1 + experts.num_experts))

    def sensitivity(*arguments: Any) -> dict[str, dict[str, float]]:
        error = float(next(errors))
        return {p: dict.fromkeys(arguments[-1], error) for p in PROJECTIONS}

    monkeypatch.setattr("quantize.allocation.sensitivity", sensitivity)
    wrong = measure(source, experts, known)
    assert [one["down_proj"]["trellis3"] for one in wrong] == [1.0, 2.0, 3.0, 4.0]
    assert [one["gate_up_proj"]["trellis2"] for one in wrong] == [1.0, 2.0, 3.0, 4.0]
    assert all(one["down_proj"]["fp4"] == 0.0 for one in wrong)


def test_a_size_that_no_formats_keep_is_refused_before_anything_is_read(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        pytest.fail("an expert is read")

    text = tmp_path / "text.txt"
    text.write_text("a text")
    monkeypatch.setattr(Source, "expert", read)
    monkeypatch.setattr("quantize.choosing._gather", read)
    source = Source(release)
    for wish in (Wish(bits=1.0, calibrate=text), Wish(target_size=10**4, calibrate=text)):
        with pytest.raises(ValueError, match=r"wanted a budget of at least .*--bits ") as caught:
            settle(wish, source, tmp_path / "out")
    least = float(str(caught.value).partition("--bits ")[2].split()[0])
    monkeypatch.undo()
    assert settle(Wish(bits=least), source, tmp_path / "out").recipe.name == "mixed"
    with pytest.raises(ValueError, match=f"--bits {least:g} "):
        settle(Wish(bits=least - 0.02), source, tmp_path / "other")
