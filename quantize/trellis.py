# SPDX-License-Identifier: Apache-2.0
"""Trellis formats of 2 to 4 bits a weight: codes that overlap, after a rotation of the row.

```
row w [K]  --rotation-->  y / scale  --pairs-->    (y0 y1) (y2 y3) (y4 y5) ...
stored: `bits` a pair, one stream a row            ... c0      c1      c2
pair t = table[last ten bits of the stream up to c_t]          |____________|
```

A code of 4 to 8 bits chooses among 1,024 pairs because its window reaches back into codes before
it, so that neighbours share what they can express (trellis-coded quantization, Marcellin and
Fischer 1990; the window of a bit stream as its state: QTIP, arXiv 2406.11235). The Viterbi search
finds the stream. Reading needs no search: a window, a table of 1,024 pairs, the rotation back.

The rotation makes whatever a row holds, a 16-level grid or outliers, close to Gaussian and of one
size, for which the table is made and one bfloat16 scale a row is enough.
"""

import ctypes
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_dsv4.cpu.build import library
from modeling_dsv4.formats import Parts, Shape, WeightFormat, hadamard, register_format

from .bits import pack_bits, unpack_bits
from .grids import finite
from .trellis_tables import TABLES

WINDOW = 10
STATES = 1 << WINDOW
BLOCK = 256
_LEAST_BLOCK = 32
_STEP = 1 / 32
# Columns whose codes are settled at a time, and how many more the search looks ahead.
COMMIT, AHEAD = 64, 16
# Rows searched at a time: on a CPU the costs of all states then stay in cache.
_ROWS = {"cpu": 32}
_DEVICE_ROWS = 4096
_TINY = 2.0**-126
# C sources; there the least costs of a step take as many numbers as this.
CPU = Path(__file__).parent / "cpu"
_MOST_HEADS = STATES >> 4
_NEVER = 1e9

Settled = Callable[[torch.Tensor, int, torch.Tensor], None]


