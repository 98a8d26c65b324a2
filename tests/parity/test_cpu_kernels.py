# SPDX-License-Identifier: Apache-2.0
"""Operations in C against their references, and when they are taken."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import hyper_ops, kernel_choice
from modeling_dsv4.cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C compiler")

SITE = {"iters": 20, "eps": 1e-6, "rms_eps": 1e-6}
# float32: another order of additions. bfloat16: one rounding that may fall to the other side.
CLOSE = {
    torch.float32: {"atol": 4e-6, "rtol": 1e-5},
    torch.bfloat16: {"atol": 2**-7, "rtol": 2**-7},
}
DTYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 4, 256), (2, 3, 4, 37), (1, 1, 8, 5), (3, 1, 1, 64), (16, 1, 2, 33), (0, 4, 8)]
)


def _site(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    n, d = shape[-2:]
    rows = n * n + 2 * n
    fn = torch.randn(rows, n * d) / (n * d) ** 0.5
    return torch.randn(shape).to(dtype), fn, torch.randn(rows), torch.rand(3)


@SHAPES
@DTYPES
@pytest.mark.parametrize("handed", [False, True], ids=["own", "handed"])
def test_a_site_opens_as_the_reference_opens_it(
    shape: tuple[int, ...], dtype: torch.dtype, handed: bool
) -> None:
    streams, *parameters = _site(shape, dtype)
    given = torch.rand(shape[:-1]) if handed else None
    found = hyper_ops.open_site(streams, given, *parameters, **SITE, kernels="auto")
    wanted = hyper_ops.open_site(streams, given, *parameters, **SITE, kernels="torch")
    torch.testing.assert_close(found[0], wanted[0], **CLOSE[dtype])
    for got, want in zip(found[1:4], wanted[1:4], strict=True):
        torch.testing.assert_close(got, want, **CLOSE[torch.float32])
    assert found[4] is streams


@SHAPES
@DTYPES
def test_a_site_closes_as_the_reference_closes_it(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    streams, u = torch.randn(shape).to(dtype), torch.randn(*shape[:-2], shape[-1]).to(dtype)
    post, comb = torch.rand(shape[:-1]), torch.rand(*shape[:-1], shape[-2])
    found = hyper_ops.expand(u, streams, post, comb, kernels="auto")
    torch.testing.assert_close(found, hyper_ops.expand_ref(u, streams, post, comb), **CLOSE[dtype])


def test_inputs_that_are_not_contiguous_give_the_same() -> None:
    streams, fn, base, scale = _site((2, 2, 4, 24), torch.float32)
    wanted = hyper_ops.open_site(streams, None, fn, base, scale, **SITE, kernels="auto")
    apart = streams.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = hyper_ops.open_site(
        apart, None, fn.t().contiguous().t(), base, scale, **SITE, kernels="auto"
    )
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    u = torch.randn(24, 2, 2).permute(1, 2, 0)
    post, comb = wanted[2], wanted[3]
    closed = [hyper_ops.expand(x, apart, post, comb, "auto") for x in (u, u.contiguous())]
    assert torch.equal(*closed)


@DTYPES
def test_a_nan_is_not_lost(dtype: torch.dtype) -> None:
    streams, *parameters = _site((2, 1, 4, 40), dtype)
    streams[0, 0, 2, 7] = torch.nan
    x, pre, post, comb, _ = hyper_ops.open_site(streams, None, *parameters, **SITE, kernels="auto")
    assert x[0].isnan().all() and pre[0].isnan().all() and comb[0].isnan().all()
    assert x[1].isfinite().all()
    u = torch.zeros(2, 1, 40, dtype=dtype)
    closed = hyper_ops.expand(u, streams, post.nan_to_num(), comb.nan_to_num(), "auto")
    assert closed[0, 0, :, 7].isnan().all() and closed.isnan().sum() == 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations that C computed."""
    from modeling_dsv4.cpu import hyper

    made: list[str] = []
    function = hyper._function

    def count(name: str, *kinds: Any) -> Any:
        made.append(name)
        return function(name, *kinds)

    monkeypatch.setattr(hyper, "_function", count)
    return made


@pytest.mark.parametrize(
    ("tokens", "dtype", "kernels", "learns", "wanted"),
    [
        (16, torch.float32, "auto", False, True),
        (17, torch.float32, "auto", False, False),
        (1, torch.float64, "auto", False, False),
        (1, torch.float16, "auto", False, False),
        (1, torch.float32, "torch", False, False),
        (1, torch.float32, "auto", True, False),
    ],
)
def test_c_computes_few_tokens_without_gradients(
    calls: list[str], tokens: int, dtype: torch.dtype, kernels: str, learns: bool, wanted: bool
) -> None:
    streams, *parameters = _site((tokens, 4, 8), dtype)
    if dtype is torch.float64:
        parameters = [x.double() for x in parameters]
    parameters[0].requires_grad_(learns)
    found = hyper_ops.open_site(streams, None, *parameters, **SITE, kernels=kernels)
    hyper_ops.expand(found[0], streams, found[2], found[3], kernels)
    if wanted:
        assert calls == ["dsv4_open_site", "dsv4_expand"]
    else:
        assert not calls
    with torch.no_grad():
        hyper_ops.open_site(streams, None, *parameters, **SITE, kernels=kernels)
    assert bool(calls) is (wanted or learns)


def test_without_a_compiler_torch_computes(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    streams, *parameters = _site((1, 4, 8), torch.float32)
    wanted = hyper_ops.open_site(streams, None, *parameters, **SITE, kernels="torch")
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    for broken in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", broken)
        found = hyper_ops.open_site(streams, None, *parameters, **SITE, kernels="auto")
        assert torch.equal(found[0], wanted[0]) and not calls
    # "false" is found and fails: that is said, with what to do.
    assert "could not build" in caplog.text and "CC" in caplog.text


def test_a_library_is_built_once_for_its_sources_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    made = build.build(compiler, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    assert ctypes.CDLL(str(made)).dsv4_open_site
    written = made.stat().st_mtime_ns
    assert build.build(compiler, tmp_path) == made and made.stat().st_mtime_ns == written
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build.build(compiler, tmp_path) != made


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build.build("false", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_others_may_write_to_keeps_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "mine"))
    assert build.cache_directory() == tmp_path / "mine"
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "mine").chmod(0o777)
    assert build.cache_directory() != tmp_path / "mine"


def test_importing_the_package_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "def fail(*args, **more): raise AssertionError(args)\n"
        "subprocess.run = subprocess.Popen = fail\n"
        "import modeling_dsv4.cpu.build as build, modeling_dsv4.cpu.rows\n"
        "assert build.library.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"DSV4_CACHE": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_the_choice_is_one_constant_to_a_compiler() -> None:
    streams, *parameters = _site((1, 4, 8), torch.float32)

    def site(x: torch.Tensor) -> torch.Tensor:
        return hyper_ops.open_site(x, None, *parameters, **SITE, kernels="auto")[0]

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        found = torch.compile(site, fullgraph=True, backend=backend)(streams)
        assert torch.equal(found, site(streams))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("open_site" in target for target in targets) == 1
    assert kernel_choice.use_cpu("auto", streams)
