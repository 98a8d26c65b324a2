# SPDX-License-Identifier: Apache-2.0
"""Which twin computes, and that the package needs neither Triton nor its kernels."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import kernel_choice
from modeling_dsv4.kernel_choice import use_triton


class OnGpu:
    """As much of a tensor on a GPU as the choice looks at."""

    is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"


def test_auto_takes_triton_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_importable", lambda name: True)
    assert not use_triton("auto", torch.zeros(1)) and use_triton("auto", OnGpu())
    assert not use_triton("torch", OnGpu()) and use_triton("triton", OnGpu())
    # The kernels compute in float32.
    monkeypatch.setattr(OnGpu, "dtype", torch.float64)
    assert not use_triton("auto", OnGpu())


@pytest.mark.parametrize("missing", ["triton", "modeling_dsv4.kernels"])
def test_without_triton_or_kernels_auto_takes_torch(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "_importable", lambda name: name != missing)
    assert not use_triton("auto", OnGpu())
    with pytest.raises(ValueError, match="cannot be imported"):
        use_triton("triton", OnGpu())


def test_triton_on_a_cpu_wants_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_importable", lambda name: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("triton", torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="move the model to a GPU"):
        use_triton("triton", torch.zeros(1))


def test_an_unknown_mode_is_refused(tiny: Callable[..., Any]) -> None:
    for refused in (lambda: use_triton("cuda", torch.zeros(1)),
                    lambda: tiny("window").set_kernels("fast")):  # fmt: skip
        with pytest.raises(ValueError, match="auto, torch, triton, got"):
            refused()


def test_a_model_without_triton_refuses_it_at_once(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "_importable", lambda name: False)
    model = tiny("window")
    model.set_kernels("torch")
    with pytest.raises(ValueError, match="not installed"):
        model.set_kernels("triton")


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_the_mode_reaches_every_module_that_dispatches(tiny: Callable[..., Any], kind: str) -> None:
    model = tiny(kind)
    told = [m for m in model.modules() if hasattr(m, "kernels")]
    assert {m.kernels for m in told} == {"auto"}
    model.set_kernels("torch")
    assert {m.kernels for m in told} == {"torch"}
    names = {type(m).__name__ for m in told}
    assert {"HyperConnection", "Dsv4Attention", "Indexer", "Compressor", "RMSNorm"} <= names


WITHOUT = """
import sys
sys.modules["triton"] = sys.modules["modeling_dsv4.kernels"] = None
sys.modules["quantize.kernels"] = sys.modules["finetune.kernels"] = None
from modeling_dsv4 import Dsv4ForCausalLM, Dsv4Config
import torch
config = Dsv4Config(**{fields})
model = Dsv4ForCausalLM(config)
from finetune import attach_adapters
from modeling_dsv4.storage import PackedExperts
mlp = model.model.layers[0].mlp
mlp.experts = PackedExperts.from_plain(mlp.experts)
model = attach_adapters(model, "all", r=2)
model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
print("ran")
"""


def test_adapters_learn_with_neither_triton_nor_kernels(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config("window").to_diff_dict()
    config.pop("transformers_version", None)
    code = WITHOUT.replace("{fields}", repr(config))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("ran\n"), done.stderr
