# SPDX-License-Identifier: Apache-2.0
"""Losses that count tokens, packing that leaks nothing, training that can be continued."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune import attach_adapters
from finetune.callbacks import read_log
from finetune.checkpoints import list_checkpoints
from finetune.config import RunConfig
from finetune.data import Examples, PackingCollator, PaddingCollator, encode_records
from finetune.records import Record, split_records
from finetune.running import _open_output
from finetune.trainer import (
    AdapterTrainer,
    Prepared,
    held_out_loss,
    make_trainer,
    restore_adapter,
    save_adapter,
    sum_loss,
)

MakeModel = Callable[..., PreTrainedModel]
KINDS = ("v4", "v4.1")


def _records(count: int = 12) -> list[Record]:
    """Pairs of quite different lengths."""
    return [
        Record(
            i + 1,
            "prompt",
            {"prompt": f"meter {i}" * (1 + i % 3), "completion": f" lasts {i} years" * (1 + i % 4)},
        )
        for i in range(count)
    ]


def _config(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {
        "model": "unused",
        "data": "unused",
        "output": str(tmp_path / "out"),
        "rank": 4,
        "max_steps": 6,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_steps": 3,
        "max_length": 256,
        "report_to": "none",
    }
    return RunConfig(**values | changes)


def _prepared(tokenizer: PreTrainedTokenizerFast, pack_to: int | None = None) -> Prepared:
    train, held = split_records(_records(), 0.25)
    some, report = encode_records(train, tokenizer, 256)
    others, held_report = encode_records(held, tokenizer, 256)
    return Prepared(Examples(some, pack_to), Examples(others, pack_to), report, held_report)


class StopAt(TrainerCallback):
    """Ends a run early, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        control.should_training_stop = state.global_step == self.step


def _losses(trainer: AdapterTrainer) -> dict[tuple[str, int], float]:
    keys = ("loss", "eval_loss", "grad_norm")
    return {
        (key, entry["step"]): entry[key]
        for entry in trainer.state.log_history
        for key in keys
        if key in entry
    }


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_what_each_is_alone(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    stir: Callable[[torch.nn.Module], None],
    kind: str,
) -> None:
    model = attach_adapters(make_model(kind), r=4)
    stir(model)
    examples, report = encode_records(_records(), tokenizer, 256)
    packed, alone = Examples(examples, 256), Examples(examples)
    assert len(packed) < len(alone) / 2
    pieces = {
        "packed": [PackingCollator()([packed[i] for i in range(len(packed))])],
        "padded": [PaddingCollator(2)([alone[i] for i in range(len(alone))])],
        "alone": [PaddingCollator(2)([alone[i]]) for i in range(len(alone))],
    }
    grads, sums = {}, {}
    for name, batches in pieces.items():
        model.zero_grad()
        sums[name] = sum_loss(model, batches)
        for batch in batches:
            count = report.label_tokens
            model(**batch, num_items_in_batch=count, use_cache=False).loss.backward()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for name in ("packed", "padded"):
        assert sums[name] == (pytest.approx(sums["alone"][0], rel=1e-5), report.label_tokens)
        for key, grad in grads[name].items():
            torch.testing.assert_close(grad, grads["alone"][key], atol=1e-5, rtol=1e-3, msg=key)


def test_the_held_out_loss_is_a_mean_over_label_tokens(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    examples, _ = encode_records(_records(), tokenizer, 256)
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        for i, label in enumerate(example.labels):
            if label != -100:
                total, tokens = total - float(logp[i - 1, label]), tokens + 1
    for rows in (Examples(examples), Examples(examples, 256)):
        assert held_out_loss(model, rows, tokenizer) == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"accumulation": 2, "batch_size": 2}])
