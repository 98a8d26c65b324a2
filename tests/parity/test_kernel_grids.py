# SPDX-License-Identifier: Apache-2.0
"""The kernels of whole numbers and trellises against their reference, outputs and gradients.

On a CPU Triton's interpreter runs them, at sizes whose blocks are partial everywhere; on a GPU
(`-m gpu`) they run at the model's, in float32 and bfloat16.
"""

import sys
from pathlib import Path

import pytest
import torch

from modeling_dsv4.formats import get_format
from quantize import trellis
from quantize.experts import StoredExperts, stacked_weights
from quantize.pack import PackLayout, RecordLayout

sys.path.append(str(Path(__file__).parent))
from packed_cases import (
    Inputs,
    Sizes,
    check_nothing_waits,
    compare,
    compare_adapted,
    compare_grouped,
    inputs,
    near,
)

experts = pytest.importorskip("quantize.kernels.experts")
expert_plan = pytest.importorskip("modeling_dsv4.kernels.expert_plan")
rotation = pytest.importorskip("quantize.kernels.rotate")
plain = pytest.importorskip("modeling_dsv4.kernels.experts")

GPU = pytest.mark.gpu
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")
DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)]
# Relative to the largest number of each tensor. In bfloat16 the activation, rotated inputs, what is
# kept for the way back and each gradient are rounded by 2^-9; float32 only sums in another order.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Every format once on a CPU, in both projections together; on a GPU each by itself as well.
MIXED = [
    ("int4", "int2"),
    ("int3", "trellis2"),
    ("trellis2.5", "trellis3"),
    ("trellis3.5", "int3"),
    ("trellis4", "trellis4"),
]
ALIKE = [(f"{kind}{bits}",) * 2 for kind, widths in (
    ("int", (2, 3, 4)), ("trellis", (2, 2.5, 3, 3.5, 4))) for bits in widths]  # fmt: skip
CASES = [pytest.param(f, torch.float32, "cpu", marks=CPU) for f in MIXED]
# The interpreter computes in float32 whatever comes in: one case shows what bfloat16 changes.
CASES += [pytest.param(("int3", "trellis2"), torch.bfloat16, "cpu", marks=CPU)]
CASES += [
    pytest.param(f, dtype, "cuda", marks=GPU)
    for f in dict.fromkeys(MIXED + ALIKE)
    for dtype in (torch.float32, torch.bfloat16)
]


# Three units of a trellis, whose tiles hold two, and groups of 64; two groups of 64 for the others.
SIZES = {"cpu": Sizes(192, 64, 5, 2), "cuda": Sizes(4096, 2048, 16, 6)}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs of several blocks each: what the interpreter walks in a second."""
    if torch.cuda.is_available():
        return
    for name in experts.GEMV_TILES:
        monkeypatch.setitem(experts.GEMV_TILES, name, {"BLOCK_N": 128, "BLOCK_U": 2})
    for way in experts.GEMM_TILES:
        monkeypatch.setitem(experts.GEMM_TILES, way, {"BLOCK_N": 128, "BLOCK_K": 128})


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    """Fresh memory is NaN, so that an element nobody writes shows."""


def make(formats: tuple[str, str], sizes: Sizes, device: str, limit: float | None) -> StoredExperts:
    """Resident records of random bytes, every code of a format; scales near 0.02."""
    layout = RecordLayout.build(sizes.d, sizes.f, *formats)
    records = torch.zeros(sizes.e, layout.nbytes, dtype=torch.uint8)
    for parts in layout.decode(records).values():
        for tensor in parts.values():
            if tensor.dtype is torch.uint8:
                tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))
            else:
                tensor.copy_(torch.rand(tensor.shape) * 0.02 + 0.01)
    alike = PackLayout.repeat(layout, sizes.e)
    module = StoredExperts("m", sizes.e, sizes.d, sizes.f, limit, alike)
    module.packed = records
    return module.to(device)


def agree(module: StoredExperts, given: Inputs, learn: bool) -> None:
    """Kernels and reference, as near as the dtype allows."""
    compare(module, given, learn, NEAR[given.x.dtype])


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what the kernels' launchers were asked for, call by call."""
    calls: list[str] = []
    for owner, label in ((experts, "packed"), (plain, "plain")):
        for name in ("run", "run_part"):
            given = getattr(owner, name)
            monkeypatch.setattr(
                owner,
                name,
                lambda *a, what=f"{label} {name}", given=given: (calls.append(what), given(*a))[1],
            )
    return calls


