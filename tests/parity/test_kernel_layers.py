# SPDX-License-Identifier: Apache-2.0
"""Triton twins of rotation, norm and SwiGLU against their references: outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import ops
from modeling_dsv4.rotary import norm_rotate, rotate

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poison")

Tensors = list[torch.Tensor]
Agree = Callable[..., None]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# float32: another order of additions. bfloat16: roundings, which the interpreter makes by cutting
# off (2^-7) and a GPU to nearest; two in a row where a normed head is turned.
TOLERANCE = {
    "cpu": {torch.float32: 1e-5, torch.bfloat16: 2**-6},
    "cuda": {torch.float32: 1e-5, torch.bfloat16: 2**-7},
}
DTYPES = [torch.float32, torch.bfloat16]


def _both(op: Callable[..., torch.Tensor]) -> tuple[Callable[..., Tensors], ...]:
    """`op(kernels, *inputs)` with Triton and with torch."""
    return (lambda *x: [op("triton", *x)]), (lambda *x: [op("torch", *x)])


def _turn(*shape: int) -> torch.Tensor:
    angle = 7 * torch.randn(shape)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def _leaves(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensors:
    return [torch.randn(s).to(dtype).to(device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["on", "back"])
@pytest.mark.parametrize(
    ("shape", "r"), [((2, 3, 5, 24), 8), ((1, 2, 1, 6), 6), ((2, 0, 4, 16), 8)], ids=str
)
def test_heads_turn_as_the_reference_turns_them(
    agree: Agree, shape: tuple[int, ...], r: int, inverse: bool, dtype: torch.dtype, device: str
) -> None:
    turn = _turn(*shape[:2], 1, r // 2).to(device)
    agree(*_both(lambda kernels, x: rotate(x, turn, inverse, kernels)),
        _leaves(device, dtype, shape), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_one_head_a_token_and_any_layout_turn_alike(device: str) -> None:
    x, turn = torch.randn(3, 2, 12, device=device), _turn(2, 3, 4).to(device)
    found = rotate(x.transpose(0, 1), turn, kernels="triton")
    torch.testing.assert_close(found, rotate(x.transpose(0, 1), turn))
    alike = turn[:, :1]  # one turn for all tokens: broadcast over an axis that is not the heads'
    found = rotate(x.transpose(0, 1), alike.expand(-1, 3, -1, -1), kernels="triton")
    torch.testing.assert_close(found, rotate(x.transpose(0, 1), alike))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (2, 0, 4, 16)], ids=str)
def test_heads_are_normed_and_turned_in_one(
    agree: Agree, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    turn = _turn(*shape[:2], 1, 4).to(device)
    agree(*_both(lambda kernels, x: norm_rotate(x, turn, 1e-2, kernels)),
        _leaves(device, dtype, shape), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normed_and_turned_at_real_size(agree: Agree, dtype: torch.dtype) -> None:
    turn = _turn(2, 300, 1, 32).cuda()
    agree(*_both(lambda kernels, x: norm_rotate(x, turn, 1e-6, kernels)),
        _leaves("cuda", dtype, (2, 300, 64, 512)), TOLERANCE["cuda"][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 1, 16), (0, 8)], ids=str)
def test_rows_are_normed_as_by_the_reference(
    agree: Agree,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Fewer programs than rows: each walks several.
    monkeypatch.setattr("modeling_dsv4.kernels.norm.PROGRAMS", 3)
    agree(*_both(lambda kernels, x, w: ops.rms_norm(x, w, 1e-3, kernels)),
        _leaves(device, dtype, shape, shape[-1:]), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [512, 1280, 4096, 7168])
def test_rows_are_normed_at_real_size(agree: Agree, d: int, dtype: torch.dtype) -> None:
    agree(*_both(lambda kernels, x, w: ops.rms_norm(x, w, 1e-6, kernels)),
        _leaves("cuda", dtype, (1031, d), (d,)), 4 * TOLERANCE["cuda"][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0.7, None])
@pytest.mark.parametrize("m", [5, 0])
def test_swiglu_clamps_and_weighs_as_the_reference(
    agree: Agree, m: int, limit: float | None, dtype: torch.dtype, device: str
) -> None:
    x, weight = _leaves(device, dtype, (m, 2 * 24), (m,))
    tolerance = TOLERANCE[device][dtype]
    agree(*_both(lambda kernels, x, w: ops.swiglu(x, limit, w, kernels)), [x, weight], tolerance)
    agree(*_both(lambda kernels, x: ops.swiglu(x, limit, None, kernels)), [x], tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [0.7, None])
@pytest.mark.parametrize("half", [0, 1])
def test_swiglu_keeps_what_is_no_number(half: int, limit: float | None, device: str) -> None:
    x = torch.ones(3, 2 * 24, device=device)
    x[1, half * 24 + 5] = torch.nan
    for kernels in ("torch", "triton"):
        where = ops.swiglu(x, limit, None, kernels).isnan().nonzero().tolist()
        assert where == [[1, 5]], kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_agrees_at_real_size(agree: Agree, dtype: torch.dtype) -> None:
    inputs = [*_leaves("cuda", dtype, (2051, 2 * 2304)), *_leaves("cuda", torch.float32, (2051,))]
    agree(
        *_both(lambda kernels, x, w: ops.swiglu(x, 1.0, w, kernels)),
        inputs,
        TOLERANCE["cuda"][dtype],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_a_model_on_triton_is_the_same_model(
    tiny: Callable[..., Any], kind: str, device: str
) -> None:
    # The shortest stacks with a compressor, an indexer and, in V4.1, an Engram.
    changes: dict[str, Any] = {"hc_sinkhorn_iters": 2}
    if kind == "v4":
        changes |= {"num_hidden_layers": 1, "compress_ratios": [4], "num_hash_layers": 0}
    model = tiny(kind, **changes).to(device)
    if kind == "v41":
        del model.model.layers[2:]
    ids = torch.randint(3, 64, (1, 5), device=device)
    grads, logits = [], []
    for kernels in ("triton", "torch"):
        model.set_kernels(kernels)
        model.zero_grad()
        logits.append(model(ids, use_cache=False).logits)
        logits[-1].square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        worst = (grads[0][name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert worst < 1e-3, name
