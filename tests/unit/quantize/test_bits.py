# SPDX-License-Identifier: Apache-2.0
"""Codes share bytes without a gap, and come back."""

import pytest
import torch

from quantize.bits import pack_bits, unpack_bits


def by_hand(packed: list[int], bits: int) -> list[int]:
    """Read a stream of little-endian bits one by one."""
    stream = [byte >> i & 1 for byte in packed for i in range(8)]
    return [
        sum(bit << i for i, bit in enumerate(stream[at : at + bits]))
        for at in range(0, len(stream), bits)
    ]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_a_stream_of_bits(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, 40))
    packed = pack_bits(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (2, 3, 5 * bits)
    assert torch.equal(unpack_bits(packed, bits).long(), codes)
    assert by_hand(packed[1, 2].tolist(), bits) == codes[1, 2].tolist()


def test_codes_that_fill_no_whole_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 8 codes to pack, got \[2, 12\]"):
        pack_bits(torch.zeros(2, 12, dtype=torch.uint8), 3)
