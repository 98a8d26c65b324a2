# SPDX-License-Identifier: Apache-2.0
"""Which guesses are kept."""

import torch

from modeling_dsv4.drafting import accept_greedy, accept_samples


def test_greedy_keeps_guesses_up_to_the_first_that_is_not_the_best() -> None:
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2, 0]]), 4).float().repeat(3, 1, 1)
    guesses = torch.tensor([[3, 1, 2], [3, 0, 2], [0, 1, 2]])
    count, more = accept_greedy(guesses, scores)
    assert count.tolist() == [3, 1, 0]
    assert more.tolist() == [0, 1, 3]
    count, more = accept_greedy(guesses[:, :0], scores[:, :1])
    assert count.tolist() == [0, 0, 0] and more.tolist() == [3, 3, 3]


def test_samples_are_the_backbone_s_however_wrong_the_head_is() -> None:
    torch.manual_seed(0)
    rows = 100_000
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.1, 0.3, 0.5], [0.1, 0.5, 0.2, 0.2]])
    guesses = torch.stack([torch.multinomial(row, rows, replacement=True) for row in q], dim=1)
    count, more = accept_samples(guesses, q.expand(rows, -1, -1), p.expand(rows, -1, -1))
    # A guess is kept with probability sum(min(p, q)).
    kept = torch.minimum(p[:2], q).sum(1).tolist()
    assert abs(float((count > 0).float().mean()) - kept[0]) < 0.01
    first = torch.where(count > 0, guesses[:, 0], more)
    second = torch.where(count > 1, guesses[:, 1], more)
    for seen, wanted in ((first, p[0]), (second[count > 0], p[1]), (more[count == 2], p[2])):
        wanted = wanted * len(seen)
        found = torch.bincount(seen, minlength=4)
        assert bool((found[wanted == 0] == 0).all())
        wanted, found = wanted[wanted > 0], found[wanted > 0]
        chi = ((found - wanted) ** 2 / wanted).sum()
        # The upper tail of chi-square.
        assert torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2), chi / 2) > 1e-3


def test_a_head_that_is_the_backbone_is_always_right() -> None:
    torch.manual_seed(0)
    p = torch.rand(500, 3, 8).softmax(-1)
    guesses = torch.multinomial(p[:, :2].flatten(0, 1), 1).view(500, 2)
    count, more = accept_samples(guesses, p[:, :2].clone(), p)
    assert bool((count == 2).all()) and more.shape == (500,)
