# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning from files to files, through the program: check, train, resume, eval, merge."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, TrainerCallback

from finetune.config import RunConfig
from finetune.deltas import file_sha256
from finetune.interruption import Interrupted
from finetune.running import train
from modeling_dsv4 import Dsv4ForCausalLM
from quantize.config import get_recipe
from quantize.convert import convert

PRIVATE = Path(__file__).parents[2] / "examples" / "data" / "private.jsonl"
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def make_base(
    private_tokenizer: Callable[..., Any], small_config: Callable[..., Any]
) -> Callable[[Path, int], Path]:
    def make(directory: Path, seed: int) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Dsv4ForCausalLM(small_config(num_hidden_layers=3, compress_ratios=[0, 4, 8]))
        model.save_pretrained(directory)
        private_tokenizer().save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="module")
def base(make_base: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "plain", 0)


@pytest.fixture(scope="module")
def packed(base: Path) -> Path:
    target = base.parent / "fp4"
    convert(base, target, get_recipe("fp4"))
    return target


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A third of the shipped data: enough, and quick."""
    file = tmp_path / "some.jsonl"
    lines = PRIVATE.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::3]), encoding="utf-8")
    return file


def _train(call: Call, model: Path, data: Path, output: Path, *more: object) -> dict:
    options = ("--max-steps", 12, "--rank", 4, "--learning-rate", 1e-2, "--max-length", 256)
    words = ("--model", model, "--data", data, "--output", output, *options, *more)
    code, out, err = call("train", *words, "--json", "--quiet")
    assert code == 0, err
    return json.loads(out)


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_check_counts_and_names_bad_lines(call: Call, base: Path, tmp_path: Path) -> None:
    code, out, _ = call("check", PRIVATE, "--model", base, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["records"] == found["examples"] == 120
    assert found["chat"] == 72
    assert found["duplicates"] == found["truncated"] == found["dropped"] == 0
    assert 0 < found["label_tokens"] < found["tokens"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": ""}\n')
    code, out, err = call("check", bad)
    assert code == 1
    assert "line 2" in out
    assert "bad.jsonl: line 2: `text`: wanted text, got blank text" in " ".join(err.split())


def test_train_lowers_the_held_out_loss_and_leaves_a_peft_adapter(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    result = _train(call, base, data, output)
    assert result["steps"] == 12
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.3
    names = {p.name for p in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "run.yaml", "result.json"} <= names
    assert not [p for p in output.rglob("*") if p.name.startswith(".staged")]
    model = PeftModel.from_pretrained(Dsv4ForCausalLM.from_pretrained(base), output)
    words = ("--model", base, "--adapter", output, "--data", data, "--held-out", "--json")
    code, out, err = call("eval", *words)
    assert code == 0, err
    found = json.loads(out)
    assert found["loss_before"] == pytest.approx(result["held_out_loss_before"], rel=1e-5)
    assert found["loss_after"] == pytest.approx(result["held_out_loss_after"], rel=1e-5)
    assert model.peft_config["default"].base_model_name_or_path == str(base)


def test_bad_records_refuse_training_before_weights_or_are_listed_in_its_result(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join([*lines[:2], "{\n", *lines[2:]]), encoding="utf-8")
    weights = base / "model.safetensors"
    away = weights.rename(tmp_path / "away")
    try:
        words = ("--model", base, "--data", data, "--output", tmp_path / "refused")
        code, _, err = call("train", *words)
    finally:
        away.rename(weights)
    assert code == 1
    assert "some.jsonl: line 3: not JSON" in " ".join(err.split())
    settings = tmp_path / "skip.yaml"
    settings.write_text("on_bad: skip\nlong: split\n")
    output = tmp_path / "skipped"
    _train(call, base, data, output, "--config", settings, "--max-steps", 1, "--max-length", 48)
    result = json.loads((output / "result.json").read_text())
    (skipped,) = result["left_out"]["skipped"]
    assert (skipped["file"], skipped["line"]) == (str(data), 3)
    assert result["train_data"]["split"] > 0
    assert result["train_data"]["cut_labels"] == 0
    words = ("--model", base, "--adapter", output, "--data", data, "--held-out", "--json")
    code, out, err = call("eval", *words)
    assert code == 0, err
    after = result["held_out_loss_after"]
    assert json.loads(out)["loss_after"] == pytest.approx(after, rel=1e-5)


def test_a_plain_base_merges_to_the_attached_logits(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    _train(call, base, data, adapter)
    code, _, err = call("merge", "--model", base, "--adapter", adapter, "--output", output)
    assert code == 0, err
    ids = torch.randint(5, 320, (2, 50))
    attached = PeftModel.from_pretrained(Dsv4ForCausalLM.from_pretrained(base), adapter)
    merged = Dsv4ForCausalLM.from_pretrained(output)
    torch.testing.assert_close(_logits(merged, ids), _logits(attached, ids), atol=1e-4, rtol=0)
    assert PreTrainedTokenizerFast.from_pretrained(output).eos_token_id == 1
    (output / "checksums.json").unlink()
    code, _, err = call("merge", "--model", base, "--adapter", adapter, "--output", output)
    assert code == 1
    assert "wanted an empty or new directory" in " ".join(err.split())


@pytest.mark.parametrize("budget", [None, "40KiB"])
def test_a_packed_base_trains_with_experts_in_memory_and_on_disk(
    call: Call, packed: Path, data: Path, tmp_path: Path, budget: str | None
) -> None:
    more = () if budget is None else ("--expert-memory", budget)
    result = _train(call, packed, data, tmp_path / "adapter", *more)
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.3


def test_where_the_experts_are_changes_no_update(
    call: Call, packed: Path, data: Path, tmp_path: Path
) -> None:
    losses = []
    for name, more in (("ram", ()), ("disk", ("--expert-memory", "40KiB"))):
        options = ("--max-steps", 3, "--preset", "all", *more)
        losses.append(_train(call, packed, data, tmp_path / name, *options))
    assert losses[0]["held_out_loss_after"] == losses[1]["held_out_loss_after"]


def test_a_packed_base_merges_into_what_is_asked_for(
    call: Call, packed: Path, data: Path, tmp_path: Path
) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    _train(call, packed, data, adapter)
    words = ("--model", packed, "--adapter", adapter, "--output", output)
    code, _, err = call("merge", *words)
    assert code == 1
    assert "wanted --to with a packed base" in " ".join(err.split())
    assert not output.exists()
    code, _, err = call("merge", *words, "--to", "float32")
    assert code == 0, err
    ids = torch.randint(5, 320, (2, 50))
    attached = PeftModel.from_pretrained(Dsv4ForCausalLM.from_pretrained(packed), adapter)
    merged = Dsv4ForCausalLM.from_pretrained(output)
    torch.testing.assert_close(_logits(merged, ids), _logits(attached, ids), atol=1e-4, rtol=0)
    again = tmp_path / "again"
    code, out, err = call("merge", *words[:-1], again, "--to", "source", "--json", "--quiet")
    assert code == 0, err
    told = json.loads(out)
    assert told["form"].startswith("fp4")
    assert told["all"]["error"] > 0
    assert Dsv4ForCausalLM.from_pretrained(again).config.quantization_config.quant_method == "dsv4"


def test_an_adapter_of_another_model_is_refused(
    call: Call,
    base: Path,
    make_base: Callable[[Path, int], Path],
    data: Path,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    _train(call, base, data, adapter)
    other = make_base(tmp_path / "other", 1)
    code, _, err = call("eval", "--model", other, "--adapter", adapter, "--data", data)
    assert code == 1
    assert "it was trained on the base model" in " ".join(err.split())


def test_a_run_goes_on_where_its_last_checkpoint_stood(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    def settings(name: str) -> RunConfig:
        return RunConfig(
            model=str(base),
            data=str(data),
            output=str(tmp_path / name),
            rank=4,
            max_steps=6,
            save_steps=2,
            eval_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            max_length=256,
        )

    whole = train(settings("whole"))
    train(settings("cut"))
    # As an interruption in step 5 would leave it.
    for path in (tmp_path / "cut").iterdir():
        if path.name.startswith(("adapter", "result", "README")):
            path.unlink()
    last = tmp_path / "cut" / "checkpoint-6"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    code, out, err = call("train", "--output", tmp_path / "cut", "--resume", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert found["held_out_loss_after"] == whole.held_out_loss_after
    again = json.loads((tmp_path / "cut" / "result.json").read_text())
    steps = {entry["step"]: entry["loss"] for entry in again["history"] if "loss" in entry}
    assert steps == {e["step"]: e["loss"] for e in whole.history if "loss" in e}


def test_an_output_holds_one_run(call: Call, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    _train(call, base, data, output, "--max-steps", 1)
    words = ("--model", base, "--data", data, "--output", output)
    code, _, err = call("train", *words)
    assert (code, "holds a run already" in " ".join(err.split())) == (1, True)
    code, _, err = call("train", *words, "--resume", "--rank", 8)
    assert (code, "had other settings (rank 4 -> 8" in " ".join(err.split())) == (1, True)
    code, _, err = call("train", "--output", tmp_path / "none", "--resume")
    assert (code, "found no run.yaml" in " ".join(err.split())) == (1, True)


def test_the_hashes_are_those_of_what_was_learned(base: Path, data: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_bytes(data.read_bytes()[: data.read_bytes().index(b"\n") + 1])
    hashes = {path.name: file_sha256(path) for path in (data, held)}

    class Change(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            for path in (data, held):
                path.write_text('{"text": "another"}\n')

    files = (str(base), str(data), str(tmp_path / "adapter"))
    config = RunConfig(*files, eval_data=str(held), max_steps=1, rank=2, report_to="none")
    train(config, callbacks=[Change()])
    facts = json.loads((tmp_path / "adapter" / "facts.json").read_text())
    assert [f["sha256"] for f in facts["data"]] == [hashes["some.jsonl"]]
    assert [f["sha256"] for f in facts["eval_data"]] == [hashes["held.jsonl"]]
    for name in ("report.html", "README.md"):
        told = (tmp_path / "adapter" / name).read_text(encoding="utf-8")
        assert all(sha256 in told for sha256 in hashes.values())
    assert file_sha256(data) not in hashes.values()


@pytest.mark.parametrize("fault", ["gate", "lr_ratios", "base", "data"])
def test_a_run_that_fails_before_its_first_step_leaves_its_output_free(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    output = tmp_path / "adapter"
    config = RunConfig(str(base), str(data), str(output), max_steps=1, rank=2)
    bad, why = config, "broken"
    with monkeypatch.context() as patch:
        if fault == "gate":
            bad, why = replace(config, overfit_gate="on"), "overfit gate"
            patch.setattr("finetune.overfit_gate.passes", lambda *args: False)
        elif fault == "lr_ratios":
            bad, why = replace(config, lr_ratios={"no such weight": 2.0}), "lr_ratios"
        elif fault == "base":
            patch.setattr("finetune.running.held_out_loss", Mock(side_effect=OSError("broken")))
        else:
            loss = Mock(side_effect=RuntimeError("broken"))
            patch.setattr("finetune.trainer.AdapterTrainer.compute_loss", loss)
        with pytest.raises((ValueError, OSError, RuntimeError), match=why):
            train(bad)
    assert not list(output.iterdir())
    assert train(config).steps == 1
    with pytest.raises(ValueError, match="holds a run already"):
        train(config)


def test_an_error_behind_the_first_step_leaves_a_run_to_continue(
    base: Path, data: Path, tmp_path: Path
) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("broken")

    config = RunConfig(str(base), str(data), str(tmp_path / "adapter"), max_steps=2, rank=2)
    with pytest.raises(OSError, match="broken"):
        train(config, callbacks=[Break()])
    assert (tmp_path / "adapter" / "run.yaml").is_file()
    assert train(config, resume=True).steps == 2


def test_settings_come_from_a_file_and_options_win(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"model: {base}\ndata: {data}\nmax_steps: 2\nrank: 2\npacking: true\nmax_length: 256\n"
    )
    output = tmp_path / "adapter"
    code, _, err = call("train", "--config", file, "--output", output, "--rank", 3, "--quiet")
    assert code == 0, err
    saved = RunConfig.from_yaml(output / "run.yaml")
    assert (saved.rank, saved.max_steps, saved.packing) == (3, 2, True)
    file.write_text("colour: x\n")
    code, _, err = call("train", "--config", file, "--model", base, "--data", data, "--output", "o")
    assert (code, "unknown keys colour" in " ".join(err.split())) == (1, True)


def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(
    call: Call, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "--model", base, "--data", data, "--output", tmp_path / "my out")
    for cut, expected in (
        (Interrupted(signal.SIGINT, "my out/checkpoint-3", 3), "my out/checkpoint-3 holds 3 steps"),
        (Interrupted(signal.SIGTERM), "before the first checkpoint: nothing is saved"),
    ):
        monkeypatch.setattr("finetune.running._train", Mock(side_effect=cut))
        code, out, err = call(*words)
        assert (code, out) == (128 + cut.signum, "")
        assert f"stopped by {signal.Signals(cut.signum).name}" in err
        assert expected in " ".join(err.split())
        assert (cut.checkpoint is None) == ("--resume" not in err)


def test_lr_find_leaves_a_table_and_a_plot_and_nothing_else_changed(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in base.iterdir()}
    output = tmp_path / "rates"
    words = ("--model", base, "--data", data, "--output", output, "--low", 1e-4, "--steps", 20)
    code, out, err = call("lr-find", *words, "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert 1e-4 < found["suggestion"] < 0.2
    assert {k: v for k, v in found.items() if k != "output"} == json.loads(
        (output / "lr_find.json").read_text()
    )
    assert {p.name for p in output.iterdir()} == {f"lr_find.{k}" for k in ("json", "svg", "png")}
    assert {p: p.read_bytes() for p in base.iterdir()} == before
    code, _, err = call("lr-find", *words, "--steps", 3)
    assert (code, "wanted at least 10 steps" in " ".join(err.split())) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--model", "m"),
        ("train", "--no-such-option"),
        ("merge", "--model", "m"),
        ("nonsense",),
    ],
)
def test_wrong_usage_ends_with_2(call: Call, words: tuple[str, ...]) -> None:
    assert call(*words)[0] == 2


@pytest.mark.parametrize("command", ["check", "lr-find", "train", "eval", "merge"])
def test_every_command_explains_itself(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert (code, f"Example: dsv4-finetune {command}" in out) == (0, True)


def test_what_is_no_directory_asks_no_network(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.chdir(tmp_path)
    for words in (
        ("train", "--model", "nobody/model", "--data", data, "--output", "o"),
        ("check", data, "--model", "nomodel"),
        ("eval", "--model", "nomodel", "--data", data),
    ):
        code, _, err = call(*words)
        assert code == 1
        assert "wanted a directory with a model, found none at no" in " ".join(err.split())


def test_an_adapter_without_weights_is_refused_before_the_model_is_loaded(
    call: Call, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    words = ("eval", "--model", base, "--data", data, "--adapter")
    code, _, err = call(*words, adapter)
    assert code == 1
    assert "adapter_model.safetensors, found none" in " ".join(err.split())
    (adapter / "adapter_model.safetensors").write_bytes(b"12345678901")
    code, _, err = call(*words, adapter)
    assert code == 1
    assert "wanted a whole safetensors file" in " ".join(err.split())


def test_a_preset_that_wants_another_model_ends_with_a_reason(
    call: Call, base: Path, data: Path
) -> None:
    words = ("--model", base, "--data", data, "--output", "o", "--preset", "memory")
    code, out, err = call("train", *words)
    assert (code, out) == (1, "")
    assert "wanted a model with Engram layers (V4.1)" in " ".join(err.split())


def test_data_is_refused_before_the_model_is_loaded(call: Call, tmp_path: Path, base: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    (tmp_path / "model").mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    words = ("--model", tmp_path / "model", "--data", bad, "--output", tmp_path / "out")
    code, _, err = call("train", *words)
    assert (code, "line 1: wanted one of `messages`" in " ".join(err.split())) == (1, True)
    assert not (tmp_path / "out").exists()
