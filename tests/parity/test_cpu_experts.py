# SPDX-License-Identifier: Apache-2.0
"""An expert in C against the reference, for every format, and when it is taken."""

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4.cpu import build
from modeling_dsv4.moe import ExpertsBase
from quantize import cpu_experts
from quantize.experts import StoredExperts
from quantize.pack import PackFile, PackLayout, PackWriter, RecordLayout
from quantize.store import ExpertStore
from quantize.trellis import CPU

COMPILER = build.find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

GRIDS = ("int2", "int3", "int4")
TRELLISES = ("trellis2", "trellis2.5", "trellis3", "trellis3.5", "trellis4")
FORMATS = ("fp4", "fp8_rows32", "fp8_block32", "fp8_block128", *GRIDS, *TRELLISES)
# Whole blocks and panels; blocks and a rest; groups of another size, or nothing but a rest.
SIZES = ((1280, 256), (544, 352), (96, 32))
# No group fills its block, codes end inside a byte of scales, or a row inside its last group.
ODD = {"fp4": (150, 70), "fp8_rows32": (83, 45), "fp8_block32": (83, 45), "fp8_block128": (200, 65)}
LIMIT = 1.5
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def stored(sizes: tuple[int, int], gate_up: str, down: str, limit: float | None) -> StoredExperts:
    """One resident expert; codes are random, so that every one of them occurs."""
    hidden, width = sizes
    layout = RecordLayout.build(hidden, width, gate_up, down)
    record = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)
    for parts in layout.decode(record).values():
        scale = parts["_scale"]
        if scale.dtype is torch.bfloat16:
            scale.copy_(torch.rand(scale.shape) * 0.02 + 0.005)
        else:
            scale.view(torch.uint8).copy_(torch.randint(118, 123, scale.shape))
        if parts[""].dtype is torch.float8_e4m3fn:
            # Without NaN, and without the largest: sums would be nothing but these.
            codes = parts[""].view(torch.uint8)
            codes.copy_(codes & 0xBF)
    experts = StoredExperts("experts", 1, hidden, width, limit, PackLayout.repeat(layout, 1))
    experts.packed = record[None]
    return experts


