# SPDX-License-Identifier: Apache-2.0
"""A run whose model is sharded over processes by accelerate's FSDP2, adapters and base alike.

Layers are gathered as they are called and let go again, so that all processes must call them
equally often. On disk everything is whole: an adapter, a checkpoint and its optimizer are the same
files as without shards.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import RunConfig
from .optimizers import TORCH
from .targets import get_preset

# Longer rows pass the layers in pieces where no gradient is wanted.
_ONE_PASS = 8192


def shards() -> bool:
    """Whether accelerate was told to shard."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_shards(config: RunConfig) -> None:
    """Refuse what shards cannot do.

    Raises:
        NotImplementedError: names the setting, and why.
    """
    if not shards():
        return
    for what, why in _refusals(config):
        raise NotImplementedError(
            f"FSDP with {what}: {why}; use data parallelism (examples/accelerate/ddp.yaml)"
        )


def _refusals(config: RunConfig) -> Iterator[tuple[str, str]]:
    if os.environ.get("FSDP_VERSION") != "2":
        yield "its first version", "wanted fsdp_version 2 (examples/accelerate/fsdp2.yaml)"
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        yield "fsdp_cpu_ram_efficient_loading", "wanted false, every process makes its adapters"
    if get_preset(config.preset).weights or config.preset == "memory":
        yield f"preset {config.preset}", "wanted a preset of adapters on layers"
    if config.objective != "sft":
        yield f"objective {config.objective}", "wanted sft"
    if config.overfit_gate == "on":
        yield "overfit_gate on", "the model is whole in no process before training"
    if config.optimizer not in TORCH:
        yield f"optimizer {config.optimizer}", f"wanted one of {', '.join(TORCH)}"
    if config.max_length > _ONE_PASS:
        yield (
            f"max_length {config.max_length}",
            f"rows over {_ONE_PASS} tokens pass the layers in pieces when held-out loss is "
            "measured, and processes would wait for each other for ever",
        )


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(value: Any) -> Any:
    """Tensors in dicts, lists and tuples, gathered from all processes, which all call this."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(inner) for inner in value)
    return value


def whole_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, by name, gathered; all processes call this."""
    return {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}


def put_adapter(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors into the shards of a model's adapters.

    Raises:
        ValueError: one is missing.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    held = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    missing = held.keys() - tensors.keys()
    if missing:
        raise ValueError(f"adapter: wanted {min(missing)}, found none such")
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(_spread(tensors[name], parameter))


def spread_optimizer(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state, with each tensor sharded like its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        number: {key: _spread(value, parameters[number]) for key, value in kept.items()}
        for number, kept in state["state"].items()
    }
    return {**state, "state": spread}


def _spread(value: Any, like: torch.Tensor) -> Any:
    if not (isinstance(value, torch.Tensor) and isinstance(like, DTensor)):
        return value
    if value.shape != like.shape:
        return value
    value = value.to(like.device)
    # Every process has all of it: nothing needs to be sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Inside the block adapters add nothing, and want gradients as before.

    PEFT's own switch turns their gradients off, which shards would take for good if it came before
    their first use.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    earlier = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, earlier, strict=True):
            layer._disable_adapters = was


class MeasureBase(TrainerCallback):
    """Measures the base without its adapters when training begins.

    Attributes:
        found: the measure; None until then.
    """

    def __init__(self, measure: Callable[[nn.Module], float | None]) -> None:
        self.measure = measure
        self.found: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        with unadapted(kwargs["model"]):
            self.found = self.measure(kwargs["model"])
