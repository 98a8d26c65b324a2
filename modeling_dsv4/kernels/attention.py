# SPDX-License-Identifier: Apache-2.0
"""Triton twin of attention with a sink over a window and chosen entries (V4 §2.3).

The reference is `ops.sink_attention` over `ops.gather_entries`, turned back by `rotary.rotate`:

```
keys(s) = window keys first[s] .. s + past   +   entries ids[s, :], or begin[s] .. end[s]
z = scale * q @ keys.T                                     # [H, keys]
p = exp(z) / (sum exp(z) + exp(sink))
o = rotate(p @ keys, conj(turn))                           # [H, C]
```

Grid: one program per (query, block of heads, split of the keys). Keys are one head, so the heads of
one query are the rows of its products: no key is read that the query did not choose, and nothing
is masked but the ends of blocks.
Tile: q [BLOCK_H, C] and an accumulator [BLOCK_H, C] in float32 stay; keys pass in blocks
[BLOCK_N, C] under an online softmax in base 2. With more than one split (few queries, many keys)
each writes its own output and logarithm of its sum, and `_combine` joins them.
Masking: ids below zero, keys outside [first, s + past] and heads beyond H load as zero and score
-inf. Running maxima start at a finite number, so that rows without a key give no NaN.
Backward: probabilities again from the saved logarithm; dq is accumulated in place, gradients of
keys and entries are added atomically in float32 (their order, so their last bits, may vary).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..ops import fp32
from ..rotary import rotate
from .launching import on_device_of

_LOG2_E = 1.4426950408889634
_VARYING = ["S", "X", "T", "past", "tokens", "splits"]


@triton.jit
def _load_rows(base, index, valid, stride, c, DOT: tl.constexpr):
    """Rows [N, C] of `base` by index [N]; rows that are not valid are zero."""
    at = index.to(tl.int64)[:, None] * stride + c[None, :]
    return tl.load(base + at, mask=valid[:, None], other=0.0).to(DOT)


@triton.jit
def _entry_index(ids, j, begin, end, id_stop, BY_ID: tl.constexpr):
    """Which entries the lanes `j` stand for, and whether they are there."""
    if BY_ID:
        index = tl.load(ids + j, mask=j < id_stop, other=-1)
        valid = index >= 0
        index = tl.where(valid, index, 0)
    else:
        index = begin + j
        valid = index < end
    return index, valid


@triton.jit
def _step(q, k, valid, acc, m, l, scale, PRECISION: tl.constexpr):
    """One block of keys of the online softmax, in base 2."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    z = tl.where(valid[None, :], z, float("-inf"))
    new = tl.maximum(m, tl.max(z, 1))
    p = tl.exp2(z - new[:, None])
    fade = tl.exp2(m - new)
    l = l * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(k.dtype), k, acc * fade[:, None], input_precision=PRECISION)
    return acc, new, l


