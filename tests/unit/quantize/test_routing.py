# SPDX-License-Identifier: Apache-2.0
"""A trace says what routers chose, in the order in which decoding asks."""

from pathlib import Path

import pytest
import torch

from modeling_dsv4 import Dsv4ForCausalLM
from quantize.routing import Trace, record_routing, zipf_trace


@torch.no_grad()
def test_a_trace_holds_what_the_routers_chose(golden_dir: Path, tmp_path: Path) -> None:
    model = Dsv4ForCausalLM.from_pretrained(golden_dir / "v4_a_fp8").eval()
    ids = torch.randint(3, 90, (1, 12))
    with record_routing(model) as recorder:
        logits = model(ids, output_router_logits=True).router_logits
        model(ids)
    trace = recorder.trace()
    layers = len(model.model.layers)
    assert trace.choices.shape == (layers, 24, model.config.num_experts_per_tok)
    last = model.model.layers[-1].mlp.gate
    scores = torch.nn.functional.softplus(logits[-1]).sqrt() + last.e_score_correction_bias
    expected = scores.topk(model.config.num_experts_per_tok).indices
    assert torch.equal(trace.choices[-1, :12].long(), expected)
    assert torch.equal(trace.choices[:, :12], trace.choices[:, 12:])
    model(ids)
    assert recorder.trace().choices.shape[1] == 24
    trace.save(tmp_path / "trace.safetensors")
    again = Trace.load(tmp_path / "trace.safetensors")
    assert again.num_experts == model.config.n_routed_experts
    assert torch.equal(again.choices, trace.choices)


def test_steps_go_layer_by_layer_for_each_token() -> None:
    trace = Trace(torch.arange(8).view(2, 2, 2), 8)
    assert list(trace.steps()) == [(0, [0, 1]), (1, [4, 5]), (0, [2, 3]), (1, [6, 7])]


def test_a_drawn_trace_has_its_law_and_its_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = zipf_trace(1, 32, 4, 2000, 0.0, 0.0, generator).choices[0].long()
    steep = zipf_trace(1, 32, 4, 2000, 1.5, 0.0, generator).choices[0].long()
    sticky = zipf_trace(1, 32, 4, 2000, 0.0, 0.75, generator).choices[0].long()
    assert all(len(set(row)) == 4 for row in sticky.tolist())

    def most(choices: torch.Tensor) -> float:
        return choices.flatten().bincount(minlength=32).max().item() / choices.numel()

    def kept(choices: torch.Tensor) -> float:
        return (choices[1:, :, None] == choices[:-1, None]).float().sum(2).mean().item()

    assert most(flat) < 0.05 < 0.15 < most(steep)
    assert kept(flat) < 0.2 < 0.7 < kept(sticky)


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="wanted a trace of routing"):
        Trace.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="found no router"), record_routing(torch.nn.Linear(1, 1)):
        pass
