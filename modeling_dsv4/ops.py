# SPDX-License-Identifier: Apache-2.0
"""Every numeric operation of the model as a pure function of tensors.

Each reads like its equation. Fast twins on a GPU are chosen here and nowhere else.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def fp32(x: torch.Tensor) -> torch.Tensor:
    """Promote half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`w * x * rsqrt(mean(x^2) + eps)` over the last axis, in float32, rounded once."""
    y = fp32(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * fp32(weight)
    return y.to(x.dtype)


def swiglu(
    gate_up: torch.Tensor, limit: float | None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Clamped SwiGLU of [..., 2F] -> [..., F], times a routing weight [...], in float32.

    The gate is clamped from above only, the up half on both sides.
    """
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
    """Sort the pairs of [n, K] expert ids so that each expert's rows are contiguous."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
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

    Copies the weights of every pair, so it is for few tokens; nothing waits for the device.

    Args:
        x: [n, D].
        gate_up: [E, 2F, D].
        down: [E, D, F].
        index: [n, K] int64.
        weight: [n, K] float32.
        limit: of the clamps.

    Returns:
        [n, D] float32.
    """
    n, k = index.shape
    expert = index.flatten()
    h = gate_up[expert] @ x.repeat_interleave(k, dim=0)[..., None]
    u = swiglu(h[..., 0], limit, weight.flatten())
    return fp32(down[expert] @ u[..., None]).view(n, k, -1).sum(1)


def scatter_rows(y: torch.Tensor, token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add rows [M, D] to their tokens: float32 [n, D] for `like` [n, D]."""
    y = fp32(y)
    return torch.zeros(like.shape, dtype=y.dtype, device=y.device).index_add(0, token, y)


# --- compressors and indexer --------------------------------------------------------------------


def gated_pool(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`e = sum_w softmax_w(g) * a` per channel: [..., W, C] -> [..., C] in float32."""
    return (gates.softmax(-2) * values).sum(-2)


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
    """
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
    b, s, h, c = q.shape
    qf, wf = fp32(q).transpose(1, 2), fp32(window)  # [B, H, S, C]
    flat = qf.reshape(b, h * s, c)
    logits = [masked_scores((flat @ wf.transpose(1, 2)).view(b, h, s, -1) * scale, window_keep)]
    ef = None if entries is None else fp32(entries)
    if ef is not None and entries_keep is not None:
        if ef.dim() == 3:
            z = (flat @ ef.transpose(1, 2)).view(b, h, s, -1)
        else:
            z = (qf.transpose(1, 2) @ ef.transpose(2, 3)).transpose(1, 2)
        logits.append(masked_scores(z * scale, entries_keep))
    # An infinite sink takes everything; inf - inf inside the softmax would be NaN.
    sink = sinks.to(qf.dtype).clamp(max=torch.finfo(qf.dtype).max)
    sink = sink.view(1, h, 1, 1).expand(b, h, s, 1)
    p = torch.cat([*logits, sink], dim=-1).softmax(-1)
    x = wf.shape[1]
    o = (p[..., :x].reshape(b, h * s, x) @ wf).view(b, h, s, c).transpose(1, 2)
    if ef is not None:
        pe = p[..., x:-1]
        if ef.dim() == 3:
            o = o + (pe.reshape(b, h * s, -1) @ ef).view(b, h, s, c).transpose(1, 2)
        else:
            o = o + pe.transpose(1, 2) @ ef
    return o.to(q.dtype)


def gather_entries(entries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of [B, T, C] by ids [B, S, K] (negative ids give row 0) -> [B, S, K, C]."""
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
