# SPDX-License-Identifier: Apache-2.0
"""Routing and experts against their equations, token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modeling_dsv4.moe import Dsv4Experts, Dsv4MoE, ExpertsBase

Make = Callable[..., Dsv4MoE]


@pytest.fixture
def make(tiny_config: Callable[..., Any], enliven: Callable[..., None]) -> Make:
    def build(kind: str = "v41", layer: int = 1, **changes: Any) -> Dsv4MoE:
        module = Dsv4MoE(tiny_config(kind, **changes), layer)
        enliven(module)
        return module.double()

    return build


def _expert(x: torch.Tensor, w1: Any, w3: Any, w2: Any, weight: Any = 1.0) -> torch.Tensor:
    gate, up = (x @ w1.T).clamp(max=1.0), (x @ w3.T).clamp(-1.0, 1.0)
    return (gate / (1 + (-gate).exp()) * up * weight) @ w2.T


def _naive(moe: Dsv4MoE, x: torch.Tensor, ids: Any = None, types: Any = None) -> torch.Tensor:
    """The equations of the release for every token of [n, D]."""
    gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
    out = []
    for t in range(x.shape[0]):
        score = (1 + (x[t] @ gate.weight.T).exp()).log().sqrt()
        if gate.hashed:
            chosen = gate.tid2eid[ids[t]].tolist()
        else:
            image = types is not None and types[t] >= 0
            bias = gate.e_score_correction_bias_vl if image else gate.e_score_correction_bias
            chosen = (score + bias).argsort(descending=True)[: gate.top_k].tolist()
        total = sum(score[e] for e in chosen)
        y = _expert(x[t], *(p.weight for p in (shared.gate_proj, shared.up_proj, shared.down_proj)))
        for e in chosen:
            w1, w3 = experts.gate_up_proj[e].chunk(2)
            weight = score[e] / total * gate.routed_scaling_factor
            y = y + _expert(x[t], w1, w3, experts.down_proj[e], weight)
        out.append(y)
    return torch.stack(out)


def test_score_routed_tokens_follow_the_equations(make: Make) -> None:
    moe, x = make(), torch.randn(2, 9, 32, dtype=torch.float64)
    out, logits = moe(x)
    torch.testing.assert_close(out.flatten(0, 1), _naive(moe, x.flatten(0, 1)))
    torch.testing.assert_close(logits, x.flatten(0, 1) @ moe.gate.weight.T)


def test_hash_routed_tokens_follow_the_table_and_weigh_by_score(make: Make) -> None:
    moe, x = make("v4", 0), torch.randn(2, 9, 32, dtype=torch.float64)
    ids = torch.randint(0, 64, (2, 9))
    out, _ = moe(x, ids)
    torch.testing.assert_close(out.flatten(0, 1), _naive(moe, x.flatten(0, 1), ids.flatten()))


def test_image_tokens_are_chosen_for_by_their_own_bias(make: Make) -> None:
    moe, x = make(), torch.randn(1, 40, 32, dtype=torch.float64)
    types = torch.where(torch.rand(1, 40) < 0.5, 0, -1)
    out, _ = moe(x, None, types)
    torch.testing.assert_close(out[0], _naive(moe, x[0], None, types[0]))
    assert (out - moe(x)[0]).abs().max() > 1e-3


def test_hash_layers_say_that_they_want_ids(make: Make) -> None:
    with pytest.raises(ValueError, match="wanted `input_ids` beside `inputs_embeds`"):
        make("v4", 0)(torch.randn(1, 3, 32).double())


def test_a_bias_selects_and_does_not_weigh(make: Make) -> None:
    moe, x = make(), torch.randn(20, 32, dtype=torch.float64)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 1e6, 0, 0]))
    logits, weights, indices = moe.gate(x)
    assert bool((indices == 1).any(-1).all())
    scores = F.softplus(logits).sqrt().gather(1, indices)
    expected = scores / scores.sum(-1, keepdim=True) * moe.gate.routed_scaling_factor
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("kind", "total"), [("v4", 1.5), ("v41", 0.0)])
@torch.no_grad()
def test_the_sum_of_scores_has_an_epsilon_in_one_family_alone(
    make: Make, kind: str, total: float
) -> None:
    # Scores of 1e-25: without an epsilon they are normalised, with 1e-20 they vanish.
    gate = make(kind).gate
    x = torch.zeros(1, 32, dtype=torch.float64)
    gate.weight.zero_()
    gate.weight[:, 0] = -115.0
    x[0, 0] = 1
    assert float(gate(x)[1].sum()) == pytest.approx(total, abs=1e-3)


def test_scores_may_stay_unnormalised(make: Make) -> None:
    gate = make(norm_topk_prob=False).gate
    logits, weights, indices = gate(torch.randn(5, 32).double())
    torch.testing.assert_close(weights, 1.5 * F.softplus(logits).sqrt().gather(1, indices))


def test_scores_are_computed_in_float32_under_any_dtype(make: Make) -> None:
    gate = make().gate.float()
    x = torch.randn(200, 32).to(torch.bfloat16)
    gate.weight.data = gate.weight.data.to(torch.bfloat16)
    logits, weights, _ = gate(x)
    assert logits.dtype is weights.dtype is torch.float32
    torch.testing.assert_close(logits, x.float() @ gate.weight.float().T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_experts_and_the_loop_agree_with_gradients(
    make: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make().experts.to(dtype)
    x = torch.randn(30, 32, dtype=dtype, requires_grad=True)
    index = torch.randint(0, 4, (30, 2))
    index[index == 2] = 3  # an expert without tokens
    weights = torch.rand(30, 2).requires_grad_()
    grouped = experts(x, index, weights)
    loop = ExpertsBase.forward(experts, x, index, weights)
    torch.testing.assert_close(grouped, loop)
    inputs, scale = (x, weights, experts.gate_up_proj, experts.down_proj), torch.randn_like(loop)
    for found, expected in zip(
        torch.autograd.grad((grouped * scale).sum(), inputs),
        torch.autograd.grad((loop * scale).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_a_store_opens_the_hit_experts_alone_and_hears_of_them_before() -> None:
    heard: list[Any] = []

    class Told(ExpertsBase):
        def prepare(self, experts: list[int]) -> None:
            heard.append(experts)

        def open_expert(self, expert: int) -> Any:
            heard.append(expert)
            return lambda x: torch.cat((x, x), -1), lambda u: u * expert

    store = Told(6, 4, 4, None)
    index = torch.tensor([[5, 1], [1, 3]])
    x = torch.randn(2, 4)
    out = store(x, index, torch.ones(2, 2))
    assert heard == [[1, 3, 5], 1, 3, 5]
    torch.testing.assert_close(out, F.silu(x) * x * torch.tensor([[6.0], [4.0]]))
    with pytest.raises(NotImplementedError, match="ExpertsBase does not say"):
        ExpertsBase(2, 4, 4, None)(x, index.clamp(max=1), torch.ones(2, 2))


def test_the_gate_is_the_upper_half_of_the_fused_weight(make: Make) -> None:
    moe, x = make(), torch.randn(1, 5, 32, dtype=torch.float64)
    expected, _ = moe(x)
    with torch.no_grad():
        w = moe.experts.gate_up_proj
        w.copy_(torch.cat(w.chunk(2, dim=1)[::-1], dim=1))
    assert (moe(x)[0] - expected).abs().max() > 1e-3


def test_few_rows_are_looped_over_and_many_grouped(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, opened = make().experts.float(), []
    open_expert = Dsv4Experts.open_expert
    monkeypatch.setattr(
        Dsv4Experts, "open_expert", lambda self, e: opened.append(e) or open_expert(self, e)
    )
    for rows, looped in ((3, True), (4, False)):
        opened.clear()
        experts(torch.randn(rows, 32), torch.randint(0, 4, (rows, 2)), torch.rand(rows, 2))
        assert bool(opened) == looped


@pytest.mark.parametrize("tokens", [3, 30])
def test_halves_of_the_experts_sum_to_the_whole(make: Make, tokens: int) -> None:
    whole = make().experts.float()
    x, weights = torch.randn(tokens, 32), torch.rand(tokens, 2)
    index = torch.randint(0, 4, (tokens, 2))
    total = torch.zeros(tokens, 32)
    for first in (0, 2):
        half = Dsv4Experts(2, 32, whole.intermediate_size, whole.swiglu_limit)
        half.gate_up_proj.data = whole.gate_up_proj.data[first : first + 2]
        half.down_proj.data = whole.down_proj.data[first : first + 2]
        here = (index >= first) & (index < first + 2)
        total += half(x, torch.where(here, index - first, 2), weights.masked_fill(~here, 0))
    torch.testing.assert_close(total, whole(x, index, weights))


@pytest.mark.parametrize("tokens", [3, 30])
def test_experts_that_nobody_chose_give_zero_and_stay_in_the_graph(make: Make, tokens: int) -> None:
    experts = make().experts.float()
    x = torch.randn(tokens, 32, requires_grad=True)
    weights = torch.rand(tokens, 2).requires_grad_()
    out = experts(x, torch.full((tokens, 2), 4), weights)
    assert out.dtype is torch.float32 and not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (x, weights)))


def test_the_routed_sum_is_rounded_once(make: Make) -> None:
    moe = make().float().to(torch.bfloat16)
    seen = []
    moe.experts.register_forward_hook(lambda module, args, out: seen.append(out))
    out, _ = moe(torch.randn(1, 8, 32).to(torch.bfloat16))
    assert out.dtype is torch.bfloat16 and seen[0].dtype is torch.float32
