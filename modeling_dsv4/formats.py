# SPDX-License-Identifier: Apache-2.0
"""Number formats of the releases: the one packer of the house, on torch alone.

| format | bits | values | scale |
|---|---|---|---|
| E4M3 (`fn`) | 8 | up to 448, no infinities, 0x7f and 0xff are NaN | one E8M0 per block |
| E2M1 | 4 | 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives | E8M0 per 32 of a row, or E4M3 per 16 |
| E8M0 | 8 | byte b is 2^(b - 127), 255 is NaN | |

Scales in E8M0 are `2^ceil(log2(amax / largest))`, so a weight is a short mantissa times a power of
two: exact in bfloat16, and nothing is lost by computing in any wider type. The exponent is read
from the bits of amax; a logarithm in floating point would be wrong next to the powers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP4_GROUP = 32
FP4_E4M3_GROUP = 16
# Magnitudes by code; bit 3 of a code is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Least amax of a block: keeps zero blocks free of NaN.
_FP8_FLOOR = 1e-4
_FP4_FLOOR = 6 * 2.0**-126
_FP4_E4M3_FLOOR = 6 * 2.0**-9

# Words as wide as two numbers: what moves a pair of them at once, whatever it holds.
_WORDS = {
    torch.bfloat16: torch.int32,
    torch.float32: torch.int64,
    torch.float64: torch.complex128,
}
# On a CPU, bytes are looked up this many at a time: their int32 indices then stay in cache.
_LOOKUP_CHUNK = 1 << 18
# Rows rounded to FP4 at a time: the many temporaries then reuse the same memory.
_PACK_ROWS = 128


# --- scales -------------------------------------------------------------------------------------


def ceil_scale(amax: torch.Tensor, largest: float, floor: float) -> torch.Tensor:
    """`2^ceil(log2(max(amax, floor) / largest))` of float32 amax, as float8_e8m0fnu."""
    mantissa, exponent = math.frexp(largest)
    # amax = m 2^e against largest = l 2^x, both mantissas in [1, 2): e - x, and one more if m > l.
    past = 0x7FFFFF - round((2 * mantissa - 1) * 2**23)
    bits = amax.clamp(min=floor).view(torch.int32)
    byte = ((bits + past) >> 23) - (exponent - 1)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def _tiles(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut an axis into its whole blocks and the rest: elements, blocks, elements a block."""
    whole, rest = divmod(size, block)
    if whole:
        yield slice(0, whole * block), slice(0, whole), block
    if rest:
        yield slice(whole * block, size), slice(whole, whole + 1), rest


def _blocks(
    x: torch.Tensor, rows: int, columns: int
) -> Iterator[tuple[torch.Tensor, tuple[Any, ...]]]:
    """Views [..., r, rows, c, columns] of x [..., R, C] and where their scales [..., r, c] lie."""
    for row, row_block, height in _tiles(x.shape[-2], rows):
        for column, column_block, width in _tiles(x.shape[-1], columns):
            part = x[..., row, column].unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            yield part, (..., row_block, column_block)


