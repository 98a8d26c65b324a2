# SPDX-License-Identifier: Apache-2.0
"""A size is kept to, statistics change the rounding, and neither is worked out twice."""

from pathlib import Path

import pytest
import torch

from modeling_dsv4.formats import get_format
from quantize.calibration import calibrate
from quantize.checksums import Checksums, damages
from quantize.choosing import Wish, settle
from quantize.config import Dsv4QuantizationConfig, Recipe, get_recipe
from quantize.convert import convert, plan_job, space_wanted
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
    before = space_wanted(Source(release), job)
    (release / "tokenizer.json").write_text(" " * 3_000_000)
    assert space_wanted(Source(release), job) == before + 3_000_000
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
    source = Source(release)
    source.origin.fetched = True
    with pytest.raises(ValueError, match="whose shards come one by one; fetch it first"):
        settle(Wish(bits=4), source, tmp_path / "out")
