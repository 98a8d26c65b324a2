# SPDX-License-Identifier: Apache-2.0
"""What was once silently wrong has a defined result or an error."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from modeling_dsv4 import Dsv4ForCausalLM, ops


@pytest.fixture
def model(golden_dir: Path) -> Dsv4ForCausalLM:
    folder = golden_dir / "v4_c_bf16_dspark"
    return Dsv4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_router_logits_stand_in_the_columns_of_the_input(model: Dsv4ForCausalLM) -> None:
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 9:] = 0, 0
    padded = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    for row, real in ((0, slice(5, 12)), (1, slice(0, 9))):
        alone = model(ids[row : row + 1, real], output_router_logits=True).router_logits
        for p, a in zip(padded, alone, strict=True):
            torch.testing.assert_close(p.view(2, 12, -1)[row, real], a, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_configuration_can_ask_for_hidden_states_and_router_logits(
    model: Dsv4ForCausalLM,
) -> None:
    ids = torch.arange(3, 9)[None]
    assert model(ids).router_logits is None
    model.config.output_router_logits = model.config.output_hidden_states = True
    out = model(ids)
    assert len(out.router_logits) == model.config.num_hidden_layers
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1


@torch.no_grad()
@pytest.mark.parametrize(
    "places", [[0, 1, 2, 7, 8, 9], [5, 4, 3, 2, 1, 0]], ids=["jump", "backwards"]
)
def test_positions_that_neither_continue_nor_restart_are_refused(
    model: Dsv4ForCausalLM, places: list[int]
) -> None:
    with pytest.raises(ValueError, match="restart at 0"):
        model(torch.arange(3, 9)[None], position_ids=torch.tensor([places]))


def test_positions_of_another_length_are_refused(model: Dsv4ForCausalLM) -> None:
    with pytest.raises(ValueError, match="for 6 tokens"):
        model(torch.arange(3, 9)[None], position_ids=torch.arange(7)[None])


def test_a_configuration_of_transformers_own_class_is_translated(golden_dir: Path) -> None:
    folder = golden_dir / "v4_a_fp8"
    native = AutoConfig.from_pretrained(folder)
    assert type(native).__name__ == "DeepseekV4Config"
    ours = Dsv4ForCausalLM.from_pretrained(folder, config=native, dtype=torch.float32)
    assert ours.config.model_type == "dsv4"
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain = Dsv4ForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(ours(ids).logits, plain, atol=1e-4, rtol=0)


def test_a_mistyped_relative_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="models/nano-v42: no such directory"):
        Dsv4ForCausalLM.from_pretrained("models/nano-v42", local_files_only=True)


@pytest.mark.parametrize("sink", [torch.inf, -torch.inf])
def test_an_infinite_sink_takes_all_or_nothing(sink: float) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
    keep = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    out = ops.sink_attention(q, k, keep, None, None, torch.full((2,), sink), 0.5)
    if sink > 0:
        assert torch.equal(out, torch.zeros_like(out))
    else:
        z = torch.einsum("bshc,btc->bhst", q, k) * 0.5
        p = z.masked_fill(~keep[:, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(out, torch.einsum("bhst,btc->bshc", p, k))
