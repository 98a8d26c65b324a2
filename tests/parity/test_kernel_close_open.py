# SPDX-License-Identifier: Apache-2.0
"""Closing a site and opening the next in one pass, against the two operations it stands for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modeling_dsv4 import hyper_connection, hyper_ops
from modeling_dsv4.hyper_connection import HyperConnection

close_open = pytest.importorskip("modeling_dsv4.kernels.close_open")
hyper = pytest.importorskip("modeling_dsv4.kernels.hyper")
closing = pytest.importorskip("modeling_dsv4.kernels.expand")

pytestmark = pytest.mark.usefixtures("poison")

Tensors = list[torch.Tensor]
Agree = Callable[..., None]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")
# The same additions, of streams that are rounded in between; see test_kernel_hyper.py.
TOLERANCE = {
    ("cpu", torch.float32): 3e-5, ("cpu", torch.bfloat16): 2**-6,
    ("cuda", torch.float32): 1e-4, ("cuda", torch.bfloat16): 2**-7,
}  # fmt: skip
OPENING = hyper.Tiles(
    project=(16, 16, 4, 2), project_handed=(16, 16, 4, 2), split=2, split_handed=2,
    finish=(4, 16, 4),
    dots=1, slopes=8, spread=(16, 16, 4, 2), spread_split=2,
)  # fmt: skip
CLOSING = closing.Tiles(forward=(128, 4), backward=1)
# Two blocks of tokens and of channels at sizes that the interpreter walks in a second.
SMALL = close_open.Tiles(join=(16, 16, 4, 2), split=2, opening=OPENING, closing=CLOSING)
SITE = {"iters": 3, "eps": 1e-6, "rms_eps": 0.1}


def _inputs(batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, device: str) -> Tensors:
    """u, streams, post, comb, handed, fn, base, scale of a size at which every one matters."""
    rows = n * n + 2 * n
    made = [
        torch.randn(*batch, d).to(dtype), torch.randn(*batch, n, d).to(dtype),
        torch.rand(*batch, n), torch.rand(*batch, n, n), torch.randn(*batch, n),
        torch.randn(rows, n * d) * (n * d) ** -0.5, torch.randn(rows), torch.rand(3) + 0.5,
    ]  # fmt: skip
    return [x.to(device).requires_grad_() for x in made]


def _ops(single: bool, site: dict[str, Any], **more: object) -> tuple[Callable, Callable]:
    """The twin and the equations; both also give what is not used, so that it has a gradient."""

    def call(op: Callable, *x: torch.Tensor, **more: object) -> tuple[torch.Tensor, ...]:
        u, streams, post, comb, handed, *parameters = x
        given = handed if single else None
        return (*op(u, streams, post, comb, given, *parameters, **site, **more), handed)

    def equations(u: Any, streams: Any, post: Any, comb: Any, *rest: Any, **site: Any) -> Any:
        return hyper_ops.open_site(hyper_ops.expand_ref(u, streams, post, comb), *rest, **site)

    return (
        lambda *x: call(close_open.close_and_open, *x, **more),
        lambda *x: call(equations, *x),
    )


@INTERPRETED
@pytest.mark.parametrize(
    ("batch", "n", "d", "dtype"),
    [((3, 6), 4, 20, torch.float32), ((5,), 3, 23, torch.float32), ((2,), 2, 40, torch.float32),
     ((3,), 4, 32, torch.bfloat16), ((0,), 4, 16, torch.float32), ((1,), 1, 16, torch.float32)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("single", [False, True], ids=["own", "handed"])
def test_closing_and_opening_is_one_after_the_other(
    agree: Agree, batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, single: bool
) -> None:
    fused, equations = _ops(single, SITE, tiles=SMALL)
    agree(fused, equations, _inputs(batch, n, d, dtype, "cpu"), TOLERANCE["cpu", dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("single", [False, True], ids=["own", "handed"])
@pytest.mark.parametrize(
    ("batch", "d", "dtype"),
    [((2, 513), 4096, torch.float32), ((2, 513), 4096, torch.bfloat16),
     ((1,), 5120, torch.bfloat16), ((3, 77), 100, torch.float32)],
    ids=str,
)  # fmt: skip
def test_closing_and_opening_is_one_after_the_other_at_real_size(
    agree: Agree, batch: tuple[int, ...], d: int, dtype: torch.dtype, single: bool
) -> None:
    fused, equations = _ops(single, SITE | {"iters": 20})
    agree(fused, equations, _inputs(batch, 4, d, dtype, "cuda"), TOLERANCE["cuda", dtype])


@INTERPRETED
@pytest.mark.parametrize(
    ("single", "dtype"),
    [(False, torch.float32), (True, torch.bfloat16)],
    ids=str,
)
def test_it_has_the_numbers_and_gradients_of_the_two_kernels(
    single: bool, dtype: torch.dtype
) -> None:
    # Streams are rounded before their statistic is taken, as they are when they are stored.
    inputs = _inputs((17,), 3, 24, dtype, "cpu")

    def two(u: Any, h: Any, post: Any, comb: Any, handed: Any, *rest: Any) -> Any:
        streams = closing.expand(u, h, post, comb, CLOSING)
        given = handed if single else None
        return (*hyper.open_site(streams, given, *rest, **SITE, tiles=OPENING), handed)

    one, _ = _ops(single, SITE, tiles=SMALL)
    found, expected = one(*inputs), two(*inputs)
    assert torch.equal(found[4], expected[4])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    weights = [torch.randn_like(y) for y in expected]
    grads, wanted = (
        torch.autograd.grad(sum((y * w).float().sum() for y, w in zip(out, weights, strict=True)),
                            inputs)
        for out in (found, expected)
    )  # fmt: skip
    # bfloat16: gradients of streams are rounded, and their last bit may fall either way.
    near = 1e-5 if dtype is torch.float32 else 2**-7
    for grad, target in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, target, atol=near * float(target.abs().max()), rtol=near)


@INTERPRETED
def test_a_run_repeats_bit_for_bit() -> None:
    inputs = _inputs((17,), 2, 20, torch.float32, "cpu")
    op, _ = _ops(True, SITE, tiles=SMALL)
    runs = []
    for _ in range(2):
        out = op(*inputs)
        runs.append([*out, *torch.autograd.grad(sum(y.square().sum() for y in out), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@INTERPRETED
def test_frozen_parameters_get_no_gradient_and_all_else_the_same() -> None:
    inputs = _inputs((2,), 4, 16, torch.float32, "cpu")
    op, _ = _ops(True, SITE, tiles=SMALL)

    def grads(given: Tensors) -> Tensors:
        loss = sum(y.square().sum() for y in op(*given))
        return list(torch.autograd.grad(loss, given[:5]))

    frozen = [*inputs[:5], *(p.detach() for p in inputs[5:])]
    torch.testing.assert_close(grads(frozen), grads(inputs), atol=0, rtol=0)


@INTERPRETED
def test_inputs_of_any_layout_give_the_same() -> None:
    made = [x.detach() for x in _inputs((4, 3), 4, 40, torch.float32, "cpu")]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in made[:5]]
    turned[3] = made[3].mT.contiguous().mT
    turned[1] = made[1][:, :, :1].expand(-1, -1, 4, -1)
    made[1] = turned[1].contiguous()
    op, _ = _ops(True, SITE, tiles=SMALL)
    torch.testing.assert_close(op(*turned, *made[5:]), op(*made), atol=0, rtol=0)


# --- the choice ---------------------------------------------------------------------------------


def _layer_parts(tiny_config: Callable, kind: str) -> tuple[HyperConnection, HyperConnection, Any]:
    config = tiny_config(kind, hc_sinkhorn_iters=2)
    before, after = HyperConnection(config), HyperConnection(config)
    with torch.no_grad():
        for p in (*before.parameters(), *after.parameters()):
            p.normal_()
    n, d = config.hc_mult, config.hidden_size
    given = [
        torch.randn(1, 2, d), torch.randn(1, 2, n, d), torch.rand(1, 2, n), torch.rand(1, 2, n, n),
        torch.rand(1, 2, n),
    ]  # fmt: skip
    return before, after, given


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry a fused launch."""
    calls: list[bool] = []
    kernel = close_open.close_and_open

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(close_open, "close_and_open", count)
    return calls


