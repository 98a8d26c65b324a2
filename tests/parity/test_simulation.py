# SPDX-License-Identifier: Apache-2.0
"""The release's rounding: each layer run from its stored input gives the next layer's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_dsv4 import Dsv4ForCausalLM, run_layer
from modeling_dsv4.formats import hadamard
from modeling_dsv4.simulation import Rounding

V4 = ("v4_a_fp8", "v4_b_bf16_mtp", "v4_c_bf16_dspark")
V41 = ("v41_a_bf16", "v41_b_fp8", "v41_c_bf16")


def _run_layers(case: Path, mode: str, experts: str = "auto") -> torch.Tensor:
    """Largest error of every position, per layer: [L, P]; `experts` compute the first one's."""
    stored = load_file(case / "qat_layers.safetensors")
    inputs = load_file(case / "inputs.safetensors")
    model = Dsv4ForCausalLM.from_pretrained(case, dtype=torch.float32).eval()
    model.set_simulation(mode)
    model.model.layers[0].mlp.experts.kernels = experts
    layer_in, p = stored["layer_in"], stored["layer_in"].shape[1]
    ids = inputs["input_ids"][:, :p]
    types = inputs["token_types"][:, :p] if "token_types" in inputs else None
    handed = None
    if "pre_mix_in" in stored:
        handed = [*stored["pre_mix_in"], stored["pre_mix_out_last"]]
    shared, errors = None, []
    for i in range(layer_in.shape[0]):
        pre = None if handed is None else handed[i][None].float()
        streams = layer_in[i][None].float()
        out, pre, shared = run_layer(model, i, streams, pre, types, input_ids=ids, shared=shared)
        last = i + 1 == layer_in.shape[0]
        wanted = stored["layer_out_last"] if last else layer_in[i + 1]
        wanted = stored.get(f"before_engram.layer{i + 1}", wanted)
        error = (out[0] - wanted.float()).abs().flatten(1).amax(1)
        if handed is not None:
            error = error.maximum((pre[0] - handed[i + 1].float()).abs().amax(1))
        errors.append(error)
    return torch.stack(errors)


def _worst_layer(errors: torch.Tensor) -> float:
    """The least share of positions within 1e-3 that any layer has."""
    return (errors <= 1e-3).float().mean(1).min().item()


@pytest.mark.parametrize("name", V4 + V41)
def test_a_layer_in_simulation_gives_what_the_reference_gave(golden_dir: Path, name: str) -> None:
    errors = _run_layers(golden_dir / name, "official")
    assert _worst_layer(errors) >= 0.85, (errors <= 1e-3).float().mean(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_kernels_of_experts_give_what_the_reference_gave(golden_dir: Path) -> None:
    pytest.importorskip("triton")
    errors = _run_layers(golden_dir / "v4_a_fp8", "official", experts="triton")
    assert (errors[0] <= 1e-3).float().mean() >= 0.85


@pytest.mark.parametrize("name", V4 + V41)
def test_without_simulation_the_same_layers_differ(golden_dir: Path, name: str) -> None:
    errors = _run_layers(golden_dir / name, "off")
    assert (errors > 1e-3).float().mean() > 0.5


def _leave_out(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Take one rounding out of the simulation."""
    key, entry, index = Rounding.key, Rounding.entry, Rounding.index

    def without(self: Rounding, x: torch.Tensor) -> torch.Tensor:
        return x

    def entry_alone(self: Rounding, x: torch.Tensor) -> torch.Tensor:
        return entry(self, x) if self.entries_in_fp4 else key(self, x)

    def one_index_side(self: Rounding, x: torch.Tensor) -> torch.Tensor:
        is_query = x.dim() == 4  # [B, S, I, J]; keys are [B, M, J]
        if is_query != (part == "index query"):
            return index(self, x)
        return hadamard(x) if self.turns_index else x

    def unturned(self: Rounding, x: torch.Tensor) -> torch.Tensor:
        return index(replace(self, turns_index=False), x)

    methods = {
        "activation": {"activation": without},
        # A V4 entry is rounded by the method for keys.
        "window key": {"key": without, "entry": entry_alone},
        "entry": {"entry": without},
        "index query": {"index": one_index_side},
        "index key": {"index": one_index_side},
        "hadamard": {"index": unturned},
    }
    for name, method in methods[part].items():
        monkeypatch.setattr(Rounding, name, method)


# A case in which each rounding is seen: inputs are rounded where weights are FP8 or FP4, and index
# vectors matter where entries are many enough for a choice.
SEEN = [
    ("activation", "v4_a_fp8"),
    ("activation", "v41_b_fp8"),
    ("window key", "v4_b_bf16_mtp"),
    ("window key", "v41_c_bf16"),
    ("entry", "v4_b_bf16_mtp"),
    ("entry", "v41_c_bf16"),
    ("index query", "v4_b_bf16_mtp"),
    ("index query", "v41_c_bf16"),
    ("index key", "v4_b_bf16_mtp"),
    ("index key", "v41_c_bf16"),
    ("hadamard", "v4_b_bf16_mtp"),
]


@pytest.mark.parametrize(("part", "name"), SEEN)
def test_no_rounding_may_be_left_out(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    _leave_out(monkeypatch, part)
    assert _worst_layer(_run_layers(golden_dir / name, "official")) < 0.85


def test_an_unknown_mode_is_refused(golden_dir: Path) -> None:
    model = Dsv4ForCausalLM.from_pretrained(golden_dir / "v4_a_fp8", dtype=torch.float32)
    with pytest.raises(ValueError, match="off, official"):
        model.set_simulation("on")
