# SPDX-License-Identifier: Apache-2.0
"""Number formats against frozen vectors of the release's kernels, and rule by rule."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_dsv4 import formats

E8M0 = torch.float8_e8m0fnu


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "kernels" / "kernels.safetensors")


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def power(exponent: torch.Tensor) -> torch.Tensor:
    """Scale 2^exponent as E8M0."""
    return (exponent + 127).to(torch.uint8).view(E8M0)


def uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64).mul(high - low).add(low).float()


# --- frozen vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
def test_fp8_simulation_equals_the_release(golden: dict, group: int) -> None:
    assert torch.equal(formats.simulate_fp8(golden["x"], group), golden[f"fp8_qdq_block{group}"])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_fp8_scales_equal_the_release(golden: dict, group: int) -> None:
    amax = golden["x"].unflatten(-1, (-1, group)).abs().amax(-1)
    scale = formats.ceil_scale(amax, 448.0, 1e-4)
    assert torch.equal(scale.float(), golden[f"fp8_scale_block{group}"])


def test_fp4_simulations_equal_the_release(golden: dict) -> None:
    assert torch.equal(formats.simulate_fp4(golden["x"]), golden["fp4_qdq_block32_e8m0"])
    assert torch.equal(formats.simulate_fp4_e4m3(golden["x"]), golden["fp4_qdq_block16_e4m3"])


def test_hadamard_equals_the_release(golden: dict) -> None:
    want = golden["hadamard128"]
    error = (formats.hadamard(golden["x"][:, :128]) - want).abs()
    assert error.max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("block", [32, 128])
def test_fp8_blocks_equal_the_release_byte_for_byte(golden: dict, block: int) -> None:
    q, scale = formats.quantize_fp8_block(golden["w"], block)
    assert torch.equal(as_bytes(q), as_bytes(golden[f"w_fp8_{block}"]))
    assert torch.equal(as_bytes(scale), as_bytes(golden[f"w_fp8_{block}_scale"]))
    back = formats.dequantize_fp8_block(q, scale, block, torch.float32)
    assert torch.equal(back, golden[f"w_fp8_{block}_dq"])


def test_fp8_rows_equal_the_release_byte_for_byte(golden: dict) -> None:
    q, scale = formats.quantize_fp8_rows(golden["w"])
    assert torch.equal(as_bytes(q), as_bytes(golden["w_rows_fp8"]))
    assert torch.equal(as_bytes(scale), as_bytes(golden["w_rows_fp8_scale"]))
    back = formats.dequantize_fp8_rows(q, scale, torch.float32)
    assert torch.equal(back, golden["w_rows_fp8_dq"])


def test_fp4_packs_as_the_release_byte_for_byte(golden: dict) -> None:
    codes, scale = formats.pack_fp4(golden["w"])
    assert torch.equal(codes, as_bytes(golden["w_fp4"]))
    assert torch.equal(as_bytes(scale), as_bytes(golden["w_fp4_scale"]))
    # A swap of nibbles would keep every statistic of a block; these values are in order.
    assert torch.equal(formats.unpack_fp4(codes, scale, torch.float32), golden["w_fp4_dq"])


def test_every_fp4_byte_means_what_it_means_in_the_release(golden: dict) -> None:
    one = power(torch.zeros(1, 16))
    values = formats.unpack_fp4(golden["all_fp4_bytes"], one, torch.float32)
    assert torch.equal(values, golden["all_fp4_bytes_values"])


# --- E2M1 ---------------------------------------------------------------------------------------


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    x = torch.zeros(2, 32)
    x[0, :7], x[1, :7], x[:, 31] = ties, -ties, 6.0
    assert torch.equal(formats.simulate_fp4(x)[:, :7], torch.stack((want, -want)))
    codes, scale = formats.pack_fp4(x)
    packed = formats.unpack_fp4(codes, scale, torch.float32)[:, :7]
    assert torch.equal(packed, torch.stack((want, -want)))


def test_one_ulp_from_a_tie_goes_to_the_nearer_value() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = torch.tensor(formats.E2M1_VALUES)
    x = torch.full((2, 32), 6.0)
    x[0, :7] = ties.nextafter(torch.tensor(0.0))
    x[1, :7] = ties.nextafter(torch.tensor(9.0))
    assert torch.equal(formats.simulate_fp4(x)[:, :7], torch.stack((values[:-1], values[1:])))


def test_the_even_column_is_the_low_nibble() -> None:
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 31] = 0.5, -6.0, 1.0
    codes, scale = formats.pack_fp4(w)
    assert codes[0, 0] == 0x1 | (0xF << 4)
    assert codes[0, 15] == 0x0 | (0x2 << 4)
    assert scale.float().item() == 1.0


def test_packing_what_was_unpacked_gives_all_256_bytes_again() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = power(torch.arange(-8, 8)[:, None])
    again, scale_again = formats.pack_fp4(formats.unpack_fp4(codes, scale, torch.float32))
    assert torch.equal(again, codes)
    assert torch.equal(as_bytes(scale_again), as_bytes(scale))


def test_unpacking_follows_the_definition_value_by_value() -> None:
    codes = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    exponent = torch.randint(-9, 9, (5, 2))
    got = formats.unpack_fp4(codes, power(exponent), torch.float64)
    for r in range(5):
        for c in range(48):
            code = int(codes[r, c // 2]) >> (4 * (c % 2)) & 15
            sign = -1 if code & 8 else 1
            want = sign * formats.E2M1_VALUES[code & 7] * 2.0 ** int(exponent[r, c // 32])
            assert got[r, c] == want, (r, c)


# --- scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_scale_exponent_is_an_exact_ceiling_at_and_beside_every_power(largest: float) -> None:
    k = torch.arange(-13, 100).double()
    amax = (largest * 2.0**k).float()
    scale = lambda x: formats.ceil_scale(x, largest, 0.0).double()
    assert torch.equal(scale(amax), 2.0**k)
    assert torch.equal(scale(amax.nextafter(torch.tensor(math.inf))), 2.0 ** (k + 1))
    assert torch.equal(scale(amax.nextafter(torch.tensor(0.0))), 2.0**k)


def test_amax_has_a_floor_and_zero_blocks_stay_zero() -> None:
    zero = torch.zeros(1)
    assert formats.ceil_scale(zero, 448.0, 1e-4).item() == 2.0**-22
    assert formats.ceil_scale(zero, 6.0, 6 * 2.0**-126).item() == 2.0**-126
    x = torch.zeros(4, 128)
    for rounded in (
        formats.simulate_fp8(x, 64),
        formats.simulate_fp4(x),
        formats.simulate_fp4_e4m3(x),
        formats.unpack_fp4(*formats.pack_fp4(x), torch.float32),
        formats.unpack_fp4(*formats.pack_fp4_e4m3(x), torch.float32),
        formats.dequantize_fp8_block(*formats.quantize_fp8_block(x, 32), 32, torch.float32),
    ):
        assert torch.equal(rounded, x)


def test_blocks_below_the_floor_round_on_the_floors_grid() -> None:
    x = torch.full((1, 32), 1e-6)
    want = (x * 2.0**22).to(torch.float8_e4m3fn).float() * 2.0**-22
    assert torch.equal(formats.simulate_fp8(x, 32), want)
    assert formats.quantize_fp8_block(x, 32)[1].item() == 2.0**-22
    assert formats.pack_fp4(x * 0)[1].item() == 2.0**-126


def test_the_floor_of_e4m3_scales_is_the_least_number_of_e4m3() -> None:
    # 6 * 2^-9 / 6: below it the scale would round to zero, and the quotient to NaN.
    x = torch.full((1, 16), 2.0**-9)
    assert torch.equal(formats.simulate_fp4_e4m3(x), x)
    assert torch.equal(formats.simulate_fp4_e4m3(x / 8), torch.zeros(1, 16))


def test_e4m3_scales_are_no_powers_of_two_and_clamp_instead_of_becoming_nan() -> None:
    x = torch.zeros(1, 16)
    x[0, 0] = 6 * 1.375
    assert formats.simulate_fp4_e4m3(x)[0, 0] == 6 * 1.375
    huge = torch.full((1, 16), 1e5)
    assert torch.equal(formats.simulate_fp4_e4m3(huge), torch.full((1, 16), 6 * 448.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packing_what_the_simulations_gave_changes_no_bit(dtype: torch.dtype) -> None:
    # All magnitudes: beneath the floors, where E4M3 scales are whole steps apart, and saturated.
    x = torch.randn(20000, 64) * torch.exp2(torch.rand(20000, 1) * 40 - 25)
    x = x.to(dtype)
    e4m3 = formats.simulate_fp4_e4m3(x)
    assert (e4m3.unflatten(-1, (-1, 16)).abs().amax(-1) == 2.0**-6).any()
    for rounded, found in (
        (e4m3, formats.unpack_fp4(*formats.pack_fp4_e4m3(e4m3), dtype)),
        (y := formats.simulate_fp4(x), formats.unpack_fp4(*formats.pack_fp4(y), dtype)),
        (
            y := formats.simulate_fp8(x, 64),
            formats.dequantize_fp8_rows(*formats.quantize_fp8_rows(y, 64), dtype, 64),
        ),
    ):
        assert torch.equal(found, rounded)
        assert torch.equal(found.signbit(), rounded.signbit())


def test_a_partial_group_has_an_e4m3_scale_of_its_own() -> None:
    x = torch.randn(5, 38)
    x[:, 32:] *= 100
    codes, scale = formats.pack_fp4_e4m3(x)
    assert codes.shape == (5, 19) and scale.shape == (5, 3)
    wide = formats.simulate_fp4_e4m3(torch.nn.functional.pad(x, (0, 10)))[:, :38]
    assert torch.equal(formats.unpack_fp4(codes, scale, torch.float32), wide)
    with pytest.raises(ValueError, match="even length"):
        formats.pack_fp4_e4m3(x[:, :37])


def test_tiny_and_huge_blocks_round_without_overflow() -> None:
    x = torch.full((1, 32), 2.5e38)
    assert formats.simulate_fp8(x, 32).isfinite().all()
    assert formats.simulate_fp4(x).isfinite().all()
    tiny = torch.full((1, 32), 2.0**-126)
    assert torch.equal(formats.simulate_fp4(tiny), tiny)


# --- FP8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_e4m3_byte_reads_as_torch_casts_it(dtype: torch.dtype) -> None:
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    got = formats.dequantize_fp8_rows(q, power(torch.zeros(1, 8)), dtype)
    assert torch.equal(got.isnan(), q.float().isnan())
    assert torch.equal(got.nan_to_num(), q.to(dtype).nan_to_num())


def test_every_e8m0_byte_scales_by_its_power() -> None:
    byte = torch.arange(255, dtype=torch.uint8)
    one = torch.ones(255, 1).to(torch.float8_e4m3fn)
    got = formats.dequantize_fp8_rows(one, byte.view(E8M0)[:, None], torch.float64)
    assert torch.equal(got[:, 0], 2.0 ** (byte.double() - 127))


def test_fp8_codes_are_torchs_own_cast_of_the_scaled_weight() -> None:
    w = torch.randn(64, 64) * 0.02
    q, scale = formats.quantize_fp8_block(w, 32)
    wide = scale.float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(as_bytes(q), as_bytes((w / wide).to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("shape", [(33, 130), (1, 2), (129, 127), (2, 40, 70), (128, 32)])
@pytest.mark.parametrize("block", [32, 128])
def test_partial_last_blocks_have_scales_of_their_own(shape: tuple[int, ...], block: int) -> None:
    w = torch.randn(shape)
    q, scale = formats.quantize_fp8_block(w, block)
    rows, columns = (-(-n // block) for n in shape[-2:])
    assert scale.shape == (*shape[:-2], rows, columns)
    padded = torch.zeros(*shape[:-2], rows * block, columns * block)
    padded[..., : shape[-2], : shape[-1]] = w
    want = formats.dequantize_fp8_block(
        *formats.quantize_fp8_block(padded, block), block, torch.float32
    )
    got = formats.dequantize_fp8_block(q, scale, block, torch.float32)
    assert torch.equal(got, want[..., : shape[-2], : shape[-1]])
    assert (got - w).norm() < 0.04 * w.norm()


@pytest.mark.parametrize("k", [2, 34, 62, 96])
def test_fp4_rows_may_end_in_a_partial_group(k: int) -> None:
    w = torch.randn(3, 5, k)
    codes, scale = formats.pack_fp4(w)
    assert codes.shape == (3, 5, k // 2)
    assert scale.shape == (3, 5, -(-k // 32))
    padded = torch.nn.functional.pad(w, (0, -k % 32))
    want = formats.unpack_fp4(*formats.pack_fp4(padded), torch.float32)[..., :k]
    assert torch.equal(formats.unpack_fp4(codes, scale, torch.float32), want)


def test_large_tensors_are_looked_up_in_pieces_without_a_seam() -> None:
    rows = 2 * formats._LOOKUP_CHUNK // 1000
    codes = torch.randint(0, 256, (rows, 1024), dtype=torch.uint8)
    scale = power(torch.randint(-4, 5, (rows, 64)))
    whole = formats.unpack_fp4(codes, scale, torch.float32)
    by_row = [
        formats.unpack_fp4(c[None], s[None], torch.float32)
        for c, s in zip(codes, scale, strict=True)
    ]
    assert torch.equal(whole, torch.cat(by_row))


# --- exactness and bias -------------------------------------------------------------------------


def test_bfloat16_holds_every_stored_number_exactly() -> None:
    w = torch.randn(96, 160) * torch.logspace(-3, 3, 96)[:, None]
    codes, scale = formats.pack_fp4(w)
    for low, wide in (
        [formats.unpack_fp4(codes, scale, t) for t in (torch.bfloat16, torch.float64)],
        [
            formats.dequantize_fp8_block(*formats.quantize_fp8_block(w, 32), 32, t)
            for t in (torch.bfloat16, torch.float64)
        ],
    ):
        assert torch.equal(low.double(), wide)


def test_float16_is_rounded_once_from_the_exact_value() -> None:
    codes = torch.randint(0, 256, (8, 16), dtype=torch.uint8)
    scale = power(torch.tensor([-30, -26, -25, -20, 0, 10, 13, 14])[:, None])
    exact = formats.unpack_fp4(codes, scale, torch.float32)
    assert torch.equal(formats.unpack_fp4(codes, scale, torch.float16), exact.half())


@pytest.mark.parametrize("spread", [0, 7, 14])
def test_fp4_recast_to_fp8_is_exact_while_scales_span_two_to_the_fourteenth(spread: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[:, :96]
    exponent = torch.randint(-spread, 1, (256, 6))
    exponent[::3], exponent[1::3] = 0, -spread
    q, scale = formats.fp4_to_fp8_block(codes, power(exponent), 128)
    assert scale.shape == (2, 2)
    want = formats.unpack_fp4(codes, power(exponent), torch.float64)
    assert torch.equal(formats.dequantize_fp8_block(q, scale, 128, torch.float64), want)


def test_fp4_recast_beyond_that_span_is_refused() -> None:
    codes = torch.full((32, 32), 0x11, dtype=torch.uint8)
    exponent = torch.zeros(32, 2)
    exponent[0, 1] = -15
    with pytest.raises(ValueError, match="keep these weights in FP4"):
        formats.fp4_to_fp8_block(codes, power(exponent), 128)


@pytest.mark.parametrize("octave", [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 6.0)])
@pytest.mark.parametrize("name", ["fp4", "fp4_packed", "fp4_e4m3", "fp8"])
def test_rounding_is_unbiased(octave: tuple[float, float], name: str) -> None:
    # Uniform over whole octaves, as many values lie above their nearest code as below it.
    n = 1 << 16
    x = uniform((n // 32, 32), *octave)
    x[:, ::16] = 6.0
    rounded = {
        "fp4": formats.simulate_fp4,
        "fp4_packed": lambda t: formats.unpack_fp4(*formats.pack_fp4(t), torch.float32),
        "fp4_e4m3": formats.simulate_fp4_e4m3,
        "fp8": lambda t: formats.simulate_fp8(t, 32),
    }[name](x)
    error = (rounded - x).double()[:, 1:16]
    ups = int((error > 0).sum())
    # Five standard deviations of a fair coin, and of the mean error.
    assert abs(ups - error.numel() / 2) < 2.5 * math.sqrt(error.numel())
    assert error.mean().abs() < 5 * error.std() / math.sqrt(error.numel())


@pytest.mark.parametrize(
    ("simulate", "low", "high"),
    [
        (lambda x: formats.simulate_fp8(x, 128), 0.015, 0.035),
        (formats.simulate_fp4, 0.08, 0.16),
        (formats.simulate_fp4_e4m3, 0.06, 0.13),
    ],
)
def test_simulation_truly_rounds(simulate: object, low: float, high: float) -> None:
    x = torch.randn(64, 512)
    y = simulate(x)
    assert low < (y - x).norm() / x.norm() < high
    # What it gives is representable: rounding again changes nothing.
    assert torch.equal(simulate(y), y)
    assert y[0, :16].div(y[0, :16].abs().max()).unique().numel() < 16


def test_simulation_keeps_dtype_and_rounds_bfloat16_like_float32() -> None:
    x = torch.randn(8, 128).bfloat16()
    for simulate in (formats.simulate_fp4, formats.simulate_fp4_e4m3):
        assert simulate(x).dtype is torch.bfloat16
        assert torch.equal(simulate(x).float(), simulate(x.float()))


def test_simulation_passes_gradients_straight_through() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.randn(4, 64)
    for simulate in (
        lambda t: formats.simulate_fp8(t, 32),
        formats.simulate_fp4,
        formats.simulate_fp4_e4m3,
    ):
        (grad,) = torch.autograd.grad((simulate(x) * weight).sum(), x)
        assert torch.equal(grad, weight)


def test_hadamard_is_its_own_inverse_and_keeps_norms() -> None:
    x = torch.randn(3, 5, 64, dtype=torch.float32)
    y = formats.hadamard(x)
    assert torch.allclose(formats.hadamard(y), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    one = torch.zeros(8)
    one[0] = 1.0
    assert torch.allclose(formats.hadamard(one), torch.full((8,), 8**-0.5))


# --- registry -----------------------------------------------------------------------------------

NAMES = ["fp4", "fp8_block128", "fp8_block32", "fp8_rows32"]


@pytest.mark.parametrize(
    "name",
    [*NAMES, formats.FP4_E4M3, formats.fp8_rows_format(64)],
    ids=lambda fmt: getattr(fmt, "name", fmt),  # a format's repr has addresses in it
)
def test_a_format_packs_the_parts_it_announces(name: str | formats.WeightFormat) -> None:
    fmt = formats.get_format(name)
    w = torch.randn(3, 130, 192)
    packed = fmt.pack(w)
    parts = fmt.parts((3, 130, 192))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == parts
    assert fmt.nbytes((3, 130, 192)) == sum(t.nbytes for t in packed.values())
    assert (fmt.unpack(packed, torch.float32) - w).norm() < 0.15 * w.norm()


def test_bytes_of_a_real_expert_are_those_of_the_release() -> None:
    # w1, w2 and w3 of V4-Flash: 4.25 bits a weight.
    fp4 = formats.get_format("fp4")
    expert = 2 * fp4.nbytes((2048, 4096)) + fp4.nbytes((4096, 2048))
    assert expert == 3 * 2048 * 4096 * 4.25 / 8
    assert 43 * 256 * expert == 147_169_738_752


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("start", "stop"), [(0, 130), (5, 6), (31, 33), (100, 130), (127, 129)])
def test_rows_of_a_format_are_rows_of_the_weight(name: str, start: int, stop: int) -> None:
    fmt = formats.get_format(name)
    packed = fmt.pack(torch.randn(2, 130, 96))
    whole = fmt.unpack(packed, torch.float32)
    rows = fmt.unpack_rows(packed, start, stop, torch.float32)
    assert torch.equal(rows, whole[:, start:stop])


def test_an_unknown_format_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"fp4.*fp8_block128.*'q9'.*import quantize"):
        formats.get_format("q9")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="second time"):
        formats.register_format(formats.get_format("fp4"))


def test_bad_weights_are_refused() -> None:
    w = torch.randn(4, 32)
    w[2, 3] = math.nan
    with pytest.raises(ValueError, match="finite"):
        formats.pack_fp4(w)
    w[2, 3] = math.inf
    with pytest.raises(ValueError, match="finite"):
        formats.quantize_fp8_block(w, 32)
    with pytest.raises(ValueError, match="even length"):
        formats.pack_fp4(torch.randn(4, 33))
    q, scale = formats.quantize_fp8_block(torch.randn(64, 64), 32)
    with pytest.raises(ValueError, match=r"\[1, 1\].*\[2, 2\]"):
        formats.dequantize_fp8_block(q, scale, 64, torch.float32)
    with pytest.raises(ValueError, match="groups of 64"):
        formats.simulate_fp8(torch.randn(2, 96), 64)
    with pytest.raises(ValueError, match="power of two"):
        formats.hadamard(torch.randn(2, 96))


def test_formats_know_their_shapes_without_data() -> None:
    codes = torch.empty(4, 8, 32, dtype=torch.uint8, device="meta")
    scale = torch.empty(4, 8, 2, dtype=E8M0, device="meta")
    wide = formats.unpack_fp4(codes, scale, torch.bfloat16)
    assert wide.shape == (4, 8, 64)
    assert wide.dtype is torch.bfloat16