def _wrapped(site: HyperConnection) -> None:
    """As accelerate does where weights are to be fetched first."""
    inner = site.forward
    site.forward = lambda *args: inner(*args)  # type: ignore[method-assign]


WATCHED: dict[str, Callable[[HyperConnection], object]] = {
    "a hook behind": lambda m: m.register_forward_hook(lambda m, a, o: None),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda m, a: None),
    "a hook on gradients": lambda m: m.register_full_backward_hook(lambda m, i, o: None),
    "a hook before gradients": lambda m: m.register_full_backward_pre_hook(lambda m, o: None),
    "another forward": _wrapped,
    "another class": lambda m: setattr(m, "__class__", type("Mine", (HyperConnection,), {})),
    "other kernels": lambda m: setattr(m, "kernels", "torch"),
}


@INTERPRETED
@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_sites_join_unless_somebody_stands_between(
    tiny_config: Callable, joined: list[bool], kind: str
) -> None:
    before, after, given = _layer_parts(tiny_config, kind)
    last = given.pop()
    handed = last if kind == "v41" else None
    want = after(hyper_ops.expand(*given), handed)
    before.kernels = after.kernels = "triton"
    found = hyper_connection.close_and_open(before, after, *given, handed)
    assert joined == [True]
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@INTERPRETED
@pytest.mark.parametrize("what", WATCHED)
def test_a_watched_site_is_called_with_closed_streams(
    tiny_config: Callable, joined: list[bool], what: str
) -> None:
    before, after, given = _layer_parts(tiny_config, "v41")
    handed = given.pop()
    before.kernels = after.kernels = "triton"
    seen = []
    WATCHED[what](after)
    inner = after.forward
    after.forward = lambda *args: seen.append(args) or inner(*args)  # type: ignore[method-assign]
    if what != "another forward":
        # What is watched here is what alone stands between, so not this test itself.
        del after.forward
    found = hyper_connection.close_and_open(before, after, *given, handed)
    assert not joined
    want = after.forward(hyper_ops.expand(*given), handed)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@INTERPRETED
