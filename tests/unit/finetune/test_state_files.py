# SPDX-License-Identifier: Apache-2.0
"""States that come back from a file as they went in: values, types, structure."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune.state_files import load_state, random_state, restore_random_state, save_state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def test_a_state_reads_back_equal(tmp_path: Path) -> None:
    table = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3), "map": table}},
        7: {"map": table},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 7], "none": None, "on": True}],
        "big": 2**70,
        "tiny": 1e-320,
        "bf16": torch.randn(3).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "view": torch.randn(4, 4).t()[1:],
        "empty": torch.zeros(0, 3),
        "nothing": {},
    }  # fmt: skip
    save_state(tmp_path / "s.safetensors", state)
    assert _equal(load_state(tmp_path / "s.safetensors"), state)


def test_what_is_neither_tensor_nor_plain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.a\.0: wanted tensors and plain values, got set"):
        save_state(tmp_path / "s.safetensors", {"a": [{1}]})
    with pytest.raises(TypeError, match="wanted plain keys, got tuple"):
        save_state(tmp_path / "s.safetensors", {(1, 2): 3})
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="wanted a saved training state"):
        load_state(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["AdamW", "SGD", "AdamW8bit", "PagedAdamW8bit", "AdEMAMix8bit"])
def test_an_optimizer_continues_from_its_file_to_the_same_bits(tmp_path: Path, name: str) -> None:
    if name.endswith("8bit"):
        make = getattr(pytest.importorskip("bitsandbytes").optim, name)
    else:
        make = getattr(torch.optim, name)

    def build() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        dice = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(*s, generator=dice)) for s in ((64, 96), (5,))]
        return params, make([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], lr=0.01)

    def step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, i: int) -> None:
        dice = torch.Generator().manual_seed(100 + i)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=dice)
        optimizer.step()

    params, optimizer = build()
    for i in range(3):
        step(params, optimizer, i)
    save_state(tmp_path / "o.safetensors", optimizer.state_dict())
    others, resumed = build()
    for mine, theirs in zip(others, params, strict=True):
        mine.data.copy_(theirs.data)
    resumed.load_state_dict(load_state(tmp_path / "o.safetensors"))
    for i in range(3, 6):
        step(params, optimizer, i)
        step(others, resumed, i)
    for mine, theirs in zip(others, params, strict=True):
        assert torch.equal(mine, theirs)


def test_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    save_state(tmp_path / "r.safetensors", random_state())
    expected = [random.gauss(0, 1), float(np.random.standard_normal()), *draw()]  # noqa: NPY002
    draw()
    restore_random_state(load_state(tmp_path / "r.safetensors"))
    assert [random.gauss(0, 1), float(np.random.standard_normal()), *draw()] == expected  # noqa: NPY002
