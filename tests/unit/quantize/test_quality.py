# SPDX-License-Identifier: Apache-2.0
"""Divergence, agreement and layers: against their definitions, and exact where they must be."""

import copy
import math
from pathlib import Path

import pytest
import torch

from quantize.quality import Reference, compare, divergence, noise_floor, surprise


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(3, 60, (3, 24))


def filled(model, rows: torch.Tensor, folder: Path, layer_rows: int = 2) -> Reference:
    reference = Reference(rows, folder, layer_rows)
    reference.fill(model)
    return reference


def test_divergence_is_its_definition_in_float64() -> None:
    p, q = torch.randn(5, 9) * 3, torch.randn(5, 9) * 3
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    torch.testing.assert_close(divergence(p, q), (a * (a / b).log()).sum(-1))
    assert divergence(p, p).tolist() == [0.0] * 5
    assert (divergence(p, q) > 0).all()


def test_surprise_looks_at_the_next_token() -> None:
    logits, ids = torch.randn(4, 7), torch.tensor([1, 5, 2, 6])
    wanted = [-logits[t].double().log_softmax(-1)[ids[t + 1]] for t in range(3)]
    torch.testing.assert_close(surprise(logits, ids), torch.stack(wanted))


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_a_model_is_exactly_itself(tiny, rows: torch.Tensor, tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    found = compare(model, filled(model, rows, tmp_path))
    assert (found.kld_mean, found.kld_max, found.top1) == (0.0, 0.0, 1.0)
    assert set(found.layer_error) == set(found.layer_drift) == {0.0}
    assert len(found.layer_error) == model.config.num_hidden_layers
    assert found.tokens == rows.numel()


def test_perplexity_is_that_of_the_loss(tiny, rows: torch.Tensor, tmp_path: Path) -> None:
    model = tiny("v4")
    own = Reference(rows, tmp_path).fill(model)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in rows]
    assert own.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_statistics_are_those_of_the_single_tokens(tiny, rows, tmp_path: Path) -> None:
    a, b = tiny("v4"), tiny("v4")
    with torch.no_grad():
        b.lm_head.weight.add_(0.3 * torch.randn_like(b.lm_head.weight))
    found = compare(b, filled(a, rows, tmp_path))
    with torch.no_grad():
        pairs = [(a(r[None]).logits[0], b(r[None]).logits[0]) for r in rows]
    kld = torch.cat([divergence(p, q) for p, q in pairs])
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).double().mean()
    assert found.kld_mean == pytest.approx(kld.mean().item(), rel=1e-4)
    assert found.kld_median == pytest.approx(kld.median().item(), rel=1e-4)
    assert found.kld_max == pytest.approx(kld.max().item(), rel=1e-4)
    assert found.kld_median < found.kld_p99 <= found.kld_max
    assert found.kld_error == pytest.approx((kld.std() / len(kld) ** 0.5).item(), rel=1e-4)
    assert found.top1 == pytest.approx(same.item())


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_one_changed_layer_errs_alone_and_the_later_ones_drift(
    tiny, rows: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    model, changed = tiny(kind), 1
    reference = filled(model, rows, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[changed].self_attn.o_b_proj.weight.mul_(1.5)
    found = compare(other, reference)
    assert [i for i, error in enumerate(found.layer_error) if error > 1e-6] == [changed]
    assert [i for i, error in enumerate(found.layer_drift) if error > 1e-6] == list(
        range(changed, model.config.num_hidden_layers)
    )


def test_the_floor_is_rounding(tiny, rows: torch.Tensor, tmp_path: Path) -> None:
    model = tiny("v4")
    floor = noise_floor(model, filled(model, rows, tmp_path))
    assert 0 <= floor.kld_mean < 1e-6
    assert floor.tokens == rows.numel()


def test_another_vocabulary_is_refused(tiny, rows: torch.Tensor, tmp_path: Path) -> None:
    reference = filled(tiny("v4"), rows, tmp_path)
    with pytest.raises(ValueError, match="models with one vocabulary"):
        compare(tiny("v4", vocab_size=80), reference, "other")


@pytest.mark.parametrize("shape", [(4,), (0, 8), (2, 1)])
def test_rows_that_predict_nothing_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wanted rows \[R, S\] of two tokens"):
        Reference(torch.zeros(shape, dtype=torch.long), tmp_path)
