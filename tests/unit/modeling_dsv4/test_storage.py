# SPDX-License-Identifier: Apache-2.0
"""Storage modules against their dequantized dense twins: values, gradients, casts, memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from modeling_dsv4 import tiled_products
from modeling_dsv4.formats import get_format
from modeling_dsv4.layers import Float32Head
from modeling_dsv4.moe import Dsv4Experts
from modeling_dsv4.storage import (
    Fp8GroupedLinear,
    Fp8Linear,
    GroupedLinear,
    OpaqueWeights,
    PackedEmbedding,
    PackedExperts,
    PackedHead,
)
from modeling_dsv4.tiled_products import frozen_linear, packed_linear

FORMATS = ["fp4", "fp8_block32", "fp8_block128"]


def grouped(inputs: int, outputs: int, groups: int) -> GroupedLinear:
    linear = GroupedLinear(inputs, outputs, groups)
    nn.init.normal_(linear.weight)
    return linear


def experts(e: int = 4, d: int = 64, f: int = 96) -> Dsv4Experts:
    plain = Dsv4Experts(e, d, f, 1.5)
    for weight in plain.parameters():
        nn.init.normal_(weight, std=0.1)
    return plain


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear32": lambda: Fp8Linear.from_plain(nn.Linear(160, 96, bias=False), 32),
    "linear128": lambda: Fp8Linear.from_plain(nn.Linear(160, 96, bias=False), 128),
    "grouped32": lambda: Fp8GroupedLinear.from_plain(grouped(64, 96, 2), 32),
    "grouped128": lambda: Fp8GroupedLinear.from_plain(grouped(64, 96, 2), 128),
    "fp4": lambda: PackedExperts.from_plain(experts()),
    "fp8_block32": lambda: PackedExperts.from_plain(experts(), "fp8_block32"),
    "fp8_block128": lambda: PackedExperts.from_plain(experts(), "fp8_block128"),
    "embedding": lambda: PackedEmbedding.from_plain(nn.Embedding(50, 64)),
    "opaque": lambda: OpaqueWeights({"a.b": (torch.bfloat16, (3, 4)), "c": (torch.float32, (2,))}),
}


def arguments(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if isinstance(module, PackedExperts):
        routes = torch.arange(2 * x.shape[0]).view(-1, 2) % module.num_experts
        return x, routes, torch.linspace(0.1, 1.0, 2 * x.shape[0]).view(-1, 2)
    return (x,)


def inputs(module: nn.Module) -> torch.Tensor:
    if isinstance(module, PackedExperts):
        return torch.randn(7, module.hidden_size)
    if isinstance(module, GroupedLinear):
        return torch.randn(3, 5, module.groups, module.in_features)
    return torch.randn(3, 5, module.in_features)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("embedding", "opaque")])
def test_values_and_gradients_equal_the_dense_twin(name: str) -> None:
    module = MODULES[name]()
    twin = module.to_plain(torch.float32)
    x = inputs(module).requires_grad_()
    same = x.detach().clone().requires_grad_()
    got, want = module(*arguments(module, x)), twin(*arguments(module, same))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-5, atol=1e-5)


def snapshot(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in module.state_dict().items()
    }


@pytest.mark.parametrize("name", MODULES)
def test_no_cast_touches_stored_bytes(name: str) -> None:
    module = MODULES[name]()
    before = snapshot(module)
    model = nn.Sequential(nn.Linear(2, 2), module)
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.type(torch.bfloat16),
    ):
        cast(model)
        assert snapshot(module) == before
    assert model[0].weight.dtype is torch.bfloat16
    assert not any(p.requires_grad for p in module.parameters())


def test_a_cast_makes_no_wide_copy_on_its_way() -> None:
    module = MODULES["fp4"]()
    seen = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append((t.dtype, t.numel()))
        return t.float() if t.is_floating_point() else t

    module._apply(fn)
    assert all(n == 0 for dtype, n in seen if dtype is torch.float8_e8m0fnu)


@pytest.mark.parametrize("name", MODULES)
def test_modules_move_between_devices(name: str) -> None:
    module = MODULES[name]()
    dtypes = {n: t.dtype for n, t in module.state_dict().items()}
    module.to("meta", torch.bfloat16)
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu")
    assert {n: t.dtype for n, t in module.state_dict().items()} == dtypes


@pytest.mark.parametrize("name", ["linear128", "grouped32", "fp4", "fp8_block128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_work_is_done_in_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]()
    x = inputs(module).to(dtype).requires_grad_()
    twin = module.to_plain(dtype)
    y = module(*arguments(module, x))
    want = twin(*arguments(module, x))
    assert y.dtype is want.dtype
    tolerance = 1e-9 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert x.grad.dtype is dtype


def test_autocast_decides_the_dtype_of_the_product() -> None:
    module = MODULES["linear32"]()
    x = torch.randn(4, 160, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        want = module.to_plain(torch.float32)(x)
    assert y.dtype is want.dtype is torch.bfloat16
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_of_any_size_give_the_same_product(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = get_format(name)
    parts = fmt.pack(torch.randn(2, 200, 64))
    x = torch.randn(5, 64, requires_grad=True)
    w = fmt.unpack(parts, torch.float32).flatten(0, 1)
    want = x @ w.T
    grad = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, x, grad)
    for budget in (1, 64 * 4 * 7, 64 * 4 * 130, 1 << 20):
        monkeypatch.setattr(tiled_products, "_TILE_BYTES", {"cpu": budget})
        got = packed_linear(x, parts, fmt)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        (got_grad,) = torch.autograd.grad(got, x, grad)
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes"), [("fp4", [40, 40, 20]), ("fp8_block32", [32, 32, 32, 4])]
)
def test_a_wide_weight_is_opened_in_tiles_of_whole_blocks(
    name: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_products, "_TILE_BYTES", {"cpu": 40 * 64 * 4})
    parts = get_format(name).pack(torch.randn(100, 64))
    tiles = tiled_products.weight_tiles(parts, get_format(name), torch.float32)
    assert [len(t) for t in tiles] == sizes


def test_the_weight_is_asked_for_again_in_the_backward_pass_and_not_kept() -> None:
    weight, asked = torch.randn(6, 4), []

    def tiles(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        asked.append(dtype)
        return weight[:4].to(dtype), weight[4:].to(dtype)

    kept: list[torch.Tensor] = []
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, tiles)
    assert asked == [torch.float32]
    assert not kept
    y.sum().backward()
    assert asked == [torch.float32] * 2
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))


def test_gradients_of_half_precision_sum_over_tiles_in_float32() -> None:
    # 1 and 256 times 2^-9: in bfloat16 each small addition would vanish.
    weight = torch.full((257, 1), 2.0**-9)
    weight[0] = 1.0
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    frozen_linear(x, lambda dtype: weight.to(dtype).split(1)).sum().backward()
    assert x.grad.item() == 1.5


def test_second_derivatives_and_no_rows_work() -> None:
    module = MODULES["linear32"]()
    x = torch.randn(2, 160, requires_grad=True)
    (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    twin = module.to_plain(torch.float32)
    (g2,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
    (h2,) = torch.autograd.grad(g2.square().sum(), x)
    torch.testing.assert_close(h, h2, rtol=1e-4, atol=1e-3)
    assert module(torch.randn(0, 160)).shape == (0, 96)


def test_fp8_linear_is_a_linear_and_grouped_is_not() -> None:
    assert isinstance(MODULES["linear32"](), nn.Linear)
    assert isinstance(MODULES["grouped32"](), GroupedLinear)
    assert not isinstance(MODULES["grouped32"](), nn.Linear)
    with pytest.raises(ValueError, match="without bias"):
        Fp8Linear.from_plain(nn.Linear(32, 32), 32)


def test_grouped_linear_keeps_groups_apart() -> None:
    linear = grouped(4, 6, 2)
    x = torch.randn(3, 2, 4)
    want = torch.stack([x[:, g] @ linear.weight[3 * g : 3 * g + 3].T for g in range(2)], dim=1)
    torch.testing.assert_close(linear(x), want)


def test_blocks_that_reach_across_groups_dequantize_right() -> None:
    # Groups of 48 rows in blocks of 128 and 32: no group starts where a block starts.
    for block in (32, 128):
        plain = grouped(64, 144, 3)
        module = Fp8GroupedLinear.from_plain(plain, block)
        x = torch.randn(2, 3, 64)
        torch.testing.assert_close(module(x), module.to_plain(torch.float32)(x))


# --- experts ------------------------------------------------------------------------------------


def test_packed_experts_have_the_names_and_shapes_of_their_files() -> None:
    with torch.device("meta"):
        fp4 = PackedExperts(4, 64, 96, None)
        fp8 = PackedExperts(4, 64, 96, None, "fp8_block128")
    assert {k: (t.dtype, tuple(t.shape)) for k, t in fp4.state_dict().items()} == {
        "gate_up_proj": (torch.uint8, (4, 192, 32)),
        "gate_up_proj_scale": (torch.float8_e8m0fnu, (4, 192, 2)),
        "down_proj": (torch.uint8, (4, 64, 48)),
        "down_proj_scale": (torch.float8_e8m0fnu, (4, 64, 3)),
    }
    # w1 and w3 have 96 rows each: one partial block each, not 1.5 shared ones.
    assert fp8.state_dict()["gate_up_proj_scale"].shape == (4, 2, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_w1_and_w3_are_packed_apart(name: str) -> None:
    plain = experts(e=2, f=40)
    plain.gate_up_proj.data[:, 40:] *= 100
    packed = PackedExperts.from_plain(plain, name)
    fmt = get_format(name)
    gate_up, down = packed.expert_weights(1, torch.float32)
    w1, w3 = plain.gate_up_proj[1].detach().split(40)
    assert torch.equal(gate_up[:40], fmt.unpack(fmt.pack(w1), torch.float32))
    assert torch.equal(gate_up[40:], fmt.unpack(fmt.pack(w3), torch.float32))
    assert torch.equal(down, fmt.unpack(fmt.pack(plain.down_proj[1]), torch.float32))


def test_packed_experts_survive_a_state_dict() -> None:
    packed = MODULES["fp4"]()
    fresh = PackedExperts(4, 64, 96, 1.5)
    fresh.load_state_dict(packed.state_dict())
    assert snapshot(fresh) == snapshot(packed)


def test_only_hit_experts_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = MODULES["fp4"]()
    opened: list[int] = []
    parts = packed.expert_parts
    monkeypatch.setattr(packed, "expert_parts", lambda e: opened.append(e) or parts(e))
    packed(torch.randn(2, 64), torch.tensor([[3, 1], [1, 3]]), torch.ones(2, 2))
    assert opened == [1, 3]


def test_an_unknown_expert_format_is_refused() -> None:
    with pytest.raises(ValueError, match="q9"):
        PackedExperts(4, 64, 96, None, "q9")


# --- Engram rows and opaque weights -------------------------------------------------------------


def test_rows_of_the_table_are_exact_in_bfloat16() -> None:
    table = MODULES["embedding"]()
    ids = torch.tensor([[3, 3, 49], [0, 7, 3]])
    rows = table(ids)
    assert rows.dtype is torch.bfloat16
    assert torch.equal(rows.float(), table.to_plain(torch.float32)(ids))
    assert table(ids[:0]).shape == (0, 3, 64)


def test_only_the_rows_asked_for_are_dequantized() -> None:
    table, seen = MODULES["embedding"](), []
    unpack = table.format.unpack
    table.format = replace(
        table.format, unpack=lambda p, dtype: seen.append(p[""].shape) or unpack(p, dtype)
    )
    table(torch.tensor([1, 2, 3]))
    assert seen == [(3, 64)]


@pytest.mark.parametrize("name", ["fp4", "fp8_rows32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_table_gives_the_rows_of_its_format(name: str, dtype: torch.dtype) -> None:
    plain = nn.Embedding(50, 64)
    table = PackedEmbedding.from_plain(plain, name, dtype)
    fmt = get_format(name)
    want = fmt.unpack(fmt.pack(plain.weight), dtype)
    ids = torch.tensor([[3, 3, 49], [0, 7, 3]])
    assert table(ids).dtype is dtype
    assert torch.equal(table(ids), want[ids])
    assert torch.equal(table.to_plain(dtype).weight, want)


def test_a_table_wants_rows_that_stand_alone() -> None:
    with pytest.raises(ValueError, match="wanted a format whose rows can be read alone"):
        PackedEmbedding(64, 64, "fp8_block32")


@pytest.mark.parametrize("name", ["fp4", "fp8_rows32"])
def test_a_packed_head_computes_in_float32(name: str) -> None:
    plain = Float32Head(64, 50, bias=False)
    head, x = PackedHead.from_plain(plain, name), torch.randn(2, 3, 64).bfloat16()
    x.requires_grad_()
    twin = head.to_plain(torch.float32)
    found, want = head(x), twin(x)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, want)]
    torch.testing.assert_close(*grads)
    head.to(torch.bfloat16)
    assert torch.equal(head(x), found)


def test_opaque_weights_are_named_as_in_the_release() -> None:
    names = MODULES["opaque"]().state_dict()
    assert {k: t.dtype for k, t in names.items()} == {"a__b": torch.bfloat16, "c": torch.float32}
