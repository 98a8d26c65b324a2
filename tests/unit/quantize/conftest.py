# SPDX-License-Identifier: Apache-2.0
"""Small packs with known content."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_dsv4.formats import get_format
from quantize.pack import PROJECTIONS, PackFile, PackLayout, PackWriter, RecordLayout

HIDDEN, WIDTH = 64, 32
MakePack = Callable[..., tuple[PackFile, torch.Tensor]]


@pytest.fixture
def layout() -> RecordLayout:
    return RecordLayout.build(HIDDEN, WIDTH, "fp4", "fp4")


@pytest.fixture
def make_pack(tmp_path: Path, layout: RecordLayout) -> MakePack:
    """Write a pack of random experts; returns it and its records [E, record]."""

    def make(num_experts: int = 6, layer: int = 0) -> tuple[PackFile, torch.Tensor]:
        shapes = {"gate_up_proj": (2, WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
        fp4 = get_format("fp4")
        records = torch.stack([
            layout.encode({p: fp4.pack(torch.randn(shapes[p])) for p in PROJECTIONS})
            for _ in range(num_experts)
        ])  # fmt: skip
        path = tmp_path / f"experts-layers-{layer}.safetensors"
        name = f"model.layers.{layer}.mlp.experts"
        with PackWriter(path, name, PackLayout.repeat(layout, num_experts)) as writer:
            for record in records:
                writer.write(record)
        return PackFile.open(path), records

    return make
