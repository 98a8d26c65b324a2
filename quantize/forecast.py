# SPDX-License-Identifier: Apache-2.0
"""What a conversion will take, before it begins: bytes by part and format, disk, about how long."""

import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from .convert import count_workers
from .dense import scale_name
from .disk_space import space_wanted
from .encode import Statistics, encode_expert
from .job import Job, entry_bytes
from .source import Source

# Written and synced to see how fast the disk takes bytes.
_PROBE = 1 << 25


@dataclass(frozen=True)
class Part:
    """Bytes of what is stored alike, in the source and in the target.

    Attributes:
        name: what it is.
        formats: how it will be stored.
        count: experts, or tensors.
        before, after: bytes.
    """

    name: str
    formats: str
    count: int
    before: int
    after: int


@dataclass(frozen=True)
class Forecast:
    """A conversion in figures.

    Attributes:
        parts: what is written.
        disk: bytes of free disk that it wants at most.
        free: bytes that are free.
        seconds: about how long, from an expert of each kind and a short write; None if nothing
            of the source is here to try, or the disk has no room for a trial.
    """

    parts: tuple[Part, ...]
    disk: int
    free: int
    seconds: float | None


def forecast(
    source: Source,
    job: Job,
    target: Path,
    statistics: Statistics | None = None,
    device: str = "cpu",
) -> Forecast:
    """Add up headers, and try an expert of each kind on the device that will round."""
    where = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    parts = (*_expert_parts(source, job), *_dense_parts(source, job))
    disk, free = space_wanted(source, job, target), shutil.disk_usage(where).free
    # Without room for a trial there is none for the conversion, which says so.
    room = free > _PROBE
    seconds = _seconds(source, job, where, statistics, device) if room else None
    return Forecast(parts, disk, free, seconds)


def _expert_parts(source: Source, job: Job) -> list[Part]:
    count: Counter[str] = Counter()
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for experts, pack in job.packs.values():
        for e in range(pack.num_experts):
            layout = pack.of(e)
            formats = " / ".join(dict.fromkeys(name for _, name in layout.formats))
            slices = source.expert_slices(experts.name, e).values()
            count[formats] += 1
            before[formats] += sum(s.end - s.start for places in slices for s in places)
            after[formats] += layout.nbytes
    return [Part("routed experts", f, count[f], before[f], after[f]) for f in count]


def _dense_parts(source: Source, job: Job) -> list[Part]:
    found: dict[str, Part] = {}
    for file in job.files.values():
        for name, entry in file.entries.items():
            part = file.packed.get(name)
            # Codes stand for the whole weight that the source has in one or two tensors.
            weight = name if part is None else part.weight if not part.suffix else None
            names = () if weight is None else (weight,) if part is None else _stored(weight)
            before = sum(entry_bytes(source.dense[n]) for n in names if n in source.dense)
            formats = "as it is" if part is None else part.format.name
            what = "everything else" if part is None else "embedding, head, tables"
            old = found.get(formats, Part(what, formats, 0, 0, 0))
            found[formats] = Part(
                what, formats, old.count + len(names[:1]), old.before + before,
                old.after + entry_bytes(entry),
            )  # fmt: skip
    for table in job.tables.values():
        formats = table.layout.format if table.rounded else "as it is, in rows"
        old = found.get(formats, Part("embedding, head, tables", formats, 0, 0, 0))
        held = [source.dense[n] for n in _stored(table.weight) if n in source.dense]
        found[formats] = replace(
            old,
            count=old.count + 1,
            before=old.before + sum(map(entry_bytes, held)),
            after=old.after + table.num_rows * table.layout.nbytes,
        )
    return list(found.values())


def _stored(weight: str) -> tuple[str, ...]:
    """Names of a weight and of its scales in the source, if it has any."""
    return weight, scale_name(weight)


def _seconds(
    source: Source, job: Job, where: Path, statistics: Statistics | None, device: str
) -> float | None:
    counts: Counter[str] = Counter()
    example = {}
    for experts, pack in job.packs.values():
        for e in range(pack.num_experts):
            kind = str(pack.of(e).formats)
            counts[kind] += 1
            if kind not in example and all(map(source.origin.holds, source.needs(experts.name, e))):
                example[kind] = experts, e, pack.of(e)
    if set(example) != set(counts):
        return None
    encoding = 0.0
    for kind, (experts, e, layout) in example.items():
        start = time.perf_counter()
        encode_expert(source, experts, e, layout, statistics, device)
        encoding += counts[kind] * (time.perf_counter() - start)
    return max(
        encoding / count_workers(source, job, statistics is not None),
        job.nbytes / _write_rate(where),
    )


def _write_rate(where: Path) -> float:
    """Bytes per second that a directory's disk takes."""
    with tempfile.TemporaryFile(dir=where) as file:
        raw = os.urandom(_PROBE)
        start = time.perf_counter()
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE / (time.perf_counter() - start)
