# SPDX-License-Identifier: Apache-2.0
"""Muon against torch's own and against itself, matrix by matrix; several optimizers as one."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from finetune.muon import Muon, Together, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 48), (2, 48, 24)])
def test_orthogonalized_matrices_stretch_nothing_far(shape: tuple[int, ...]) -> None:
    stretch = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert stretch.min() > 0.3
    assert stretch.max() < 1.4


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
def test_on_two_axes_it_is_torchs_muon(shape: tuple[int, int]) -> None:
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.02}
    optimizers = Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Both iterate in bfloat16, rounding at other places.
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert moved > 0.5


def test_experts_of_a_stack_learn_as_if_alone() -> None:
    value, grad = torch.randn(3, 16, 24), torch.randn(3, 16, 24)
    stack = nn.Parameter(value.clone())
    alone = [nn.Parameter(v.clone()) for v in value]
    stack.grad = grad
    for p, g in zip(alone, grad, strict=True):
        p.grad = g.clone()
    Muon([stack], lr=0.1).step()
    Muon(alone, lr=0.1).step()
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in alone]))


def test_gate_and_up_are_stepped_apart() -> None:
    value, grad = torch.randn(4, 32, 24), torch.randn(4, 32, 24)
    whole = nn.Parameter(value.clone())
    parts = [nn.Parameter(value[:, at : at + 16].clone()) for at in (0, 16)]
    whole.grad, parts[0].grad, parts[1].grad = grad, grad[:, :16].clone(), grad[:, 16:].clone()
    Muon([whole], lr=0.1, halves=[whole]).step()
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(whole.data, torch.cat([p.data for p in parts], dim=1))


def _parts(matrix: nn.Parameter, vector: nn.Parameter) -> list[torch.optim.Optimizer]:
    return [Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.2, weight_decay=0.0)]


def _learn(
    optimizers: list[torch.optim.Optimizer], p: list[nn.Parameter], seeds: range
) -> list[torch.Tensor]:
    for seed in seeds:
        dice = torch.Generator().manual_seed(seed)
        for one in p:
            one.grad = torch.randn(one.shape, generator=dice)
        for optimizer in optimizers:
            optimizer.step()
    return [one.detach().clone() for one in p]


def test_several_optimizers_as_one_are_what_they_are_apart() -> None:
    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]

    p = fresh()
    wanted = _learn(_parts(*p), p, range(5))
    p = fresh()
    one = Together(_parts(*p))
    _learn([one], p, range(2))
    state, held = deepcopy(one.state_dict()), [x.detach().clone() for x in p]
    assert all(map(torch.equal, _learn([one], p, range(2, 5)), wanted))

    p = [nn.Parameter(x) for x in held]
    again = Together(_parts(*p))
    again.load_state_dict(state)
    assert all(map(torch.equal, _learn([again], p, range(2, 5)), wanted))


def test_a_rate_that_is_set_on_all_is_that_of_each() -> None:
    p = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]
    one = Together(_parts(*p))
    one.load_state_dict(one.state_dict())
    for group in one.param_groups:
        group["lr"] = 0.0
    assert all(torch.equal(x, torch.ones_like(x)) for x in _learn([one], p, range(2)))
