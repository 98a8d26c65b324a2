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
from finetune.config import RunConfig
from finetune.data import Examples, PackingCollator, PaddingCollator, encode_records
from finetune.records import Record, split_records
from finetune.running import _open_output
from finetune.trainer import (
    AdapterTrainer,
    Prepared,
    held_out_loss,
    make_trainer,
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
    assert "training_args.bin" not in files


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
