# SPDX-License-Identifier: Apache-2.0
"""Every numeric operation of the model as a pure function of tensors.

Each reads like its equation. Fast twins on a GPU are chosen here and nowhere else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .kernel_choice import use_triton

if TYPE_CHECKING:
    from .cache_storage import CachedRows


def fp32(x: torch.Tensor) -> torch.Tensor:
    """Promote half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, kernels: str = "torch"
) -> torch.Tensor:
    """`w * x * rsqrt(mean(x^2) + eps)` over the last axis, in float32, rounded once."""
    if weight is not None and use_triton(kernels, x):
        from .kernels import norm

        return norm.rms_norm(x, weight, eps)
    y = fp32(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * fp32(weight)
    return y.to(x.dtype)


def swiglu(
    gate_up: torch.Tensor,
    limit: float | None,
    weight: torch.Tensor | None = None,
    kernels: str = "torch",
) -> torch.Tensor:
    """Clamped SwiGLU of [..., 2F] -> [..., F], times a routing weight [...], in float32.

    The gate is clamped from above only, the up half on both sides.
    """
    if use_triton(kernels, gate_up):
        from .kernels import swiglu as fused

        return fused.swiglu(gate_up, limit, weight)
    gate, up = fp32(gate_up).chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    u = F.silu(gate) * up
    if weight is not None:
        u = u * weight[..., None]
    return u.to(gate_up.dtype)


# --- mixture of experts -------------------------------------------------------------------------


class ExpertRows(NamedTuple):
    """Token-expert pairs sorted by expert: `order` into the flat pairs, `token` of each, counts."""

    order: torch.Tensor
    token: torch.Tensor
    counts: list[int]


def group_by_expert(index: torch.Tensor, num_experts: int) -> ExpertRows:
    """Sort the pairs of [n, K] expert ids so that each expert's rows are contiguous.

    Ids from `num_experts` on stand for experts of other processes; their pairs are left out.
    """
    flat = index.flatten()
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    order = flat.argsort(stable=True)[: sum(counts)]
    return ExpertRows(order, order // index.shape[1], counts)


def can_group(weight: torch.Tensor) -> bool:
    """Whether torch's grouped matmul takes weights [E, out, in]: rows of whole 16 bytes."""
    if weight.is_cuda and weight.dtype is not torch.bfloat16:
        return False
    sizes = (weight.shape[1], weight.shape[2])
    aligned = all(size * weight.element_size() % 16 == 0 for size in sizes)
    return aligned and weight.dtype in (torch.float32, torch.bfloat16)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows [M, in], sorted by expert, times each expert's [out, in] -> [M, out]."""
    ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
    return F.grouped_mm(x, weight.transpose(-1, -2), offs=ends)


def gathered_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """`sum_k down_e(weight_k * swiglu(gate_up_e(x)))` with e = index_k, in fixed shapes.

    For few tokens: eagerly it copies the weights of every pair, compiled on a CPU it reads them
    once, where they are. Nothing waits for the device.

    Args:
        x: [n, D].
        gate_up: [E, 2F, D].
        down: [E, D, F].
        index: [n, K] int64; ids from E on are left out.
        weight: [n, K] float32.
        limit: of the clamps.

    Returns:
        [n, D] float32.
    """
    n, k = index.shape
    expert = index.flatten().clamp(max=len(gate_up) - 1)
    weight = weight * (index < len(gate_up))
    x = x.repeat_interleave(k, dim=0)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # A sum of products takes the rows into its loop; a matrix product wants them copied.
        h = (fp32(gate_up[expert]) * fp32(x)[:, None]).sum(-1).to(x.dtype)
        u = swiglu(h, limit, weight.flatten())
        y = (fp32(down[expert]) * fp32(u)[:, None]).sum(-1)
    else:
        u = swiglu((gate_up[expert] @ x[..., None])[..., 0], limit, weight.flatten())
        y = fp32(down[expert] @ u[..., None])[..., 0]
    return y.view(n, k, -1).sum(1)


def scatter_rows(y: torch.Tensor, token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add rows [M, D] to their tokens: float32 [n, D] for `like` [n, D]."""
    y = fp32(y)
    return torch.zeros(like.shape, dtype=y.dtype, device=y.device).index_add(0, token, y)


# --- compressors and indexer --------------------------------------------------------------------


def gated_pool(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`e = sum_w softmax_w(g) * a` per channel: [..., W, C] -> [..., C] in float32."""
    return (gates.softmax(-2) * values).sum(-2)


def pool_windows(
    slots: torch.Tensor,
    bias: torch.Tensor | None,
    overlap: torch.Tensor | None,
    kernels: str = "torch",
) -> torch.Tensor:
    """Pool windows of W tokens, alone or with the window before (V4 §2.3.1-2.3.2).

    Args:
        slots: values and gates [B, M, W, 2, C] float32; with overlap [B, M, 2W, 2, 2C], the
            window before first, of which the first C channels count, as the last C of its own do.
        bias: added to the gates by place in the window: [W, C], with overlap [W, 2C]; or None.
        overlap: [B, M] bool, which windows have one before; None where windows do not overlap.

    Returns:
        [B, M, C].
    """
    if use_triton(kernels, slots):
        from .kernels import pool

        return pool.pool_windows(slots, bias, overlap)
    values, gates = slots.unbind(3)  # [B, M, slots, width]
    if overlap is None:
        return gated_pool(values, gates if bias is None else gates + bias)
    w, c = slots.shape[2] // 2, slots.shape[4] // 2
    if bias is not None:
        gates = gates + bias.repeat(2, 1)
    values = torch.cat((values[:, :, :w, :c], values[:, :, w:, c:]), dim=2)
    gates = torch.cat((gates[:, :, :w, :c], gates[:, :, w:, c:]), dim=2)
    absent = torch.arange(2 * w, device=slots.device) < w
    absent = absent & ~overlap[..., None]  # [B, M, slots]
    return gated_pool(values, gates.masked_fill(absent[..., None], -math.inf))


def index_scores(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Lightning-indexer scores `sum_h relu(q_h . k) w_h` in float32.

    Args:
        query: [B, S, I, J].
        key: [B, T, J].
        weight: [B, S, I], already scaled.

    Returns:
        [B, S, T].
    """
    b, s, i, j = query.shape
    logits = fp32(query).reshape(b, s * i, j) @ fp32(key).transpose(1, 2)  # [B, S*I, T]
    logits = logits.relu_().view(b * s, i, -1)
    return (fp32(weight).reshape(b * s, 1, i) @ logits).view(b, s, -1)


def top_k_ascending(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k best of the last axis, ascending; among equals the earliest win.

    `torch.topk` breaks ties by length and layout; this does not, so that a longer context never
    changes what a query chose.

    Long axes are searched in two steps: the k blocks with the best maxima, then the k best inside
    them. Nothing is lost: each chosen block holds one score that beats, or equals and precedes,
    every score of a block that was not chosen.
    """
    n = scores.shape[-1]
    width = math.isqrt(n // max(k, 1))
    if width < _NARROW:
        return top_k_ascending_ref(scores, k)
    whole = n - n % width
    best = scores[..., :whole].unflatten(-1, (-1, width)).amax(-1)
    if whole < n:
        best = torch.cat((best, scores[..., whole:].amax(-1, keepdim=True)), dim=-1)
    ids = top_k_ascending(best, k)[..., None] * width + torch.arange(width, device=scores.device)
    ids = ids.flatten(-2)
    inside = scores.gather(-1, ids.clamp(max=n - 1)).masked_fill_(ids >= n, -math.inf)
    return ids.gather(-1, top_k_ascending_ref(inside, k))


# Blocks narrower than this cost more than they save.
_NARROW = 4


def top_k_ascending_ref(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`top_k_ascending` by its definition: all above the k-th best, then the earliest equals."""
    kth = scores.topk(k, dim=-1, sorted=True).values[..., -1:]
    above, tied = scores > kth, scores == kth
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))
    if scores.shape[-2:-1] != (1,):
        return chosen.nonzero()[:, -1].view(*scores.shape[:-1], k)
    # Decoding: a shape that the data decides would wait for the device and end a compiled graph.
    # The r-th chosen id goes to slot r, all others to one that is cut off.
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, k)
    at = torch.arange(scores.shape[-1], device=scores.device).expand_as(slot)
    return slot.new_zeros(*slot.shape[:-1], k + 1).scatter_(-1, slot, at)[..., :k]


# --- attention ----------------------------------------------------------------------------------


def masked_scores(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Hide keys: scores [B, H, S, T] where keep [B, S, T] is false become -inf."""
    return scores.masked_fill(~keep[:, None], -math.inf)


def sink_probabilities(
    q: torch.Tensor,
    window: torch.Tensor,
    window_keep: torch.Tensor,
    entries: torch.Tensor | None,
    entries_keep: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`softmax([q . k | q . e | sink])` without the sink's share: [B, H, S, X + T], float32.

    Arguments as `sink_attention`.
    """
    b, s, h, c = q.shape
    qf, wf = fp32(q).transpose(1, 2), fp32(window)  # [B, H, S, C]
    flat = qf.reshape(b, h * s, c)
    logits = [masked_scores((flat @ wf.transpose(1, 2)).view(b, h, s, -1) * scale, window_keep)]
    if entries is not None and entries_keep is not None:
        ef = fp32(entries)
        if ef.dim() == 3:
            z = (flat @ ef.transpose(1, 2)).view(b, h, s, -1)
        else:
            z = (qf.transpose(1, 2) @ ef.transpose(2, 3)).transpose(1, 2)
        logits.append(masked_scores(z * scale, entries_keep))
    sink = finite_sinks(sinks, qf.dtype).view(1, h, 1, 1).expand(b, h, s, 1)
    return torch.cat([*logits, sink], dim=-1).softmax(-1)[..., :-1]


def finite_sinks(sinks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sinks [H] in the scores' dtype; an infinite one takes everything without becoming NaN."""
    return sinks.to(dtype).clamp(max=torch.finfo(dtype).max)


def read_values(
    p: torch.Tensor, window: torch.Tensor, entries: torch.Tensor | None
) -> torch.Tensor:
    """`sum_t p_t k_t` of p [B, H, S, X + T] over window and entries -> [B, S, H, C], float32."""
    b, h, s, _ = p.shape
    wf, x = fp32(window), window.shape[1]
    o = (p[..., :x].reshape(b, h * s, x) @ wf).view(b, h, s, -1).transpose(1, 2)
    if entries is not None:
        ef, pe = fp32(entries), p[..., x:]
        if ef.dim() == 3:
            o = o + (pe.reshape(b, h * s, -1) @ ef).view(b, h, s, -1).transpose(1, 2)
        else:
            o = o + pe.transpose(1, 2) @ ef
    return o


def sink_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    window_keep: torch.Tensor,
    entries: torch.Tensor | None,
    entries_keep: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Shared-key attention with a sink in the denominator only, over window and entries.

    Args:
        q: [B, S, H, C].
        window: [B, X, C], keys and values at once.
        window_keep: [B, S, X] bool.
        entries: shared by the queries [B, T, C], or one set a query [B, S, K, C]; or None.
        entries_keep: [B, S, T] or [B, S, K] bool.
        sinks: [H] float32.

    Returns:
        [B, S, H, C] in q's dtype.
    """
    p = sink_probabilities(q, window, window_keep, entries, entries_keep, sinks, scale)
    return read_values(p, window, entries).to(q.dtype)


def fused_sink_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    window_keep: torch.Tensor,
    entries: torch.Tensor | None,
    entries_keep: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`sink_attention` by torch's scaled_dot_product_attention; entries shared by the queries.

    The sink is one more key, zero like its value, whose score comes from the mask. Keys have no
    heads, so a token's heads are as many queries of one head.
    """
    b, s, h, c = q.shape
    keys, keep = fp32(window), window_keep.expand(b, s, -1)
    if entries is not None and entries_keep is not None:
        keys = torch.cat((keys, fp32(entries)), dim=1)
        keep = torch.cat((keep, entries_keep.expand(b, s, -1)), dim=-1)
    seen = torch.zeros(keep.shape, dtype=keys.dtype, device=q.device).masked_fill(~keep, -math.inf)
    seen = seen[:, :, None].expand(-1, -1, h, -1)  # [B, S, H, T]
    sink = finite_sinks(sinks, keys.dtype)[:, None].expand(b, s, h, 1)
    bias = torch.cat((seen, sink), dim=-1).view(b, 1, s * h, -1)
    keys = F.pad(keys, (0, 0, 0, 1))[:, None]  # [B, 1, T + 1, C]
    flat = fp32(q).reshape(b, 1, s * h, c)
    o = F.scaled_dot_product_attention(flat, keys, keys, attn_mask=bias, scale=scale)
    return o.view(b, s, h, c).to(q.dtype)


def gather_entries(entries: CachedRows, ids: torch.Tensor) -> torch.Tensor:
    """Rows of [B, T, C] by ids [B, S, K] (negative ids give row 0) -> [B, S, K, C]."""
    if not isinstance(entries, torch.Tensor):
        return entries.take(ids)
    b, t, c = entries.shape
    base = torch.arange(b, device=ids.device).view(b, 1, 1) * t
    # An embedding look-up: its backward adds rows in parallel, that of indexing does not.
    return F.embedding(ids.clamp(min=0).long() + base, entries.reshape(b * t, c))


def chosen_mask(ids: torch.Tensor, entries: int) -> torch.Tensor:
    """Ids [B, S, K] (negative = none) -> which of the entries they name, [B, S, T] bool."""
    mask = torch.zeros(*ids.shape[:2], entries + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, torch.where(ids < 0, entries, ids).long(), True)[..., :entries]


# --- Engram -------------------------------------------------------------------------------------


def engram_gate(
    streams: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Context gate of Engram (§3.2; V4.1 release file engram.py), float32.

    `sigmoid(copysign(sqrt(max(|dot|, 1e-6)), dot))` with the dot of the two RMS-normed sides over
    sqrt(D). Near zero the slope reaches 125, so nothing here may be half precision.

    Args:
        streams: [..., N, D], raw, before any norm.
        key: [..., N, D].
        q_weight: [N, D]; only its product with k_weight matters.
        k_weight: [N, D].

    Returns:
        [..., N].
    """
    h, k = fp32(streams), fp32(key)
    r = torch.rsqrt(h.square().mean(-1) + eps) * torch.rsqrt(k.square().mean(-1) + eps)
    weight = fp32(q_weight) * fp32(k_weight)
    dot = (h * weight * k).sum(-1) * r * h.shape[-1] ** -0.5
    return torch.sigmoid(torch.copysign(dot.abs().clamp(min=1e-6).sqrt(), dot))


def engram_add(
    streams: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    live: torch.Tensor | None,
    eps: float,
    kernels: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h_n + live gate_n v` in float32, rounded once; see `engram_gate`.

    Args:
        value: [..., D].
        live: [...] bool, false where nothing is added; None = all live.

    Returns:
        the gate [..., N] as if all were live, and the streams [..., N, D].
    """
    if use_triton(kernels, streams):
        from .kernels import engram

        return engram.engram_add(streams, key, value, q_weight, k_weight, live, eps)
    gate = engram_gate(streams, key, q_weight, k_weight, eps)
    opened = gate if live is None else gate * live[..., None]
    added = opened[..., None] * fp32(value)[..., None, :]
    return gate, (fp32(streams) + added).to(streams.dtype)
