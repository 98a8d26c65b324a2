# SPDX-License-Identifier: Apache-2.0
"""The Auto classes find the models of this package, and stay themselves otherwise."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from modeling_dsv4 import (
    DeepseekV41Config,
    DeepseekV41ForCausalLM,
    DeepseekV41Model,
    Dsv4Config,
    Dsv4ForCausalLM,
    Dsv4Model,
    register,
)


def test_a_v41_release_loads_by_its_own_model_type(
    golden: Callable[[str], Any], tmp_path: Path
) -> None:
    case = golden("v41_a_bf16")
    config = AutoConfig.from_pretrained(case.folder)
    assert type(config) is DeepseekV41Config and config.num_hidden_layers == 9
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    assert type(model) is DeepseekV41ForCausalLM
    model.set_engram_token_map(case.inputs["compressed_token_map"])
    ids = case.inputs["input_ids_b"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, case.model(ids).logits, atol=1e-4, rtol=0)
    # What it saves is ours, and needs no subclass.
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dsv4"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is Dsv4ForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, case.model(ids).logits, atol=1e-4, rtol=0)


def test_our_own_layout_loads_by_its_model_type(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("v4").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Dsv4Config
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is Dsv4ForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is Dsv4Model
    assert type(AutoModelForCausalLM.from_config(Dsv4Config.from_pretrained(tmp_path))) is (
        Dsv4ForCausalLM
    )


def test_the_backbone_of_a_release_loads_alone(golden: Callable[[str], Any]) -> None:
    case = golden("v41_a_bf16")
    backbone = AutoModel.from_pretrained(case.folder, dtype=torch.float32).eval()
    assert type(backbone) is DeepseekV41Model
    backbone.set_engram_token_map(case.inputs["compressed_token_map"])
    ids = case.inputs["input_ids_b"]
    with torch.no_grad():
        expected = case.model.model(ids).last_hidden_state
        torch.testing.assert_close(backbone(ids).last_hidden_state, expected, atol=1e-4, rtol=0)


_PROGRAM = """
import sys, torch, modeling_dsv4
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
before = AutoModelForCausalLM.from_pretrained(folder)
assert type(before).__module__.startswith("transformers."), type(before)
modeling_dsv4.register(official_v4=True)
after = AutoModelForCausalLM.from_pretrained(folder)
assert isinstance(after, modeling_dsv4.Dsv4ForCausalLM), type(after)
assert after.config.model_type == "deepseek_v4"
"""


def test_official_v4_belongs_to_transformers_until_it_is_asked_for(golden_dir: Path) -> None:
    # In a process of its own: the registration is for good.
    folder = golden_dir / "v4_b_bf16_mtp"
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_registering_twice_is_harmless_and_a_name_that_is_taken_no_error(
    monkeypatch: pytest.MonkeyPatch, golden_dir: Path
) -> None:
    register()
    refused: list[str] = []

    def taken(model_type: str, config: Any, exist_ok: bool = False) -> None:
        if not exist_ok:
            refused.append(model_type)
            raise ValueError(f"'{model_type}' is already used by a Transformers config")

    monkeypatch.setattr(AutoConfig, "register", taken)
    register()
    assert refused == ["deepseek_v41"]


def test_trainer_and_pipelines_know_the_classes_by_name() -> None:
    # Trainer shifts the labels under label smoothing for the classes of this table alone.
    for name in ("Dsv4ForCausalLM", "DeepseekV41ForCausalLM"):
        assert name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "Dsv4Model" in MODEL_MAPPING_NAMES.values()
    # Somebody else's entry stays.
    register(official_v4=False)
    assert MODEL_MAPPING_NAMES["deepseek_v4"] == "DeepseekV4Model"


def test_a_directory_of_another_model_is_left_alone(tmp_path: Path, golden_dir: Path) -> None:
    shutil.copytree(golden_dir / "v41_c_bf16", tmp_path / "other")
    fields = json.loads((tmp_path / "other" / "config.json").read_text())
    fields["model_type"] = "deepseek_v99"
    (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="deepseek_v99"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"unknown configuration fields \['text_config'\]"):
        Dsv4ForCausalLM.from_pretrained(tmp_path / "other")
