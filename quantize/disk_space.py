# SPDX-License-Identifier: Apache-2.0
"""Will a conversion find room on the disk, and what to do where it does not."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checksums import Checksums
from .job import Job, peak_disk
from .origin import freed
from .sizes import format_size
from .source import Source, small_bytes


def check_space(source: Source, job: Job, sums: Checksums, target: Path, more: int = 0) -> None:
    """Refuse a disk without room for what is left to write, and `more` bytes; ValueError."""
    origin = source.origin
    done = sum(s.nbytes for name, s in sums.files.items() if sums.has(target / name))
    for name, keys in sums.done.items():
        done += sum(item.nbytes for item in job.files[name].items if item.key in keys)
    # A megabyte covers config.json, the index and the checksums of any model.
    wanted = space_wanted(source, job, target) - done + more + 2**20
    free = shutil.disk_usage(_existing(target)).free
    if wanted > free:
        raise ValueError(
            f"{target}: wanted {format_size(wanted)} of free disk, got {format_size(free)}; "
            "free some, or convert to another disk"
            + (", or add --delete-source-shards" if origin.keeps else "")
        )


def _existing(target: Path) -> Path:
    """The target, or the nearest directory above it that is there."""
    return next(path for path in (target, *target.absolute().parents) if path.exists())


def space_wanted(source: Source, job: Job, target: Path) -> int:
    """Bytes of free disk that a conversion into `target` wants at most."""
    origin = source.origin
    deleted, frees = not origin.keeps and not origin.fetched, None
    if deleted:
        device = _existing(target).stat().st_dev
        frees = {shard: freed(source.directory / shard, device) for shard in origin.sizes}
    peak = peak_disk(job, origin.sizes, origin.fetched, deleted, frees)
    return peak + small_bytes(source.directory)


@contextmanager
def full_disk_explained(target: Path) -> Iterator[None]:
    """Say what to do where the disk has no room left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{target}: the disk is full; what is written so far is kept. Free some and run the "
            "same command again"
        ) from error
