# SPDX-License-Identifier: Apache-2.0
"""What reading experts from disk costs, counted by layer."""

from dataclasses import dataclass, fields


@dataclass
class ReadCounts:
    """What one layer's experts cost so far.

    Attributes:
        tokens: rows that passed the layer.
        hits: uses of an expert whose record was already in memory.
        misses: records read from disk.
        bytes_read: misses times the record's size, exactly.
        waits: times that a read was waited for.
        wait_seconds: how long.
        read_seconds: time during which a request was in flight: bytes_read / read_seconds is the
            bandwidth that was reached.
        called_off: reads for later layers that were not wanted and not begun.
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0
    called_off: int = 0

    def add(self, other: "ReadCounts") -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
