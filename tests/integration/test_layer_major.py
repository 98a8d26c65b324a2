# SPDX-License-Identifier: Apache-2.0
"""A converted model trained from disk a layer at a time, through the program."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.cli import app, run
from quantize.config import get_recipe
from quantize.convert import convert
from quantize.sizes import parse_size

WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8}


@pytest.fixture(scope="module")
def converted(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("v4", vocab_size=96, **WIDTHS).save_pretrained(folder / "plain")
    words = {f"w{i}": i for i in range(90)} | {"<eos>": 90, "<pad>": 91, "<unk>": 92, "<bos>": 93}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.save_pretrained(folder / "plain")
    return convert(folder / "plain", folder / "packed", get_recipe("fp4"))


def test_the_program_trains_from_disk_a_layer_at_a_time(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [" ".join(f"w{(7 * i + j) % 90}" for j in range(12 + i % 9)) for i in range(12)]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = tmp_path / "run.yaml"
    settings.write_text(
        "accumulation: 3\nbatch_size: 2\nlogging_steps: 1\neval_fraction: 0.0\nrank: 4\n"
        "report_to: none\nlearning_rate: 0.01\nmax_steps: 3\n"
    )
    losses = {}
    for schedule in ("ordinary", "layer-major"):
        output = tmp_path / schedule
        call = [
            "train", "--model", str(converted), "--data", str(data), "--output", str(output),
            "--config", str(settings), "--expert-memory", "30kB", "--layer-schedule", schedule,
            "--quiet", "--json",
        ]  # fmt: skip
        assert run(lambda call=call: app(call)) == 0, capsys.readouterr().err
        history = json.loads((output / "result.json").read_text())["history"]
        losses[schedule] = [entry["loss"] for entry in history if "loss" in entry]
        assert (output / "adapter_model.safetensors").is_file()
    assert len(losses["ordinary"]) == 3
    assert losses["layer-major"] == pytest.approx(losses["ordinary"], rel=1e-3)
    assert parse_size("30kB") < sum(p.stat().st_size for p in converted.glob("experts-*"))
