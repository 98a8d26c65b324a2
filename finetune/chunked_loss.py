# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over the vocabulary a few tokens at a time, gradients included.

The logits of 64k tokens of V4-Flash take 31 GiB in float32, and their gradient as much again. Here
logits and their gradient exist for one chunk, and tokens without a label never meet the head.

On a GPU one kernel walks a chunk's logits and leaves their gradient in their place.

torch's own `linear_cross_entropy` takes a weight in the input's dtype; this head is float32 math on
whatever the weight is stored in, and may carry an adapter, so that it is called as it stands.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from modeling_dsv4.kernel_choice import use_triton

IGNORED = -100
# Logits of one chunk. Their gradient, and the softmax inside, take as much each.
CHUNK_BYTES = 256 << 20
COPIES = 3


def chunk_tokens(vocab_size: int, nbytes: int = CHUNK_BYTES) -> int:
    """Tokens whose float32 logits fit into a chunk; at least one."""
    return max(1, nbytes // (4 * vocab_size))


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """What each column predicts: labels [B, S] one to the left, nothing for the last column."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor, kernels: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the rows' cross-entropies, divided, and its gradient.

    Args:
        logits: [m, V]; a kernel overwrites them.
        labels: [m] int64, -100 for none.
        divisor: [] float32 (float64 for logits of that).
        kernels: see `modeling_dsv4/kernel_choice.py`.

    Returns:
        the loss [] and its gradient [m, V] in the logits' dtype.
    """
    if logits.dtype is not torch.float64 and use_triton(kernels, logits):
        from .kernels import cross_entropy as fused

        return fused.cross_entropy(logits, labels, divisor, IGNORED)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(leaf.to(divisor.dtype), labels, reduction="sum") / divisor
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def backward_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    divisor: float,
    tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies, divided, and its gradient, which the head's parameters get too.

    Args:
        head: rows [m, D] to logits [m, V] float32, whose last operation needs no logits to go back.
        hidden: [B, S, D], final hidden states; taken as a constant.
        labels: [B, S], the id that each column predicts, -100 for none.
        divisor: of the sum.
        tokens: rows of a chunk; None is what `CHUNK_BYTES` allows.

    Returns:
        the loss [] float32 and its gradient with respect to `hidden` [B, S, D].
    """
    flat, gradient = hidden.detach().flatten(0, 1), torch.zeros_like(hidden)
    wanted = labels.flatten()
    at = (wanted != IGNORED).nonzero().flatten()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    if not len(at):
        return total, gradient
    if tokens is None:
        with torch.no_grad():
            tokens = chunk_tokens(head(flat[:1]).shape[-1])
    into, kernels = gradient.flatten(0, 1), _kernels(head)
    share = torch.full_like(total, divisor)
    for some in at.split(tokens):
        rows = flat[some].requires_grad_()
        with torch.enable_grad():
            logits = head(rows)
        loss, slopes = cross_entropy(logits.detach(), wanted[some], share, kernels)
        logits.backward(slopes)
        assert rows.grad is not None
        into[some] = rows.grad
        total += loss
    return total, gradient


def _kernels(head: object) -> str:
    """What `set_kernels` said of a head, whatever stands around it."""
    modules = head.modules() if isinstance(head, nn.Module) else ()
    choices = (getattr(module, "kernels", None) for module in modules)
    return next((choice for choice in choices if isinstance(choice, str)), "auto")
