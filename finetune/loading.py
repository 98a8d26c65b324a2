# SPDX-License-Identifier: Apache-2.0
"""Base models and tokenizers, from directories."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Registers the quantizer, so that packed models load.
import quantize  # noqa: F401
from modeling_dsv4 import Dsv4ForCausalLM


def load_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    dequantize: bool = False,
    expert_memory: str | None = None,
    engram_memory: str | None = None,
) -> PreTrainedModel:
    """Load a causal LM; memory budgets apply to quantized models and default to what fits.

    Raises:
        ValueError: no such directory; nothing is asked of the Hub.
    """
    _check_directory(model)
    more: dict[str, Any] = {"expert_memory": expert_memory, "engram_memory": engram_memory}
    more = {key: value for key, value in more.items() if value is not None}
    if dequantize:
        more["dequantize"] = True
    return Dsv4ForCausalLM.from_pretrained(str(model), dtype=dtype, **more)


def _check_directory(model: str | Path) -> None:
    if not Path(model).is_dir():
        raise ValueError(f"wanted a model directory, found none: {model}")


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ValueError: there is none.
    """
    _check_directory(model)
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{model}: wanted a model with a tokenizer, got: {reason}") from error
