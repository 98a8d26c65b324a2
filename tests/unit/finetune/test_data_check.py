# SPDX-License-Identifier: Apache-2.0
"""The verdict on a data file, the program around it, and its clean copy."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.clean_copy import write_clean
from finetune.cli import app, run
from finetune.data import encode_records
from finetune.data_check import check_data
from finetune.detectors import Detector
from finetune.encoding import Rules
from finetune.records import read_records

MAIL = "jo@mail.corp-site.de"
ROWS: list[Any] = [
    {
        "id": 7,
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": MAIL}],
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a b c"}]},
    "{",
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"prompt": "p", "completion": "battery " * 40},
    {"text": "the meter lasts"},
    {"text": "The meter -- lasts!"},
    {"text": "the meter lasts"},
    {"text": "in eval"},
]
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "d.jsonl", *ROWS)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return _write(tmp_path / "e.jsonl", {"text": "in eval"}, {"text": "not in the other"})


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    def invoke(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(lambda: app(["check", *map(str, words)]))
        out = capsys.readouterr()
        return code, out.out, " ".join(out.err.split())

    return invoke


def _write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_everything_is_counted_and_named(
    data: Path, held_out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rules = Rules(40)
    check = check_data(data, tokenizer, eval_data=held_out, rules=rules, detector=Detector())
    values = check.to_dict()
    assert [(one["line"], one["reason"].split(" (")[0]) for one in values["bad"]] == [
        (3, "not JSON"),
        (4, "chat: wanted a user message, got assistant"),
    ]
    assert (values["records"], values["bad_lines"]) == (7, 2)
    assert [values[key] for key in ("chat", "sharegpt", "prompt_completion", "text")] == [
        1,
        1,
        1,
        4,
    ]
    assert values["repeats"] == [
        {"place": "line 7", "of": "line 6", "kind": "normalised"},
        {"place": "line 8", "of": "line 6", "kind": "exact"},
    ]
    assert values["overlaps"] == [{"place": "line 9", "of": "line 1", "kind": "exact"}]
    assert [(one["line"], one["kind"]) for one in values["findings"]] == [(1, "email")]
    assert values["eval"]["records"] == 2
    good = [record for record in read_records(_good(data)) if record]
    report = encode_records(good, tokenizer, 40)[1]
    assert {key: values[key] for key in report.to_dict()} == report.to_dict()
    assert report.truncated == 1
    whole = [len(one) for one in encode_records(good, tokenizer, 10**6)[0]]
    assert values["quantiles"]["p100"] == max(whole)
    assert values["quantiles"]["p50"] == sorted(whole)[3]
    for low, high, count in values["histogram"]:
        assert count == sum(low <= size < high for size in whole)
    assert sum(count for *_, count in values["histogram"]) == 7
    assert values["packing"]["fill"] == report.tokens / (values["packing"]["rows"] * 40)
    assert len(values["warnings"]) == 5


def _good(data: Path) -> Path:
    good = [row for i, row in enumerate(ROWS) if i not in (2, 3)]
    return _write(data.with_name("good.jsonl"), *good)


def test_without_a_tokenizer_the_order_of_roles_is_still_checked(data: Path) -> None:
    check = check_data(data)
    assert [one.line for one in check.data.bad] == [3, 4]
    assert check.report is None
    assert check.data.findings == []


def test_a_clean_copy_holds_what_is_good(data: Path, held_out: Path, tmp_path: Path) -> None:
    detector, copy = Detector(), tmp_path / "out" / "clean.jsonl"
    check = check_data(data, eval_data=held_out, detector=detector)
    summary = write_clean(check, copy, detector)
    assert summary == {
        "path": str(copy),
        "written": 4,
        "redacted": 1,
        "nulls": 0,
        "left_out": {"bad": 2, "normalised duplicate": 1, "exact duplicate": 1, "overlap": 1},
    }
    rows = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "[EMAIL]"}],
        "id": 7,
    }
    assert rows[1]["messages"][1]["content"] == "a b c"
    assert [p.name for p in copy.parent.iterdir()] == ["clean.jsonl"]
    again = check_data(copy, eval_data=held_out, detector=detector)
    assert (again.errors(), again.warnings()) == ([], [])
    with pytest.raises(ValueError, match="is there already; remove it, or name another"):
        write_clean(check, copy)
    copy.unlink()
    write_clean(check, copy)
    assert MAIL in copy.read_text(encoding="utf-8")


def test_a_clean_copy_never_replaces_its_source(data: Path, tmp_path: Path) -> None:
    check = check_data(data)
    before = data.read_bytes()
    for path, message in (
        (data, "wanted another file than the checked"),
        (tmp_path / "x.json", "wanted a .jsonl file"),
    ):
        with pytest.raises(ValueError, match=message):
            write_clean(check, path)
    assert data.read_bytes() == before
    bad = check_data(_write(tmp_path / "bad.jsonl", "{"))
    with pytest.raises(ValueError, match=r"wanted good records in .*, got none"):
        write_clean(bad, tmp_path / "y.jsonl")
    assert not (tmp_path / "y.jsonl").exists()


def test_the_program_fails_on_errors_and_on_warnings_only_if_strict(
    program: Program, data: Path, tmp_path: Path
) -> None:
    code, out, err = program(data, "--json")
    assert code == 1
    assert "d.jsonl: line 3: not JSON" in err
    assert [one["line"] for one in json.loads(out)["bad"]] == [3, 4]
    warned = _write(tmp_path / "w.jsonl", {"text": "one"}, {"text": "one"})
    assert program(warned)[0] == 0
    code, _, err = program(warned, "--strict")
    assert (code, err) == (1, "error: 1 records repeat earlier ones")


def test_the_program_shows_samples_and_hides_secrets(
    program: Program, data: Path, saved: Path
) -> None:
    words = (data, "--model", saved, "--show", 2, "--max-length", 64)
    code, out, err = program(*words)
    assert code == 1
    assert "<bos><|user|>q<|assistant|>{+[EMAIL]<eos>+}" in out
    assert "line 1, messages[1].content: email: [EMAIL]" in out
    assert "warning: 1 probable findings of email" in out
    assert MAIL not in out + err
    code, out, err = program(*words, "--json")
    values = json.loads(out)
    assert len(values["samples"]) == 2
    assert MAIL not in out + err
    assert values["tokens"] > values["label_tokens"] > 0


def test_secrets_in_bad_lines_are_hidden_too(program: Program, tmp_path: Path) -> None:
    file = _write(tmp_path / "d.jsonl", {"text": "good"}, {"messages": [{"role": MAIL}]})
    code, out, err = program(file)
    assert code == 1
    assert f"got text of {len(MAIL)} characters" in err
    assert MAIL not in out + err


def test_the_program_writes_a_clean_copy_and_says_what_is_missing(
    program: Program, data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "clean.jsonl"
    _, out, _ = program(data, "--write", copy, "--redact", "--quiet")
    assert "5 records, 1 redacted; left out: 2 bad, 1 normalised duplicate, 1 exact" in out
    assert len(read_records(copy)) == 5


@pytest.mark.parametrize(
    "words",
    [("--show", 1), ("--redact",), ("--long", "fold"), ("--thinking", "on"), ("--loss-on", "x")],
)
def test_wrong_usage_exits_with_2(program: Program, data: Path, words: tuple[Any, ...]) -> None:
    assert program(data, *words)[0] == 2


def test_a_clean_copy_replaces_no_checked_file(data: Path, held_out: Path, tmp_path: Path) -> None:
    before = held_out.read_bytes()
    check = check_data(data, eval_data=held_out)
    with pytest.raises(ValueError, match="wanted another file than the checked"):
        write_clean(check, held_out)
    assert held_out.read_bytes() == before


def test_a_clean_copy_is_json_whatever_the_columns_hold(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one", "at": datetime(2026, 1, 2), "x": float("nan")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    copy = tmp_path / "clean.jsonl"
    assert write_clean(check_data(tmp_path / "t.parquet"), copy)["nulls"] == 1
    got = json.loads(copy.read_text(encoding="utf-8"))
    assert got == {"text": "one", "at": "2026-01-02 00:00:00", "x": None}


def test_half_a_surrogate_in_another_column_is_named(tmp_path: Path) -> None:
    file = _write(tmp_path / "d.jsonl", {"text": "one"}, r'{"text": "two", "id": "\ud800"}')
    with pytest.raises(ValueError, match="clean copy: line 2: half of a surrogate pair"):
        write_clean(check_data(file), tmp_path / "clean.jsonl")
