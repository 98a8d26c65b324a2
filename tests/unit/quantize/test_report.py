# SPDX-License-Identifier: Apache-2.0
"""The report as a person or a script runs it: figures, files, errors that say what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantize
from quantize import cli
from quantize.convert import convert
from quantize.report import measure_sizes, read_config, read_rows


@pytest.fixture(scope="module")
def release(golden_dir: Path) -> Path:
    return golden_dir / "v4_a_fp8"


@pytest.fixture(scope="module")
def packed(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(release, tmp_path_factory.mktemp("made") / "fp4", quantize.get_recipe("fp4"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token rows: the golden models come without a tokenizer."""
    path = tmp_path_factory.mktemp("text") / "rows.safetensors"
    save_file({"rows": torch.randint(3, 90, (3, 20), dtype=torch.int16)}, path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsv4-quantize", "report", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_an_official_fp4_source_loses_nothing_and_all_files_are_there(
    run, release: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        release, packed, "--text", text, "--output", tmp_path / "out", "--length", 20, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    target = found["targets"][0]
    assert (target["kld_max"], target["top1"]) == (0.0, 1.0)
    assert set(target["layer_error"]) == {0.0}
    assert target["perplexity"] == found["source"]["perplexity"]
    assert target["tokens"] == 60
    assert "exactly 0" in (tmp_path / "out" / "report.svg").read_text()
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("tmp*")), "the source's logits were left behind"


def test_the_same_report_is_the_same_bytes(
    run, release: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert run(release, packed, "--text", text, "--output", tmp_path / name, "--length", 20,
                   "--expert-memory", "64KiB", "--quiet") == (0, "", "")  # fmt: skip
    for file in ("report.json", "report.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_table_names_every_model(run, release, packed, text: Path, tmp_path: Path) -> None:
    code, out, _ = run(release, packed, "--text", text, "--output", tmp_path, "--length", 20,
                       "--rows", 1, "--no-plot")  # fmt: skip
    assert code == 0
    assert all(word in out for word in ("v4_a_fp8: 20 tokens", "with itself", "fp4", "drift"))
    assert not (tmp_path / "report.png").exists()


def test_bits_count_every_byte_of_the_files(release: Path, packed: Path) -> None:
    config = read_config(release)
    sizes = measure_sizes(packed, config)
    files = [*packed.glob("*.safetensors")]
    assert sizes.nbytes == sum(f.stat().st_size for f in files)
    packs = sum(f.stat().st_size for f in files if f.name.startswith("experts-"))
    assert sizes.expert_bytes == packs
    experts = config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    assert sizes.expert_parameters == config.num_hidden_layers * experts
    assert sizes.bits == 8 * sizes.nbytes / sizes.parameters
    # Two numbers a byte and one scale per 32: what the release itself has, but for the padding.
    assert measure_sizes(release, config).expert_bits == pytest.approx(4.25)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"--length": 61}, "at least one row of 61 tokens, got 60"),
        ({"--length": 1}, "rows of 2 to 8192 tokens, got 1"),
        ({"--text": "nothing.txt"}, "wanted a file of text, found none"),
        ({"--text": "words.txt"}, "wanted tokenizer.json"),
        ({"--space": "1KB"}, "--rows 0 fit"),
    ],
)
def test_errors_say_what_to_do(
    run, release: Path, packed: Path, text: Path, tmp_path: Path, monkeypatch, change, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("some words")
    options = {"--text": text, "--output": tmp_path / "out", "--length": 20, **change}
    code, _, err = run(release, packed, *[x for pair in options.items() for x in pair])
    assert code == 1
    assert wanted in err


def test_a_directory_without_a_model_is_refused_before_any_work(
    run, release: Path, text: Path, tmp_path: Path
) -> None:
    code, _, err = run(release, tmp_path, "--text", text, "--output", tmp_path, "--length", 20)
    assert (code, "found no config.json" in err) == (1, True)


def test_a_plot_without_matplotlib_says_what_to_install(
    run, release: Path, packed: Path, text: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(release, packed, "--text", text, "--output", tmp_path)
    assert (code, "pip install 'dsv4[report]'" in err) == (1, True)


def test_text_is_read_with_the_models_tokenizer(tmp_path: Path) -> None:
    nano = Path(__file__).parents[3] / "models" / "nano-v41"
    (tmp_path / "words.txt").write_text("The Congress of the United States. " * 20)
    rows = read_rows(tmp_path / "words.txt", nano, 16, 2)
    assert rows.shape == (2, 16)
    assert rows.dtype == torch.int64
