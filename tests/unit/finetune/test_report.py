# SPDX-License-Identifier: Apache-2.0
"""The report, the card and the facts: complete, self-contained, and escaped."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from finetune.charts import bar_chart, line_chart, nice_ticks
from finetune.deltas import file_sha256
from finetune.facts import collect_facts, command_line, histogram
from finetune.measures import Measure
from finetune.model_card import hub_name, model_card
from finetune.report import finish_run, render, report_run

_VOID = {"meta", "br", "img", "hr", "input", "link"}
# Attributes by which a page would fetch something.
_FETCHES = {"src", "srcset", "href", "action", "data", "poster", "background"}


class Checker(HTMLParser):
    """Well-formed nesting; what the page would fetch; its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(v) for k, v in attrs if k in _FETCHES and not str(v).startswith("#")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert checker.fetched == []
    assert "script" not in checker.tags
    assert "url(" not in html
    assert "@import" not in html
    return checker


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a finished run, by its files."""
    directory = tmp_path / "velmora"
    directory.mkdir()
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "auto_mapping": {"base_identity": "sha256:abc"}})
    )
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    config = _config(tmp_path)
    lines = (f"{key}: {json.dumps(value)}" for key, value in config.items())
    (directory / "run.yaml").write_text("\n".join(lines))
    (directory / "result.json").write_text(json.dumps(_result()))
    return directory


def _config(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tmp_path / "base"),
        "data": str(tmp_path / "d.jsonl"),
        "output": str(tmp_path / "velmora"),
        "preset": "all",
        "rank": 8,
        "learning_rate": 1e-3,
    }


def _result() -> dict[str, Any]:
    history = [
        {"step": i, "loss": 3.0 / i, "learning_rate": 1e-3 / i, "grad_norm": 1.0}
        for i in range(1, 9)
    ]
    return {
        "steps": 8,
        "seconds": 75.0,
        "trained_parameters": 12345,
        "held_out_loss_before": 3.25,
        "held_out_loss_after": 1.5,
        "train_data": {"examples": 90, "tokens": 4000, "truncated": 1},
        "held_out_data": {"examples": 10, "tokens": 400, "truncated": 0},
        "history": [*history, {"step": 4, "eval_loss": 2.0}],
    }


_EVAL = {
    "measures": [
        {"name": "loss", "before": 3.25, "after": 1.5, "better": True},
        {"name": "exact", "before": 0.0, "after": 0.75, "better": True},
        {"name": "general_perplexity", "before": 20.0, "after": 20.4, "better": False},
    ],
    "forgetting": 0.02,
    "samples": [{"question": "<b>Who?</b>", "answer": "A & B", "before": "?", "after": "A & B"}],
    "data": "d.jsonl",
}


def test_the_report_has_what_an_auditor_asks_for(run: Path, tmp_path: Path) -> None:
    finish_run(run, _config(tmp_path), _result(), argv=["/x/dsv4-finetune", "train", "--rank", "8"],
               lengths=[3, 5, 90])  # fmt: skip
    (run / "eval.json").write_text(json.dumps(_EVAL))
    (run / "check.json").write_text(json.dumps({"duplicates": 2, "secrets": {"email": 3}}))
    html = report_run(run).read_text()
    page = _check(html)
    for wanted in (
        "velmora",
        "dsv4-finetune train --rank 8",
        "sha256:abc",
        file_sha256(tmp_path / "d.jsonl"),
        file_sha256(run / "adapter_model.safetensors"),
        file_sha256(tmp_path / "base" / "config.json"),
        "1.5000",
        "3.2500 before training",
        "1 min 15 s",
        "12,345",
        "torch",
        "learning rate",
        "changed by +2.0%",
        "+75.0 points",
        "secrets: email",
        "<b>Who?</b>",
        "A & B",
    ):
        assert wanted in page.text, wanted
    assert page.tags.count("svg") == 4
    assert page.tags.count("polyline") == 4
    assert "<b>Who?" not in html


def test_a_report_without_an_evaluation_says_how_to_get_one(run: Path, tmp_path: Path) -> None:
    finish_run(run, _config(tmp_path), _result(), argv=["x"])
    page = _check((run / "report.html").read_text())
    assert "dsv4-finetune eval --save" in page.text
    assert "dsv4-finetune check DATA --json" in page.text


def test_a_run_without_kept_facts_is_reported_too(run: Path, tmp_path: Path) -> None:
    path = report_run(run, tmp_path / "elsewhere.html")
    assert "Unknown." in _check(path.read_text()).text
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"found no result\.json"):
        report_run(run)


def test_hostile_words_stay_words(run: Path, tmp_path: Path) -> None:
    bad = '"><img src=x onerror=alert(1)><script>'
    facts = collect_facts(run, _config(tmp_path), argv=["p", bad])
    samples = [{"question": bad, "answer": bad, "before": bad, "after": bad}]
    config = _config(tmp_path) | {"note": bad}
    page = _check(render(config, _result(), facts, _EVAL | {"samples": samples}, {bad: bad}))
    assert "img" not in page.tags
    assert page.text.count("onerror=alert(1)") >= 6


def test_the_card_is_one_that_peft_and_the_hub_read(run: Path, tmp_path: Path) -> None:
    finish_run(run, _config(tmp_path), _result(), argv=["x"])
    (run / "eval.json").write_text(json.dumps(_EVAL))
    report_run(run)
    card = ModelCard.load(run / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "base"
    assert {"lora", "dsv4", "base_model:adapter:base"} <= set(data["tags"])
    assert data["datasets"] == ["d"]
    metrics = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert metrics["held-out loss"] == 1.5
    assert metrics["exact"] == 0.75
    assert card.data.model_name == "velmora"
    assert file_sha256(run / "adapter_model.safetensors") in card.text


def test_names_of_bases_are_names_for_the_hub(tmp_path: Path) -> None:
    assert hub_name("deepseek-ai/DeepSeek-V4-Flash") == "deepseek-ai/DeepSeek-V4-Flash"
    assert hub_name(str(tmp_path / "my model!")) == "my-model"
    facts = {"data": [], "base": {"identity": None}, "adapter": [], "command": "", "versions": {}}
    result = {"steps": 1, "seconds": 1.0, "trained_parameters": 1}
    text = str(model_card({"model": "a/b", "output": "o"}, result, facts))
    assert "nothing was held out" in text


def test_facts_name_no_user_and_no_host(run: Path, tmp_path: Path) -> None:
    import getpass
    import socket

    facts = json.dumps(collect_facts(run, _config(tmp_path), argv=["/data/u/bin/dsv4-finetune"]))
    assert socket.gethostname() not in facts
    words = set(re.findall(r"\w+", facts.replace(str(tmp_path), "")))
    assert getpass.getuser() not in words
    assert command_line(["/data/u/bin/dsv4-finetune", "a b"]) == "dsv4-finetune 'a b'"


def test_histograms_count_every_document() -> None:
    lengths = [1, 2, 24, 25, 48, 500, 500]
    bins = histogram(lengths)
    assert sum(count for _, count in bins) == len(lengths)
    for end, count in bins:
        step = bins[0][0]
        assert count == sum(end - step < length <= end for length in lengths)
    assert histogram([]) == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.1, 3.2), (1e-6, 2e-4), (5, 5), (-2, 7), (0, 0)]
)
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_charts_place_points_where_they_belong() -> None:
    svg = line_chart("Loss", [("a", [(0, 4.0), (10, 2.0)]), ("b", [(5, float("nan"))])])
    (points,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    assert x0 < x1
    assert y0 < y1
    assert line_chart("Loss", [("a", [])]) == ""
    bars = bar_chart("n", [(10, 1), (20, 3)], x="tokens")
    heights = [float(h) for h in re.findall(r'class="bar"[^>]*height="([\d.]+)"', bars)]
    assert heights[1] == pytest.approx(3 * heights[0], rel=1e-3)


def test_measures_know_which_way_is_better() -> None:
    assert Measure("loss", 2.0, 1.0).better
    assert Measure("exact", 0.5, 0.25).better is False
    assert Measure("exact", 0.5, 0.5).better is None
    assert Measure("loss", 2.0, None).words() == ("loss", "2", "", "")
    assert Measure("perplexity", 10.0, 7.0).words()[3] == "-30.0%"
