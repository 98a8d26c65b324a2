# SPDX-License-Identifier: Apache-2.0
"""Codes of one to seven bits in bytes, without a bit between them."""

import torch

# So many codes fill whole bytes, whatever their width.
PERIOD = 8


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., n] below 2^bits into bytes [..., n * bits / 8] uint8; n a multiple of 8.

    Code i of eight lies at bits `i * bits` of a little-endian word of `bits` bytes.
    """
    if codes.shape[-1] % PERIOD:
        raise ValueError(f"wanted a multiple of {PERIOD} codes to pack, got {list(codes.shape)}")
    if bits == PERIOD:
        return codes.to(torch.uint8)
    at = torch.arange(PERIOD, device=codes.device)
    words = (codes.unflatten(-1, (-1, PERIOD)).long() << at * bits).sum(-1, keepdim=True)
    return (words >> at[:bits] * 8).bitwise_and_(255).to(torch.uint8).flatten(-2)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_bits`: codes [..., n] int32."""
    if bits == PERIOD:
        return packed.int()
    groups = packed.unflatten(-1, (-1, bits)).int()
    codes = packed.new_empty((*groups.shape[:-1], PERIOD), dtype=torch.int32)
    for i in range(PERIOD):
        first, shift = divmod(i * bits, 8)
        code = groups[..., first] >> shift
        if shift + bits > 8:
            code = code | groups[..., first + 1] << 8 - shift
        codes[..., i] = code & (1 << bits) - 1
    return codes.flatten(-2)
