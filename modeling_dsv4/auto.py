# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes.

A config class has one `model_type`, and an Auto class wants the model's `config_class` to be that
very class; so DeepSeek-V4.1's own model type gets an empty pair of subclasses, with nothing else in
it. `deepseek_v4` is taken by transformers itself: `register(official_v4=True)` takes it over.
"""

import logging

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from . import hf_quantizer
from .configuration_dsv4 import DeepseekV4Config, DeepseekV41Config, Dsv4Config
from .modeling_dsv4 import Dsv4ForCausalLM, Dsv4Model

logger = logging.getLogger(__name__)


class DeepseekV41Model(Dsv4Model):
    """`Dsv4Model` under the model type "deepseek_v41"."""

    config_class = DeepseekV41Config


class DeepseekV41ForCausalLM(Dsv4ForCausalLM):
    """`Dsv4ForCausalLM` under the model type "deepseek_v41"."""

    config_class = DeepseekV41Config


class DeepseekV4Model(Dsv4Model):
    """`Dsv4Model` under the model type "deepseek_v4"."""

    config_class = DeepseekV4Config


class DeepseekV4ForCausalLM(Dsv4ForCausalLM):
    """`Dsv4ForCausalLM` under the model type "deepseek_v4"."""

    config_class = DeepseekV4Config


_CLASSES: dict[str, tuple[type[PreTrainedConfig], type, type]] = {
    "dsv4": (Dsv4Config, Dsv4Model, Dsv4ForCausalLM),
    "deepseek_v41": (DeepseekV41Config, DeepseekV41Model, DeepseekV41ForCausalLM),
    "deepseek_v4": (DeepseekV4Config, DeepseekV4Model, DeepseekV4ForCausalLM),
}


def register(official_v4: bool = False) -> None:
    """Make the Auto classes know "dsv4" and "deepseek_v41".

    Args:
        official_v4: also load "deepseek_v4" directories with this package instead of
            transformers' own classes.
    """
    hf_quantizer.register()
    for model_type in ("dsv4", "deepseek_v41", *(("deepseek_v4",) if official_v4 else ())):
        config, backbone, causal = _CLASSES[model_type]
        mine = model_type != "deepseek_v41"
        try:
            AutoConfig.register(model_type, config, exist_ok=mine)
        except ValueError:
            # The day transformers ships the type itself: an import must not fail for it.
            logger.info("%s is registered already; its own classes stay", model_type)
            continue
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        # Trainer and pipelines ask these tables by class name what kind of model they hold: without
        # the entry, label smoothing would compare every logit with the token it was made from.
        MODEL_MAPPING_NAMES.setdefault(model_type, backbone.__name__)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, causal.__name__)