@pytest.mark.parametrize(("formats", "dtype", "device"), CASES)
def test_few_tokens_equal_the_reference(
    formats: tuple[str, str], dtype: torch.dtype, device: str, by_kernels: list[str]
) -> None:
    module = make(formats, SIZES[device], device, 0.5)
    agree(module, inputs(3, SIZES[device], dtype, device), learn=False)
    assert by_kernels == ["packed run"]


@pytest.mark.parametrize(("formats", "dtype", "device"), CASES)
def test_many_tokens_and_their_gradients_equal_the_reference(
    formats: tuple[str, str], dtype: torch.dtype, device: str, by_kernels: list[str]
) -> None:
    # Where gradients end: few float32 numbers lie near it, so that another order of sums takes none
    # across; of many, or rounded ones, it would: none is near.
    few = device == "cpu" and dtype is torch.float32
    module = make(formats, SIZES[device], device, 0.5 if few else 10.0)
    agree(module, inputs(17 if device == "cpu" else 700, SIZES[device], dtype, device), True)
    assert by_kernels == ["packed run"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [2, 17])
def test_groups_of_32_where_64_do_not_divide_a_row(n: int, device: str) -> None:
    sizes = Sizes(160, 96, 4, 2)
    agree(make(("int4", "int3"), sizes, device, 0.5),
          inputs(n, sizes, torch.float32, device), learn=n > 2)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 192, 768])
