# SPDX-License-Identifier: Apache-2.0
"""How fast data is checked, part by part, against reading its JSON alone; and in what memory.

    python benchmarks/data_check.py [--megabytes 10] [--tokenizer DIR]

Memory is the peak of a process that does nothing but the check, over one that has imported the
same and checked a single record: of the file, and of one four times as large.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finetune.data_check import check_data
from finetune.detectors import Detector
from finetune.duplicates import Fingerprints
from finetune.encoding import Rules, encode_long
from finetune.loading import load_tokenizer
from finetune.records import Record, iter_records
from finetune.redaction import scan_record

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--tokenizer", help="Directory of a tokenizer; without it none is timed.")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        check_one(args.one, args.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        file, large, small = (Path(folder, f"{name}.jsonl") for name in ("chats", "more", "one"))
        write_chats(file, round(args.megabytes * 1e6))
        write_chats(large, round(4 * args.megabytes * 1e6))
        write_chats(small, 1)
        measure(file, args.tokenizer)
        show_memory([small, file, large], args.tokenizer)


def write_chats(file: Path, size: int) -> None:
    """Chats of words from this repository's documents: 10 to 80 asked, 20 to 400 answered."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    words, rng = text.split(), random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            ask, answer = (" ".join(rng.choices(words, k=rng.randint(*k))) for k in _LENGTHS)
            messages = [
                {"role": "user", "content": ask},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


_LENGTHS = ((10, 80), (20, 400))


def measure(file: Path, tokenizer_dir: str | None) -> None:
    """Time each part alone on the same records, and the whole."""
    size = file.stat().st_size / 1e6
    lines = file.read_bytes().splitlines()
    records = [item for item in iter_records(file) if isinstance(item, Record)]
    detector, prints = Detector(), Fingerprints()
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
    parts: list[tuple[str, Callable[[], object]]] = [
        ("JSON alone (limit)", lambda: [json.loads(line) for line in lines]),
        ("read and validate", lambda: sum(1 for _ in iter_records(file))),
        ("fingerprints", lambda: [prints.add(record) for record in records]),
        ("repeats among them", prints.repeats),
        ("secrets and personal data", lambda: [list(scan_record(r, detector)) for r in records]),
    ]
    if tokenizer is not None:
        rules = Rules(2048)
        parts.append(("encode", lambda: [encode_long(r, tokenizer, rules) for r in records]))
    parts.append(("check, all of it", lambda: check_data(file, tokenizer, detector=detector)))
    table = Table(title=f"{size:.1f} MB, {len(records):,} chats")
    for title in ("part", "s", "MB/s", "records/s", "of the limit"):
        table.add_column(title, justify="left" if title == "part" else "right")
    limit = 0.0
    for name, part in parts:
        start = time.perf_counter()
        part()
        seconds = time.perf_counter() - start
        limit = limit or seconds
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{size / seconds:.1f}",
            f"{len(records) / seconds:,.0f}",
            f"{limit / seconds:.3f}",
        )
    Console().print(table)


def check_one(file: Path, tokenizer_dir: str | None) -> None:
    """Check a file; print seconds, and peak memory in bytes."""
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
    detector, start = Detector(), time.perf_counter()
    check_data(file, tokenizer, detector=detector)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps([seconds, peak]) + "\n")


def show_memory(files: list[Path], tokenizer_dir: str | None) -> None:
    """Check each file in a process of its own; the first shows what the imports take."""
    table = Table(title="the check alone, a process each")
    for title in ("records", "MB", "s", "records/s", "peak MiB", "over one record"):
        table.add_column(title, justify="right")
    least = 0.0
    for file in files:
        command = [sys.executable, __file__, "--one", str(file)]
        command += [] if tokenizer_dir is None else ["--tokenizer", tokenizer_dir]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        least = least or peak
        count = len(file.read_bytes().splitlines())
        table.add_row(
            f"{count:,}",
            f"{file.stat().st_size / 1e6:.1f}",
            f"{seconds:.2f}",
            f"{count / seconds:,.0f}",
            f"{peak / 2**20:,.0f}",
            f"{(peak - least) / 2**20:,.0f} MiB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
