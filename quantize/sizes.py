# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and times as people write them: 2GiB, 2GB, 12GB/s, 7.5 h."""

import re

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(value: str | int) -> int:
    """Return bytes for `value`: a number of bytes, or text such as "2GiB" or "1.5GB".

    Raises:
        ValueError: negative, or not a size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"wanted a size such as 2GiB or 2GB, got {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"wanted a size of at least 0 bytes, got {value}")
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError(f"wanted a size such as 2GiB or 2GB, got {value!r}")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * {**_DECIMAL, **_BINARY}[unit])


def parse_rate(value: str | int) -> int:
    """Return bytes per second for text such as "12GB/s" (the "/s" may be left out)."""
    text = value.strip().removesuffix("/s") if isinstance(value, str) else value
    try:
        rate = parse_size(text)
    except ValueError:
        raise ValueError(f"wanted a rate such as 12GB/s, got {value!r}") from None
    if not rate:
        raise ValueError(f"wanted a rate above 0, got {value!r}")
    return rate


def format_size(size: float) -> str:
    """Write bytes with a decimal unit and three figures: 147 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:.0f} TB"


def format_time(seconds: float) -> str:
    """Write a time in its largest unit: 90 s, 25 min, 7.5 h."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
