# SPDX-License-Identifier: Apache-2.0
"""Layers on two devices: what one computes is on its own, and the answer is that of one device.

No machine with two GPUs is needed: "cpu:1" is a name that torch takes, and the memory is one. A
dispatch mode notes which tensors lie where, and which operations mix the two, as no GPU would.
"""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_dsv4 import Dsv4Cache, Dsv4Config, Dsv4ForCausalLM, formats, rotary

# Tensors of both say "cpu"; a move to either makes a copy.
FIRST, SECOND = torch.device("cpu", 2), torch.device("cpu", 1)
# What is copied may lie elsewhere.
_ANYWHERE = {torch.ops.aten.copy_.default}


class TwoDevices(TorchDispatchMode):
    """Knows by their memory where tensors lie: what was put or moved there, and what came of it.

    A tensor that was just made says "cpu" as all do: it is taken to be where it is used first.
    """

    def __init__(self) -> None:
        super().__init__()
        # Kept alive: freed memory may be given to another tensor.
        self.known: dict[int, tuple[torch.device, torch.Tensor]] = {}
        self.mixed: set[str] = set()

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        if tensor.numel():
            self.known[tensor.untyped_storage().data_ptr()] = device, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A number without axes may come from anywhere.
        places = (x.untyped_storage().data_ptr() for x in given if x.dim() and x.numel())
        sides = {self.known[place][0] for place in places if place in self.known}
        device = kwargs.get("device")
        device = device if device in (FIRST, SECOND) else None
        if len(sides) > 1 and func not in _ANYWHERE:
            # Where, for whoever has to mend it.
            frames = [f for f in traceback.extract_stack() if "modeling_dsv4" in f.filename]
            self.mixed.add(f"{func} at {frames[-1].filename}:{frames[-1].lineno}")
        out = func(*args, **kwargs)
        if len(sides) == 1:
            (side,) = sides
            for x in given if device is None else ():
                if x.dim():
                    self.put(x, side)
            device = device or side
        if device is not None:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.put(x, device)
        return out


@torch.no_grad()
def answer(model: Dsv4ForCausalLM, storage: str, devices: TwoDevices | None = None) -> torch.Tensor:
    """Logits of a prompt and of tokens behind it."""
    cache = Dsv4Cache(model.config, storage=storage)
    ids = torch.arange(3, 75).view(2, 36)
    if devices is not None:
        devices.put(ids, FIRST)
    logits = [model(ids[:, :32], past_key_values=cache).logits]
    logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in (32, 33, 34)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("name", "storage"), [("v4_b_bf16_mtp", "plain"), ("v41_a_bf16", "packed")]
)
def test_layers_on_two_devices_answer_as_on_one(
    golden_dir: Path, name: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kept by device, which here is one.
    for module, function in ((rotary, "_held_frequencies"), (formats, "_byte_table")):
        monkeypatch.setattr(module, function, getattr(module, function).__wrapped__)
    config = Dsv4Config.from_json_file(golden_dir / name / "config.json")
    model, devices = Dsv4ForCausalLM(config).eval(), TwoDevices()
    if config.engram_layer_ids:
        used = config.engram_compressed_vocab_size
        model.set_engram_token_map(torch.arange(config.vocab_size) % used)
    wanted = answer(model, storage)
    layers = model.model.layers
    for tensor in (*model.parameters(), *model.buffers()):
        devices.put(tensor, FIRST)
    for i, layer in enumerate(layers):
        # In turns, so that what one layer leaves for another crosses over. Hash layers look up ids
        # at the entry of a pass, moved to a device that is told apart by its name alone.
        place = SECOND if i % 2 and not layer.mlp.gate.hashed else FIRST
        for tensor in (*layer.parameters(), *layer.buffers()):
            devices.put(tensor, place)
        add_hook_to_module(layer, AlignDevicesHook(execution_device=place))
    for module in (model.model.hc_head, model.model.norm, model.lm_head):
        if module is not None:
            add_hook_to_module(module, AlignDevicesHook(execution_device=FIRST))
    with devices:
        found = answer(model, storage, devices)
    assert not devices.mixed, "\n".join(sorted(devices.mixed))
    assert torch.equal(found, wanted)
