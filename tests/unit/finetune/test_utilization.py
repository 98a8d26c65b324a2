# SPDX-License-Identifier: Apache-2.0
"""Operations are counted as they run, and counting changes nothing."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from finetune.utilization import CountOperations, matmul_rate


def test_a_product_and_its_gradients_are_counted() -> None:
    layer, x = torch.nn.Linear(6, 10, bias=False), torch.randn(4, 6, requires_grad=True)
    with CountOperations() as counter:
        y = layer(x)
    assert counter.total == 2 * 4 * 6 * 10
    with CountOperations() as counter:
        y.sum().backward()
    assert counter.total == 2 * 2 * 4 * 6 * 10


def test_counting_leaves_loss_and_gradients_as_they_are(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model, ids = make_model("v4.1").train(), torch.arange(40)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with CountOperations() as counter:
        counted = gradients()
    assert all(map(torch.equal, plain, counted))
    # Twice the operations of a forward pass and more go backward.
    with CountOperations() as forward, torch.no_grad():
        model(input_ids=ids)
    assert 2.5 < counter.total / forward.total < 3.5


def test_a_rate_is_in_operations_a_second() -> None:
    assert 1e8 < matmul_rate() < 1e14
