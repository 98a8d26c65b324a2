# SPDX-License-Identifier: Apache-2.0
"""How a fast twin is held to its reference."""

from collections.abc import Callable, Sequence

import pytest
import torch

Op = Callable[..., Sequence[torch.Tensor]]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element nobody writes shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(*args: object, **kwargs: object) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return wrapped

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def agree() -> Callable[[Op, Op, Sequence[torch.Tensor], float], None]:
    """`agree(twin, reference, inputs, tolerance)`; see `outputs_and_gradients_agree`."""
    return outputs_and_gradients_agree


def outputs_and_gradients_agree(
    twin: Op, reference: Op, inputs: Sequence[torch.Tensor], tolerance: float
) -> None:
    """Compare outputs and gradients with those of the reference in float32 of the same numbers.

    `tolerance` is relative to the largest number of each tensor. What is sent back are numbers
    that the outputs' dtype holds, since autograd rounds it.
    """
    wide = [x.detach().float().requires_grad_() for x in inputs]
    found, expected = twin(*inputs), reference(*wide)
    weights = [torch.randn_like(y) for y in found]
    loss = sum((y * w).float().sum() for y, w in zip(found, weights, strict=True))
    target = sum((y * w.float()).sum() for y, w in zip(expected, weights, strict=True))
    grads, wanted = torch.autograd.grad(loss, inputs), torch.autograd.grad(target, wide)
    for i, (a, b) in enumerate(zip((*found, *grads), (*expected, *wanted), strict=True)):
        assert a.shape == b.shape
        if b.numel():
            worst = (a.float() - b).abs().max() / b.abs().max().clamp(min=1e-30)
            assert worst <= tolerance, f"tensor {i}: {worst:.1e}"
