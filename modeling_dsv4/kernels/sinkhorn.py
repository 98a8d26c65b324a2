# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp inside a kernel: the matrices of a block of tokens never leave the chip.

Reference (`hyper_ops.sinkhorn_ref`), N x N a token:

    m = softmax(L, over k) + eps
    m = m / (sum_j m + eps)
    repeat iters - 1 times:  m = m / (sum_k m + eps);  m = m / (sum_j m + eps)

Tile: [BT, NP, NP], NP the power of two from N on; `keep` is false on the padding, where the
matrix is 0 and its denominator, made 1 by `pad` [1, NP], harmless.

Going backward each step wants its result and its denominator. The denominators [BT, NP] of all
steps stay in registers; the results are walked back by multiplying with them.
"""

import triton
import triton.language as tl


@triton.jit
def _softmax(logits, keep):
    top = tl.max(tl.where(keep, logits, -float("inf")), axis=2)
    e = tl.where(keep, tl.exp(logits - top[:, :, None]), 0.0)
    total = tl.sum(e, axis=2)
    return e / tl.where(total > 0, total, 1.0)[:, :, None]


@triton.jit
def sinkhorn_forward(logits, keep, pad, eps, ITERS: tl.constexpr):
    """[BT, NP, NP] logits -> almost doubly stochastic matrices."""
    m = tl.where(keep, _softmax(logits, keep) + eps, 0.0)
    m = m / (tl.sum(m, axis=1) + eps + pad)[:, None, :]
    for _ in range(ITERS - 1):
        m = m / (tl.sum(m, axis=2) + eps + pad)[:, :, None]
        m = m / (tl.sum(m, axis=1) + eps + pad)[:, None, :]
    return m


@triton.jit
def sinkhorn_backward(logits, grad, keep, pad, eps, ITERS: tl.constexpr):
    """Gradient of the logits from that of the matrices, through every iteration."""
    soft = _softmax(logits, keep)
    m = tl.where(keep, soft + eps, 0.0)
    first = tl.sum(m, axis=1) + eps + pad
    m = m / first[:, None, :]
    past = (first,)
    for _ in tl.static_range(ITERS - 1):
        rows = tl.sum(m, axis=2) + eps + pad
        m = m / rows[:, :, None]
        columns = tl.sum(m, axis=1) + eps + pad
        m = m / columns[:, None, :]
        past = past + (rows, columns)  # noqa: RUF005
    g = tl.where(keep, grad, 0.0)
    for i in tl.static_range(ITERS - 1):
        columns = past[2 * (ITERS - 1 - i)]
        g = (g - tl.sum(g * m, axis=1)[:, None, :]) / columns[:, None, :]
        m = m * columns[:, None, :]
        rows = past[2 * (ITERS - 1 - i) - 1]
        g = (g - tl.sum(g * m, axis=2)[:, :, None]) / rows[:, :, None]
        m = m * rows[:, :, None]
    g = (g - tl.sum(g * m, axis=1)[:, None, :]) / first[:, None, :]
    return soft * (g - tl.sum(g * soft, axis=2)[:, :, None])
