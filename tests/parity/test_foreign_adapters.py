# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT itself trains on transformers' own DeepSeek-V4: the same logits here.

There PEFT adds W + BA to fused experts (`target_parameters`); here both stand apart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM

from finetune import export_adapter, import_adapter
from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.checkpoint import save_official

SIZES: dict[str, dict[str, Any]] = {
    # D = 2F, so that gate_up fits both ways round.
    "square": {"compress_ratios": [0, 4, 128, 4], "index_topk": 64},
    "odd": {"compress_ratios": [0, 4, 128, 4], "index_topk": 64, "moe_intermediate_size": 12},
    # D = F: down fits both ways round.
    "wide": {"compress_ratios": [0, 4, 128, 4], "index_topk": 64, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fused_experts_come_in_and_go_out(
    tiny: Callable[..., Any], tmp_path: Path, sizes: dict[str, Any]
) -> None:
    save_official(tiny("v4", **sizes).to(torch.bfloat16), tmp_path / "base")

    def ours() -> Dsv4ForCausalLM:
        return Dsv4ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    def native() -> DeepseekV4ForCausalLM:
        folder = tmp_path / "base"
        return DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        target_modules=r"model\.layers\.\d+\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"down_proj": 2},
    )
    model = get_peft_model(native(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.randint(0, 64, (2, 140))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        base = native()(ids, use_cache=False).logits
        model.save_pretrained(tmp_path / "peft")
        back = import_adapter(tmp_path / "peft", ours())
        found = back(ids, use_cache=False).logits
        folder = export_adapter(back, tmp_path / "out", "peft")
        again = PeftModel.from_pretrained(native(), folder)(ids, use_cache=False).logits
    assert (expected - base).std() > 0.1
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(again, expected, atol=5e-4, rtol=0)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(f / "adapter_model.safetensors").items()}
        for f in (tmp_path / "peft", folder)
    ]
    assert set(shapes[0]) == set(shapes[1])