def test_a_hook_on_all_modules_sees_closed_streams(
    tiny_config: Callable, joined: list[bool]
) -> None:
    before, after, given = _layer_parts(tiny_config, "v41")
    handed, seen = given.pop(), []
    before.kernels = after.kernels = "triton"
    watch = nn.modules.module.register_module_forward_pre_hook(lambda m, args: seen.append(args))
    try:
        hyper_connection.close_and_open(before, after, *given, handed)
    finally:
        watch.remove()
    (streams, _), *_ = seen
    assert not joined
    torch.testing.assert_close(streams, hyper_ops.expand(*given), atol=1e-5, rtol=1e-5)


# --- whole models -------------------------------------------------------------------------------


def _model(tiny: Callable[..., Any], kind: str) -> Any:
    """One layer, whose sites alone compute in Triton."""
    changes: dict[str, Any] = {"hc_sinkhorn_iters": 2}
    if kind == "v4":
        changes |= {"num_hidden_layers": 1, "compress_ratios": [4], "num_hash_layers": 0}
    model = tiny(kind, **changes)
    if kind == "v41":
        del model.model.layers[1:]
    model.set_kernels("torch")
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernels = "triton"
    return model


def _learn(model: Any, ids: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(ids, use_cache=False, output_hidden_states=True)
    out.logits.square().mean().backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@INTERPRETED
@torch.no_grad()
def test_a_two_pass_model_is_the_same_joined_and_apart(
    tiny: Callable[..., Any], joined: list[bool]
) -> None:
    model, ids = _model(tiny, "v4"), torch.randint(3, 64, (1, 5))
    together = model(ids, output_hidden_states=True)
    assert joined == [True]
    model.set_kernels("torch")
    apart = model(ids, output_hidden_states=True)
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.hidden_states, apart.hidden_states, atol=1e-5, rtol=1e-5)


@INTERPRETED
def test_a_checkpointed_single_pass_model_learns_the_same_joined_and_apart(
    tiny: Callable[..., Any], joined: list[bool]
) -> None:
    model, ids = _model(tiny, "v41"), torch.randint(3, 64, (1, 3))
    model.train().gradient_checkpointing_enable()
    together, grads = _learn(model, ids)
    assert len(joined) == 2
    model.eval().gradient_checkpointing_disable()
    model.set_kernels("torch")
    apart, wanted = _learn(model, ids)
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.hidden_states, apart.hidden_states, atol=1e-5, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        worst = (grads[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert worst < 1e-4, name


@INTERPRETED
@torch.no_grad()
def test_weights_that_accelerate_fetches_are_there_in_time(
    tiny: Callable[..., Any], joined: list[bool]
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = _model(tiny, "v41"), torch.randint(3, 64, (1, 3))
    want = model(ids).logits
    assert joined == [True]
    site = model.model.layers[0].ffn_hc
    accelerate.cpu_offload(site, execution_device=torch.device("cpu"))
    assert site.fn.is_meta
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert joined == [True]