def exact(experts: StoredExperts, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ExpertsBase.run_expert(experts, 0, x.double(), weights.double())


def check(experts: StoredExperts, m: int, dtype: torch.dtype) -> None:
    """Nearer to float64 than rounding in float32 explains, wherever the reference is."""
    x, weights = torch.randn(m, experts.hidden_size).to(dtype), torch.rand(m) + 0.1
    found = experts.run_expert(0, x, weights)
    assert found.dtype is dtype and found.shape == x.shape
    wanted = exact(experts, x, weights)
    reference = ExpertsBase.run_expert(experts, 0, x, weights).double()
    size = wanted.abs().amax(-1, keepdim=True)
    # The last rounding to the dtype, and sums that err by their terms' sizes in float32.
    allowed = EPS[dtype] * wanted.abs() + 40 * EPS[torch.float32] * size
    assert ((found.double() - wanted).abs() <= allowed).all()
    several = {torch.float32: 40, torch.bfloat16: 10}[dtype] * EPS[dtype]
    torch.testing.assert_close(found.double(), reference, rtol=0, atol=several * size.max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that C computed."""
    made: list[int] = []
    run = cpu_experts.run

    def count(plan: Any, record: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return run(plan, record, x, w)

    monkeypatch.setattr(cpu_experts, "run", count)
    return made


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_every_format_is_computed_as_the_reference_computes_it(
    calls: list[int], name: str, dtype: torch.dtype
) -> None:
    for sizes in (*SIZES, *([ODD[name]] if name in ODD else [])):
        experts = stored(sizes, name, name, LIMIT)
        rows = (0, 1, 2, 3, 4, 5, 17, 130) if sizes == SIZES[0] else (1, 3, 18)
        for m in rows:
            if m:
                check(experts, m, dtype)
            else:
                empty = experts.run_expert(0, torch.empty(0, sizes[0], dtype=dtype), torch.rand(0))
                assert empty.shape == (0, sizes[0]) and empty.dtype is dtype
    assert 0 in calls and 130 in calls


@pytest.mark.parametrize(("gate_up", "down"), [("trellis2.5", "int3"), ("fp4", "trellis4")])
def test_projections_may_be_in_different_formats(gate_up: str, down: str) -> None:
    for m in (1, 6):
        check(stored((512, 256), gate_up, down, None), m, torch.float32)


@pytest.mark.parametrize("limit", [None, 0.2, 50.0])
def test_both_halves_are_clamped(limit: float | None) -> None:
    experts = stored((128, 64), "int4", "int4", limit)
    # Weights that large drive gates far below and above zero, to where exp over- and underflows.
    x = torch.cat([torch.randn(3, 128), torch.randn(3, 128) * 1e3])
    found, wanted = experts.run_expert(0, x, torch.ones(6)), exact(experts, x, torch.ones(6))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max())


@pytest.mark.parametrize("name", ["fp4", "fp8_rows32"])
def test_the_smallest_scale_and_nan_are_what_the_format_says(name: str) -> None:
    experts = stored((160, 64), name, name, None)
    scale = experts.layout.of(0).decode(experts.packed[0])["gate_up_proj"]["_scale"]
    scale.view(torch.uint8)[0] = 0
    # 2^-127 times anything of size one is still a number; the products alone would be lost.
    x = torch.randn(5, 160) * 2.0**120
    wanted = exact(experts, x, torch.ones(5))
    for m in (1, 5):
        found = experts.run_expert(0, x[:m], torch.ones(m)).double()
        close = {"rtol": 0, "atol": 1e-5 * wanted.abs().max()}
        torch.testing.assert_close(found, wanted[:m], **close)
    scale.view(torch.uint8)[0, 3, 1] = 255
    for m in (1, 5):
        assert experts.run_expert(0, x[:m], torch.ones(m)).isnan().all()


@pytest.mark.parametrize("m", [1, 5])
def test_a_nan_stays_in_its_row(m: int) -> None:
    experts = stored((160, 64), "fp4", "fp4", LIMIT)
    x = torch.randn(m + 1, 160)
    x[0, 7] = torch.nan
    found = experts.run_expert(0, x, torch.ones(m + 1))
    assert found[0].isnan().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("width", [32, 128])
def test_codes_of_fp8_that_are_nan_are_nan(width: int) -> None:
    # One at a time, and in blocks.
    experts = stored((128, width), "fp8_rows32", "fp8_rows32", None)
    codes = experts.layout.of(0).decode(experts.packed[0])["down_proj"][""].view(torch.uint8)
    codes[5, 3], codes[9, 31] = 0x7F, 0xFF
    for m in (1, 6):
        found = experts.run_expert(0, torch.randn(m, 128), torch.ones(m)).isnan()
        assert found[:, [5, 9]].all() and found.sum() == 2 * m


def test_threads_and_inputs_that_are_not_contiguous_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        for name in ("fp4", "int2", "int3", "trellis3"):
            experts = stored((512, 160), name, name, LIMIT)
            x, weights = torch.randn(512, 131).t(), torch.rand(131, 2)[:, 1]
            for m in (1, 3, 131):
                found = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(experts.run_expert(0, x[:m], weights[:m]))
                found.append(experts.run_expert(0, x[:m].contiguous(), weights[:m].contiguous()))
                assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_same_beside_rows_that_are_not_finite(name: str) -> None:
    experts = stored((512, 256), name, name, LIMIT)
    x, weights = torch.randn(6, 512), torch.rand(6)
    x[1, 77], x[2, 300], x[4, 500] = torch.inf, torch.nan, -torch.inf
    found = experts.run_expert(0, x, weights)
    for i in range(6):
        alone = experts.run_expert(0, x[i : i + 1], weights[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=0, equal_nan=True)
    finite = [row.isfinite().all().item() for row in found]
    assert finite == [True, False, False, True, False, True]
    assert torch.equal(found[2].isnan(), torch.ones(512, dtype=torch.bool))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_outliers_zeros_and_any_size_are_as_exact(name: str, dtype: torch.dtype) -> None:
    experts, weights = stored((512, 256), name, name, None), torch.rand(5) + 0.5
    x = torch.randn(5, 512)
    x[0, 200], x[1], x[2, :256], x[3] = 3e3, 0, 0, x[3] * 2.0**-40
    x = x.to(dtype)
    found, wanted = experts.run_expert(0, x, weights).double(), exact(experts, x, weights)
    size = wanted.abs().amax(-1, keepdim=True)
    assert ((found - wanted).abs() <= EPS[dtype] * wanted.abs() + 2.0**-18.6 * size).all()
    assert found[1].eq(0).all() and found[3].abs().amax() > 0


@pytest.mark.parametrize("name", ["fp4", "int4", "trellis3"])
def test_rows_that_are_next_to_nothing_are_as_exact(name: str) -> None:
    """What enters the second product is of the square of x."""
    experts, weights = stored((512, 256), name, name, None), torch.ones(2)
    x = torch.randn(2, 512) * torch.tensor([[2.0**-55], [2.0**-60]])
    found, wanted = experts.run_expert(0, x, weights).double(), exact(experts, x, weights)
    size = wanted.abs().amax(-1, keepdim=True)
    assert (size > 0).all() and ((found - wanted).abs() <= 2.0**-18.6 * size).all()


@pytest.mark.parametrize("name", ["fp4", *GRIDS])
def test_an_outlier_takes_no_digits_from_other_blocks(name: str) -> None:
    experts = stored((512, 256), name, name, None)
    scale = experts.layout.of(0).decode(experts.packed[0])["gate_up_proj"]["_scale"]
    # The block's weights are next to nothing, so that the outlier in it adds nothing.
    block = 256 // (512 // scale.shape[-1])
    if name == "fp4":
        scale.view(torch.uint8)[..., :block] = 0
    else:
        scale[..., :block] = 2.0**-120
    x, weights = torch.randn(1, 512), torch.ones(1)
    without = experts.run_expert(0, x, weights)
    x[0, 3] = 2.0**40
    found, close = experts.run_expert(0, x, weights), 2.0**-20 * without.abs().max().item()
    torch.testing.assert_close(found, without, rtol=0, atol=close)


def test_torchs_defaults_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = stored(SIZES[0], "trellis3", "fp4", LIMIT)
    x, weights = torch.randn(5, experts.hidden_size), torch.rand(5)
    wanted, sizes = experts.run_expert(0, x, weights), []
    empty = torch.empty

    def spy(*size: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(kwargs.get("dtype"))
        return empty(*size, **kwargs)

    torch.set_default_dtype(torch.bfloat16)
    try:
        monkeypatch.setattr(torch, "empty", spy)
        found = experts.run_expert(0, x, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)
    assert torch.float32 in sizes


def test_every_number_of_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(torch.nan))
    experts = stored((170, 68), "fp4", "fp4", LIMIT)
    for m in (1, 2, 7, 129):
        assert experts.run_expert(0, torch.randn(m, 170), torch.rand(m)).isfinite().all()


def test_records_give_the_same_bits_from_memory_and_from_disk(
    tmp_path: Path, calls: list[int]
) -> None:
    experts = [stored((256, 64), "trellis2", "int2", LIMIT) for _ in range(3)]
    layout = PackLayout.repeat(experts[0].layout.of(0), 3)
    path = tmp_path / "experts.safetensors"
    with PackWriter(path, "experts", layout) as writer:
        for one in experts:
            writer.write(one.packed[0])
    pack, found = PackFile.open(path), []
    x, index = torch.randn(9, 256), torch.stack([torch.randperm(3)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    for threads in (None, 1, 4):
        one = StoredExperts("experts", 3, 256, 64, LIMIT, layout)
        if threads is None:
            one.attach_resident(pack)
        else:
            one.attach_store(ExpertStore([pack], layout.largest, threads), 0)
        found.append(one(x, index, weights))
        if threads is not None:
            assert (one.counts.misses, one.counts.hits) == (3, 0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("dtype", "kernels", "learns", "simulated", "wanted"),
    [
        (torch.float32, "auto", False, False, True),
        (torch.bfloat16, "auto", False, False, True),
        (torch.float64, "auto", False, False, False),
        (torch.float16, "auto", False, False, False),
        (torch.float32, "torch", False, False, False),
        (torch.float32, "auto", True, False, False),
        (torch.float32, "auto", False, True, False),
    ],
)
def test_c_computes_without_gradients(
    calls: list[int],
    dtype: torch.dtype,
    kernels: str,
    learns: bool,
    simulated: bool,
    wanted: bool,
) -> None:
    experts = stored((64, 32), "fp4", "fp4", LIMIT)
    experts.kernels = kernels
    experts.round_input = torch.nn.Identity() if simulated else None
    x = torch.randn(2, 64).to(dtype).requires_grad_(learns)
    experts.run_expert(0, x, torch.rand(2))
    assert bool(calls) is wanted
    experts.run_expert(0, x.detach(), torch.rand(2).requires_grad_(learns))
    assert bool(calls) is wanted
    with torch.no_grad():
        experts.run_expert(0, x, torch.rand(2))
    assert bool(calls) is (wanted or learns)


def test_autocast_and_formats_that_c_does_not_know_are_torchs(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, x = stored((64, 32), "fp4", "fp4", LIMIT), torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.run_expert(0, x, torch.rand(2)).dtype is torch.bfloat16
    monkeypatch.setattr(cpu_experts, "_kind", lambda _: None)
    stored((64, 96), "fp4", "fp4", LIMIT).run_expert(0, x, torch.rand(2))
    assert not calls


def test_without_a_compiler_torch_computes(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, x, weights = stored((64, 32), "fp4", "fp4", LIMIT), torch.randn(2, 64), torch.rand(2)
    monkeypatch.setattr(cpu_experts, "library", build.library.__wrapped__)
    for broken in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", broken)
        found = experts.run_expert(0, x, weights)
        assert torch.equal(found, ExpertsBase.run_expert(experts, 0, x, weights)) and not calls


def test_a_record_of_another_layout_is_refused() -> None:
    experts = stored((64, 32), "fp4", "fp4", LIMIT)
    x, weights = torch.randn(2, 64), torch.rand(2)
    plan = cpu_experts.plan_for("auto", experts.layout.of(0), LIMIT, x, weights, None)
    with pytest.raises(ValueError, match="wanted a record of"):
        cpu_experts.run(plan, experts.packed[0, 1:], x, weights)
    with pytest.raises(ValueError, match="wanted rows"):
        cpu_experts.run(plan, experts.packed[0], x[:, 1:], weights)


# --- other processors ----------------------------------------------------------------------------


@pytest.fixture(params=["-DDSV4_PORTABLE", "-march=haswell", "-march=skylake-avx512"])
def other_processor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Compile for a processor with fewer instructions than this one, or for none."""
    architecture = request.param.removeprefix("-march=")
    needed = {"haswell": " avx2 ", "skylake-avx512": " avx512bw "}.get(architecture)
    facts = Path("/proc/cpuinfo")
    if needed and not (facts.exists() and needed in facts.read_text()):
        pytest.skip("this processor cannot run it")
    # Not optimized as much: compiling takes most of the time of this file.
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O1", request.param))
    # Which the other's threads come from.
    assert build.library() is not None
    other = ctypes.CDLL(str(build.build(COMPILER, tmp_path, CPU)))
    monkeypatch.setattr(cpu_experts, "library", lambda _: other)
    cpu_experts._function.cache_clear()
    yield
    cpu_experts._function.cache_clear()


@pytest.mark.usefixtures("other_processor")
def test_other_instructions_compute_the_same() -> None:
    for name in FORMATS:
        for sizes in SIZES[:2]:
            for m in (1, 7):
                check(stored(sizes, name, name, LIMIT), m, torch.float32)


# --- threads -------------------------------------------------------------------------------------


def _product() -> torch.Tensor:
    torch.manual_seed(3)
    experts = stored((256, 256), "fp4", "fp4", LIMIT)
    return experts.run_expert(0, torch.randn(2, 256), torch.rand(2))


@pytest.fixture(params=["torch's threads", "own threads"])
def pool(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library that holds the pool, with torch's threads or with its own."""
    lib = build.library()
    assert lib is not None
    if request.param == "own threads":
        lib.dsv4_adopt(None)
    yield lib
    build.adopt_threads(lib)


@pytest.mark.usefixtures("pool")
def test_calls_from_several_threads_at_once_do_not_meet() -> None:
    before = torch.get_num_threads()
    experts = [stored((256, 256), "fp4", "fp4", LIMIT) for _ in range(4)]
    x, weights = torch.randn(2, 256), torch.rand(2)
    wanted = [one.run_expert(0, x, weights) for one in experts]
    wrong = []

    def work(i: int) -> None:
        torch.set_num_threads(3)
        for _ in range(200):
            if not torch.equal(experts[i].run_expert(0, x, weights), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not wrong


def test_a_forked_process_has_threads_of_its_own(pool: ctypes.CDLL) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = _product()
        child = os.fork()
        if not child:
            alone = pool.dsv4_pool_size() == 0
            same = torch.equal(_product(), wanted)
            os._exit(0 if alone and same and pool.dsv4_pool_size() == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(_product(), wanted)
    finally:
        torch.set_num_threads(before)


def test_a_process_ends_with_its_threads_asleep_or_at_work(tmp_path: Path) -> None:
    calls = 20000
    wanted = sum(chunk for i in range(calls) for chunk in range(1 + i % 7))
    lines = (
        "#include <stdint.h>",
        "void dsv4_share(void (*)(void *, int64_t), void *, int64_t, int64_t);",
        "static void add(void *sum, int64_t n) { __sync_fetch_and_add((int64_t *)sum, n); }",
        "int main(void) {",
        "    int64_t sum = 0;",
        f"    for (int i = 0; i < {calls}; ++i) dsv4_share(add, &sum, 1 + i % 7, 1 + i % 5);",
        f"    return sum != {wanted};",
        "}",
    )
    source, program = tmp_path / "main.c", tmp_path / "main"
    source.write_text("\n".join(lines))
    command = [COMPILER, "-O2", "-pthread", "-o", program, source, build.HERE / "pool.c"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([program], check=True, timeout=20)