def _grid(shape: torch.Size | tuple[int, ...], rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of [..., R, C]; the last blocks may be partial."""
    return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def _block_amax(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    amax = x.new_empty(_grid(x.shape, rows, columns))
    for part, at in _blocks(x, rows, columns):
        amax[at] = part.abs().amax(dim=(-3, -1))
    if not amax.isfinite().all():
        raise ValueError("wanted finite numbers to quantize, got infinities or NaN")
    return amax


def _scale_blocks_(x: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Multiply x [..., R, C] in place by its blocks' scales [..., r, c]."""
    if scale.shape != _grid(x.shape, rows, columns):
        raise ValueError(
            f"wanted scales {list(_grid(x.shape, rows, columns))} for values {list(x.shape)} in "
            f"blocks of {rows}x{columns}, got {list(scale.shape)}"
        )
    for part, at in _blocks(x, rows, columns):
        part.mul_(scale[at][..., :, None, :, None])
    return x


def _working(dtype: torch.dtype) -> torch.dtype:
    """Type to dequantize in: float16 cannot hold the scales, so it is rounded from float32."""
    return torch.float32 if dtype is torch.float16 else dtype


# --- bytes to numbers ---------------------------------------------------------------------------


@functools.cache
def _byte_table(fp4: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each of 256 bytes stands for: one E4M3 number, or two E2M1 numbers as one wide word."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    if not fp4:
        return byte.view(torch.float8_e4m3fn).to(dtype)
    values = _e2m1_table(device).to(dtype)
    pairs = torch.stack((values[(byte & 15).int()], values[(byte >> 4).int()]), dim=-1)
    return pairs.view(_WORDS[dtype]).squeeze(-1)


@functools.cache
def _e2m1_table(device: torch.device) -> torch.Tensor:
    """The number of each of 16 E2M1 codes, float32."""
    values = torch.tensor(E2M1_VALUES, device=device)
    return torch.cat((values, -values))


def _look_up(data: torch.Tensor, fp4: bool, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of packed bytes [..., n]: [..., n] of E4M3, or [..., 2n] of E2M1."""
    if data.device.type == "meta":
        return data.new_empty((*data.shape[:-1], data.shape[-1] * (1 + fp4)), dtype=dtype)
    table = _byte_table(fp4, dtype, data.device)
    flat = data.reshape(-1)
    out = torch.empty(flat.shape, dtype=table.dtype, device=data.device)
    step = _LOOKUP_CHUNK if data.device.type == "cpu" else max(flat.numel(), 1)
    for part, byte in zip(out.split(step), flat.split(step), strict=True):
        torch.index_select(table, 0, byte.int(), out=part)
    return out.view(data.shape).view(dtype)


# --- FP8 in blocks ------------------------------------------------------------------------------


def _quantize_fp8(w: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.detach().float()
    scale = ceil_scale(_block_amax(w, rows, columns), E4M3_MAX, _FP8_FLOOR)
    q = _scale_blocks_(w.clone(), scale.float().reciprocal(), rows, columns)
    return q.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    work = _working(dtype)
    w = _look_up(q.view(torch.uint8), False, work)
    return _scale_blocks_(w, scale.to(work), rows, columns).to(dtype)


def quantize_fp8_block(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., out, in] to E4M3 with one E8M0 scale a block x block square.

    Returns:
        [..., out, in] float8_e4m3fn and [..., ceil(out / block), ceil(in / block)]
        float8_e8m0fnu; the last blocks may be partial.
    """
    return _quantize_fp8(w, block, block)


def dequantize_fp8_block(
    q: torch.Tensor, scale: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """Inverse of `quantize_fp8_block`: [..., out, in] in `dtype`, exact from bfloat16 upwards."""
    return _dequantize_fp8(q, scale, block, block, dtype)


def quantize_fp8_rows(w: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows [..., R, K] to E4M3 with one E8M0 scale [..., R, ceil(K / group)] a group."""
    return _quantize_fp8(w, 1, group)


def dequantize_fp8_rows(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, group: int = 32
) -> torch.Tensor:
    """Inverse of `quantize_fp8_rows`: [..., R, K] in `dtype`."""
    return _dequantize_fp8(q, scale, 1, group, dtype)


# --- FP4 ----------------------------------------------------------------------------------------


def _e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 codes (uint8) of float32 x; ties go to the even code, beyond 6 saturates."""
    v = x.abs()
    codes = (v > 0.25).to(torch.uint8)
    for half in (1.25, 2.5, 5.0):
        codes += v > half
    # Below these halves lies an odd code, so the half itself goes up.
    for half in (0.75, 1.75, 3.5):
        codes += v >= half
    return codes + (x.signbit() * 8).to(torch.uint8)


def pack_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., R, K] to E2M1 with one E8M0 scale per 32 of a row; K even.

    Returns:
        Codes [..., R, K / 2] uint8, the even column in the low nibble, and scales
        [..., R, ceil(K / 32)] float8_e8m0fnu.
    """
    _check_even(w)
    k = w.shape[-1]
    packed = [_pack_fp4_rows(part) for part in w.detach().reshape(-1, k).split(_PACK_ROWS)]
    codes, scale = (torch.cat(parts) for parts in zip(*packed, strict=True))
    return codes.view(*w.shape[:-1], k // 2), scale.view(*w.shape[:-1], -1)


def _check_even(w: torch.Tensor) -> None:
    if w.shape[-1] % 2:
        raise ValueError(f"wanted rows of an even length for FP4 codes, got {list(w.shape)}")


def _pack_fp4_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.float()
    scale = ceil_scale(_block_amax(w, 1, FP4_GROUP), E2M1_MAX, _FP4_FLOOR)
    x = _scale_blocks_(w.clone(), scale.float().reciprocal(), 1, FP4_GROUP)
    codes = _e2m1_codes(x)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def unpack_fp4(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `pack_fp4` and `pack_fp4_e4m3`: [..., R, K] in `dtype`, exact from bfloat16 up."""
    work = _working(dtype)
    group = FP4_E4M3_GROUP if scale.dtype == torch.float8_e4m3fn else FP4_GROUP
    w = _look_up(codes.view(torch.uint8), True, work)
    return _scale_blocks_(w, scale.to(work), 1, group).to(dtype)


def _e4m3_scale(amax: torch.Tensor) -> torch.Tensor:
    """`max(amax, 6 * 2^-9) / 6` of float32 amax, rounded to float8_e4m3fn."""
    scale = amax.clamp(min=_FP4_E4M3_FLOOR) / E2M1_MAX
    # Casts beyond 448 saturate on some devices and give NaN on others.
    return scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def pack_fp4_e4m3(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., R, K] to E2M1 with one E4M3 scale per 16 of a row; K even.

    What `simulate_fp4_e4m3` gave is kept bit for bit.

    Returns:
        Codes [..., R, K / 2] uint8, the even column in the low nibble, and scales
        [..., R, ceil(K / 16)] float8_e4m3fn.
    """
    _check_even(w)
    w = w.detach().float()
    amax = _block_amax(w, 1, FP4_E4M3_GROUP)
    # Scales that small are whole steps apart: rounding amax = 1.5 to 1.67 steps of 6 gives two
    # steps and 4 for the largest code, from which dividing by 6 would not find two steps again.
    scale = torch.where(amax == 2.0**-6, 2.0**-8, _e4m3_scale(amax).float())
    codes = _e2m1_codes(w / scale.repeat_interleave(FP4_E4M3_GROUP, -1)[..., : w.shape[-1]])
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale.to(torch.float8_e4m3fn)


def fp4_to_fp8_block(
    codes: torch.Tensor, scale: torch.Tensor, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recast FP4 weights to FP8 blocks without any rounding, or raise ValueError.

    A block's scale is its largest FP4 scale over 2^6 (6 * 2^6 = 384 fits E4M3). That is exact
    while the scales of non-zero values inside one block differ by at most 2^14.
    """
    w = unpack_fp4(codes, scale, torch.float32)
    byte = scale.view(torch.uint8)
    rows, columns = block, max(block // FP4_GROUP, 1)
    top = byte.new_empty(_grid(byte.shape, rows, columns))
    for part, at in _blocks(byte, rows, columns):
        top[at] = part.amax(dim=(-3, -1))
    fp8_scale = (top.int() - 6).clamp_(min=0).to(torch.uint8).view(torch.float8_e8m0fnu)
    q = _scale_blocks_(w.clone(), fp8_scale.float().reciprocal(), block, block)
    q = q.to(torch.float8_e4m3fn)
    wrong = dequantize_fp8_block(q, fp8_scale, block, torch.float32) != w
    if wrong.any():
        raise ValueError(
            f"wanted FP4 scales within 2^14 of each other inside every {block}x{block} block, got "
            f"{int(wrong.sum())} values that FP8 would round; keep these weights in FP4"
        )
    return q, fp8_scale


# --- simulation of activation rounding ----------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """Round in the forward pass; pass the gradient as if nothing had happened."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rounding: Callable[[torch.Tensor], torch.Tensor],
        group: int,
    ) -> torch.Tensor:
        if x.shape[-1] % group:
            raise ValueError(
                f"wanted a last axis of whole groups of {group} to round, got {list(x.shape)}"
            )
        return rounding(x.float().unflatten(-1, (-1, group))).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


def _amax(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=-1, keepdim=True)


def _round_fp8(x: torch.Tensor) -> torch.Tensor:
    s = ceil_scale(_amax(x), E4M3_MAX, _FP8_FLOOR).float()
    return (x / s).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * s


def _e2m1_round(x: torch.Tensor) -> torch.Tensor:
    codes = _e2m1_codes(x)
    return _e2m1_table(x.device).index_select(0, codes.flatten().int()).view(x.shape)


def _round_fp4(x: torch.Tensor) -> torch.Tensor:
    s = ceil_scale(_amax(x), E2M1_MAX, _FP4_FLOOR).float()
    return _e2m1_round(x / s) * s


def _round_fp4_e4m3(x: torch.Tensor) -> torch.Tensor:
    s = _e4m3_scale(_amax(x)).float()
    return _e2m1_round(x / s) * s


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """Round [..., C] to E4M3 and back, one power-of-two scale per `group` channels."""
    return _StraightThrough.apply(x, _round_fp8, group)


def simulate_fp4(x: torch.Tensor, group: int = FP4_GROUP) -> torch.Tensor:
    """Round [..., C] to E2M1 and back, one power-of-two scale per `group` channels."""
    return _StraightThrough.apply(x, _round_fp4, group)


def simulate_fp4_e4m3(x: torch.Tensor, group: int = FP4_E4M3_GROUP) -> torch.Tensor:
    """Round [..., C] to E2M1 and back, one E4M3 scale (no power of two) per `group` channels."""
    return _StraightThrough.apply(x, _round_fp4_e4m3, group)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform of [..., C] over sqrt(C), C a power of two; its own inverse."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"wanted a last axis that is a power of two, got {list(x.shape)}")
    y, half = x.float(), 1
    while half < size:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return (y * size**-0.5).to(x.dtype)


# --- registry -----------------------------------------------------------------------------------

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [..., out, in] is stored in several tensors.

    Attributes:
        name: what configs call it.
        bits: of one code, scales not counted.
        group: weights that share a scale along a row.
        parts: shape of a weight to {suffix of the tensor's name: (dtype, shape)}. Codes have no
            suffix; rows are the last axis but one of every part, and leading axes stack.
        pack: weight to {suffix: tensor}, rounding.
        unpack: ({suffix: tensor}, dtype) to the weight.
        row_block: rows that share scales, hence rows of codes per row of every other part.
        tables: checksum of learned tables that codes point into; 0 where there are none.
    """

    name: str
    bits: float
    group: int
    parts: Callable[[Shape], dict[str, tuple[torch.dtype, Shape]]]
    pack: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    unpack: Callable[[Parts, torch.dtype], torch.Tensor]
    row_block: int = 1
    tables: int = 0

    def unpack_rows(self, parts: Parts, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows start to stop of the weight [..., out, in]; reads only the blocks they lie in."""
        first, last = start // self.row_block, -(-stop // self.row_block)
        low, high = first * self.row_block, last * self.row_block
        some = {
            suffix: part[..., first:last, :] if suffix else part[..., low:high, :]
            for suffix, part in parts.items()
        }
        return self.unpack(some, dtype)[..., start - low : stop - low, :]

    def nbytes(self, shape: Shape) -> int:
        """Bytes that a weight of this shape takes, scales included."""
        return sum(dtype.itemsize * math.prod(size) for dtype, size in self.parts(shape).values())


_FORMATS: dict[str, WeightFormat] = {}


def register_format(weight_format: WeightFormat) -> WeightFormat:
    """Make a format known by its name; the same name twice is an error."""
    if weight_format.name in _FORMATS:
        raise ValueError(f"wanted a new format name, got {weight_format.name!r} a second time")
    _FORMATS[weight_format.name] = weight_format
    return weight_format


def get_format(name: str | WeightFormat) -> WeightFormat:
    """Look a format up by name; a format itself passes."""
    if isinstance(name, WeightFormat):
        return name
    if name not in _FORMATS:
        raise ValueError(
            f"wanted a weight format out of {sorted(_FORMATS)}, got {name!r}; "
            "if it is one of the quantize package's, `import quantize` first"
        )
    return _FORMATS[name]


def _fp4_parts(
    shape: Shape, scale: torch.dtype = torch.float8_e8m0fnu, group: int = FP4_GROUP
) -> dict[str, tuple[torch.dtype, Shape]]:
    *rows, k = shape
    return {"": (torch.uint8, (*rows, k // 2)), "_scale": (scale, (*rows, -(-k // group)))}


@functools.cache
def fp8_block_format(block: int) -> WeightFormat:
    """The format of E4M3 weights with one E8M0 scale a block x block square, for any block."""

    def parts(shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        scale = (torch.float8_e8m0fnu, _grid(shape, block, block))
        return {"": (torch.float8_e4m3fn, shape), "_scale": scale}

    return WeightFormat(
        name=f"fp8_block{block}",
        bits=8,
        group=block,
        parts=parts,
        pack=lambda w: dict(zip(("", "_scale"), quantize_fp8_block(w, block), strict=True)),
        unpack=lambda p, dtype: dequantize_fp8_block(p[""], p["_scale"], block, dtype),
        row_block=block,
    )


@functools.cache
def fp8_rows_format(group: int) -> WeightFormat:
    """The format of E4M3 rows with one E8M0 scale a group, for any group."""
    return WeightFormat(
        name=f"fp8_rows{group}",
        bits=8,
        group=group,
        parts=lambda shape: {
            "": (torch.float8_e4m3fn, shape),
            "_scale": (torch.float8_e8m0fnu, _grid(shape, 1, group)),
        },
        pack=lambda w: dict(zip(("", "_scale"), quantize_fp8_rows(w, group), strict=True)),
        unpack=lambda p, dtype: dequantize_fp8_rows(p[""], p["_scale"], dtype, group),
    )


FP4 = register_format(
    WeightFormat(
        name="fp4",
        bits=4,
        group=FP4_GROUP,
        parts=_fp4_parts,
        pack=lambda w: dict(zip(("", "_scale"), pack_fp4(w), strict=True)),
        unpack=lambda p, dtype: unpack_fp4(p[""], p["_scale"], dtype),
    )
)
# Not registered: activations are kept in it, no checkpoint's weights.
FP4_E4M3 = replace(
    FP4,
    name="fp4_e4m3",
    group=FP4_E4M3_GROUP,
    parts=lambda shape: _fp4_parts(shape, torch.float8_e4m3fn, FP4_E4M3_GROUP),
    pack=lambda w: dict(zip(("", "_scale"), pack_fp4_e4m3(w), strict=True)),
)
FP8_BLOCK128 = register_format(fp8_block_format(128))
FP8_BLOCK32 = register_format(fp8_block_format(32))
FP8_ROWS32 = register_format(fp8_rows_format(32))
