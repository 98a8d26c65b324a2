# SPDX-License-Identifier: Apache-2.0
"""The trained nano model, in float32 so that no tie is decided by rounding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_dsv4 import Dsv4ForCausalLM
from quantize.run.engine import Engine

NANO = Path(__file__).parents[4] / "models" / "nano-v41"


@pytest.fixture(scope="session")
def nano_parts():
    model = Dsv4ForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def nano() -> Path:
    return NANO


@pytest.fixture
def engine(nano_parts) -> Callable[..., Engine]:
    """A fresh engine over the one loaded model."""
    return lambda slots=2, **more: Engine(*nano_parts, slots=slots, **more)
