# SPDX-License-Identifier: Apache-2.0
"""mHC's Triton twins against their references: outputs and every gradient.

On a CPU Triton's interpreter runs them, at sizes that show every mask; on a GPU (`-m gpu`) they
run at the model's.
"""

from collections.abc import Callable

import pytest
import torch

from modeling_dsv4 import hyper_ops

hyper = pytest.importorskip("modeling_dsv4.kernels.hyper")
closing = pytest.importorskip("modeling_dsv4.kernels.expand")

pytestmark = pytest.mark.usefixtures("poison")

Tensors = list[torch.Tensor]
Agree = Callable[..., None]
EPS = 1e-6
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Two blocks of tokens and of channels at sizes that the interpreter walks in a second.
SMALL = hyper.Tiles(
    project=(16, 16, 4, 2), project_handed=(16, 16, 4, 2), split=2, split_handed=2,
    finish=(4, 16, 4),
    dots=1, slopes=8, spread=(16, 16, 4, 2), spread_split=2,
)  # fmt: skip


def _site(batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, device: str) -> Tensors:
    """Streams, handed, fn, base, scale of a size at which every one matters."""
    rows = n * n + 2 * n
    streams, handed = torch.randn(*batch, n, d), torch.randn(*batch, n)
    fn, base, scale = torch.randn(rows, n * d), torch.randn(rows), torch.rand(3) + 0.5
    fn = fn * (n * d) ** -0.5
    made = [streams.to(dtype), handed, fn, base, scale]
    return [x.to(device).requires_grad_() for x in made]


def _expanding(batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, device: str) -> Tensors:
    u, streams = torch.randn(*batch, d).to(dtype), torch.randn(*batch, n, d).to(dtype)
    made = [u, streams, torch.rand(*batch, n), torch.rand(*batch, n, n)]
    return [x.to(device).requires_grad_() for x in made]


def _both(single: bool, iters: int = 5, **more: object) -> tuple[Callable, Callable]:
    constants = {"iters": iters, "eps": EPS, "rms_eps": 0.1}

    def fused(s: torch.Tensor, h: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = hyper.open_site(s, h if single else None, *p, **constants, **more)
        return (*out, h)

    def reference(s: torch.Tensor, h: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = hyper_ops.open_site(s, h if single else None, *p, **constants)
        return (*out, h)

    return fused, reference


# float32: another order of additions. bfloat16: one rounding, which the interpreter makes by
# cutting off (2^-7) and a GPU to nearest (2^-9, of numbers up to twice as large as their sum).
INTERPRETED = {torch.float32: 3e-5, torch.bfloat16: 2**-7}
ON_GPU = {torch.float32: 1e-4, torch.bfloat16: 2**-8}
TOLERANCE = {"cpu": INTERPRETED, "cuda": ON_GPU}


@pytest.mark.parametrize("single", [False, True], ids=["own", "handed"])
@pytest.mark.parametrize(
    ("batch", "n", "d", "dtype"),
    [((3, 6), 4, 24, torch.float32), ((5,), 3, 23, torch.float32),
     ((3,), 4, 32, torch.bfloat16), ((0,), 4, 16, torch.float32), ((1,), 1, 16, torch.float32)],
    ids=str,
)  # fmt: skip
def test_a_site_opens_as_its_reference_does(
    agree: Agree, batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, single: bool
) -> None:
    if torch.cuda.is_available():
        pytest.skip("uses the GPU")
    fused, reference = _both(single, tiles=SMALL)
    agree(fused, reference, _site(batch, n, d, dtype, "cpu"), INTERPRETED[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("single", [False, True], ids=["own", "handed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "d"), [((2, 513), 4096), ((1,), 5120), ((3, 77), 100)], ids=str)
def test_a_site_opens_as_its_reference_does_at_real_size(
    agree: Agree, batch: tuple[int, ...], d: int, dtype: torch.dtype, single: bool
) -> None:
    fused, reference = _both(single, iters=20)
    agree(fused, reference, _site(batch, 4, d, dtype, "cuda"), ON_GPU[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_twenty_iterations_have_the_gradient_of_twenty(agree: Agree, device: str) -> None:
    fused, reference = _both(False, iters=20, tiles=SMALL)
    inputs = _site((5,), 4, 16, torch.float32, device)
    with torch.no_grad():
        inputs[4].mul_(4)
    agree(fused, reference, inputs, 2e-4)
    with pytest.raises(AssertionError, match="tensor"):
        agree(_both(False, iters=19, tiles=SMALL)[0], reference, inputs, 2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_parameters_get_no_gradient_and_streams_the_same(device: str) -> None:
    streams, handed, *parameters = _site((5,), 4, 24, torch.float32, device)
    wanted = _grad(hyper.open_site, streams, handed, parameters)
    frozen = [p.detach() for p in parameters]
    torch.testing.assert_close(_grad(hyper.open_site, streams, handed, frozen), wanted)
    torch.testing.assert_close(
        wanted, _grad(hyper_ops.open_site, streams, handed, parameters), atol=1e-4, rtol=1e-4
    )


def _grad(op: Callable, streams: torch.Tensor, handed: torch.Tensor, rest: Tensors) -> Tensors:
    out = op(streams, handed, *rest, iters=3, eps=EPS, rms_eps=1e-5)
    return list(torch.autograd.grad(sum(y.square().sum() for y in out), (streams, handed)))


@pytest.mark.parametrize("device", DEVICES)
def test_streams_that_are_one_stream_repeated_are_read_as_such(device: str) -> None:
    # What enters the first layer has strides of 0.
    _, _, *parameters = _site((2, 3), 4, 24, torch.float32, device)
    x = torch.randn(2, 3, 24, device=device)
    streams = x[:, :, None].expand(-1, -1, 4, -1)
    constants = {"iters": 3, "eps": EPS, "rms_eps": 1e-5}
    found = hyper.open_site(streams, None, *parameters, **constants)
    expected = hyper_ops.open_site(streams, None, *parameters, **constants)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "n", "d", "dtype"),
    [((2, 2), 4, 136, torch.float32), ((3,), 3, 23, torch.float32),
     ((2,), 4, 264, torch.bfloat16), ((0,), 4, 16, torch.float32), ((1,), 1, 8, torch.float32)],
    ids=str,
)  # fmt: skip
def test_a_site_closes_as_its_reference_does(
    agree: Agree, batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype, device: str
) -> None:
    tiles = closing.Tiles(forward=(128, 4), backward=1)
    agree(
        lambda *x: (closing.expand(*x, tiles),),
        lambda *x: (hyper_ops.expand_ref(*x),),
        _expanding(batch, n, d, dtype, device),
        TOLERANCE[device][dtype],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [4096, 5120])
def test_a_site_closes_as_its_reference_does_at_real_size(
    agree: Agree, d: int, dtype: torch.dtype
) -> None:
    agree(
        lambda *x: (closing.expand(*x),),
        lambda *x: (hyper_ops.expand_ref(*x),),
        _expanding((2, 515), 4, d, dtype, "cuda"),
        ON_GPU[dtype],
    )


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_layout_close_alike(device: str) -> None:
    u, streams, post, comb = _expanding((4, 3), 4, 40, torch.float32, device)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (u, streams, post)]
    turned.append(comb.mT.contiguous().mT)
    torch.testing.assert_close(
        closing.expand(*turned), hyper_ops.expand_ref(u, streams, post, comb), atol=1e-5, rtol=0
    )
