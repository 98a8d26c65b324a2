# SPDX-License-Identifier: Apache-2.0
"""How transformers' `from_pretrained` learns of a release's storage formats.

`config.quantization_config` with `quant_method` "dsv4_release" makes transformers build a
`ReleaseQuantizer`, which swaps modules for those of `storage.py` while the model is still on the
meta device; tensors then load into them as they are in the files.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .formats import fp8_block_format
from .moe import Dsv4Experts
from .storage import (
    Fp8GroupedLinear,
    Fp8Linear,
    GroupedLinear,
    PackedEmbedding,
    PackedExperts,
    PackedHead,
)
from .validate_config import check_release_quantization
from .weight_map import storage_kinds

RELEASE_METHOD = "dsv4_release"
STORAGE_MODULES = (Fp8Linear, Fp8GroupedLinear, PackedEmbedding, PackedHead, PackedExperts)


class ReleaseConfig(QuantizationConfigMixin):
    """How the weights of a release are stored.

    Args:
        weight_block_size: [n, n], the edge of FP8 blocks.
        expert_dtype: "fp4", or None and "fp8" for experts in FP8 blocks.
        dequantize: widen everything after loading; a wish of this run, never saved.
        fields: what else the release states; kept as it is.
    """

    method: ClassVar[str] = RELEASE_METHOD
    # Wishes of a run: accepted with the other fields, left out when the config is saved.
    run_time_keys: ClassVar[frozenset[str]] = frozenset({"dequantize"})

    def __init__(
        self,
        weight_block_size: list[int] | None = None,
        expert_dtype: str | None = None,
        dequantize: bool = False,
        **fields: Any,
    ) -> None:
        if fields.pop("quant_method", self.method) != self.method:
            raise ValueError(f"{type(self).__name__} is for quant_method {self.method!r} alone")
        self.quant_method = self.method
        self.weight_block_size = weight_block_size
        self.expert_dtype = expert_dtype
        self.dequantize = dequantize
        for name, value in fields.items():
            setattr(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for storage that cannot be read."""
        check_release_quantization(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What belongs into config.json."""
        return {k: v for k, v in super().to_dict().items() if k not in self.run_time_keys}

    def get(self, key: str, default: Any = None) -> Any:
        """Look a field up as in the dictionary that transformers expects on a second load."""
        return getattr(self, key, default)


class ReleaseQuantizer(HfQuantizer):
    """Loads, saves and trains around weights in a release's formats; it never rounds any."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        apply_release_storage(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        return dequantize_storage(model, dtype or model.dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def apply_release_storage(
    model: PreTrainedModel, quantization_config: dict[str, Any], experts: bool = True
) -> None:
    """Swap the modules that a release stores in FP8 or FP4, by the rules of `weight_map`.

    Args:
        model: a Dsv4 model, normally on the meta device; the swapped modules are empty.
        quantization_config: `weight_block_size` [n, n] and `expert_dtype`; others are not read.
        experts: False leaves the routed experts to the caller.
    """
    config = copy.copy(model.config)
    config.quantization_config = quantization_config
    block = quantization_config.get("weight_block_size")
    # A bare backbone holds the same modules without the prefix that a head's model adds.
    prefix = model.base_model_prefix
    prefix = "" if hasattr(model, prefix) else f"{prefix}."
    for path, kind in storage_kinds(config).items():
        if not path.startswith(prefix):
            continue
        parent, name = _parent(model, path.removeprefix(prefix))
        plain = getattr(parent, name)
        if isinstance(plain, Dsv4Experts) and not experts:
            continue
        with torch.device(next(plain.parameters()).device):
            setattr(parent, name, stored_module(plain, kind, block[0] if block else 0))


def stored_module(plain: nn.Module, kind: str, block: int = 0) -> nn.Module:
    """Return the empty twin of a plain module for storage kind "fp8", "fp4" or "rows".

    `block` is the edge of FP8 blocks; the other kinds have none.
    """
    if isinstance(plain, Dsv4Experts) and kind in ("fp4", "fp8"):
        sizes = plain.num_experts, plain.hidden_size, plain.intermediate_size, plain.swiglu_limit
        return PackedExperts(*sizes, fp8_block_format(block) if kind == "fp8" else kind)
    if kind == "fp8" and isinstance(plain, GroupedLinear):
        return Fp8GroupedLinear(plain.in_features, plain.out_features, plain.groups, block)
    if kind == "fp8" and isinstance(plain, nn.Linear):
        return Fp8Linear(plain.in_features, plain.out_features, block)
    if kind == "rows" and isinstance(plain, nn.Embedding):
        return PackedEmbedding(plain.num_embeddings, plain.embedding_dim)
    raise ValueError(
        "wanted a linear map or experts to store in FP8, experts in FP4 or an embedding in rows, "
        f"got {type(plain).__name__} to store as {kind!r}"
    )


def dequantize_storage(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every module of a release format by its plain twin in `dtype`, one at a time."""
    found = [path for path, m in model.named_modules() if isinstance(m, STORAGE_MODULES)]
    for path in found:
        parent, name = _parent(model, path)
        setattr(parent, name, getattr(parent, name).to_plain(dtype))
    return model


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def register() -> None:
    """Make the method known to transformers; once more is harmless."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if RELEASE_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(RELEASE_METHOD)(ReleaseConfig)
        register_quantizer(RELEASE_METHOD)(ReleaseQuantizer)
