# SPDX-License-Identifier: Apache-2.0
"""What is refused before it costs anything: damaged files, Hub names, settings that clash."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from finetune import attach_adapters, export_adapter, import_adapter
from finetune.adapters import load_adapters
from finetune.config import RunConfig
from finetune.deltas import AdapterFile
from finetune.evaluate import evaluate_files
from finetune.inspection import inspect_adapter
from finetune.layer_major import LayerMajor
from finetune.loading import load_model, load_tokenizer
from finetune.report import report_run
from finetune.running import train

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_layer_major_trains_no_indexer(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="does not run the indexer's loss"):
        RunConfig("m", "d", "o", train_indexer=True, layer_schedule="layer-major")
    with pytest.raises(ValueError, match="got an indexer that trains"):
        LayerMajor(attach_adapters(make_model(), r=2, train_indexer=True))


@pytest.mark.parametrize("layout", [None, "hf"])
def test_an_adapter_of_another_base_is_not_imported(
    make_model: MakeModel, tmp_path: Path, layout: str | None
) -> None:
    tuned = attach_adapters(make_model(), r=2)
    for name, p in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    tuned.save_pretrained(tmp_path / "a")
    source = tmp_path / "a"
    if layout is not None:
        source = export_adapter(tmp_path / "a", tmp_path / "b", layout)
    torch.manual_seed(99)
    other = make_model()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(ValueError, match="trained on the base model"):
        import_adapter(source, other)


@pytest.mark.usefixtures("offline")
def test_names_of_the_hub_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="found none at some/name"):
            load("some/name")
    attach_adapters(make_model(), r=2).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors, found none"):
        load_adapters(make_model(), tmp_path)
    # Before the model, which is not there either.
    with pytest.raises(ValueError, match=r"typo/adapter_config.json, found none"):
        evaluate_files("some/name", tmp_path / "data.jsonl", adapter="typo")


def test_damaged_adapters_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    attach_adapters(model, r=2).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in told.items() if k != "lora_alpha"}))
    with pytest.raises(ValueError, match=r"adapter_config.json: wanted lora_alpha"):
        AdapterFile(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    told["lora_alpha"] = 4
    config.write_text(json.dumps(told))
    for call in (
        inspect_adapter,
        lambda path: load_adapters(make_model(), path),
        lambda path: import_adapter(path, make_model()),
    ):
        with pytest.raises(ValueError, match=r"wanted a whole safetensors file"):
            call(tmp_path)


def assert_every_reader_says(make_model: MakeModel, path: Path, message: str) -> None:
    for call in (
        inspect_adapter,
        AdapterFile,
        lambda folder: load_adapters(make_model(), folder),
        lambda folder: import_adapter(folder, make_model()),
    ):
        with pytest.raises(ValueError, match=message):
            call(path)


@pytest.mark.parametrize("text", ["not json", "[]", '{"peft_type": "LORA", "auto_mapping": [1]}'])
def test_every_reader_names_a_damaged_config(
    make_model: MakeModel, tmp_path: Path, text: str
) -> None:
    attach_adapters(make_model(), r=2).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert_every_reader_says(make_model, tmp_path, r"adapter_config.json: wanted")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ids", [1, 2]),
        ("ids", {"layers.0.mlp.experts": [0, "one"]}),
        ("mass", {"layers.0.mlp.experts": "most"}),
        ("num_experts", None),
        ("share", "half"),
        ("score", 1),
        ("tokens", 1.5),
        ("colour", "red"),
    ],
)
def test_a_damaged_choice_of_experts_is_named(
    make_model: MakeModel, tmp_path: Path, key: str, value: object
) -> None:
    model = make_model()
    ids = {n.removeprefix("model."): [0, 2] for n, _ in model.named_modules()}
    ids = {name: chosen for name, chosen in ids.items() if name.endswith("mlp.experts")}
    attach_adapters(model, "hot-experts", r=2, experts=ids).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    told["auto_mapping"]["hot_experts"][key] = value
    file.write_text(json.dumps(told))
    assert_every_reader_says(make_model, tmp_path, rf"adapter_config.json: hot_experts.*{key}")


@pytest.mark.parametrize("text", ["{}", "not json", "[]"])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    RunConfig("m", "d", str(tmp_path)).save(tmp_path / "run.yaml")
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result.json: wanted"):
        report_run(tmp_path)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("")
    with pytest.raises(ValueError, match="got the file"):
        train(RunConfig("m", "d", str(file)))
