# SPDX-License-Identifier: Apache-2.0
"""Run settings: read strictly, written whole, compared on resume."""

from pathlib import Path

import pytest

from finetune.config import RunConfig, read_yaml

BASE = {"model": "m", "data": "d.jsonl", "output": "o"}


def test_a_saved_run_reads_back_equal(tmp_path: Path) -> None:
    run = RunConfig(**BASE, rank=4, alpha=3.5, packing=True, max_steps=7)
    run.save(tmp_path / "run.yaml")
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == run
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_given_options_win_over_the_file(tmp_path: Path) -> None:
    RunConfig(**BASE, rank=4, seed=3).save(tmp_path / "run.yaml")
    run = RunConfig.from_yaml(tmp_path / "run.yaml", rank=8, seed=None)
    assert (run.rank, run.seed) == (8, 3)


def test_later_files_win(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: m\ndata: d\noutput: o\nrank: 4\nseed: 3\n")
    (tmp_path / "two.yaml").write_text("rank: 8\nlr_ratios:\n  .*o_a_proj.*: 2\n")
    run = RunConfig.from_yaml(tmp_path / "one.yaml", tmp_path / "two.yaml", seed=5)
    assert (run.rank, run.seed, run.lr_ratios) == (8, 5, {".*o_a_proj.*": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BASE | {"learning_rat": 1e-4}, "unknown keys learning_rat"),
        ({"model": "m"}, "wanted data, output"),
        (BASE | {"rank": 0}, "rank: wanted at least 1, got 0"),
        (BASE | {"rank": "8"}, "rank: wanted int, got '8'"),
        (BASE | {"packing": 1}, "packing: wanted bool"),
        (BASE | {"learning_rate": -1.0}, "learning_rate: wanted more than 0"),
        (BASE | {"learning_rate": "fast"}, "learning_rate: wanted float"),
        (BASE | {"eval_fraction": 1.0}, "eval_fraction: wanted at least 0 and less than 1"),
        (BASE | {"loss_on": "prompts"}, "loss_on: wanted one of answers, all"),
        (BASE | {"preset": "everything"}, "preset: wanted one of"),
        (BASE | {"expert_memory": 2}, "expert_memory: wanted"),
        (BASE | {"optimizer": "adam"}, "optimizer: wanted one of adamw, sgd"),
        (BASE | {"overfit_gate": True}, "overfit_gate: wanted"),
        (BASE | {"patience": 0}, "patience: wanted at least 1, got 0"),
        (BASE | {"lora_plus_ratio": 0}, "lora_plus_ratio: wanted more than 0"),
        (BASE | {"lr_ratios": ["x"]}, "lr_ratios: wanted"),
        (BASE | {"lr_ratios": {"(": 2.0}}, "lr_ratios: wanted patterns of names"),
        (BASE | {"lr_ratios": {"x": "b"}}, "lr_ratios: wanted numbers above 0, got 'b' for x"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_whole_numbers_serve_as_real_ones() -> None:
    assert RunConfig.from_dict(BASE | {"epochs": 2, "alpha": 16}).epochs == 2


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match="wanted"):
        read_yaml(tmp_path / "run.yaml")


def test_a_run_continues_only_with_its_own_settings() -> None:
    earlier = RunConfig(**BASE, rank=4)
    RunConfig(
        **BASE, rank=4, logging_steps=1, expert_memory="1GiB", report_to="none"
    ).check_continues(earlier)
    with pytest.raises(ValueError, match=r"rank 4 -> 8; seed 0 -> 1"):
        RunConfig(**BASE, rank=8, seed=1).check_continues(earlier)


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlearning_rate: 1e-4\nlr_ratios: {x: 2e0}\n")
    config = RunConfig.from_yaml(file)
    assert (config.learning_rate, config.lr_ratios) == (1e-4, {"x": 2.0})
