# SPDX-License-Identifier: Apache-2.0
"""One expert of a source as the record of a pack: bytes where the format stays, else rounded."""

from dataclasses import dataclass

import torch

from modeling_dsv4.formats import WeightFormat, get_format

from .pack import PROJECTIONS, RecordLayout
from .source import ExpertsSource, Slice, Source

# Rows whose error is measured while rounding: enough for a figure to look at, and cheap.
_SAMPLE_ROWS = 128


@dataclass(frozen=True)
class Encoded:
    """A record, and how far its weights are from the source's.

    Attributes:
        record: [nbytes] uint8.
        error: sum of squared differences over some rows; 0 if nothing was rounded.
        power: sum of squares of the same rows.
    """

    record: torch.Tensor
    error: float = 0.0
    power: float = 0.0


def keeps_bytes(experts: ExpertsSource, layout: RecordLayout, projection: str) -> bool:
    """Whether a projection is in the wanted format already."""
    held = experts.weight_format
    return held is not None and held.name == layout.format(projection)


def encode_expert(
    source: Source, experts: ExpertsSource, expert: int, layout: RecordLayout
) -> Encoded:
    """Make one expert's record.

    Bytes that stay are read straight to their place. What is rounded is read one matrix [out, in]
    at a time, so that memory is a few times that of one matrix in float32.

    Args:
        source: to read from.
        experts: the module that the expert belongs to.
        expert: its number.
        layout: of its record.
    """
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.decode(record)
    slices = source.expert_slices(experts.name, expert)
    error = power = 0.0
    for projection in PROJECTIONS:
        places = {part: found for (p, part), found in slices.items() if p == projection}
        if keeps_bytes(experts, layout, projection):
            _read_parts(source, places, views[projection])
            continue
        wanted = get_format(layout.format(projection))
        e, p = _round_parts(source, experts.weight_format, places, wanted, views[projection])
        error, power = error + e, power + p
    return Encoded(record, error, power)


def _read_parts(
    source: Source, places: dict[str, list[Slice]], views: dict[str, torch.Tensor]
) -> None:
    """Read a projection's bytes straight to where they belong."""
    for part, found in places.items():
        targets = views[part] if len(found) > 1 else views[part][None]
        for place, target in zip(found, targets, strict=True):
            source.read_into(place, target.flatten().view(torch.uint8).numpy().data)


def _round_parts(
    source: Source,
    held: WeightFormat | None,
    places: dict[str, list[Slice]],
    wanted: WeightFormat,
    views: dict[str, torch.Tensor],
) -> tuple[float, float]:
    """Round a projection matrix by matrix into its views; returns error and power of some rows."""
    read = {part: _matrices(source, found) for part, found in places.items()}
    matrices = [
        dict(zip(read, tensors, strict=True)) for tensors in zip(*read.values(), strict=True)
    ]
    error = power = 0.0
    for m, parts in enumerate(matrices):
        weight = parts[""].float() if held is None else held.unpack(parts, torch.float32)
        packed = wanted.pack(weight)
        for part, tensor in packed.items():
            target = views[part][m] if len(matrices) > 1 else views[part]
            target.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
        e, p = _sampled_error(wanted, packed, weight)
        error, power = error + e, power + p
    return error, power


def _matrices(source: Source, places: list[Slice]) -> list[torch.Tensor]:
    """Read matrices [out, in]: several slices, or one of [2, F, ...]."""
    read = [source.read(place) for place in places]
    if len(read) == 1 and read[0].dim() == 3:
        return list(read[0])
    return read


def _sampled_error(
    weight_format: WeightFormat, parts: dict[str, torch.Tensor], weight: torch.Tensor
) -> tuple[float, float]:
    rows = min(_SAMPLE_ROWS, weight.shape[-2])
    got = weight_format.unpack_rows(parts, 0, rows, torch.float32)
    wanted = weight[..., :rows, :]
    return float((got - wanted).square().sum()), float(wanted.square().sum())
