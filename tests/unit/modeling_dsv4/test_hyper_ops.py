# SPDX-License-Identifier: Apache-2.0
"""mHC: the equations by hand, and each written-out gradient against autograd of its reference."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from modeling_dsv4 import hyper_ops
from modeling_dsv4.hyper_connection import HyperConnection, HyperHead, first_pre

Op = Callable[..., torch.Tensor]
EPS = 1e-6


# --- Sinkhorn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sinkhorn", [hyper_ops.sinkhorn, hyper_ops.sinkhorn_ref])
def test_sinkhorn_gives_the_matrix_worked_out_by_hand(sinkhorn: Op) -> None:
    logits = torch.tensor(
        [[2.0, 0, 0, -1], [0, 1, 0, 0], [1, 0, 3, 0], [0, -2, 0, 1]], dtype=torch.float64
    )
    expected = [
        [0.651036, 0.213477, 0.076814, 0.058671],
        [0.097391, 0.641419, 0.084906, 0.176283],
        [0.111123, 0.099048, 0.715832, 0.073996],
        [0.140450, 0.046055, 0.122446, 0.691048],
    ]
    found = sinkhorn(logits, 20, EPS)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [1, 4, 8])
def test_sinkhorn_ends_on_columns(spread: float) -> None:
    m = hyper_ops.sinkhorn(spread * torch.randn(500, 4, 4), 20, EPS)
    torch.testing.assert_close(m.sum(-2), torch.ones(500, 4), atol=1e-5, rtol=0)
    if spread == 8:
        # Rows are only nearly 1; an order that ended on rows would have it the other way round.
        assert (m.sum(-1) - 1).abs().max() > 1e-3


def test_one_iteration_is_softmax_and_columns_alone() -> None:
    logits = torch.randn(6, 3, 3, dtype=torch.float64)
    m = logits.softmax(-1) + EPS
    once = m / (m.sum(-2, keepdim=True) + EPS)
    torch.testing.assert_close(hyper_ops.sinkhorn(logits, 1, EPS), once)
    again = once / (once.sum(-1, keepdim=True) + EPS)
    again = again / (again.sum(-2, keepdim=True) + EPS)
    torch.testing.assert_close(hyper_ops.sinkhorn(logits, 2, EPS), again)


@pytest.mark.parametrize("spread", [1, 6])
def test_the_gradient_of_sinkhorn_walks_all_twenty_iterations(spread: float) -> None:
    logits = (spread * torch.randn(3, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hyper_ops.sinkhorn(x, 20, EPS), logits)


# --- twins --------------------------------------------------------------------------------------

N, D = 4, 10
Shapes = Sequence[tuple[int, ...]]
TWINS: dict[str, tuple[Op, Op, Callable[[tuple[int, ...]], Shapes]]] = {
    "sinkhorn": (
        lambda x: hyper_ops.sinkhorn(x, 7, EPS),
        lambda x: hyper_ops.sinkhorn_ref(x, 7, EPS),
        lambda b: [(*b, N, N)],
    ),
    "project": (
        lambda x, f: hyper_ops.project(x, f, 1e-3),
        lambda x, f: hyper_ops.project_ref(x, f, 1e-3),
        lambda b: [(*b, N, D), (24, N * D)],
    ),
    "collapse": (
        hyper_ops.collapse,
        hyper_ops.collapse_ref,
        lambda b: [(*b, N, D), (*b, N)],
    ),
    "expand": (
        hyper_ops.expand,
        hyper_ops.expand_ref,
        lambda b: [(*b, D), (*b, N, D), (*b, N), (*b, N, N)],
    ),
}


def _inputs(shapes: Shapes, layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    made = []
    for shape in shapes:
        if layout == "transposed":
            x = torch.randn(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        elif layout == "strided":
            x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
        else:
            x = torch.randn(shape, dtype=dtype)
        made.append(x.requires_grad_())
    return made


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("batch", [(3, 5), (1,), (7,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_outputs_and_gradients_equal_the_reference(
    name: str, batch: tuple[int, ...], layout: str
) -> None:
    fast, reference, shapes = TWINS[name]
    inputs = _inputs(shapes(batch), layout, torch.float64)
    found, expected = fast(*inputs), reference(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    grads, wanted = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for grad, target in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, target, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", TWINS)
def test_an_expanded_gradient_is_as_good_as_a_dense_one(name: str) -> None:
    # `.sum()` sends a gradient of strides 0, which matrix products read differently.
    fast, reference, shapes = TWINS[name]
    inputs = _inputs(shapes((5,)), "contiguous", torch.float64)
    for found, expected in zip(
        torch.autograd.grad(fast(*inputs).sum(), inputs),
        torch.autograd.grad(reference(*inputs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", TWINS)
def test_written_out_gradients_pass_finite_differences(name: str) -> None:
    fast, _, shapes = TWINS[name]
    inputs = _inputs(shapes((2,)), "contiguous", torch.float64)
    assert torch.autograd.gradcheck(fast, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_mixed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    streams, u = torch.randn(300, N, D).to(dtype), torch.randn(300, D).to(dtype)
    pre, post, comb = torch.rand(300, N), torch.rand(300, N), torch.randn(300, N, N)
    exact = hyper_ops.expand_ref(*(x.double() for x in (u, streams, post, comb)))
    _check_rounded_once(hyper_ops.expand(u, streams, post, comb), exact)
    exact = hyper_ops.collapse_ref(streams.double(), pre.double())
    _check_rounded_once(hyper_ops.collapse(streams, pre), exact)


def _check_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Half a unit in the last place, and the noise of a sum in float32: terms cancel."""
    allowed = exact.abs() * torch.finfo(found.dtype).eps / 2 + 1e-6
    assert bool(((found.double() - exact).abs() <= allowed).all())


