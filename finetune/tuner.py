# SPDX-License-Identifier: Apache-2.0
"""How PEFT comes to know our layers: a LoRA tuner that serves them, put into PEFT's own table.

`LoraConfig` can be told of custom layers, but forgets them when saved, so that a plain
`PeftModel.from_pretrained` would fail. The table from method to tuner is where PEFT itself looks,
for every entry point. For models of other families, and for layers that PEFT serves, this tuner
is PEFT's.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from modeling_dsv4.layers import PLAIN_LINEAR
from modeling_dsv4.moe import ExpertsBase

from .combine import add_weighted_adapter
from .hot_layers import LoraSomeExperts
from .identity import base_identity, is_ours
from .layers import LAYER_KINDS, BesideLora, LoraLinear, LoraPackedLinear, is_packed_linear
from .memory_layers import MEMORY_KINDS, check_memory, refuse_mixing

logger = logging.getLogger(__name__)
# Where adapter_config.json keeps the identity: a free-form field, which PEFT stores unread.
IDENTITY_KEY = "base_identity"


@dataclass
class SavedLoraConfig(LoraConfig):
    """A description that PEFT read from a file: its adapter is not new."""


class Dsv4LoraModel(LoraModel):
    """PEFT's LoRA, which also knows grouped projections, routed experts and packed weights."""

    def _pre_injection_hook(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if is_ours(model):
            if config.target_parameters:
                raise NotImplementedError(
                    "target_parameters: here experts get adapters beside their weights, as modules "
                    "(target_modules='...mlp.experts', or a preset); an adapter that was saved so "
                    "is put on a model by finetune.import_adapter"
                )
            _refuse_split(model)
            check_memory(model, config)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # Also of a second adapter, for which there is no hook.
        if is_ours(model):
            check_identity(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    # PEFT has it without `self`, and calls it on the tuner.
    def _create_new_module(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        **kwargs: Any,
    ) -> nn.Module:
        base: Any = target
        if isinstance(target, BaseTunerLayer):
            base = target.get_base_layer()
        if isinstance(base, ExpertsBase):
            return LoraSomeExperts(target, adapter_name, config=lora_config, **kwargs)
        for kind, layer in (*LAYER_KINDS, *MEMORY_KINDS):
            if isinstance(base, kind):
                return layer(target, adapter_name, config=lora_config, **kwargs)
        if is_packed_linear(base):
            return LoraPackedLinear(target, adapter_name, config=lora_config, **kwargs)
        plain = type(base) in PLAIN_LINEAR
        if plain and is_ours(self.model) and not lora_config.fan_in_fan_out:
            return LoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, BesideLora):
            # PEFT would follow the base's weight; a store of experts on disk has none.
            new_module.place(next(parent.parameters()).device)
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        if is_ours(self.model):
            refuse_mixing(self.peft_config, args[0] if args else kwargs["adapters"])
            return add_weighted_adapter(self, *args, **kwargs)
        return super().add_weighted_adapter(*args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if is_ours(model):
            _check_tensors(model, adapter_name, renamed)
        return renamed


def register() -> None:
    """Put the tuner into PEFT's tables; doing it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = SavedLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Dsv4LoraModel


def _refuse_split(model: nn.Module) -> None:
    if any(hasattr(p, "to_local") for p in model.parameters()):
        raise NotImplementedError(
            "adapters on a model that is split over processes (distributed_config, tp_plan) are "
            "not there yet: load it without these, and train in data parallel (docs/parallel.md)"
        )


def check_identity(model: nn.Module, config: LoraConfig) -> None:
    """Stamp a new adapter's config with its base; compare a loaded one's.

    One that was saved without is loaded, with a warning, and stays without: nobody knows its base.

    Raises:
        ValueError: the adapter was trained on another model.
    """
    found = base_identity(model)
    wanted = (config.auto_mapping or {}).get(IDENTITY_KEY)
    if found is None:
        return
    if wanted is None and isinstance(config, SavedLoraConfig):
        logger.warning(
            "the adapter does not say which base it was trained on (no %s in its "
            "adapter_config.json): nothing can tell whether it fits this one (path: %s)",
            IDENTITY_KEY,
            config.base_model_name_or_path or "unknown",
        )
    elif wanted is None:
        config.auto_mapping = {**(config.auto_mapping or {}), IDENTITY_KEY: found}
    elif wanted != found:
        raise ValueError(
            f"adapter: it was trained on the base model {wanted[:19]}... "
            f"({config.base_model_name_or_path or 'path unknown'}), got {found[:19]}...; load it "
            "onto its own base, or onto a quantized copy of that"
        )


def _check_tensors(model: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """An adapter fits wholly or not at all; PEFT itself only warns of missing tensors.

    Raises:
        ValueError: tensors that match nothing, are missing, or have another shape.
    """
    every = model.state_dict(keep_vars=True)
    own = {k: v for k, v in every.items() if ".lora_" in k and f".{name}." in k}
    unknown = sorted(set(tensors) - set(every))
    missing = sorted(set(own) - set(tensors))
    shapes = sorted(k for k, v in own.items() if k in tensors and tensors[k].shape != v.shape)
    for what, keys in (("unknown", unknown), ("missing", missing), ("misshapen", shapes)):
        if keys:
            raise ValueError(
                f"adapter {name!r}: {len(keys)} {what} tensors, e.g. {keys[0]}; it was made for "
                "another model or by another tool"
            )
