# SPDX-License-Identifier: Apache-2.0
"""States of optimizers, schedules and generators in one safetensors file each; nothing pickled.

Tensors are the file's tensors. What holds them (dicts with any plain keys, lists, tuples, numbers)
stands as JSON in the file's metadata, with each tensor's name in its place.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

_TREE = "tree"
_PLAIN = (str, int, float, bool, type(None))


def save_state(path: str | Path, state: object) -> None:
    """Write a state.

    Raises:
        TypeError: it holds something that is neither a tensor nor plain.
    """
    tensors: dict[str, torch.Tensor] = {}
    # Optimizers share tables between parameters; each is written once.
    names: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    tree = json.dumps(_flatten(state, "", tensors, names))
    save_file(tensors, str(path), metadata={_TREE: tree})


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote, with tensors on the CPU.

    Raises:
        ValueError: the file is no such state.
    """
    with safe_open(str(path), framework="pt") as file:
        tree = (file.metadata() or {}).get(_TREE)
        if tree is None:
            raise ValueError(f"{path}: wanted a saved training state, got other tensors")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _restore(json.loads(tree), tensors)


def _flatten(
    value: object,
    name: str,
    tensors: dict[str, torch.Tensor],
    names: dict[tuple[int, torch.Size, torch.dtype], str],
) -> object:
    if isinstance(value, torch.Tensor):
        held = value.detach()
        key = (held.data_ptr(), held.shape, held.dtype)
        if held.numel() and key in names:
            return {"tensor": names[key]}
        names[key] = name
        # A copy: safetensors refuses views of one storage.
        tensors[name] = held.to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, _PLAIN):
                raise TypeError(f"state{name}: wanted plain keys, got {type(key).__name__}")
        return {
            "dict": [
                [key, _flatten(inner, f"{name}.{key}", tensors, names)]
                for key, inner in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {
            kind: [
                _flatten(inner, f"{name}.{place}", tensors, names)
                for place, inner in enumerate(value)
            ]
        }
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"state{name}: wanted tensors and plain values, got {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _restore(held, tensors) for key, held in inner}
    held = [_restore(one, tensors) for one in inner]
    return tuple(held) if kind == "tuple" else held


def random_state() -> dict[str, Any]:
    """States of every generator that training may draw from: python's, numpy's, torch's."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator where `random_state` found it."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    keys = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