# --- the equations ------------------------------------------------------------------------------


def _coefficients(
    streams: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return hyper_ops.coefficients(streams, fn, base, scale, iters=20, eps=EPS, rms_eps=1e-6)


def test_expand_sums_over_the_first_index_of_comb() -> None:
    streams = torch.tensor([[1.0, 0], [0, 1]])
    comb = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    nothing = torch.zeros(2)
    mixed = hyper_ops.expand(nothing, streams, nothing, comb)
    torch.testing.assert_close(mixed, torch.tensor([[0.1, 0.3], [0.2, 0.4]]))


def test_rows_of_fn_are_pre_then_post_then_comb_row_major() -> None:
    streams = torch.randn(5, 4, 6, dtype=torch.float64)
    fn, base = torch.randn(24, 24).double(), torch.randn(24).double()
    scale = torch.tensor([0.3, 0.7, 1.1]).double()
    x = streams.flatten(1)
    m = (x @ fn.T) / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    pre, post, comb = _coefficients(streams, fn, base, scale)
    torch.testing.assert_close(pre, torch.sigmoid(0.3 * m[:, :4] + base[:4]) + EPS)
    torch.testing.assert_close(post, 2 * torch.sigmoid(0.7 * m[:, 4:8] + base[4:8]))
    logits = (1.1 * m[:, 8:] + base[8:]).view(5, 4, 4)
    torch.testing.assert_close(comb, hyper_ops.sinkhorn_ref(logits, 20, EPS))


def test_streams_of_zero_leave_the_base_alone() -> None:
    # Also: pre has an epsilon and post has none, and the base is not scaled.
    base = torch.randn(24)
    base[0], base[4] = -math.inf, -math.inf
    pre, post, _ = _coefficients(torch.zeros(1, 4, 8), torch.randn(24, 32), base, torch.randn(3))
    torch.testing.assert_close(pre[0], torch.sigmoid(base[:4]) + EPS)
    torch.testing.assert_close(post[0], 2 * torch.sigmoid(base[4:8]))
    assert float(pre[0, 0]) == pytest.approx(1e-6, rel=1e-6) and float(post[0, 0]) == 0


def test_one_norm_spans_all_streams() -> None:
    # With `fn` that reads stream 1 alone, ten times stream 0 still shrinks every coefficient.
    streams, fn = torch.randn(1, 4, 8), torch.zeros(24, 4, 8)
    fn[:, 1] = torch.randn(24, 8)
    louder = streams.clone()
    louder[:, 0] *= 10
    before, after = (hyper_ops.project(s, fn.flatten(1), 0.0) for s in (streams, louder))
    ratio = streams.square().mean().sqrt() / louder.square().mean().sqrt()
    torch.testing.assert_close(after, before * ratio)


def test_the_modules_use_their_own_parameters(tiny_config: Callable) -> None:
    config = tiny_config("v4", hc_eps=0.25)
    site, head = HyperConnection(config), HyperHead(config)
    streams = torch.randn(2, 3, 4, 32)
    with torch.no_grad():
        for p in (*site.parameters(), *head.parameters()):
            p.normal_()
    expected = hyper_ops.coefficients(
        streams, site.fn, site.base, site.scale, iters=20, eps=0.25, rms_eps=1e-6
    )
    collapsed, *found, passed = site(streams)
    assert torch.equal(collapsed, hyper_ops.collapse(streams, expected[0]))
    for part, wanted in zip(found, expected, strict=True):
        assert torch.equal(part, wanted)
    assert passed is streams
    handed = torch.randn(2, 3, 4)
    assert torch.equal(site(streams, handed)[0], hyper_ops.collapse(streams, handed))
    mix = hyper_ops.project_ref(streams, head.hc_fn, 1e-6)
    weights = torch.sigmoid(head.hc_scale * mix + head.hc_base) + 0.25
    torch.testing.assert_close(head(streams), (weights[..., None] * streams).sum(-2))


def test_a_single_pass_chain_opens_on_stream_zero() -> None:
    streams = torch.randn(2, 5, 4, 8, dtype=torch.bfloat16)
    pre = first_pre(streams)
    assert pre.dtype is torch.float32 and pre.shape == (2, 5, 4)
    assert torch.equal(hyper_ops.collapse(streams, pre), streams[:, :, 0])
