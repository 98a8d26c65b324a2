# SPDX-License-Identifier: Apache-2.0
"""Numeric operations against their equations written as loops, with gradients."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from modeling_dsv4 import ops


def test_rms_norm_works_in_float32_and_rounds_once() -> None:
    x, w = torch.randn(4, 6, 32).to(torch.bfloat16), torch.rand(32).to(torch.bfloat16)
    y = x.float()
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ops.rms_norm(x.float(), None, 1e-6), y)
    assert torch.equal(
        ops.rms_norm(x, w, 1e-6),
        (ops.rms_norm(x.float(), None, 1e-6) * w.float()).to(torch.bfloat16),
    )


def test_an_epsilon_of_1e_minus_20_is_not_flushed() -> None:
    x = torch.full((1, 4), 1e-10)
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-20), torch.full((1, 4), 0.5**0.5))
    assert float(ops.rms_norm(x, None, 1e-6).max()) < 1e-5


def test_swiglu_clamps_the_gate_from_above_and_the_other_on_both_sides() -> None:
    gate = torch.tensor([-50.0, -3, 0.5, 3, 50])
    up = torch.tensor([9.0, -9, 1.5, -1, 9])
    weight = torch.tensor(0.25)
    expected = F.silu(gate.clamp(max=2)) * up.clamp(-2, 2) / 4
    torch.testing.assert_close(ops.swiglu(torch.cat((gate, up)), 2.0, weight), expected)
    free = F.silu(gate) * up
    torch.testing.assert_close(ops.swiglu(torch.cat((gate, up)), None), free)


def test_swiglu_multiplies_the_routing_weight_before_it_rounds() -> None:
    x, weight = torch.randn(64, 32).to(torch.bfloat16), torch.rand(64)
    wide = ops.swiglu(x.float(), 1.0, weight)
    assert torch.equal(ops.swiglu(x, 1.0, weight), wide.to(torch.bfloat16))
    assert ops.swiglu(x, 1.0, weight).dtype is torch.bfloat16


# --- experts ------------------------------------------------------------------------------------


def test_pairs_are_sorted_by_expert_and_keep_their_tokens() -> None:
    index = torch.tensor([[2, 0], [0, 3], [3, 2]])
    rows = ops.group_by_expert(index, 5)
    assert rows.counts == [2, 0, 2, 2, 0]
    assert rows.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert index.flatten()[rows.order].tolist() == [0, 0, 2, 2, 3, 3]


def test_pairs_of_other_processes_experts_are_left_out() -> None:
    index = torch.tensor([[2, 0], [0, 2], [1, 2]])
    rows = ops.group_by_expert(index, 2)
    assert rows.counts == [2, 1]
    assert rows.token.tolist() == [0, 1, 2]
    assert index.flatten()[rows.order].tolist() == [0, 0, 1]


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 8], [2, 2, 2, 2]])
def test_grouped_products_equal_a_loop(counts: list[int]) -> None:
    x = torch.randn(8, 16, requires_grad=True)
    w = torch.randn(4, 12, 16, requires_grad=True)
    assert ops.can_group(w)
    out = ops.grouped_linear(x, w, counts)
    loop = torch.cat([xe @ we.T for xe, we in zip(x.split(counts), w, strict=True)])
    torch.testing.assert_close(out, loop)
    weight = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad((out * weight).sum(), (x, w)),
        torch.autograd.grad((loop * weight).sum(), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_shapes_and_dtypes_that_cannot_be_grouped_are_known() -> None:
    assert not ops.can_group(torch.empty(2, 8, 6))
    assert not ops.can_group(torch.empty(2, 6, 8))
    assert not ops.can_group(torch.empty(2, 12, 12, dtype=torch.bfloat16))
    assert not ops.can_group(torch.empty(2, 8, 8, dtype=torch.float64))
    assert ops.can_group(torch.empty(2, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("limit", [0.5, None])
def test_gathered_experts_give_what_one_expert_after_the_other_gives(limit: float | None) -> None:
    n, k, d, f, e = 5, 2, 6, 4, 3
    double = {"dtype": torch.float64, "requires_grad": True}
    x, weight = torch.randn(n, d, **double), torch.rand(n, k, **double)
    gate_up, down = torch.randn(e, 2 * f, d, **double), torch.randn(e, d, f, **double)
    index = torch.stack([torch.randperm(e)[:k] for _ in range(n)])

    def loop() -> torch.Tensor:
        rows = []
        for t in range(n):
            y = torch.zeros(d, dtype=torch.float64)
            for i, w in zip(index[t], weight[t], strict=True):
                y = y + down[i] @ ops.swiglu(gate_up[i] @ x[t], limit, w)
            rows.append(y)
        return torch.stack(rows)

    results = [ops.gathered_experts(x, gate_up, down, index, weight, limit), loop()]
    torch.testing.assert_close(*results)
    inputs, seed = (x, weight, gate_up, down), torch.randn(n, d, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, seed) for y in results))


def test_gathered_experts_leave_out_those_that_are_elsewhere() -> None:
    x, gate_up, down = torch.randn(3, 4), torch.randn(2, 8, 4), torch.randn(2, 4, 4)
    index, weight = torch.tensor([[0, 2], [2, 2], [1, 0]]), torch.rand(3, 2)
    found = ops.gathered_experts(x, gate_up, down, index, weight, None)
    less = weight * (index < 2)
    assert torch.equal(found, ops.gathered_experts(x, gate_up, down, index % 2, less, None))
    assert not found[1].any() and bool(found[0].any())


def test_gathered_experts_sum_halves_in_float32() -> None:
    x, index = torch.randn(2, 8).bfloat16(), torch.tensor([[0, 2], [1, 0]])
    gate_up, down = torch.randn(3, 8, 8).bfloat16(), torch.randn(3, 8, 4).bfloat16()
    found = ops.gathered_experts(x, gate_up, down, index, torch.ones(2, 2), None)
    assert found.dtype == torch.float32
    one = torch.ones(2, 1)
    parts = [ops.gathered_experts(x, gate_up, down, i[:, None], one, None) for i in index.T]
    assert torch.equal(found, parts[0] + parts[1])


def test_rows_are_added_to_their_tokens_in_float32() -> None:
    y = torch.full((257, 1), 0.00390625, dtype=torch.bfloat16)
    y[0] = 1
    token = torch.zeros(257, dtype=torch.long)
    out = ops.scatter_rows(y, token, torch.empty(2, 1, dtype=torch.bfloat16))
    # In bfloat16 each of the small numbers would be lost beside 1.
    assert out.dtype is torch.float32 and out.flatten().tolist() == [2.0, 0.0]


# --- selection ----------------------------------------------------------------------------------


def test_index_scores_are_the_weighted_sum_of_rectified_products() -> None:
    q, k, w = torch.randn(2, 3, 5, 4), torch.randn(2, 7, 4), torch.randn(2, 3, 5)
    expected = torch.zeros(2, 3, 7)
    for b in range(2):
        for s in range(3):
            for t in range(7):
                expected[b, s, t] = (F.relu(q[b, s] @ k[b, t]) * w[b, s]).sum()
    torch.testing.assert_close(ops.index_scores(q, k, w), expected)


def test_the_best_are_given_in_ascending_order() -> None:
    scores = torch.randn(2, 5, 40)
    ids = ops.top_k_ascending(scores, 9)
    assert torch.equal(ids, scores.topk(9).indices.sort(-1).values)


def test_one_query_a_row_chooses_as_many_queries_do() -> None:
    # Rounded, so that many are equal; some rows see fewer than k.
    scores = (torch.randn(5, 1, 40) * 2).round()
    scores[2, 0, 3:], scores[3] = -torch.inf, 0
    alone, together = ops.top_k_ascending(scores, 9), ops.top_k_ascending(scores[:, 0], 9)
    assert torch.equal(alone[:, 0], together) and alone.dtype == torch.int64


def test_among_equals_the_earliest_win() -> None:
    scores = torch.tensor([[0.0, 5, 0, 0, 7, 0]])
    assert ops.top_k_ascending(scores, 4).tolist() == [[0, 1, 2, 4]]
    assert ops.top_k_ascending(torch.zeros(1, 300), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("length", [20, 37, 128, 1000])
def test_a_longer_context_does_not_change_a_choice_among_ties(length: int) -> None:
    # Rectified scores are often exactly 0; entries a query cannot see are -inf.
    scores = torch.randn(3, 20).clamp(min=0)
    longer = F.pad(scores, (0, length - 20), value=-math.inf)
    assert torch.equal(ops.top_k_ascending(scores, 12), ops.top_k_ascending(longer, 12))


def test_chosen_entries_are_gathered_or_masked() -> None:
    entries = torch.randn(2, 6, 4, requires_grad=True)
    ids = torch.tensor([[[0, 5], [2, -1]], [[1, 3], [-1, -1]]], dtype=torch.int32)
    got = ops.gather_entries(entries, ids)
    assert torch.equal(got[0, 0], entries[0, [0, 5]]) and torch.equal(got[1, 0], entries[1, [1, 3]])
    mask = ops.chosen_mask(ids, 6)
    assert mask.nonzero().tolist() == [[0, 0, 0], [0, 0, 5], [0, 1, 2], [1, 0, 1], [1, 0, 3]]
    # Two queries that read one entry both send it their gradient.
    same = ops.gather_entries(entries, torch.tensor([[[3], [3]], [[0], [0]]]))
    (grad,) = torch.autograd.grad(same.sum(), entries)
    assert grad[0, 3].tolist() == [2.0] * 4 and float(grad[0, 2].abs().sum()) == 0


# --- attention ----------------------------------------------------------------------------------

Inputs = tuple[torch.Tensor, ...]


@pytest.fixture
def inputs() -> Inputs:
    """q [2, 5, 3, 8], window [2, 6, 8] and its mask, entries [2, 9, 8] and theirs, sinks [3]."""
    keep = torch.rand(2, 5, 6) < 0.7
    some = torch.rand(2, 5, 9) < 0.5
    q, window, entries = (torch.randn(2, 5, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 9, 8))
    floats = [x.double().requires_grad_() for x in (q, window, entries, torch.randn(3))]
    return floats[0], floats[1], keep, floats[2], some, floats[3]


def _naive(inputs: Inputs, scale: float) -> torch.Tensor:
    q, window, keep, entries, some, sinks = inputs
    keys, mask = torch.cat((window, entries), 1), torch.cat((keep, some), -1)
    out = torch.zeros_like(q)
    for b in range(2):
        for s in range(5):
            for h in range(3):
                allowed = keys[b, mask[b, s]]
                z = (allowed @ q[b, s, h] * scale).exp()
                out = out.index_put(
                    (torch.tensor(b), torch.tensor(s), torch.tensor(h)),
                    (z[:, None] * allowed).sum(0) / (z.sum() + sinks[h].exp()),
                )
    return out


@pytest.mark.parametrize("attend", [ops.sink_attention, ops.fused_sink_attention])
def test_attention_follows_its_definition_with_gradients(
    inputs: Inputs, attend: Callable[..., torch.Tensor]
) -> None:
    expected, found = _naive(inputs, 0.3), attend(*inputs, 0.3)
    torch.testing.assert_close(found, expected)
    floats, weight = (inputs[0], inputs[1], inputs[3], inputs[5]), torch.randn_like(found)
    for grad, target in zip(
        torch.autograd.grad((found * weight).sum(), floats),
        torch.autograd.grad((expected * weight).sum(), floats),
        strict=True,
    ):
        torch.testing.assert_close(grad, target)


def test_gathered_entries_give_what_masked_ones_give(inputs: Inputs) -> None:
    q, window, keep, entries, _, sinks = inputs
    ids = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(10)]).view(2, 5, 4)
    ids[0, 0, 2:], ids[1, 3] = -1, -1
    masked = ops.sink_attention(q, window, keep, entries, ops.chosen_mask(ids, 9), sinks, 0.3)
    gathered = ops.sink_attention(
        q, window, keep, ops.gather_entries(entries, ids), ids >= 0, sinks, 0.3
    )
    torch.testing.assert_close(gathered, masked)
    weight, floats = torch.randn_like(masked), (q, window, entries, sinks)
    for grad, target in zip(
        torch.autograd.grad((gathered * weight).sum(), floats),
        torch.autograd.grad((masked * weight).sum(), floats),
        strict=True,
    ):
        torch.testing.assert_close(grad, target)


@pytest.mark.parametrize("attend", [ops.sink_attention, ops.fused_sink_attention])
def test_a_sink_takes_everything_or_nothing(
    inputs: Inputs, attend: Callable[..., torch.Tensor]
) -> None:
    q, window, keep, entries, some, _ = (x.detach() for x in inputs)
    keep[..., 0] = True
    for large in (80.0, math.inf):
        full = attend(q, window, keep, entries, some, torch.full((3,), large), 0.3)
        assert full.abs().max() < 1e-20
    none = attend(q, window, keep, entries, some, torch.full((3,), -math.inf), 0.3)
    keys, mask = torch.cat((window, entries), 1), torch.cat((keep, some), -1)
    z = torch.einsum("bshc,btc->bhst", q, keys) * 0.3
    p = z.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    torch.testing.assert_close(none, torch.einsum("bhst,btc->bshc", p, keys))


@pytest.mark.parametrize("attend", [ops.sink_attention, ops.fused_sink_attention])
def test_a_query_that_sees_nothing_gets_zero(
    inputs: Inputs, attend: Callable[..., torch.Tensor]
) -> None:
    q, window, keep, entries, some, sinks = (x.detach() for x in inputs)
    keep[1, 2], some[1, 2] = False, False
    out = attend(q, window, keep, entries, some, sinks, 0.3)
    assert float(out[1, 2].abs().max()) == 0 and bool(out.isfinite().all())


@pytest.mark.parametrize("attend", [ops.sink_attention, ops.fused_sink_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_computes_halves_in_float32(
    inputs: Inputs, dtype: torch.dtype, attend: Callable[..., torch.Tensor]
) -> None:
    q, window, keep, entries, some, sinks = (x.detach() for x in inputs)
    halves = [x.to(dtype) for x in (q, window, entries)]
    wide = attend(
        halves[0].float(), halves[1].float(), keep, halves[2].float(), some, sinks.float(), 0.3
    )
    found = attend(halves[0], halves[1], keep, halves[2], some, sinks.float(), 0.3)
    assert torch.equal(found, wide.to(dtype))


# --- pooling and the Engram gate ----------------------------------------------------------------


def test_pooling_weighs_every_channel_by_its_own_softmax() -> None:
    values, gates = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    p = gates.exp() / gates.exp().sum(1, keepdim=True)
    torch.testing.assert_close(ops.gated_pool(values, gates), (p * values).sum(1))


def _gate(dot: float, d: int = 4) -> float:
    """The gate at a given dot product: unit sides, so that the norms are 1."""
    streams, key = torch.ones(1, d, dtype=torch.float64), torch.ones(1, d, dtype=torch.float64)
    weight = torch.full((1, d), dot / d**0.5, dtype=torch.float64)
    return float(ops.engram_gate(streams, key, weight, torch.ones(1, d), 0.0))


@pytest.mark.parametrize("dot", [4.0, -4.0, 0.01, -0.01])
def test_the_gate_is_the_sigmoid_of_a_signed_root(dot: float) -> None:
    expected = 1 / (1 + math.exp(-math.copysign(abs(dot) ** 0.5, dot)))
    assert _gate(dot) == pytest.approx(expected, abs=1e-12)


def test_the_gate_jumps_over_one_half_at_zero() -> None:
    # `sign` instead of `copysign` would give exactly one half at zero.
    above, below = 1 / (1 + math.exp(-1e-3)), 1 / (1 + math.exp(1e-3))
    assert _gate(0.0) == pytest.approx(above, abs=1e-12)
    assert _gate(1e-9) == pytest.approx(above, abs=1e-12)
    assert _gate(-1e-9) == pytest.approx(below, abs=1e-12)


def test_the_gate_norms_each_stream_alone_and_only_the_product_of_weights_counts() -> None:
    h, k, a, b = (torch.randn(6, 4, 16, dtype=torch.float64) for _ in range(4))
    a, b = a[0], b[0]
    dot = (h * a * b * k).sum(-1) / 16**0.5
    for x in (h, k):
        dot = dot / (x.square().mean(-1) + 1e-5).sqrt()
    root = dot.abs().clamp(min=1e-6).sqrt() * dot.sign()
    gate = ops.engram_gate(h, k, a, b, 1e-5)
    torch.testing.assert_close(gate, root.sigmoid())
    torch.testing.assert_close(ops.engram_gate(h, k, 2 * a, b / 2, 1e-5), gate)


def test_the_gate_computes_halves_in_float32() -> None:
    h, k = (torch.randn(50, 4, 16).to(torch.bfloat16) for _ in range(2))
    a, b = torch.rand(2, 4, 16).to(torch.bfloat16)
    wide = ops.engram_gate(h.float(), k.float(), a.float(), b.float(), 1e-6)
    assert torch.equal(ops.engram_gate(h, k, a, b, 1e-6), wide)


@pytest.mark.parametrize("op", [ops.fp32, lambda x: ops.rms_norm(x, None, 1e-6)])
def test_float64_is_never_narrowed(op: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    assert op(x).dtype is torch.float64
