# SPDX-License-Identifier: Apache-2.0
"""Stored experts compute what packed experts compute, wherever their records are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_dsv4.formats import get_format
from modeling_dsv4.moe import Dsv4Experts
from modeling_dsv4.storage import PackedExperts
from quantize.experts import StoredExperts
from quantize.pack import PROJECTIONS, PackFile, PackLayout, PackWriter, RecordLayout
from quantize.store import ExpertStore

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 3
NAME = "model.layers.0.mlp.experts"
Open = Callable[[int | None], StoredExperts]


class PoisonedStore(ExpertStore):
    """Spoils the bytes of every evicted record, so that a late look at them cannot go unnoticed."""

    def _recycle(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.fill_(0xFF)


@pytest.fixture
def plain() -> Dsv4Experts:
    experts = Dsv4Experts(EXPERTS, HIDDEN, WIDTH, 10.0)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.2)
    torch.nn.init.normal_(experts.down_proj, std=0.2)
    return experts


@pytest.fixture(params=["fp4", "fp8_block32"])
def packed(request: pytest.FixtureRequest, plain: Dsv4Experts) -> PackedExperts:
    return PackedExperts.from_plain(plain, request.param)


@pytest.fixture
def pack(packed: PackedExperts, tmp_path: Path) -> PackFile:
    layout = RecordLayout.build(HIDDEN, WIDTH, packed.format.name, packed.format.name)
    path = tmp_path / "experts-layers-0.safetensors"
    with PackWriter(path, NAME, PackLayout.repeat(layout, EXPERTS)) as writer:
        for e in range(EXPERTS):
            writer.write(layout.encode(dict(zip(PROJECTIONS, packed.expert_parts(e), strict=True))))
    return PackFile.open(path)


@pytest.fixture
def open_stored(pack: PackFile) -> Open:
    """Open the pack resident (None) or behind a store of so many records."""

    def make(capacity: int | None) -> StoredExperts:
        experts = StoredExperts(NAME, EXPERTS, HIDDEN, WIDTH, 10.0, pack.layout)
        if capacity is None:
            experts.attach_resident(pack)
        else:
            experts.attach_store(PoisonedStore([pack], capacity * pack.layout.largest), 0)
        # Bits are compared, and packed experts have no twin in C.
        experts.kernels = "torch"
        return experts

    return make


def batch(tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, TOP_K)


@pytest.mark.parametrize("capacity", [None, 1, TOP_K, TOP_K + 1, EXPERTS])
def test_the_sum_is_that_of_packed_experts_bit_for_bit(
    packed: PackedExperts, open_stored: Open, capacity: int | None
) -> None:
    stored = open_stored(capacity)
    for _ in range(3):
        x, index, weights = batch()
        assert torch.equal(stored(x, index, weights), packed(x, index, weights))


@pytest.mark.parametrize("capacity", [None, 1, TOP_K, EXPERTS])
def test_gradients_are_those_of_packed_experts_bit_for_bit(
    packed: PackedExperts, open_stored: Open, capacity: int | None
) -> None:
    stored = open_stored(capacity)
    x, index, weights = batch()
    gradients = []
    for experts in (stored, packed):
        leaf, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        # Something else is read in between: the records of the forward pass are gone by now.
        loss = experts(leaf, index, w).square().sum()
        experts(*batch())
        gradients.append(torch.autograd.grad(loss, (leaf, w)))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert gradients[0][0].abs().sum() > 0


def test_a_forward_reads_the_routed_experts_alone(open_stored: Open) -> None:
    stored = open_stored(EXPERTS)
    index = torch.tensor([[1, 4, 6], [4, 6, 7]])
    stored(torch.randn(2, HIDDEN), index, torch.rand(2, 3))
    assert stored.counts.misses == 4
    assert stored.counts.bytes_read == 4 * stored.layout.largest
    assert stored.counts.tokens == 2
    stored(torch.randn(2, HIDDEN), index, torch.rand(2, 3))
    assert (stored.counts.misses, stored.counts.hits) == (4, 4)


def test_a_backward_reads_each_expert_once_more_and_counts_it(open_stored: Open) -> None:
    stored = open_stored(1)
    x = torch.randn(2, HIDDEN, requires_grad=True)
    y = stored(x, torch.tensor([[1, 4, 6], [4, 6, 7]]), torch.rand(2, 3))
    assert stored.counts.misses == 4
    y.sum().backward()
    # The last one of the forward pass is the first one of the backward pass.
    assert (stored.counts.misses, stored.counts.hits) == (7, 1)


def test_a_failed_read_reaches_the_caller_and_leaves_the_store_usable(
    open_stored: Open, pack: PackFile, packed: PackedExperts
) -> None:
    stored = open_stored(2)
    raw = pack.path.read_bytes()
    with pack.path.open("r+b") as file:
        file.truncate(pack.offset + 5 * pack.layout.largest)
    x, index, weights = torch.randn(1, HIDDEN), torch.tensor([[0, 3, 6]]), torch.rand(1, 3)
    with pytest.raises(OSError, match="the file was cut short"):
        stored(x, index, weights)
    pack.path.write_bytes(raw)
    assert torch.equal(stored(x, index, weights), packed(x, index, weights))


@pytest.mark.parametrize("capacity", [None, 1])
def test_casts_leave_records_alone(
    packed: PackedExperts, open_stored: Open, capacity: int | None
) -> None:
    stored = open_stored(capacity).to(torch.bfloat16).float().half()
    x, index, weights = batch()
    assert torch.equal(stored(x, index, weights), packed(x, index, weights))


@pytest.mark.parametrize("capacity", [None, 1])
def test_plain_experts_are_the_dequantized_records(
    packed: PackedExperts, open_stored: Open, capacity: int | None
) -> None:
    back = open_stored(capacity).to_plain(torch.float32)
    wanted = packed.to_plain(torch.float32)
    assert torch.equal(back.gate_up_proj, wanted.gate_up_proj)
    assert torch.equal(back.down_proj, wanted.down_proj)


@pytest.mark.parametrize("capacity", [None, 2])
def test_saved_packs_are_the_same_bytes(
    open_stored: Open, pack: PackFile, tmp_path: Path, capacity: int | None
) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    stored = open_stored(capacity)
    stored.save_files(target)
    (copied,) = target.iterdir()
    assert copied.name == pack.path.name
    assert copied.read_bytes() == pack.path.read_bytes()
    # Over its own source: nothing may be lost.
    stored.save_files(pack.path.parent)
    assert pack.path.read_bytes() == copied.read_bytes()


def test_memory_is_told_by_tier(open_stored: Open, pack: PackFile) -> None:
    stored = open_stored(2)
    assert stored.memory_bytes() == {"cpu": 0, "disk": pack.nbytes}
    stored(*batch())
    assert stored.memory_bytes() == {"cpu": 2 * pack.layout.largest, "disk": pack.nbytes}
    resident = open_stored(None)
    assert resident.memory_bytes() == {}
    assert sum(b.nbytes for b in resident.buffers()) == pack.nbytes


def test_a_pack_of_another_module_is_refused(pack: PackFile) -> None:
    other = StoredExperts("model.layers.1.mlp.experts", EXPERTS, HIDDEN, WIDTH, 10.0, pack.layout)
    with pytest.raises(ValueError, match=r"module model.layers.1.mlp.experts, got model.layers.0"):
        other.attach_resident(pack)


def test_a_pack_of_another_recipe_is_refused(pack: PackFile) -> None:
    other = "fp8_block32" if pack.layout.of(7).format("down_proj") == "fp4" else "fp4"
    kinds = (0,) * (EXPERTS - 1) + (1,)
    layout = PackLayout((pack.layout.of(7), RecordLayout.build(HIDDEN, WIDTH, other, other)), kinds)
    experts = StoredExperts(NAME, EXPERTS, HIDDEN, WIDTH, 10.0, layout)
    with pytest.raises(ValueError, match="wanted an expert pack with the layout of expert 7"):
        experts.attach_store(ExpertStore([pack], pack.nbytes), 0)


def test_experts_without_a_pack_say_so(pack: PackFile, tmp_path: Path) -> None:
    experts = StoredExperts(NAME, EXPERTS, HIDDEN, WIDTH, 10.0, pack.layout)
    with pytest.raises(ValueError, match="no expert pack was attached"):
        experts(*batch())
    with pytest.raises(ValueError, match="nothing to save"):
        experts.save_files(tmp_path)


def test_projections_may_have_formats_of_their_own(plain: Dsv4Experts, tmp_path: Path) -> None:
    layout = RecordLayout.build(HIDDEN, WIDTH, "fp4", "fp8_block32")
    fp4, fp8 = get_format("fp4"), get_format("fp8_block32")
    path = tmp_path / "experts-layers-0.safetensors"
    with PackWriter(path, NAME, PackLayout.repeat(layout, EXPERTS)) as writer:
        for e in range(EXPERTS):
            gate_up = fp4.pack(plain.gate_up_proj[e].detach().unflatten(0, (2, -1)))
            writer.write(
                layout.encode({"gate_up_proj": gate_up, "down_proj": fp8.pack(plain.down_proj[e])})
            )
    pack = PackFile.open(path)
    experts = StoredExperts(NAME, EXPERTS, HIDDEN, WIDTH, 10.0, pack.layout)
    experts.attach_resident(pack)
    gate_up, down = experts.expert_weights(5, torch.float32)
    fp4_twin = PackedExperts.from_plain(plain, "fp4").expert_weights(5, torch.float32)[0]
    fp8_twin = PackedExperts.from_plain(plain, "fp8_block32").expert_weights(5, torch.float32)[1]
    assert torch.equal(gate_up, fp4_twin)
    assert torch.equal(down, fp8_twin)


MIXED = [("fp4", "fp4"), ("fp4", "fp8_block32"), ("fp8_block32", "fp8_block32"), ("fp4", "fp4")]


@pytest.fixture
def mixed(plain: Dsv4Experts, tmp_path: Path) -> PackFile:
    """Every expert in formats of its own, records of three sizes."""

    def format_of(weight: str) -> str:
        _, expert, projection = weight.rsplit(".", 2)
        return MIXED[int(expert) % len(MIXED)][PROJECTIONS.index(projection)]

    layout = PackLayout.build(NAME, EXPERTS, HIDDEN, WIDTH, format_of)
    path = tmp_path / "experts-layers-0.safetensors"
    with PackWriter(path, NAME, layout) as writer:
        for e in range(EXPERTS):
            weights = (plain.gate_up_proj[e].detach().unflatten(0, (2, -1)), plain.down_proj[e])
            record = layout.of(e)
            parts = [
                get_format(record.format(p)).pack(w)
                for p, w in zip(PROJECTIONS, weights, strict=True)
            ]
            writer.write(record.encode(dict(zip(PROJECTIONS, parts, strict=True))))
    return PackFile.open(path)


@pytest.mark.parametrize("budget", [None, "largest", "half"])
def test_experts_in_different_formats_compute_what_each_alone_does(
    plain: Dsv4Experts, mixed: PackFile, tmp_path: Path, budget: str | None
) -> None:
    stored = StoredExperts(NAME, EXPERTS, HIDDEN, WIDTH, 10.0, mixed.layout)
    if budget is None:
        stored.attach_resident(mixed)
        assert stored.stacked() is None
    else:
        size = mixed.layout.largest if budget == "largest" else mixed.nbytes // 2
        stored.attach_store(PoisonedStore([mixed], size), 0)
    twins = {name: PackedExperts.from_plain(plain, name) for name in ("fp4", "fp8_block32")}
    dense = Dsv4Experts(EXPERTS, HIDDEN, WIDTH, 10.0)
    for e in range(EXPERTS):
        gate_up, down = MIXED[e % len(MIXED)]
        dense.gate_up_proj.data[e] = twins[gate_up].expert_weights(e, torch.float32)[0]
        dense.down_proj.data[e] = twins[down].expert_weights(e, torch.float32)[1]
    x, index, weights = batch()
    x.requires_grad_()
    got, wanted = stored(x, index, weights), dense(x, index, weights)
    torch.testing.assert_close(got, wanted)
    probe = torch.randn_like(wanted) / 10
    grads = [torch.autograd.grad(out, x, probe)[0] for out in (got, wanted)]
    torch.testing.assert_close(*grads)
    if stored.store is not None:
        assert 0 < stored.store.resident_bytes <= stored.store.budget
    (tmp_path / "saved").mkdir()
    stored.save_files(tmp_path / "saved")
    assert (tmp_path / "saved" / mixed.path.name).read_bytes() == mixed.path.read_bytes()