@triton.jit
def _turn_back(o, turn, BLOCK_H: tl.constexpr, C: tl.constexpr, PLAIN: tl.constexpr,
               ROTARY: tl.constexpr):  # fmt: skip
    """Turn channels PLAIN to PLAIN + ROTARY of o [BLOCK_H, C] by the conjugate of `turn`."""
    pair = tl.arange(0, C // 2)
    at = pair - PLAIN // 2
    turns = (at >= 0) & (at < ROTARY // 2)
    cos = tl.load(turn + 2 * at, mask=turns, other=1.0)[None, :]
    sin = tl.load(turn + 2 * at + 1, mask=turns, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(o, [BLOCK_H, C // 2, 2]))
    turned = tl.join(even * cos + odd * sin, odd * cos - even * sin)
    return tl.reshape(turned, [BLOCK_H, C])


@triton.jit(do_not_specialize=_VARYING)
def attend_forward(
    q, keys, entries, first, ids, begin, end, sinks, turn, out, lse,
    S, H, X, T, K, past, window, scale, tokens, splits,
    C: tl.constexpr, PLAIN: tl.constexpr, ROTARY: tl.constexpr,
    ENTRIES: tl.constexpr, BY_ID: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query, one block of heads, one split of its keys."""
    blocks_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // blocks_h).to(tl.int64)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    c, n = tl.arange(0, C), tl.arange(0, BLOCK_N)
    b, s = token // S, (token % S).to(tl.int32)
    real = h < H
    rows = h[:, None] * C + c[None, :]
    qh = tl.load(q + token * H * C + rows, mask=real[:, None], other=0.0).to(DOT)
    if SPLIT:
        m = tl.full([BLOCK_H], -1e38, tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
    else:
        sink = tl.load(sinks + h, mask=real, other=0.0)
        m = tl.minimum(tl.maximum(sink * 1.4426950408889634, -1e38), 3e38)
        l = tl.full([BLOCK_H], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_H, C], tl.float32)

    stop = s + past + 1
    low = tl.maximum(tl.maximum(tl.load(first + token), stop - window), 0)
    share = tl.cdiv(tl.cdiv(stop - low, BLOCK_N), splits) * BLOCK_N
    stop = tl.minimum(stop, low + (split + 1) * share)
    for at in tl.range(low + split * share, stop, BLOCK_N, num_stages=STAGES):
        x = at + n
        k = _load_rows(keys + b * X * C, x, x < stop, C, c, DOT)
        acc, m, l = _step(qh, k, x < stop, acc, m, l, scale, PRECISION)

    if ENTRIES:
        if BY_ID:
            low, high, count = 0, 0, K
        else:
            low, high = tl.load(begin + token), tl.load(end + token)
            count = high - low
        share = tl.cdiv(tl.cdiv(count, BLOCK_N), splits) * BLOCK_N
        stop = tl.minimum(count, (split + 1) * share)
        for at in tl.range(split * share, stop, BLOCK_N, num_stages=STAGES):
            index, valid = _entry_index(ids + token * K, at + n, low, high, stop, BY_ID)
            k = _load_rows(entries + b * T * C, index, valid, C, c, DOT)
            acc, m, l = _step(qh, k, valid, acc, m, l, scale, PRECISION)

    # Parts lie [splits, tokens, H, C]; a whole is a part that stands alone.
    token = split * tokens + token
    l = tl.where(l > 0, l, 1e-38)
    o = acc / l[:, None]
    if ROTARY > 0 and not SPLIT:
        o = _turn_back(o, turn + token * ROTARY, BLOCK_H, C, PLAIN, ROTARY)
    tl.store(out + token * H * C + rows, o.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + token * H + h, m + tl.log2(l), mask=real)


@triton.jit(do_not_specialize=_VARYING)
def attend_combine(
    parts, parts_lse, sinks, turn, out, lse, H, tokens, splits,
    C: tl.constexpr, PLAIN: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Join the splits of one query and one block of heads, and add the sink."""
    blocks_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // blocks_h).to(tl.int64)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = h < H
    rows = h[:, None] * C + tl.arange(0, C)[None, :]
    sink = tl.load(sinks + h, mask=real, other=0.0)
    m = tl.minimum(tl.maximum(sink * 1.4426950408889634, -1e38), 3e38)
    l = tl.full([BLOCK_H], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_H, C], tl.float32)
    for split in tl.range(0, splits):
        at = split * tokens + token
        part_lse = tl.load(parts_lse + at * H + h, mask=real, other=-1e38)
        part = tl.load(parts + at * H * C + rows, mask=real[:, None], other=0.0)
        new = tl.maximum(m, part_lse)
        weight, fade = tl.exp2(part_lse - new), tl.exp2(m - new)
        l = l * fade + weight
        acc = acc * fade[:, None] + part * weight[:, None]
        m = new
    o = acc / l[:, None]
    if ROTARY > 0:
        o = _turn_back(o, turn + token * ROTARY, BLOCK_H, C, PLAIN, ROTARY)
    tl.store(out + token * H * C + rows, o.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + token * H + h, m + tl.log2(l), mask=real)


@triton.jit
def _step_back(q, do, k, valid, dq, lse, delta, scale, soft, dk_base, index, c, stride,
               PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys: adds to dq, and atomically to the gradient of the keys."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.where(valid[None, :], tl.exp2(z - lse[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(k), input_precision=PRECISION)
    dz = (p * (dp - delta[:, None]) * soft).to(k.dtype)
    dq = tl.dot(dz, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(dz), q, input_precision=PRECISION)
    dk = tl.dot(tl.trans(p.to(k.dtype)), do, dk, input_precision=PRECISION)
    at = index.to(tl.int64)[:, None] * stride + c[None, :]
    tl.atomic_add(dk_base + at, dk, mask=valid[:, None], sem="relaxed")
    return dq


@triton.jit(do_not_specialize=_VARYING)
def attend_backward(
    q, keys, entries, first, ids, begin, end, grad, lse, delta, dq, dkeys, dentries,
    S, H, X, T, K, past, window, scale, soft,
    C: tl.constexpr, ENTRIES: tl.constexpr, BY_ID: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query, one block of heads: its dq, and its share of dkeys and dentries."""
    blocks_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // blocks_h).to(tl.int64)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, n = tl.arange(0, C), tl.arange(0, BLOCK_N)
    b, s = token // S, (token % S).to(tl.int32)
    real = h < H
    rows = token * H * C + h[:, None] * C + c[None, :]
    qh = tl.load(q + rows, mask=real[:, None], other=0.0).to(DOT)
    do = tl.load(grad + rows, mask=real[:, None], other=0.0).to(DOT)
    # Heads that are not there: infinite, so that their probabilities are zero.
    row_lse = tl.load(lse + token * H + h, mask=real, other=float("inf"))
    row_delta = tl.load(delta + token * H + h, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_H, C], tl.float32)

    stop = s + past + 1
    low = tl.maximum(tl.maximum(tl.load(first + token), stop - window), 0)
    for at in tl.range(low, stop, BLOCK_N, num_stages=STAGES):
        x = at + n
        k = _load_rows(keys + b * X * C, x, x < stop, C, c, DOT)
        acc = _step_back(qh, do, k, x < stop, acc, row_lse, row_delta, scale, soft,
                         dkeys + b * X * C, x, c, C, PRECISION)  # fmt: skip

    if ENTRIES:
        if BY_ID:
            low, high, count = 0, 0, K
        else:
            low, high = tl.load(begin + token), tl.load(end + token)
            count = high - low
        for at in tl.range(0, count, BLOCK_N, num_stages=STAGES):
            index, valid = _entry_index(ids + token * K, at + n, low, high, count, BY_ID)
            k = _load_rows(entries + b * T * C, index, valid, C, c, DOT)
            acc = _step_back(qh, do, k, valid, acc, row_lse, row_delta, scale, soft,
                             dentries + b * T * C, index, c, C, PRECISION)  # fmt: skip
    tl.store(dq + rows, acc.to(dq.dtype.element_ty), mask=real[:, None])


class Tile(NamedTuple):
    """Heads and keys of a program's tile, its warps, and the stages of its loads."""

    heads: int
    keys: int
    warps: int
    stages: int


# Largest shared memory of each, C = 512: 66 KiB in float32; in half precision 49, 66, 192 and (for
# tensor memory) 161 KiB forward, 96 and 128 KiB backward. Capabilities 8.6, 8.9, 12.0 have 99 KiB.
_EXACT = Tile(16, 16, 4, 1)
_NARROW, _COMMON = Tile(16, 32, 4, 2), Tile(32, 32, 8, 2)
_WIDE, _WIDE_TENSOR = Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)
_BACK_EXACT, _BACK_COMMON, _BACK_WIDE = Tile(16, 16, 8, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)


class Reads(NamedTuple):
    """What every query reads, integers of [B, S]: see `attend`."""

    first: torch.Tensor
    ids: torch.Tensor | None
    begin: torch.Tensor | None
    end: torch.Tensor | None
    past: int
    window: int


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    entries: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
    reads: Reads,
    turn: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attend to window keys and entries, with a sink, and turn the output back.

    Args:
        q: [B, S, H, C].
        keys: [B, X, C], X = past + S: query s stands at key s + past and sees the last `window`.
        entries: [B, T, C] or None.
        sinks: [H] float32.
        scale: of the scores.
        reads: `first` [B, S], the first key that a query may see (its document's); then either
            `ids` [B, S, K], below zero = none, or the range of entries `begin` to `end` [B, S].
        turn: [B, S, R/2, 2] cosine and sine: the output's last R channels are turned back by it.
        tile: measured sizes of this device by default.
        splits: programs that share the keys of one query; by default enough to fill the device.

    Returns:
        [B, S, H, C] in q's dtype.
    """
    c = q.shape[-1]
    if q.numel() == 0:
        return q * 1.0
    real = None if turn is None else turn.contiguous()
    width = max(16, triton.next_power_of_2(c))
    if width != c:
        pad = (0, width - c)
        q, keys = F.pad(q, pad), F.pad(keys, pad)
        entries = None if entries is None else F.pad(entries, pad)
    if entries is not None and (entries.shape[1] == 0 or _numel(reads.ids) == 0):
        entries = None
    sizes = _Sizes.of(q, keys, entries, reads, c, tile, splits)
    with on_device_of(q):
        out = _Attend.apply(q, keys, entries, sinks, real, scale, reads, sizes)
    return out[..., :c]


def _numel(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.numel()


class _Sizes(NamedTuple):
    """How the grid is cut: tiles forward and backward, splits, real channels of the padded ones."""

    tile: Tile
    back: Tile
    splits: int
    channels: int

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        keys: torch.Tensor,
        entries: torch.Tensor | None,
        reads: Reads,
        channels: int,
        tile: Tile | None,
        splits: int | None,
    ) -> _Sizes:
        b, s, h, _ = q.shape
        if not q.is_cuda:
            small = Tile(16, 16, 4, 1)
            return cls(tile or small, tile or small, splits or 1, channels)
        device = torch.cuda.get_device_properties(q.device)
        count = min(reads.window, keys.shape[1])
        if entries is not None:
            count += entries.shape[1] if reads.ids is None else reads.ids.shape[2]
        few = 2 * b * s * triton.cdiv(h, 64) <= device.multi_processor_count
        forward, back = _tiles(device, q.dtype, h, few)
        forward = tile or forward
        if splits is None:
            programs = b * s * triton.cdiv(h, forward.heads)
            most = triton.cdiv(count, forward.keys)
            splits = max(1, min(most, 2 * device.multi_processor_count // programs)) if few else 1
        return cls(forward, tile or back, splits, channels)


def _tiles(device: Any, dtype: torch.dtype, heads: int, few: bool) -> tuple[Tile, Tile]:
    """Tiles forward and backward for the shared memory there is."""
    if dtype is torch.float32:
        return _EXACT, _BACK_EXACT
    roomy = device.shared_memory_per_block_optin >= 200 << 10
    back = _BACK_WIDE if device.shared_memory_per_block_optin >= 136 << 10 else _BACK_COMMON
    if heads <= 16:
        return _NARROW, back._replace(heads=16)
    if few:
        return _NARROW, back
    if not roomy or heads <= 32:
        return _COMMON, back
    return (_WIDE if device.major < 10 else _WIDE_TENSOR), back


def dot_dtype(x: torch.Tensor) -> Any:
    """What products take: the interpreter has no products in half precision."""
    if not x.is_cuda or x.dtype is torch.float32:
        return tl.float32
    return tl.bfloat16 if x.dtype is torch.bfloat16 else tl.float16


def precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _int32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int32).contiguous()


class _Attend(torch.autograd.Function):
    """The kernels as one differentiable function of queries, keys, entries and sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        keys: torch.Tensor,
        entries: torch.Tensor | None,
        sinks: torch.Tensor,
        turn: torch.Tensor | None,
        scale: float,
        reads: Reads,
        sizes: _Sizes,
    ) -> torch.Tensor:
        q, keys, sinks = q.contiguous(), keys.contiguous(), sinks.float().contiguous()
        entries = None if entries is None else entries.contiguous()
        by_id = reads.ids is not None
        # What is not there is never loaded: any integers stand for it.
        first = _int32(reads.first)
        ids, begin, end = (
            first if x is None else _int32(x) for x in (reads.ids, reads.begin, reads.end)
        )
        places = (first, ids, begin, end, reads.past, reads.window)
        out, lse = _launch_forward(q, keys, entries, sinks, turn, scale, places, by_id, sizes)
        ctx.save_for_backward(q, keys, entries, sinks, turn, first, ids, begin, end, out, lse)
        ctx.scale, ctx.reads, ctx.by_id, ctx.sizes = scale, places[4:], by_id, sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, keys, entries, sinks, turn, first, ids, begin, end, out, lse = ctx.saved_tensors
        b, s, h, c = q.shape
        # Turning keeps the product of output and gradient, which is all the sink needs.
        delta = (fp32(grad) * fp32(out)).sum(-1)
        if turn is not None:
            real = grad[..., : ctx.sizes.channels]
            real = rotate(real, turn[:, :, None])
            grad = F.pad(real, (0, c - real.shape[-1]))
        dq = torch.empty_like(q)
        dkeys = torch.zeros(keys.shape, dtype=torch.float32, device=q.device)
        some = entries is not None
        dentries = torch.zeros_like(entries, dtype=torch.float32) if some else dkeys
        tile, (past, window) = ctx.sizes.back, ctx.reads
        read = entries if some else keys
        grad = grad.contiguous()
        attend_backward[(b * s * triton.cdiv(h, tile.heads),)](
            q, keys, read, first, ids, begin, end, grad, lse, delta, dq, dkeys,
            dentries, s, h, keys.shape[1], read.shape[1], ids.shape[-1], past, window,
            ctx.scale * _LOG2_E, ctx.scale, C=c, ENTRIES=some, BY_ID=ctx.by_id,
            BLOCK_H=tile.heads, BLOCK_N=tile.keys, STAGES=tile.stages, DOT=dot_dtype(q),
            PRECISION=precision(), num_warps=tile.warps,
        )  # fmt: skip
        weight = torch.exp2((sinks * _LOG2_E).clamp(-1e38, 3e38) - lse)
        dsinks = -(weight * delta).sum((0, 1))
        found = dentries.to(entries.dtype) if some else None
        return dq, dkeys.to(keys.dtype), found, dsinks, None, None, None, None


def _launch_forward(
    q: torch.Tensor,
    keys: torch.Tensor,
    entries: torch.Tensor | None,
    sinks: torch.Tensor,
    turn: torch.Tensor | None,
    scale: float,
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int],
    by_id: bool,
    sizes: _Sizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, C] and the base-2 logarithm of each row's sum [B, S, H] float32."""
    (b, s, h, c), (tile, splits) = q.shape, (sizes.tile, sizes.splits)
    first, ids, begin, end, past, window = places
    tokens, blocks = b * s, triton.cdiv(h, tile.heads)
    out = torch.empty_like(q)
    lse = torch.empty(b, s, h, dtype=torch.float32, device=q.device)
    rotary = 0 if turn is None else turn.shape[-2] * 2
    turns = sinks if turn is None else turn
    plain = sizes.channels - rotary
    parts, parts_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        parts_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    read = keys if entries is None else entries
    attend_forward[(tokens * blocks, splits)](
        q, keys, read, first, ids, begin, end, sinks, turns, parts, parts_lse, s, h,
        keys.shape[1], read.shape[1], ids.shape[-1], past, window, scale * _LOG2_E, tokens,
        splits, C=c, PLAIN=plain, ROTARY=rotary, ENTRIES=entries is not None, BY_ID=by_id,
        SPLIT=splits > 1, BLOCK_H=tile.heads, BLOCK_N=tile.keys, STAGES=tile.stages,
        DOT=dot_dtype(q), PRECISION=precision(), num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        attend_combine[(tokens * triton.cdiv(h, 2),)](
            parts, parts_lse, sinks, turns, out, lse, h, tokens, splits, C=c, PLAIN=plain,
            ROTARY=rotary, BLOCK_H=2, num_warps=4,
        )  # fmt: skip
    return out, lse
