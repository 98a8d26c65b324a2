# SPDX-License-Identifier: Apache-2.0
"""Calibration hears what experts are fed with, whoever holds them, and leaves no trace."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_dsv4 import ops
from modeling_dsv4.moe import Dsv4Experts, ExpertsBase
from modeling_dsv4.storage import PackedExperts
from quantize.calibration import SHRINKAGE, Calibration, calibrate, token_batches

E, D, WIDTH, K, LIMIT = 5, 32, 64, 2, 2.0
NAME = "model.layer"


class OneLayer(nn.Module):
    """An embedding, a gate that never chooses the last expert, and experts."""

    def __init__(self, layer: ExpertsBase) -> None:
        super().__init__()
        self.embed, self.gate = nn.Embedding(50, D), nn.Linear(D, E - 1)
        self.layer = layer

    def route(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.embed(input_ids).flatten(0, 1)
        weights, index = self.gate(x).sigmoid().topk(K, dim=-1)
        return x, index, weights

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.layer(*self.route(input_ids))


def plain() -> Dsv4Experts:
    layer = Dsv4Experts(E, D, WIDTH, LIMIT)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 50, (2, n)) for n in (40, 7, 1)]


def test_moments_are_those_of_the_inputs() -> None:
    model, ids = OneLayer(plain()), batches()
    found = calibrate(model, ids)
    moment = {"gate_up_proj": torch.zeros(D, D), "down_proj": torch.zeros(WIDTH, WIDTH)}
    alone = {p: [m.clone() for _ in range(E)] for p, m in moment.items()}
    counts = [0] * E
    for b in ids:
        x, index, weights = model.route(b)
        for t in range(len(x)):
            for e, w in zip(index[t].tolist(), weights[t], strict=True):
                u = ops.swiglu(F.linear(x[t], model.layer.gate_up_proj[e]), LIMIT, w)
                counts[e] += 1
                for p, v in (("gate_up_proj", x[t] * w), ("down_proj", u)):
                    moment[p] += torch.outer(v, v)
                    alone[p][e] += torch.outer(v, v)
    assert found.counts(NAME).tolist() == counts
    for p, both in moment.items():
        second = found.statistics(NAME, 1, p)
        assert second is not None
        pooled = both.diagonal() / sum(counts)
        own = (alone[p][1].diagonal() + SHRINKAGE * pooled) / (counts[1] + SHRINKAGE)
        torch.testing.assert_close(second.diagonal(), own, rtol=1e-4, atol=1e-6)

        def correlation(m: torch.Tensor) -> torch.Tensor:
            return m / m.diagonal().outer(m.diagonal()).sqrt()

        torch.testing.assert_close(correlation(second), correlation(both), rtol=1e-3, atol=1e-4)


def test_experts_that_were_never_chosen_have_the_layers_moments() -> None:
    found = calibrate(OneLayer(plain()), batches())
    counts = found.counts(NAME)
    assert counts[-1] == 0
    assert counts[:-1].all()
    diagonal = found.diagonal(NAME, "down_proj")
    average = (diagonal[:-1] * (counts[:-1, None] + SHRINKAGE)).sum(0)
    pooled = (average - (E - 1) * SHRINKAGE * diagonal[-1]) / counts.sum()
    torch.testing.assert_close(diagonal[-1], pooled, rtol=1e-3, atol=1e-6)
    share = found.share(NAME)
    assert 0 < share[-1] < share[:-1].min()
    assert float(share.sum()) == pytest.approx(1)


def test_packed_experts_are_heard_alike() -> None:
    packed = PackedExperts.from_plain(plain())
    model = OneLayer(packed)
    ids = batches()
    wide = calibrate(model, ids)
    model.layer = packed.to_plain(torch.float32)
    again = calibrate(model, ids)
    for p in ("gate_up_proj", "down_proj"):
        a, b = (c.statistics(NAME, 0, p) for c in (wide, again))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_listening_changes_nothing_and_leaves_nothing() -> None:
    model, ids = OneLayer(plain()), batches()
    before = model(ids[0], use_cache=False)
    names = set(model.layer.__dict__)
    calibrate(model, ids)
    assert set(model.layer.__dict__) == names
    assert not model.layer._forward_pre_hooks
    assert torch.equal(model(ids[0], use_cache=False), before)


def test_a_file_says_the_same(tmp_path: Path) -> None:
    found = calibrate(OneLayer(plain()), batches())
    found.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    assert again.modules == [NAME]
    assert torch.equal(again.counts(NAME), found.counts(NAME))
    assert torch.equal(again.sample(NAME), found.sample(NAME))
    assert again.sample(NAME).shape[1] == D
    for expert in (0, 3):
        for p in ("gate_up_proj", "down_proj", "gate_up_proj"):
            a, b = (c.statistics(NAME, expert, p) for c in (again, found))
            assert torch.equal(a, b)


def test_modules_that_never_ran_have_no_statistics() -> None:
    assert calibrate(OneLayer(plain()), batches()).statistics("mtp.0", 0, "down_proj") is None


def test_layers_can_be_gathered_apart() -> None:
    model = nn.Module()
    model.first, model.second = OneLayer(plain()), OneLayer(plain())
    model.forward = lambda input_ids, use_cache: [  # type: ignore[method-assign]
        m(input_ids, use_cache) for m in (model.first, model.second)
    ]
    assert calibrate(model, batches(), layers=[1]).modules == ["model.second.layer"]


def test_nothing_to_hear_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted batches of token ids"):
        calibrate(OneLayer(plain()), [])
    with pytest.raises(ValueError, match="wanted a file of calibration statistics, found none"):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="wanted a text to calibrate with, got 0 tokens"):
        list(token_batches(lambda text: {"input_ids": []}, tmp_path / "empty.txt"))


def test_a_text_is_cut_into_rows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 30)
    rows = token_batches(
        lambda text: {"input_ids": list(range(len(text)))}, tmp_path / "text.txt", 25, 10
    )
    assert [r.tolist()[0] for r in rows] == [
        list(range(10)), list(range(10, 20)), list(range(20, 25))
    ]  # fmt: skip
