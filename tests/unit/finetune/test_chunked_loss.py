# SPDX-License-Identifier: Apache-2.0
"""The loss a chunk at a time is the loss of all logits at once, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.chunked_loss import backward_loss, chunk_tokens, next_labels
from modeling_dsv4.layers import Float32Head


class Widest(nn.Module):
    """Remembers the most rows that it was given at once."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.rows = head, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows = max(self.rows, len(x))
        return self.head(x)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_chunks_give_the_loss_and_gradients_of_all_logits(trained: bool, tokens: int) -> None:
    head = Float32Head(8, 19, bias=False).requires_grad_(trained)
    hidden, labels = torch.randn(2, 7, 8), torch.randint(0, 19, (2, 7))
    labels[0, :4], labels[1, -1] = -100, -100
    want_hidden = hidden.clone().requires_grad_()
    want = F.cross_entropy(head(want_hidden).flatten(0, 1), labels.flatten(), reduction="sum") / 5
    want.backward()
    want_head, head.weight.grad = head.weight.grad, None
    watched = Widest(head)
    loss, gradient = backward_loss(watched, hidden, labels, 5.0, tokens)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, want_hidden.grad)
    assert watched.rows <= tokens
    if trained:
        torch.testing.assert_close(head.weight.grad, want_head)
    else:
        assert head.weight.grad is None


def test_tokens_without_a_label_never_meet_the_head() -> None:
    watched = Widest(nn.Linear(4, 6))
    labels = torch.full((1, 9), -100)
    loss, gradient = backward_loss(watched, torch.randn(1, 9, 4), labels, 1.0)
    assert (loss, watched.rows) == (0, 0)
    assert not gradient.any()


def test_a_chunk_keeps_its_bytes() -> None:
    assert chunk_tokens(129280, 256 << 20) * 129280 * 4 <= 256 << 20
    assert chunk_tokens(129280, 1) == 1


def test_a_column_predicts_its_right_neighbour() -> None:
    assert next_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]