def test_rows_are_rotated_into_the_order_of_their_readers(width: int, device: str) -> None:
    x = torch.randn(2, 3, width, device=device)
    expected = trellis.rotate(x)
    near(rotation.rotate(x, 1, 1), expected, 1e-5)
    # A row alone gives the same bits.
    pieces = rotation.rotate(x, 1, 64)
    assert torch.equal(pieces[1, 2], rotation.rotate(x[1, 2:], 1, 64)[0])
    near(pieces.unflatten(-1, (64, -1)).mT.flatten(-2), expected, 1e-5)
    near(rotation.rotate(rotation.rotate(x, 1, 2), 2, 1), x, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_open_whole_numbers_as_the_reference_does_bit_for_bit(
    bits: int, device: str
) -> None:
    sizes = SIZES[device]
    module = make((f"int{bits}",) * 2, sizes, device, None)
    module.kernels = "triton"
    x = torch.eye(sizes.d, device=device)
    pair = module.grouped(x, torch.full((sizes.d, 1), 3, device=device))
    assert pair is not None
    assert torch.equal(pair[0](x).T, module.expert_weights(3, torch.float32)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formats", [("int3", "int3"), ("trellis2", "trellis2.5")])
def test_grouped_products_and_their_gradients_equal_the_reference(
    formats: tuple[str, str], device: str
) -> None:
    module = make(formats, SIZES[device], device, 1.0)
    compare_grouped(module, inputs(17, SIZES[device], torch.float32, device), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_beside_packed_experts_equal_those_beside_the_reference(device: str) -> None:
    base = make(("int2", "trellis3"), SIZES[device], device, 1.0)
    compare_adapted(base, inputs(5, SIZES[device], torch.float32, device), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [2, 17])
@pytest.mark.parametrize("formats", [("int4", "int3"), ("trellis3", "trellis2")])
def test_a_part_of_the_pairs_is_computed_from_slots_anywhere(
    formats: tuple[str, str], n: int, device: str
) -> None:
    sizes = SIZES[device]
    module = make(formats, sizes, device, None)
    layout = module.layout.uniform
    # Experts 4 and 1 in slots 6 and 0 of others, which are longer than a record.
    slots = torch.randint(0, 256, (7, layout.nbytes + 4096), dtype=torch.uint8, device=device)
    for slot, e in ((6, 4), (0, 1)):
        slots[slot, : layout.nbytes] = module.packed[e]
    given = inputs(n, sizes, torch.float32, device)
    given.index[0, 0] = 4
    flat = given.index.flatten()
    pairs = [(flat == e).nonzero().flatten() for e in (4, 1)]
    part = expert_plan.Part(torch.cat(pairs), [len(p) for p in pairs], [6, 0], sizes.e, sizes.k)
    y = torch.full((n * sizes.k, sizes.d), -7.0, device=device)
    weights = stacked_weights(layout, slots[:, : layout.nbytes])
    experts.run_part(given.x, given.routing.flatten(), part, *weights, None, y)
    module.kernels = "torch"
    for e, chosen in zip((4, 1), pairs, strict=True):
        rows = given.x[chosen // sizes.k], given.routing.flatten()[chosen]
        if len(chosen):
            near(y[chosen], module.run_expert(e, *rows), 1e-5)
    # Alone, an expert's rows are the same to the bit.
    alone = torch.full_like(y, -7.0)
    single = part._replace(order=pairs[0], counts=part.counts[:1], places=part.places[:1])
    experts.run_part(given.x, given.routing.flatten(), single, *weights, None, alone)
    assert len(pairs[0]) and torch.equal(alone[pairs[0]], y[pairs[0]])
    others = torch.ones(n * sizes.k, dtype=torch.bool, device=device)
    others[part.order] = False
    assert others.any() and (y[others] == -7.0).all()


@CPU
def test_packed_weights_and_not_only_random_bytes(by_kernels: list[str]) -> None:
    sizes = Sizes(64, 64, 2, 1)
    layout = RecordLayout.build(sizes.d, sizes.f, "int3", "trellis2.5")
    weights = {"gate_up_proj": torch.randn(2, 64, 64) * 0.2, "down_proj": torch.randn(64, 64) * 0.2}
    record = layout.encode({p: get_format(layout.format(p)).pack(w) for p, w in weights.items()})
    module = StoredExperts("m", 2, 64, 64, None, PackLayout.repeat(layout, 2))
    module.packed = record.repeat(2, 1)
    agree(module, inputs(2, sizes._replace(e=3), torch.float32, "cpu")._replace(
        index=torch.tensor([[0], [1]])), learn=False)  # fmt: skip
    assert by_kernels == ["packed run"]


@CPU
def test_what_no_kernel_computes_stays_with_others(by_kernels: list[str]) -> None:
    # Half a unit of a trellis or of int3, a format of each kind, a model's own format.
    for formats, d, wanted in (
        (("trellis3", "trellis3"), 96, []),
        (("int3", "int3"), 48, []),
        (("fp4", "int4"), 64, []),
        (("fp4", "fp4"), 64, ["plain run"]),
    ):
        sizes = Sizes(d, 64, 5, 2)
        module = make(formats, sizes, "cpu", 1.0)
        module.kernels = "triton"
        by_kernels.clear()
        given = inputs(2, sizes, torch.float32, "cpu")
        module(*given)
        assert by_kernels == wanted, formats
        module.kernels = "torch"
        module(*given)
        assert by_kernels == wanted, formats


@GPU
@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("formats", [("int4", "int4"), ("trellis3", "trellis3")])
def test_nothing_waits_for_the_host(formats: tuple[str, str], n: int) -> None:
    module = make(formats, SIZES["cuda"], "cuda", 1.0)
    check_nothing_waits(module, inputs(n, SIZES["cuda"], torch.bfloat16, "cuda"))
