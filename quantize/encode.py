# SPDX-License-Identifier: Apache-2.0
"""One expert of a source as the record of a pack: bytes where the format stays, else rounded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from modeling_dsv4.formats import WeightFormat, get_format

from .pack import PROJECTIONS, RecordLayout
from .rounding import quantize_weight
from .source import ExpertsSource, Slice, Source

# (module, expert, projection) to second moments [I, I], or None where nothing is known.
Statistics = Callable[[str, int, str], torch.Tensor | None]
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


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: an unknown name, or a device that this machine does not have.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: wanted a device of this machine, such as cpu or cuda:0, got {device!r} "
            f"({reason})"
        ) from error


def encode_expert(
    source: Source,
    experts: ExpertsSource,
    expert: int,
    layout: RecordLayout,
    statistics: Statistics | None = None,
    device: str = "cpu",
    into: torch.Tensor | None = None,
) -> Encoded:
    """Make one expert's record.

    Bytes that stay are read straight to their place. What is rounded is read one projection at a
    time, so that memory is a few times that of one in float32.

    Args:
        source: to read from.
        experts: the module that the expert belongs to.
        expert: its number.
        layout: of its record.
        statistics: second moments of what an expert's projection is fed with, or None.
        device: that computes; what it reads and gives is on the CPU.
        into: a record of the same layout to write over, which saves the system its pages.
    """
    record = torch.zeros(layout.nbytes, dtype=torch.uint8) if into is None else into
    views = layout.decode(record)
    slices = source.expert_slices(experts.name, expert)
    error = power = 0.0
    for projection in PROJECTIONS:
        places = {part: found for (p, part), found in slices.items() if p == projection}
        if keeps_bytes(experts, layout, projection):
            _read_parts(source, places, views[projection])
            continue
        weight = _read_weight(source, experts.weight_format, places, device)
        wanted = get_format(layout.format(projection))
        second = statistics(experts.name, expert, projection) if statistics else None
        packed = quantize_weight(weight, wanted, None if second is None else second.to(device))
        for part, tensor in packed.items():
            raw = tensor.contiguous().view(torch.uint8)
            views[projection][part].view(torch.uint8).copy_(raw)
        e, p = _sampled_error(wanted, packed, weight)
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


def _read_weight(
    source: Source, held: WeightFormat | None, places: dict[str, list[Slice]], device: str
) -> torch.Tensor:
    """Read a projection as numbers: [2, F, D] or [D, F] float32."""
    parts = {}
    for part, found in places.items():
        read = [source.read(place) for place in found]
        parts[part] = (torch.stack(read) if len(read) > 1 else read[0]).to(device)
    return parts[""].float() if held is None else held.unpack(parts, torch.float32)


def _sampled_error(
    weight_format: WeightFormat, parts: dict[str, torch.Tensor], weight: torch.Tensor
) -> tuple[float, float]:
    rows = min(_SAMPLE_ROWS, weight.shape[-2])
    got = weight_format.unpack_rows(parts, 0, rows, torch.float32)
    wanted = weight[..., :rows, :]
    return float((got - wanted).square().sum()), float(wanted.square().sum())
