# SPDX-License-Identifier: Apache-2.0
"""Linear maps of few rows in C against float64, and when they are taken."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_dsv4 import kernel_choice, linear_ops
from modeling_dsv4.cpu import build
from modeling_dsv4.cpu import linear as in_c
from modeling_dsv4.formats import dequantize_fp8_block, quantize_fp8_block
from modeling_dsv4.layers import Dsv4Linear, Float32Head
from modeling_dsv4.storage import Fp8GroupedLinear, Fp8Linear, GroupedLinear

COMPILER = build.find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(EPS), ids=str)
# [out, in]: whole steps and tiles; a rest of both; less than a step.
SHAPES = ((64, 256), (37, 333), (5, 7))
# Blocks of scales that end inside the weight, in both directions, and are smaller than it.
FP8_SHAPES = ((128, 256), (197, 333), (3, 70))


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let C compute the smallest weights."""
    monkeypatch.setattr(kernel_choice, "_LEAST_BYTES", dict.fromkeys(in_c._KINDS, 0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that C computed."""
    made: list[int] = []
    linear = in_c.linear

    def count(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(x.shape[:-1].numel())
        return linear(x, *args, **kwargs)

    monkeypatch.setattr(in_c, "linear", count)
    return made


def near(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, plus: torch.Tensor | None = None
) -> None:
    """Within what float32 sums may err by, and one rounding to the result's dtype.

    K products are added in at least 16 parts: each is in at most K / 16 + 16 additions.
    """
    x, weight = x.double(), weight.double()
    wanted, size = F.linear(x, weight), F.linear(x.abs(), weight.abs())
    if plus is not None:
        wanted, size = wanted + plus.double(), size + plus.double().abs()
    allowed = (x.shape[-1] / 16 + 16) * EPS[torch.float32] * size
    if found.dtype is torch.bfloat16:
        allowed = allowed + EPS[torch.bfloat16] * wanted.abs()
    assert found.shape == wanted.shape and found.isfinite().all()
    assert ((found.double() - wanted).abs() <= allowed).all()


def check_all(rows: Any = range(1, 10)) -> None:
    """Every kind of weight, with every dtype of rows, by the operation itself."""
    for m in rows:
        for dtype in EPS:
            for out, columns in SHAPES:
                x, weight = torch.randn(m, columns).to(dtype), torch.randn(out, columns)
                plus = torch.randn(m, out).to(dtype)
                for kind in EPS:
                    given = weight.to(kind)
                    near(in_c.linear(x, given, plus=plus), x, given, plus)
                    near(in_c.linear(x, given, wide=True), x, given)
            for out, columns in FP8_SHAPES:
                x = torch.randn(m, columns).to(dtype)
                codes, scale = quantize_fp8_block(torch.randn(out, columns), 64)
                weight = dequantize_fp8_block(codes, scale, 64, torch.float32)
                near(in_c.linear(x, codes, scale, block=64), x, weight)


def test_sums_err_by_no_more_than_float32_explains() -> None:
    check_all()


@pytest.mark.parametrize("groups", [1, 3])
@DTYPES
@pytest.mark.usefixtures("everything")
def test_groups_are_multiplied_apart(calls: list[int], dtype: torch.dtype, groups: int) -> None:
    module = GroupedLinear(130, groups * 37, groups).to(dtype)
    packed = Fp8GroupedLinear(130, groups * 37, groups, 64)
    for weight in (module.weight, torch.randn(groups * 37, 130)):
        nn.init.normal_(module.weight)
        packed.set_weight(weight)
    x = torch.randn(2, 2, groups, 130).to(dtype)
    plus = torch.randn(2, 2, groups, 37).to(dtype)
    with torch.no_grad():
        for layer, weight in ((module, module.weight), (packed, packed.dequantized(dtype))):
            for added in (None, plus):
                found = layer(x, added)
                assert found.shape == (2, 2, groups, 37)
                for g in range(groups):
                    rows = weight[g * 37 : (g + 1) * 37]
                    part = None if added is None else added[..., g, :]
                    near(found[..., g, :], x[..., g, :], rows, part)
    assert calls == [4] * 4


@DTYPES
@pytest.mark.usefixtures("everything")
def test_threads_and_rows_beside_a_row_change_no_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    x, weight = torch.randn(16, 400).to(dtype), torch.randn(300, 400)
    codes, scale = quantize_fp8_block(weight, 64)
    ways = (
        lambda x: in_c.linear(x, weight.to(dtype)),
        lambda x: in_c.linear(x, codes, scale, block=64),
    )
    try:
        for way in ways:
            wanted = way(x)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(way(x), wanted)
                for m in range(1, 8):
                    assert torch.equal(way(x[:m]), wanted[:m])
                apart = x.t().contiguous().t()
                assert torch.equal(way(apart), wanted)
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_every_code_and_scale_is_what_the_format_says(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    scale = torch.full((1, 4), 127, dtype=torch.uint8)
    scale[0, 1], scale[0, 2] = 0, 254
    codes[:, 0x7F] = codes[:, 0xFF] = 0
    codes, scale = codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)
    weight = dequantize_fp8_block(codes, scale, 64, torch.float64)
    for column in (3, 70, 135, 200):
        x = torch.zeros(1, 256, dtype=dtype)
        x[0, column] = 2.0**-6 if column == 135 else 1
        found = in_c.linear(x, codes, scale, block=64, wide=True)
        assert torch.equal(found.double(), F.linear(x.double(), weight))
    # One lane at a time: none is in another's place.
    wanted = weight[0, 192:]
    x = torch.zeros(64, 256, dtype=dtype)
    x[:, 192:] = torch.eye(64)
    found = in_c.linear(x, codes[:1].contiguous(), scale, block=64, wide=True)
    assert torch.equal(found[:, 0].double(), wanted)


@DTYPES
def test_a_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 100).to(dtype), torch.randn(9, 100)
    x[1, 99] = torch.nan
    codes, scale = quantize_fp8_block(weight, 64)
    for found in (in_c.linear(x, weight.to(dtype)), in_c.linear(x, codes, scale, block=64)):
        assert found[1].isnan().all() and found[[0, 2, 3, 4]].isfinite().all()
    codes.view(torch.uint8)[4, 77], codes.view(torch.uint8)[2, 98] = 0x7F, 0xFF
    x[1, 99] = 0
    found = in_c.linear(x, codes, scale, block=64)
    assert found[:, [2, 4]].isnan().all() and found.isnan().sum() == 10
    scale.view(torch.uint8)[0, 1] = 255
    assert in_c.linear(x, codes, scale, block=64).isnan().all()


@pytest.mark.usefixtures("everything")
def test_every_number_of_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, scratch = in_c._empty, torch.empty
    monkeypatch.setattr(in_c, "_empty", lambda *a: empty(*a).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: scratch(*a, **k).fill_(torch.nan))
    check_all((1, 6))


# --- when C is taken -----------------------------------------------------------------------------


class Sub(torch.Tensor):
    """Numbers whose products somebody else defines."""


X, W = torch.randn(2, 3, 20), torch.randn(16, 20)
LEFT = {
    "torch": ("torch", X, W),
    "many rows": ("auto", torch.randn(9, 20), W),
    "many rows of bfloat16": ("auto", X.bfloat16(), W.bfloat16()),
    "float64": ("auto", X.double(), W.double()),
    "float16": ("auto", X.half(), W.half()),
    "learning": ("auto", X, nn.Parameter(W)),
    "learning x": ("auto", X.clone().requires_grad_(), W),
    "transposed": ("auto", X, W.t().contiguous().t()),
    "sliced": ("auto", X[..., :10], W[:, :10]),
    "meta": ("auto", X.to("meta"), W.to("meta")),
    "subclass": ("auto", X, W.as_subclass(Sub)),
}


@pytest.mark.parametrize("why", list(LEFT))
@pytest.mark.usefixtures("everything")
def test_what_c_does_not_compute_is_torchs(calls: list[int], why: str) -> None:
    kernels, x, weight = LEFT[why]
    found = linear_ops.linear(x, weight, kernels=kernels)
    assert not calls and found.shape == (*x.shape[:-1], 16)
    if why != "meta":
        assert torch.equal(found, F.linear(x, weight))


@pytest.mark.usefixtures("everything")
def test_few_rows_without_gradients_are_cs(calls: list[int]) -> None:
    bias = torch.randn(16)
    near(linear_ops.linear(X, W, bias, kernels="auto"), X, W, bias)
    with torch.no_grad():
        near(linear_ops.linear(X, nn.Parameter(W), kernels="auto"), X, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_ops.linear(X, W, kernels="auto").dtype is torch.bfloat16
    assert linear_ops.linear(X[:0], W, kernels="auto").shape == (0, 3, 16)
    with pytest.raises(RuntimeError, match="shape"):
        linear_ops.linear(X[..., 1:], W, kernels="auto")
    assert calls == [6, 6, 0]


def test_small_weights_are_torchs(calls: list[int]) -> None:
    linear_ops.linear(torch.randn(1, 512), torch.randn(1023, 512), kernels="auto")
    assert not calls
    linear_ops.linear(torch.randn(1, 512), torch.randn(1024, 512), kernels="auto")
    assert calls == [1]


@pytest.mark.usefixtures("everything")
def test_modules_ask_for_c_unless_told(calls: list[int]) -> None:
    layers = {
        "plain": Dsv4Linear(128, 70),
        "head": Float32Head(128, 70, bias=False).bfloat16(),
        "fp8": Fp8Linear.from_plain(nn.Linear(128, 70, bias=False), 64),
    }
    with torch.no_grad():
        for layer in layers.values():
            found = layer(torch.randn(1, 1, 128))
            kernel_choice.set_kernels(layer, "torch")
            torch.manual_seed(0)
            assert found.shape == (1, 1, 70) and found.dtype is torch.float32
            layer(torch.randn(1, 1, 128))
    assert calls == [1, 1, 1]


@pytest.mark.usefixtures("everything")
def test_fp8_in_other_blocks_or_scales_is_torchs(calls: list[int]) -> None:
    with torch.no_grad():
        Fp8Linear.from_plain(nn.Linear(128, 70, bias=False), 32)(torch.randn(1, 128))
        layer = Fp8Linear.from_plain(nn.Linear(128, 70, bias=False), 64)
        wanted = layer(torch.randn(1, 128))
        assert calls == [1]
        layer.weight_scale_inv = nn.Parameter(layer.weight_scale_inv.float(), requires_grad=False)
        assert layer(torch.randn(1, 128)).shape == wanted.shape
    assert calls == [1]


@pytest.mark.usefixtures("everything")
def test_what_is_added_is_spread_or_refused(calls: list[int]) -> None:
    plus = torch.randn(1, 1, 16)
    with torch.no_grad():
        found = linear_ops.linear(X, W, plus=plus, kernels="auto")
        torch.testing.assert_close(found, F.linear(X, W) + plus, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="expand"):
            linear_ops.linear(X, W, plus=torch.randn(2), kernels="auto")
    assert len(calls) == 2


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    codes = torch.zeros(128, 192).to(torch.float8_e4m3fn)
    scale = torch.ones(2, 3).to(torch.float8_e8m0fnu)
    in_c.linear(torch.randn(1, 192), codes, scale, block=64)
    for wrong in (scale[:1], scale[:, :2].contiguous()):
        with pytest.raises(ValueError, match=r"wanted scales \[2, 3\] on the CPU"):
            in_c.linear(torch.randn(1, 192), codes, wrong, block=64)
    for columns in (191, 193, 3 * 192):
        with pytest.raises(ValueError, match="as many groups as a weight"):
            in_c.linear(torch.randn(1, columns), codes, scale, block=64)


@pytest.mark.usefixtures("everything")
def test_forward_gradients_are_torchs(calls: list[int]) -> None:
    layer, x, v = Dsv4Linear(20, 16).requires_grad_(False), X[0], torch.ones_like(X[0])
    with torch.autograd.forward_ad.dual_level():
        out = layer(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, F.linear(v, layer.weight))
    assert not calls


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lib = build.library()
    monkeypatch.setattr(build, "_forked", True)
    monkeypatch.setattr(lib, "dsv4_adopt", lambda *_: pytest.fail("libgomp's threads taken"))
    assert build.adopt_threads(lib) is lib


def test_a_process_knows_that_it_was_forked() -> None:
    assert not build._forked
    child = os.fork()
    if not child:
        os._exit(not build._forked)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("everything")
def test_without_a_compiler_torch_computes(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "library", lambda *_: None)
    assert torch.equal(linear_ops.linear(X, W, kernels="auto"), F.linear(X, W)) and not calls


@pytest.mark.usefixtures("everything")
def test_a_compiler_sees_one_operation() -> None:
    layer = Dsv4Linear(20, 16)
    with torch.no_grad():
        seen = torch._dynamo.explain(layer)(X)
        exported = torch.export.export(layer, (X,)).graph
    names = [
        [str(n.target) for n in graph.nodes if n.op == "call_function"]
        for graph in (seen.graphs[0].graph, exported)
    ]
    # What is exported runs where this package is not.
    assert seen.graph_break_count == 0
    assert names == [["dsv4_cpu.linear.default"], ["aten.linear.default"]]


@pytest.fixture(params=["-DDSV4_PORTABLE", "-march=haswell", "-march=skylake-avx512"])
def other_processor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Compile for a processor with fewer instructions than this one, or for none."""
    needed = {"-march=haswell": " avx2 ", "-march=skylake-avx512": " avx512bw "}
    facts = Path("/proc/cpuinfo")
    wanted = needed.get(request.param)
    if wanted and not (facts.exists() and wanted in facts.read_text()):
        pytest.skip("this processor cannot run it")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O1", request.param))
    assert COMPILER is not None
    other = ctypes.CDLL(str(build.build(COMPILER, tmp_path)), os.RTLD_LOCAL)
    monkeypatch.setattr(in_c, "library", lambda: other)
    in_c._functions.cache_clear()
    yield
    in_c._functions.cache_clear()


@pytest.mark.usefixtures("other_processor")
def test_other_instructions_compute_the_same() -> None:
    check_all((1, 2, 7))
