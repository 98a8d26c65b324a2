# SPDX-License-Identifier: Apache-2.0
"""Trellis formats against a reference that reads bit by bit, a search of every path, and theory."""

import itertools
import math

import pytest
import torch

import quantize  # noqa: F401
from modeling_dsv4.cpu.build import find_compiler
from modeling_dsv4.formats import get_format, hadamard
from quantize import trellis as trellis_module
from quantize.bits import unpack_bits
from quantize.trellis import TRELLISES, Trellis, rotate, table_checksum, viterbi, windows

# Squared error on a Gaussian, found with other numbers than the tables were made from. No code can
# do better than 4^-bits; scalar codes of the same rate (Max, 1960) reach 0.1175, 0.03454, 0.0095.
REACHED = {"trellis2": 0.0765, "trellis2.5": 0.0400, "trellis3": 0.0210, "trellis3.5": 0.0113,
           "trellis4": 0.0064}  # fmt: skip
SCALAR = {"trellis2": 0.1175, "trellis3": 0.03454, "trellis4": 0.0095}


def read_row(parts: dict[str, torch.Tensor], bits: int, row: int) -> torch.Tensor:
    """One row before it is rotated back, from the definition."""
    stream = [byte >> i & 1 for byte in parts[""][row].tolist() for i in range(8)]
    table = Trellis(bits).table(torch.device("cpu"))
    values, window = [], 0
    for at in range(0, len(stream), bits):
        code = sum(bit << i for i, bit in enumerate(stream[at : at + bits]))
        window = (window << bits | code) % 1024
        values += table[window].tolist()
    return torch.tensor(values) * parts["_scale"][row].float()


@pytest.mark.parametrize("name", REACHED)
def test_unpacking_is_the_definition(name: str) -> None:
    fmt = get_format(name)
    parts = fmt.pack(torch.randn(2, 96))
    for row in range(2):
        blocks = hadamard(read_row(parts, int(fmt.bits * 2), row).view(3, 32))
        # Across three blocks: cos + sin of thirds of a turn, over the root of 3.
        a, b = -0.5 + 0.75**0.5, -0.5 - 0.75**0.5
        across = torch.tensor([[1, 1, 1], [1, a, b], [1, b, a]]) / 3**0.5
        want = (across @ blocks).flatten()
        torch.testing.assert_close(fmt.unpack(parts, torch.float32)[row], want)


@pytest.mark.parametrize("name", REACHED)
def test_a_gaussian_is_rounded_as_well_as_promised(name: str) -> None:
    fmt, w = get_format(name), torch.randn(64, 1024)
    got = float((fmt.unpack(fmt.pack(w), torch.float32) - w).square().mean())
    assert 4.0**-fmt.bits < got < 1.04 * REACHED[name]
    assert got < 0.7 * SCALAR.get(name, 1.0)
    assert fmt.nbytes((64, 1024)) * 8 / w.numel() == fmt.bits + 16 / 1024


def test_outliers_cost_little_more_than_a_gaussian_of_their_size() -> None:
    w = torch.randn(32, 512)
    w[:, torch.randperm(512)[:13]] *= 12

    def wrong(name: str) -> float:
        fmt = get_format(name)
        got = fmt.unpack(fmt.pack(w), torch.float32)
        return float((got - w).square().sum() / w.square().sum())

    assert wrong("trellis2") < 0.09
    assert wrong("trellis2") < 0.8 * wrong("int2")


@pytest.mark.parametrize("bits", [4, 6])
def test_the_search_finds_the_best_of_all_paths(bits: int) -> None:
    y, table = torch.randn(2, 4), Trellis(bits).table(torch.device("cpu"))
    start = torch.tensor([5, 1023])
    found = viterbi(y, table, bits, start)
    for row in range(len(y)):
        best, path = math.inf, ()
        for first, second in itertools.product(range(1 << bits), repeat=2):
            a = (int(start[row]) << bits | first) % 1024
            b = (a << bits | second) % 1024
            wrong = float((torch.cat((table[a], table[b])) - y[row]).square().sum())
            if wrong < best:
                best, path = wrong, (a, b)
        assert tuple(found[:, row].tolist()) == path