@dataclass(frozen=True)
class Trellis:
    """Codes of `bits` for every pair of weights, 4 to 8."""

    bits: int

    def table(self, device: torch.device) -> torch.Tensor:
        """Pair of every window [1024, 2] float32."""
        return _table(self.bits, device)

    def pack(self, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round [..., K] to the stream of the least squared error."""
        y, scale = normalize(rotate(finite(w)).flatten(0, -2))
        codes = self.search(y, self.table(w.device))
        scale = scale * self.gain(codes, y)
        return self.store(codes.view(*w.shape[:-1], -1), scale.view(*w.shape[:-1], 1))

    def search(
        self,
        y: torch.Tensor,
        table: torch.Tensor,
        settled: Settled | None = None,
        commit: int = COMMIT,
        ahead: int = AHEAD,
    ) -> torch.Tensor:
        """Find the streams nearest to rows y [R, K] of size 1: codes [R, K / 2] uint8.

        Args:
            y: rotated rows.
            table: of `table()`.
            settled: told of every stretch whose codes are final, its first column and what is
                wrong there [r, n]; it may change the columns behind of the rows' y [r, K] in place.
            commit: columns of such a stretch, even.
            ahead: columns behind it that the search looks at before it settles, even.
        """
        rows = _ROWS.get(y.device.type, _DEVICE_ROWS)
        return torch.cat([
            self._search(part.clone(), table, settled, commit, ahead) for part in y.split(rows)
        ])  # fmt: skip

    def _search(
        self, y: torch.Tensor, table: torch.Tensor, settled: Settled | None, commit: int, ahead: int
    ) -> torch.Tensor:
        state = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        codes = []
        for start in range(0, y.shape[1], commit):
            target = y[:, start : start + commit + ahead]
            path = viterbi(target, table, self.bits, state)[: commit // 2]
            state = path[-1]
            codes.append(path & (1 << self.bits) - 1)
            if settled is not None:
                chosen = table[path].transpose(0, 1).flatten(1)
                settled(y, start, y[:, start : start + commit] - chosen)
        return torch.cat(codes).T.to(torch.uint8)

    def gain(self, codes: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Factor [R, 1] on what codes stand for, of the least squared error for rows y [R, K]."""
        q = self.values(codes)
        return ((q * y).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)).clamp(min=0)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Unscaled rows [..., K] float32 that codes [..., K / 2] stand for."""
        window = windows(codes, self.bits)
        # A pair is moved as one word of eight bytes.
        pairs = self.table(codes.device).view(torch.int64).flatten()
        return pairs.index_select(0, window.flatten()).view(window.shape).view(torch.float32)

    def store(self, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parts of codes [..., K / 2] with scales [..., 1]."""
        return {"": pack_bits(codes, self.bits), "_scale": scale.bfloat16()}

    def unpack(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """[..., K] in `dtype`, computed in float32."""
        y = self.values(unpack_bits(parts[""], self.bits)) * parts["_scale"].float()
        return rotate(y).to(dtype)

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Shapes of the stored tensors."""
        *rows, k = shape
        block_size(k)
        return {
            "": (torch.uint8, (*rows, k * self.bits // 16)),
            "_scale": (torch.bfloat16, (*rows, 1)),
        }


@functools.cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    half = torch.frombuffer(bytearray.fromhex(TABLES[bits]), dtype=torch.int8).view(-1, 2)
    table = torch.cat((half.float(), -half.float().flip(0))) * _STEP
    return table.to(device)


def table_checksum(bits: int) -> int:
    """Checksum of all that codes are read with: the table, its step, window and rotation."""
    numbers = f"{WINDOW} {_STEP} {BLOCK}".encode()
    return zlib.crc32(bytes.fromhex(TABLES[bits]), zlib.crc32(numbers))


def block_size(k: int) -> int:
    """Weights that are rotated together in rows of k."""
    block = math.gcd(k, BLOCK)
    if block < _LEAST_BLOCK:
        raise ValueError(
            f"wanted rows of a multiple of {_LEAST_BLOCK} weights for a trellis, got {k}; "
            "leave this weight as it is, or take fp8_rows32"
        )
    return block


@functools.cache
def rotations(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric orthogonal matrices: Hadamard inside blocks, Hartley across the blocks of a row."""
    return hadamard(torch.eye(block_size(k), dtype=torch.float32, device="cpu")).to(
        device
    ), hartley(k).to(device)


@functools.cache
def hartley(k: int) -> torch.Tensor:
    """How the n blocks of a row of k are mixed: [n, n] float32, symmetric and orthogonal."""
    place = torch.arange(k // block_size(k), dtype=torch.float64, device="cpu")
    angle = place[:, None] * place * (2 * math.pi / len(place))
    return ((angle.cos() + angle.sin()) / len(place) ** 0.5).float()


def rotate(w: torch.Tensor) -> torch.Tensor:
    """Mix every weight of a row [..., K] float32 with every other; its own inverse."""
    inside, across = rotations(w.shape[-1], w.device)
    return (across @ (w.unflatten(-1, (len(across), -1)) @ inside)).flatten(-2)


def normalize(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, K] over their root mean squares, and these [R, 1], never zero."""
    # Divided by the largest first: squares of very small or large numbers are none.
    largest = y.abs().amax(-1, keepdim=True).clamp(min=_TINY)
    y = y / largest
    size = y.square().mean(-1, keepdim=True).sqrt().clamp(min=_TINY)
    return y / size, largest * size


def windows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Last ten bits of the stream up to each code: codes [..., T] to [..., T] int32."""
    codes = codes.int()
    window = codes.clone()
    for back in range(1, -(-WINDOW // bits)):
        window[..., back:] |= codes[..., :-back] << back * bits
    return window.bitwise_and_(STATES - 1)


def viterbi(y: torch.Tensor, table: torch.Tensor, bits: int, state: torch.Tensor) -> torch.Tensor:
    """Find the path of windows nearest to rows y, each beginning behind its state.

    Args:
        y: [R, K] float32, K even.
        table: [1024, 2], the pair of each window.
        bits: of one code.
        state: [R] int64, windows before the first pair.

    Returns:
        Windows [K / 2, R] int64.
    """
    rows, steps = len(y), y.shape[1] // 2
    compiled = library(CPU) if y.device.type == "cpu" else None
    if compiled is not None:
        return _viterbi_in_c(compiled, y, table, bits, state)
    choices, heads = 1 << bits, STATES >> bits
    targets = y.T.reshape(steps, 2, rows)
    own, cross = table.square().sum(1, keepdim=True), -2 * table
    # Of every window and step, so that the way back can ask again which one came before.
    cost = y.new_empty(steps + 1, STATES, rows)
    cost[0] = _NEVER
    cost[0].scatter_(0, state[None], 0.0)
    best = y.new_empty(heads, rows)
    for t in range(steps):
        # The bits that fall out of the window number its possible predecessors.
        torch.amin(cost[t].view(choices, heads, rows), 0, out=best)
        torch.addmm(own, cross, targets[t], out=cost[t + 1])
        cost[t + 1].view(heads, choices, rows).add_(best[:, None])
    window = cost[steps].argmin(0)
    path = torch.empty(steps, rows, dtype=torch.int64, device=y.device)
    row = torch.arange(rows, device=y.device)
    for t in reversed(range(steps)):
        path[t] = window
        head = window >> bits
        before = cost[t].view(choices, heads * rows)[:, head * rows + row]
        window = before.argmin(0) * heads + head
    return path


def _viterbi_in_c(
    compiled: ctypes.CDLL, y: torch.Tensor, table: torch.Tensor, bits: int, state: torch.Tensor
) -> torch.Tensor:
    rows, steps = len(y), y.shape[1] // 2
    own, cross = table.square().sum(1), (-2 * table).T.contiguous()
    scratch = torch.empty((steps + 1) * STATES + steps * _MOST_HEADS)
    path = torch.empty(steps, rows, dtype=torch.int64)
    tensors = (y.contiguous(), own, *cross, state.contiguous(), scratch, path)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    compiled.dsv4_viterbi(*pointers, *map(ctypes.c_int64, (rows, steps, bits)))
    return path


def _trellis_format(name: str, trellis: Trellis) -> WeightFormat:
    return WeightFormat(
        name=name,
        bits=trellis.bits / 2,
        group=BLOCK,
        parts=trellis.parts,
        pack=trellis.pack,
        unpack=trellis.unpack,
        tables=table_checksum(trellis.bits),
    )


TRELLISES = {f"trellis{bits / 2:g}": Trellis(bits) for bits in (4, 5, 6, 7, 8)}
TRELLIS2, TRELLIS2_5, TRELLIS3, TRELLIS3_5, TRELLIS4 = (
    register_format(_trellis_format(name, trellis)) for name, trellis in TRELLISES.items()
)
