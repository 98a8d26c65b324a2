# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes for the dense linear maps, our packs for the routed experts: one saved model.

bitsandbytes' own quantizer replaces `nn.Linear` and knows nothing of experts, which would stay as
wide as they were: of V4-Flash 97 % of all weights. `from_pretrained(..., quantization_config=
BitsAndBytesConfig(...))` therefore ends here: its quantizer does the linear maps, the experts
become records of a pack (or stay in the packs that they are in), and both are saved and loaded
again under the method "dsv4_bitsandbytes".

Two defects of bitsandbytes 0.50.2 on processors with AVX512-BF16 are kept out. `Linear4bit`
repacks its weight in place on the first evaluation; what is saved afterwards, and what the model
then computes with, is another weight (relative error 0.23 without double quantization), and
gradients stop there without a word. Both come from that repacking alone, which is switched off:
results are then the same on every processor, and a step of one token is slower.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import BitsAndBytesConfig

from modeling_dsv4.formats import get_format
from modeling_dsv4.loading import quantization_state
from modeling_dsv4.moe import Dsv4Experts
from modeling_dsv4.safetensors_file import read_index

from .config import Dsv4QuantizationConfig, Recipe, get_recipe
from .experts import StoredExperts
from .hf_quantizer import Dsv4Quantizer
from .pack import PackLayout
from .sizes import format_size

METHOD = "dsv4_bitsandbytes"
_logger = logging.get_logger(__name__)
# What bitsandbytes makes of one weight: codes under its own name, and these beside it.
_BESIDE_WEIGHT = ("weight.", "SCB", "weight_format")


class Dsv4BitsAndBytesConfig(Dsv4QuantizationConfig):
    """Dense linear maps by bitsandbytes, experts in packs.

    Args:
        bitsandbytes: a `BitsAndBytesConfig`, or its dictionary.
        recipe: formats of the routed experts.
        round_experts: the source's experts are plain and are rounded while loading; never saved.
        fields: those of `Dsv4QuantizationConfig`.
    """

    method: ClassVar[str] = METHOD
    run_time_keys: ClassVar[frozenset[str]] = Dsv4QuantizationConfig.run_time_keys | {
        "round_experts"
    }

    def __init__(
        self,
        bitsandbytes: "BitsAndBytesConfig | Mapping[str, Any]",
        recipe: "Mapping[str, Any] | Recipe | str" = "fp4",
        round_experts: bool = False,
        **fields: Any,
    ) -> None:
        if isinstance(bitsandbytes, BitsAndBytesConfig):
            bitsandbytes = bitsandbytes.to_dict()
        self.bitsandbytes = dict(bitsandbytes)
        self.round_experts = round_experts
        recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        super().__init__(recipe=recipe, **fields)

    @classmethod
    def around(cls, given: Any, stored: Mapping[str, Any] | None) -> "Dsv4BitsAndBytesConfig":
        """What `from_pretrained` makes of a `BitsAndBytesConfig`.

        Args:
            given: what the user passed.
            stored: what config.json says, None for plain weights.

        Raises:
            ValueError: the model is quantized by bitsandbytes already.
            NotImplementedError: weights in a release's formats.
        """
        data = given if isinstance(given, Mapping) else given.to_dict()
        if not stored:
            return cls(data, round_experts=True)
        method = stored.get("quant_method")
        if method == METHOD:
            raise ValueError(
                "quantization_config: this model's linear maps are quantized by bitsandbytes "
                "already; leave the argument out"
            )
        if method != Dsv4QuantizationConfig.method:
            raise NotImplementedError(
                f"quantization_config: wanted plain weights or experts in packs, got {method!r}; "
                "convert it first (dsv4-quantize convert SRC DST), or pass dequantize=True if a "
                "release's weights fit into memory as bfloat16"
            )
        fields = {k: v for k, v in dict(stored).items() if k != "quant_method"}
        return cls(data, **fields)


