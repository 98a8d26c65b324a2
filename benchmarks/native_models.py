# SPDX-License-Identifier: Apache-2.0
"""Models to hold against each other: ours, and transformers' own V4 with the same weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

SHAPES = Path(__file__).parent / "shapes"
NO_NATIVE = "not run: this transformers has no deepseek_v4"


def native_classes() -> tuple[Any, Any] | None:
    """transformers' config and model of V4, or None where it has none."""
    try:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    except ImportError:
        return None
    return DeepseekV4Config, DeepseekV4ForCausalLM


def shape_config(shape: str, **changes: Any) -> Any:
    """Our configuration of a file of benchmarks/shapes, some fields changed."""
    from modeling_dsv4 import Dsv4Config
    from modeling_dsv4.translate_config import translate_config

    fields = json.loads((SHAPES / f"{shape}.json").read_text(encoding="utf-8"))
    return Dsv4Config(**translate_config({**fields, **changes}))


def make_model(config: Any, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Our model with random weights, made on the device."""
    from modeling_dsv4 import Dsv4ForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Dsv4ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def native_twin(model: Any) -> Any | str:
    """transformers' own model with the weights of ours, by way of a released checkpoint's files.

    Returns:
        the model on the same device, or why there is none.
    """
    classes = native_classes()
    if classes is None:
        return NO_NATIVE
    if model.config.hc_single_pass:
        return "not run: transformers has no V4.1"
    from modeling_dsv4.checkpoint import save_official

    weight = model.get_input_embeddings().weight
    with tempfile.TemporaryDirectory() as folder:
        save_official(model, folder)
        return classes[1].from_pretrained(folder, dtype=weight.dtype).to(weight.device)