def test_training_lowers_the_held_out_loss(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, changes: dict
) -> None:
    config = _config(tmp_path, max_steps=12, save_steps=100, **changes)
    data = _prepared(tokenizer, 256 if config.packing else None)
    model = attach_adapters(make_model(), r=4)
    trainer = make_trainer(model, config, data, tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_accumulated_steps_equal_one_large_batch(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rows differ in length, so a mean of means would not."""
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        config = _config(tmp_path, batch_size=size, accumulation=accumulation, save_steps=100)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = attach_adapters(make_model(), r=4)
        trainer = make_trainer(model, config, _prepared(tokenizer), tokenizer)
        trainer.train()
        found.append(_losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_stopped_run_continues_with_the_losses_of_an_undisturbed_one(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole_config = _config(tmp_path, dropout=0.1)
    data = _prepared(tokenizer)

    def trainer_for(config: RunConfig, *callbacks: TrainerCallback) -> AdapterTrainer:
        torch.manual_seed(0)
        model = attach_adapters(make_model(), r=4, dropout=config.dropout)
        return make_trainer(model, config, data, tokenizer, callbacks)

    whole = trainer_for(whole_config)
    whole.train()
    config = dataclasses.replace(whole_config, output=str(tmp_path / "stopped"))
    trainer_for(config, StopAt(3)).train()
    assert (tmp_path / "stopped" / "checkpoint-3").is_dir()
    torch.manual_seed(99)
    resumed = trainer_for(config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert _losses(resumed) == _losses(whole)
    final = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, final[name]), name


def test_checkpoints_hold_the_adapter_and_nothing_of_the_base(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = _config(tmp_path, max_steps=3)
    model = attach_adapters(make_model(), r=4)
    make_trainer(model, config, _prepared(tokenizer), tokenizer).train()
    files = {p.name: p.stat().st_size for p in Path(config.output, "checkpoint-3").iterdir()}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained <= files["adapter_model.safetensors"] < 1.2 * trained
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md"}


class Scripted(AdapterTrainer):
    """Held-out losses as a test wants them, one per evaluation; the weights are the real ones."""

    script: tuple[float, ...] = ()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        done = sum("eval_loss" in entry for entry in self.state.log_history)
        metrics = {"eval_loss": self.script[done]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@pytest.mark.parametrize("packing", [False, True])
def test_patience_ends_a_run_and_the_best_adapter_is_kept(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: bool,
) -> None:
    """Evaluations at 1, 2, ...: the best at 2, stopped at 4. Step 2 saves though none is due."""
    monkeypatch.setattr("finetune.trainer.AdapterTrainer", Scripted)
    Scripted.script = (3.0, 2.0, 2.5, 2.0, 1.0)
    config = _config(
        tmp_path, patience=2, eval_steps=1, save_steps=3, keep_checkpoints=1, packing=packing
    )
    data = _prepared(tokenizer, 256 if packing else None)
    kept: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_end(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            **kwargs: Any,
        ) -> None:
            if state.global_step == 2:
                kept.update({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})

    trainer = make_trainer(attach_adapters(make_model(), r=4), config, data, tokenizer, [Keep()])
    trainer.train()
    assert trainer.state.global_step == 4
    assert [p.name for p in list_checkpoints(config.output)] == ["checkpoint-2"]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, kept[name]), name


def test_patience_needs_something_held_out(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = dataclasses.replace(_prepared(tokenizer), held_out=None)
    with pytest.raises(ValueError, match="patience: wanted held-out records"):
        make_trainer(make_model(), _config(tmp_path, patience=1), data, tokenizer)


def test_what_was_logged_is_in_a_file_with_speed_and_memory(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = _config(tmp_path, max_steps=3, batch_size=3, eval_steps=2)
    data = _prepared(tokenizer)
    trainer = make_trainer(attach_adapters(make_model(), r=4), config, data, tokenizer)
    trainer.train()
    log = read_log(Path(config.output, "log.jsonl"))
    assert [entry["step"] for entry in log] == [1, 2, 2, 3, 3, 3]
    losses = [entry for entry in log if "loss" in entry]
    # One pass: nine records in three steps, pads not counted.
    assert losses[-1]["tokens"] == sum(len(data.train[i]["input_ids"]) for i in range(9))
    assert all(entry["tokens_per_second"] > 0 and entry["memory_gib"] > 0.01 for entry in losses)
    assert all(entry["busiest_expert"] >= 1 > entry["idle_experts"] for entry in losses)
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry] == [
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    ]


def test_tensorboard_gets_a_folder_in_the_output(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = _config(tmp_path, max_steps=2, report_to="tensorboard")
    model = attach_adapters(make_model(), "attention", r=4)
    make_trainer(model, config, _prepared(tokenizer), tokenizer).train()
    board = accumulator.EventAccumulator(str(tmp_path / "out" / "logs")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Scalars("eval/loss")] == [2]
    with pytest.raises(ValueError, match="report_to: wanted none or installed reporters"):
        make_trainer(model, _config(tmp_path, report_to="nobody"), _prepared(tokenizer), tokenizer)


def test_bfloat16_weights_train_float32_adapters(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = attach_adapters(make_model().to(torch.bfloat16), r=4)
    data = _prepared(tokenizer)
    trainer = make_trainer(model, _config(tmp_path, eval_steps=6), data, tokenizer)
    before = held_out_loss(model, data.held_out, tokenizer)
    trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert len(states) == len(trained)
    assert {t.dtype for t in (*trained, *states)} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert held_out_loss(model, data.held_out, tokenizer) < before - 0.3


def test_an_adapter_that_cannot_be_written_is_an_error_of_the_disk(
    make_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"could not write the adapter|Is a directory"):
        save_adapter(attach_adapters(make_model(), "attention", r=2), tmp_path)


def test_another_runs_checkpoint_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    small, large = (attach_adapters(make_model(), preset, r=4) for preset in ("attention", "all"))
    save_adapter(small, tmp_path / "small")
    save_adapter(large, tmp_path / "large")
    restore_adapter(large, tmp_path / "large")
    with pytest.raises(ValueError, match=r"\d+ missing tensors, e\.g\. .*lora_A"):
        restore_adapter(large, tmp_path / "small")
    with pytest.raises(ValueError, match=r"\d+ unknown tensors, e\.g\. .*lora_A"):
        restore_adapter(small, tmp_path / "large")


def test_an_output_that_holds_other_files_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert _open_output(config, resume=False) is None
    output = Path(config.output)
    output.mkdir()
    assert _open_output(config, resume=False) is None
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"wanted an empty or new directory, got .*out with files"):
        _open_output(config, resume=False)
    (output / "run.yaml").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        _open_output(config, resume=False)