class Dsv4BitsAndBytesQuantizer(Dsv4Quantizer):
    """Leaves linear maps to bitsandbytes' quantizer and experts to packs."""

    quantization_config: Dsv4BitsAndBytesConfig
    # Names of a linear map's tensors depend on how it was rounded: see `_check_names`.
    inventory = None  # type: ignore[assignment]

    def __init__(self, quantization_config: Dsv4BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = BitsAndBytesConfig.from_dict(quantization_config.bitsandbytes)
        kind = "bitsandbytes_8bit" if config.load_in_8bit else "bitsandbytes_4bit"
        self.linear: HfQuantizer = AUTO_QUANTIZER_MAPPING[kind](
            config, pre_quantized=self.pre_quantized
        )
        self.serialized_names = self.linear.serialized_names

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ImportError without bitsandbytes and accelerate."""
        self.linear.validate_environment(*args, **kwargs)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return self.linear.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return self.linear.get_quantize_ops()

    def get_weight_conversions(self) -> list[Any]:
        return self.linear.get_weight_conversions()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized and checkpoint_files:
            self._check_names(model, Path(checkpoint_files[0]).parent)
        if not self.quantization_config.round_experts:
            super()._process_model_before_weight_loading(
                model, checkpoint_files=checkpoint_files, **kwargs
            )
        kwargs.setdefault("device_map", None)
        self.linear._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.quantization_config.round_experts:
            round_experts(model, Recipe.from_dict(self.quantization_config.recipe))
        else:
            super()._process_model_after_weight_loading(model, **kwargs)
        model = self.linear._process_model_after_weight_loading(model, **kwargs)
        keep_unpacked(model)
        _logger.warning("%s", describe(model))
        return model

    def _check_names(self, model: PreTrainedModel, directory: Path) -> None:
        """Refuse a directory with tensors that are missing or belong to nothing."""
        names = set(read_index(directory))
        wanted = set(Dsv4Quantizer.inventory(model.config))
        parts = tuple(n.removesuffix("weight") + s for n in wanted for s in _BESIDE_WEIGHT)
        told = {
            "missing": sorted(wanted - names),
            "not expected": sorted(n for n in names - wanted if not n.startswith(parts)),
        }
        problems = [f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in told.items() if n]
        if problems:
            raise ValueError(
                f"{directory}: its tensors do not fit its config.json: {'; '.join(problems)}"
            )

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        model = self.linear._dequantize(model, dtype=dtype or model.dtype)
        return super()._dequantize(model, dtype)


def round_experts(model: nn.Module, recipe: Recipe) -> None:
    """Replace plain experts by resident records, one layer at a time."""
    prefix = "" if hasattr(model, "model") else "model."
    for path, plain in list(model.named_modules()):
        if not isinstance(plain, Dsv4Experts):
            continue
        sizes = (plain.hidden_size, plain.intermediate_size)
        module = prefix + path
        layout = PackLayout.build(module, plain.num_experts, *sizes, recipe.format_of)
        packed = StoredExperts(module, plain.num_experts, *sizes, plain.swiglu_limit, layout)
        packed.packed = torch.empty(layout.shape, dtype=torch.uint8)
        for e in range(plain.num_experts):
            weights = {
                "gate_up_proj": plain.gate_up_proj[e].detach().unflatten(0, (2, -1)),
                "down_proj": plain.down_proj[e].detach(),
            }
            record = layout.of(e)
            parts = {k: get_format(record.format(k)).pack(w) for k, w in weights.items()}
            layout.record(packed.packed, e).copy_(record.encode(parts))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place: see the top of this file."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def describe(model: nn.Module) -> str:
    """Say in one line how many bytes are in which form, and what stays as it was."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    sizes = dict.fromkeys(("experts", "linear maps", "state"), 0)
    stays: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, StoredExperts):
            sizes["experts"] += module.layout.nbytes
        elif isinstance(module, kinds):
            sizes["linear maps"] += module.weight.nbytes
            sizes["state"] += sum(tensor.nbytes for tensor in quantization_state(module))
        else:
            for parameter in module.parameters(recurse=False):
                name = path.rpartition(".")[2]
                stays[name] = stays.get(name, 0) + parameter.nbytes
    largest = sorted(stays, key=lambda name: -stays[name])[:4]
    named = ", ".join(f"{name} {format_size(stays[name])}" for name in largest)
    return (
        f"experts in packs: {format_size(sizes['experts'])}; linear maps by bitsandbytes: "
        f"{format_size(sizes['linear maps'])} and {format_size(sizes['state'])} of scales and "
        f"tables; stays as stored: {format_size(sum(stays.values()))} (most of it {named})"
    )


def register() -> None:
    """Make the method known to transformers; once more is harmless."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(Dsv4BitsAndBytesConfig)
        register_quantizer(METHOD)(Dsv4BitsAndBytesQuantizer)
