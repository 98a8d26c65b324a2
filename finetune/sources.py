# SPDX-License-Identifier: Apache-2.0
"""Rows of data files, one at a time, from this machine alone.

| kind | how it is read | in memory at once |
|---|---|---|
| `.jsonl`, also `.jsonl.gz`, `.jsonl.zst` | line by line | a line |
| `.json` | one array, or lines | the array |
| `.csv`, `.tsv` | row by row | a row |
| `.parquet` | in batches of 1,024 rows | a batch |
| a directory of `datasets.save_to_disk` | mapped, row by row | a row |
| `.txt`, `.md` | one record a file | a file |
| a directory of the above | file by file, by name | as above |

jsonl, json, csv and text need nothing but Python; zst and parquet need pyarrow, saved data sets the
`datasets` library, each imported when such a file comes. Nothing is fetched: a path that is not
here is refused, and `datasets` is told to stay offline.
"""

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md")
WANTED = ".jsonl (plain, .gz, .zst), .json, .csv, .tsv, .parquet, .txt, .md"
# Columns that may hold JSON text, as csv has no lists.
_LISTS = ("messages", "conversations", "tools", "history")


@dataclass(frozen=True)
class Row:
    """One row. `value`: a line's bytes, still to be parsed, or a table's row.

    `place` says where it stands, in the words of its file: line 3, row 3, file 3 (a.txt).
    """

    number: int
    place: str
    value: bytes | dict[str, Any] | Any


@dataclass(frozen=True)
class Source:
    """A data file or directory, recognised: which kind it is, and the files it consists of."""

    path: Path
    kind: str
    files: tuple[Path, ...]
    left_alone: int = 0

    def __iter__(self) -> Iterator[Row]:
        """The rows in order; numbers go on from file to file, places name the file.

        Raises:
            ValueError: a file is not of its kind, or ends early.
        """
        if self.kind == "saved data set":
            yield from _saved_rows(self.path)
            return
        number = 0
        single = len(self.files) == 1 and self.files[0] == self.path
        for file in self.files:
            name = "" if single else f"{file.relative_to(self.path)} "
            for row in _file_rows(file, self.kind, name):
                number += 1
                at = number if self.kind == "text" else row.number
                place = f"file {at} ({name.strip() or file.name})" if self.kind == "text" else ""
                yield Row(number if not single else row.number, place or row.place, row.value)

    def describe(self) -> str:
        """In words: `jsonl`, `csv, 3 files`."""
        files = f", {len(self.files)} files" if len(self.files) > 1 else ""
        others = f" ({self.left_alone} others left alone)" if self.left_alone else ""
        return f"{self.kind}{files}{others}"


def open_source(path: str | Path) -> Source:
    """Recognise a data file or directory.

    Raises:
        ValueError: it is not there, of no known kind, or a directory of several kinds or splits.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    suffix = _suffix(path)
    if suffix is None:
        raise ValueError(f"{path}: wanted {WANTED}, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise ValueError(
            f"{path}: wanted a {suffix} file of records, found none (data is read from this "
            "machine alone)"
        )
    return Source(path, _kind(suffix), (path,))


def _open_directory(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if len(splits) == 1:
            return Source(path / splits[0], "saved data set", ())
        raise ValueError(
            f"{path}: wanted one split, got {', '.join(splits)}; give {path / splits[0]}"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Source(path, "saved data set", ())
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    known = [file for file in files if _suffix(file) is not None]
    kinds = sorted({_kind(_suffix(file) or "") for file in known})
    if len(kinds) != 1:
        got = f"files of {', '.join(kinds)}" if kinds else f"{len(files)} files of no such kind"
        raise ValueError(f"{path}: wanted a directory of one of {WANTED}, got {got}")
    return Source(path, kinds[0], tuple(known), len(files) - len(known))


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in (*LINES, *TABLES, *TEXTS) if name.endswith(s)), None)


def _kind(suffix: str) -> str:
    return (
        "text"
        if suffix in TEXTS
        else suffix.removeprefix(".").removesuffix(".gz").removesuffix(".zst")
    )


def _file_rows(file: Path, kind: str, name: str) -> Iterator[Row]:
    if kind == "text":
        yield Row(1, name, {"text": _read_text(file)})
    elif kind == "json" and _first_byte(file) == b"[":
        yield from _array_rows(file, name)
    elif kind in ("jsonl", "json"):
        yield from _line_rows(file, name)
    elif kind == "parquet":
        yield from _parquet_rows(file, name)
    else:
        yield from _csv_rows(file, "\t" if kind == "tsv" else ",", name)


def _read_text(file: Path) -> str | None:
    """The text; None, which no record may be, where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _line_rows(file: Path, name: str) -> Iterator[Row]:
    # Bytes: a wrong encoding is a fault of its line, not of the file. A last newline is no line.
    try:
        with _open_lines(file) as stream:
            for number, raw in enumerate(stream, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield Row(number, f"{name}line {number}", raw.removesuffix(b"\n"))
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: wanted a whole gzip file, got: {error}") from error
    except OSError as error:
        if not file.name.lower().endswith(".zst"):
            raise
        raise ValueError(f"{file}: wanted a whole zst file, got: {error}") from error


def _open_lines(file: Path) -> Any:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.lower().endswith(".zst"):
        pyarrow = _pyarrow(file)
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _array_rows(file: Path, name: str) -> Iterator[Row]:
    try:
        values = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: wanted a JSON array of records, got: {error}") from error
    for number, value in enumerate(values, start=1):
        yield Row(number, f"{name}item {number}", value)


def _csv_rows(file: Path, delimiter: str, name: str) -> Iterator[Row]:
    """Rows by their column names; an empty cell is no cell. Numbers are lines of the file."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # Bytes that are no UTF-8 become half surrogates, which no record may hold.
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            head = stream.readline()
            stream.seek(0)
            if delimiter == "," and "," not in head and ";" in head:
                delimiter = ";"
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            start = reader.line_num + 2
            for values in reader:
                cells = {key: _cell(key, value) for key, value in values.items() if value}
                yield Row(start, f"{name}line {start}", cells)
                start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}: wanted csv with a header, got: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: Path, name: str) -> Iterator[Row]:
    pyarrow = _pyarrow(file)
    # The name is bound by the import above; this one loads the submodule.
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{name}row {number}", _table_row(value))
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file}: wanted a parquet file, got: {reason}") from error


def _saved_rows(path: Path) -> Iterator[Row]:
    # Read when `datasets` is first imported; afterwards its own field decides.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path}: a saved data set needs the library datasets; install dsv4[finetune]"
        ) from error
    datasets.config.HF_DATASETS_OFFLINE = True
    for number, value in enumerate(datasets.load_from_disk(str(path)), start=1):
        yield Row(number, f"row {number}", _table_row(value))


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{file}: this kind of file needs pyarrow; install dsv4[finetune]"
        ) from error
    return pyarrow


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what columns force on it: absent fields as nulls, lists as JSON text."""
    return {key: _cell(key, _drop_nulls(value)) for key, value in row.items() if value is not None}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def _cell(key: str, value: Any) -> Any:
    """A cell; a list that its column holds as JSON text is read."""
    if key in _LISTS and isinstance(value, str):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value