@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize(("rows", "columns"), [(7, 80), (1, 2), (3, 0), (0, 8)])
def test_the_search_in_c_finds_the_same_path(
    bits: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, table = torch.randn(rows, columns), Trellis(bits).table(torch.device("cpu"))
    state = torch.randint(0, 1024, (rows,))
    found = viterbi(y, table, bits, state)
    monkeypatch.setattr(trellis_module, "library", lambda folder: None)
    wanted = viterbi(y, table, bits, state)
    if rows:
        assert torch.equal(found, wanted)
    assert found.shape == (columns // 2, rows) and found.dtype is torch.int64


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp4", "int2", "int3", "int4", "trellis2", "trellis3.5"])
def test_a_gpu_rounds_as_well_and_reads_the_same(name: str) -> None:
    w, fmt = torch.randn(3, 32, 512), get_format(name)
    here, there = fmt.pack(w), fmt.pack(w.cuda())
    wrong = [float((fmt.unpack(p, torch.float32).cpu() - w).square().mean()) for p in (here, there)]
    assert wrong[1] == pytest.approx(wrong[0], rel=0.01)
    moved = fmt.unpack({part: x.cpu() for part, x in there.items()}, torch.float32)
    torch.testing.assert_close(fmt.unpack(there, torch.float32).cpu(), moved, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_what_a_stream_stands_for_is_found_again(bits: int) -> None:
    trellis = Trellis(bits)
    y = trellis.values(torch.randint(0, 1 << bits, (40, 128)))
    found = trellis.search(y, trellis.table(y.device))
    # Two windows may hold one pair, so values are compared and not codes.
    assert torch.equal(trellis.values(found), y)


def test_a_scale_is_the_best_for_its_codes() -> None:
    trellis, y = Trellis(4), torch.randn(40, 64) * 1.3
    codes = trellis.search(y, trellis.table(y.device))
    q = trellis.values(codes)
    gain = trellis.gain(codes, y)
    torch.testing.assert_close(((y - gain * q) * q).sum(-1), torch.zeros(40), rtol=0, atol=1e-3)
    # Rows far from Gaussian: what packing stores is the scale of the codes, not of the row.
    w = torch.randn(16, 32).pow(3)
    parts = trellis.pack(w)
    q = trellis.values(unpack_bits(parts[""], 4))
    best = (q * rotate(w)).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)
    torch.testing.assert_close(parts["_scale"].float(), best, rtol=2**-8, atol=0)


def test_windows_reach_back_ten_bits_and_start_at_zero() -> None:
    codes = torch.tensor([[1, 2, 3, 4]])
    assert windows(codes, 4).tolist() == [[1, 0x12, 0x123, 0x234]]
    assert windows(codes, 8).tolist() == [[1, 0x102, 0x203, 0x304]]


def test_the_rotation_is_its_own_inverse_for_every_width() -> None:
    for k in (32, 96, 192, 2304, 3072, 7168):
        w = torch.randn(2, k)
        torch.testing.assert_close(rotate(rotate(w)), w)
        spike = torch.zeros(k)
        spike[k // 2] = 1.0
        # One weight reaches its whole row, and no other takes more than its share by far.
        assert rotate(spike).abs().max() < 1.5 * k**-0.5


@pytest.mark.parametrize("name", ["trellis2", "trellis2.5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stacks_and_rows_are_the_same_weight(name: str, dtype: torch.dtype) -> None:
    fmt, w = get_format(name), torch.randn(2, 3, 96)
    parts = fmt.pack(w)
    assert {k: (p.dtype, tuple(p.shape)) for k, p in parts.items()} == fmt.parts((2, 3, 96))
    whole = fmt.unpack(parts, dtype)
    assert whole.dtype is dtype
    torch.testing.assert_close(whole, fmt.unpack(parts, torch.float32).to(dtype))
    torch.testing.assert_close(fmt.unpack(fmt.pack(w[1]), dtype), whole[1])
    torch.testing.assert_close(fmt.unpack_rows(parts, 1, 3, dtype), whole[:, 1:3])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_any_size_of_number_is_rounded_alike(size: float) -> None:
    fmt, w = get_format("trellis3"), torch.randn(2, 64) * size
    got = fmt.unpack(fmt.pack(w), torch.float32)
    assert got.isfinite().all()
    assert float((got / (size or 1) - w / (size or 1)).square().mean()) < 0.04


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    w = torch.zeros(2, 64)
    w[1, 3] = bad
    with pytest.raises(ValueError, match="wanted finite numbers to quantize"):
        get_format("trellis2").pack(w)


def test_rows_too_short_to_rotate_are_refused() -> None:
    for shape in ((2, 48), (2, 16)):
        with pytest.raises(ValueError, match="wanted rows of a multiple of 32 weights"):
            get_format("trellis2").parts(shape)
        with pytest.raises(ValueError, match="wanted rows of a multiple of 32 weights"):
            get_format("trellis2").pack(torch.randn(shape))


def test_checksums_tell_tables_and_how_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {trellis.tables for trellis in map(get_format, TRELLISES)}
    assert len(known) == len(TRELLISES)
    assert 0 not in known
    before = table_checksum(4)
    assert get_format("trellis2").tables == before
    for name, other in (("_STEP", 1 / 16), ("BLOCK", 128), ("TABLES", {4: "00" * 1024})):
        with monkeypatch.context() as patch:
            patch.setattr(f"quantize.trellis.{name}", other)
            assert table_checksum(4) != before
