# SPDX-License-Identifier: Apache-2.0
"""Every kind of file gives the same rows, from this machine alone, and says what it is."""

import gzip
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.records import BadRecord, Record, iter_records, read_records
from finetune.sources import open_source

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "q, é\n2"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {"prompt": "p;1", "completion": "c"},
    {"text": 'a "text"\nof two lines'},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def _lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def _columns() -> dict[str, list[Any]]:
    """The rows as columns: lists as JSON text, absent cells empty."""
    names = {key: None for row in ROWS for key in row}
    columns: dict[str, list[Any]] = {}
    for name in names:
        cells: list[Any] = [row.get(name) for row in ROWS]
        columns[name] = [json.dumps(c) if isinstance(c, list) else c for c in cells]
    return columns


def _write_csv(path: Path, delimiter: str) -> None:
    import csv

    columns = _columns()
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(_columns()), path)


def _write_zst(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(_lines())


def _write_saved(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(_columns()).save_to_disk(str(path))


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "d.jsonl": (lambda path: path.write_bytes(_lines()), "jsonl"),
    "d.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(_lines())), "jsonl"),
    "d.jsonl.zst": (_write_zst, "jsonl"),
    "lines.json": (lambda path: path.write_bytes(_lines()), "json"),
    "array.json": (lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"), "json"),
    "d.csv": (lambda path: _write_csv(path, ","), "csv"),
    "semicolons.csv": (lambda path: _write_csv(path, ";"), "csv"),
    "d.tsv": (lambda path: _write_csv(path, "\t"), "tsv"),
    "d.parquet": (_write_parquet, "parquet"),
    "saved": (_write_saved, "saved data set"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_records(tmp_path: Path, name: str) -> None:
    write, kind = WRITERS[name]
    write(tmp_path / name)
    assert open_source(tmp_path / name).describe() == kind
    records = read_records(tmp_path / name)
    assert [record.content for record in records] == ROWS


def test_places_are_said_in_the_words_of_the_file(tmp_path: Path) -> None:
    def places(name: str) -> list[str]:
        WRITERS[name][0](tmp_path / name)
        return [record.place for record in read_records(tmp_path / name)]

    assert places("d.jsonl") == ["line 1", "line 2", "line 3"]
    assert places("array.json") == ["item 1", "item 2", "item 3"]
    assert places("d.parquet") == ["row 1", "row 2", "row 3"]
    # The last cell of the third row has a line break: rows begin at lines of the file.
    assert places("d.csv") == ["line 2", "line 3", "line 4"]


def test_a_message_that_a_table_fills_with_nulls_loses_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    datasets.Dataset.from_list([{"messages": messages}]).save_to_disk(str(tmp_path / "s"))
    found = read_records(tmp_path / "s")[0].content["messages"]
    assert found[0] == {"role": "user", "content": "q"}
    assert found[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


def test_a_folder_of_texts_is_one_record_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("first", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    source = open_source(tmp_path)
    assert source.describe() == "text, 2 files (1 others left alone)"
    records = read_records(tmp_path)
    assert [record.content["text"] for record in records] == ["first", "second"]
    assert [record.place for record in records] == ["file 1 (a/x.txt)", "file 2 (b.md)"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"file 3 \(c\.txt\): `text`: wanted text, got None"):
        read_records(tmp_path)


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    for name, text in (("part-1.jsonl", "b"), ("part-0.jsonl", "a")):
        (tmp_path / name).write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    records = read_records(tmp_path)
    assert [(r.content["text"], r.place, r.line) for r in records] == [
        ("a", "part-0.jsonl line 1", 1),
        ("b", "part-1.jsonl line 1", 2),
    ]
    (tmp_path / "d.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"one of \.jsonl .*, got files of csv, jsonl"):
        open_source(tmp_path)


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"wanted one split, got train, test; give .*both/train"):
        open_source(tmp_path / "both")
    assert [r.content for r in read_records(tmp_path / "both" / "test")] == [{"text": "a"}]
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "one"))
    assert len(read_records(tmp_path / "one")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl.gz", gzip.compress(_lines())[:-9], "wanted a whole gzip file"),
        ("d.jsonl.gz", _lines(), "wanted a whole gzip file"),
        ("d.json", b"[{]", "wanted a JSON array of records"),
        ("d.csv", b'text\n"open', "wanted csv with a header"),
        ("d.parquet", b"PAR1 no", "wanted a parquet file"),
    ],
)
def test_a_broken_file_is_told_from_a_bad_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_a_wrong_encoding_in_csv_is_a_fault_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"text\ngood\n\xff\xff\n")
    found = list(iter_records(tmp_path / "d.csv"))
    assert isinstance(found[0], Record)
    assert isinstance(found[1], BadRecord)
    assert found[1].place == "line 3"


def test_long_cells_are_read_and_the_limit_of_others_is_kept(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "d.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_records(tmp_path / "d.csv")[0].content["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found none .*from this machine alone"):
        open_source("https://example.com/data.jsonl")


def test_jsonl_needs_no_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "datasets", "pandas"):
        monkeypatch.setitem(sys.modules, module, None)
    WRITERS["d.jsonl"][0](tmp_path / "d.jsonl")
    assert len(read_records(tmp_path / "d.jsonl")) == 3
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="needs pyarrow; install"):
        read_records(tmp_path / "d.parquet")


def test_the_datasets_library_is_told_to_stay_offline(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.config.HF_DATASETS_OFFLINE = False
    _write_saved(tmp_path / "saved")
    assert len(read_records(tmp_path / "saved")) == 3
    assert datasets.config.HF_DATASETS_OFFLINE


def test_a_damaged_zst_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path / "d.jsonl.zst"
    file.write_bytes(b"no zst at all")
    with pytest.raises(ValueError, match=r"d\.jsonl\.zst: wanted a whole zst file"):
        list(open_source(file))
