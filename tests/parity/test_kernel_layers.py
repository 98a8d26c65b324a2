# SPDX-License-Identifier: Apache-2.0
"""Triton twins of rotation, norm and SwiGLU against their references: outputs and gradients."""

from collections.abc import Callable

import pytest
import torch

from modeling_dsv4 import ops
from modeling_dsv4.rotary import norm_rotate, rotate

pytest.importorskip("triton")

Tensors = list[torch.Tensor]
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


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element nobody writes shows."""
    plain, plain_new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: plain_new(*a, **k).fill_(torch.nan)
    )


def _agree(op: Callable[..., torch.Tensor], inputs: Tensors, tolerance: float) -> None:
    """`op(kernels, *inputs)`: Triton's in the inputs' dtype, torch's in float32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    found, expected = op("triton", *inputs), op("torch", *wide)
    weight = torch.randn_like(found)
    grads = torch.autograd.grad((found * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight.float()).sum(), wide)
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        assert a.shape == b.shape
        if b.numel():
            worst = (a.float() - b).abs().max() / b.abs().max().clamp(min=1e-30)
            assert worst <= tolerance, f"{worst:.1e}"


def _turn(*shape: int) -> torch.Tensor:
    angle = 7 * torch.randn(shape)
    return torch.polar(torch.ones_like(angle), angle)


def _leaves(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensors:
    return [torch.randn(s).to(dtype).to(device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["on", "back"])
@pytest.mark.parametrize(
    ("shape", "r"), [((2, 3, 5, 24), 8), ((1, 2, 1, 6), 6), ((2, 0, 4, 16), 8)], ids=str
)
def test_heads_turn_as_the_reference_turns_them(
    shape: tuple[int, ...], r: int, inverse: bool, dtype: torch.dtype, device: str
) -> None:
    turn = _turn(*shape[:2], 1, r // 2).to(device)
    _agree(
        lambda kernels, x: rotate(x, turn, inverse, kernels),
        _leaves(device, dtype, shape), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_one_head_a_token_and_any_layout_turn_alike(device: str) -> None:
    x, turn = torch.randn(3, 2, 12, device=device), _turn(2, 3, 4).to(device)
    found = rotate(x.transpose(0, 1), turn, kernels="triton")
    torch.testing.assert_close(found, rotate(x.transpose(0, 1), turn))
    alike = turn[:, :1]  # one turn for all tokens: broadcast over an axis that is not the heads'
    found = rotate(x.transpose(0, 1), alike.expand(-1, 3, -1), kernels="triton")
    torch.testing.assert_close(found, rotate(x.transpose(0, 1), alike))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (2, 0, 4, 16)], ids=str)
def test_heads_are_normed_and_turned_in_one(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    turn = _turn(*shape[:2], 1, 4).to(device)
    _agree(
        lambda kernels, x: norm_rotate(x, turn, 1e-2, kernels),
        _leaves(device, dtype, shape), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normed_and_turned_at_real_size(dtype: torch.dtype) -> None:
    turn = _turn(2, 300, 1, 32).cuda()
    _agree(
        lambda kernels, x: norm_rotate(x, turn, 1e-6, kernels),
        _leaves("cuda", dtype, (2, 300, 64, 512)), TOLERANCE["cuda"][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 1, 16), (0, 8)], ids=str)
def test_rows_are_normed_as_by_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    _agree(
        lambda kernels, x, w: ops.rms_norm(x, w, 1e-3, kernels),
        _leaves(device, dtype, shape, shape[-1:]), TOLERANCE[device][dtype],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [512, 1280, 4096, 7168])
def test_rows_are_normed_at_real_size(d: int, dtype: torch.dtype) -> None:
    _agree(
        lambda kernels, x, w: ops.rms_norm(x, w, 1e-6, kernels),
        _leaves("cuda", dtype, (1031, d), (d,)), 4 * TOLERANCE["cuda"][dtype],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0.7, None])
@pytest.mark.parametrize("m", [5, 0])
def test_swiglu_clamps_and_weighs_as_the_reference(
    m: int, limit: float | None, dtype: torch.dtype, device: str
) -> None:
    x, weight = _leaves(device, dtype, (m, 2 * 24), (m,))
    tolerance = TOLERANCE[device][dtype]
    _agree(lambda kernels, x, w: ops.swiglu(x, limit, w, kernels), [x, weight], tolerance)
    _agree(lambda kernels, x: ops.swiglu(x, limit, None, kernels), [x], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_agrees_at_real_size(dtype: torch.dtype) -> None:
    inputs = [*_leaves("cuda", dtype, (2051, 2 * 2304)), *_leaves("cuda", torch.float32, (2051,))]
    _agree(lambda kernels, x, w: ops.swiglu(x, 1.0, w, kernels), inputs, TOLERANCE["cuda"][dtype])
