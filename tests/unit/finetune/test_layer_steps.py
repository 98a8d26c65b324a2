# SPDX-License-Identifier: Apache-2.0
"""A run a layer at a time inside transformers' Trainer: the losses and adapters of the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.config import RunConfig
from finetune.data import Examples, encode_records
from finetune.layer_major import LayerMajor
from finetune.layer_steps import make_schedule
from finetune.records import Record
from finetune.trainer import AdapterTrainer, Prepared, make_trainer

MakeModel = Callable[..., PreTrainedModel]


def _config(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {
        "model": "unused", "data": "unused", "output": str(tmp_path / "out"), "rank": 4,
        "batch_size": 2, "accumulation": 3, "learning_rate": 1e-2, "logging_steps": 1,
        "max_length": 256, "eval_fraction": 0.0, "epochs": 2.0,
    }  # fmt: skip
    return RunConfig(**values | changes)


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: RunConfig
) -> tuple[AdapterTrainer, dict[str, torch.Tensor]]:
    texts = {"prompt": "meter", "completion": " lasts years"}
    records = [
        Record(i + 1, "prompt", {k: v * (1 + i % 4) for k, v in texts.items()}) for i in range(9)
    ]
    some, report = encode_records(records, tokenizer, 256)
    data = Prepared(Examples(some, 256 if config.packing else None), None, report, report)
    torch.manual_seed(0)
    adapted = attach_adapters(model, r=4)
    trainer = make_trainer(adapted, config, data, tokenizer)
    trainer.train()
    return trainer, {n: p.detach() for n, p in adapted.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
def test_losses_and_adapters_are_those_of_the_ordinary_order(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    runs, together, step = {}, [], LayerMajor.step

    def watched(self: LayerMajor, batches: list[Any], *items: Any) -> torch.Tensor:
        together.append(len(batches))
        return step(self, batches, *items)

    monkeypatch.setattr(LayerMajor, "step", watched)
    for schedule in ("ordinary", "layer-major"):
        # Nine rows in twos: the last step of an epoch has two micro-batches, the last of one row.
        config = _config(tmp_path, layer_schedule=schedule)
        runs[schedule] = _run(make_model(kind), tokenizer, config)
    (want, wanted), (got, found) = runs.values()
    assert got.layer_major is not None
    assert want.layer_major is None
    assert together == [3, 2, 3, 2]
    assert got.state.global_step == want.state.global_step == 4
    for key in ("loss", "grad_norm"):
        values = [[e[key] for e in t.state.log_history if key in e] for t in (want, got)]
        assert len(values[0]) == 4
        assert values[1] == pytest.approx(values[0], rel=2e-4), key
    for name, tensor in wanted.items():
        # Adam divides by the gradient's size: where that is rounding alone, so is the update.
        assert (found[name] - tensor).norm() < 2e-2 * tensor.norm() + 1e-4, name


def test_a_run_names_its_schedule_and_memory(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = _config(tmp_path, layer_schedule="layer-major", checkpoint_memory="1MB", packing=True)
    model = attach_adapters(make_model("v4"), r=4)
    schedule = make_schedule(model, config)
    assert schedule is not None
    assert schedule.checkpoint_memory == 10**6
    assert make_schedule(model, _config(tmp_path)) is None
    with pytest.raises(NotImplementedError, match="wanted one process, got 2"):
        make_schedule(model, config, processes=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_schedule": "sideways"}, "wanted one of ordinary, layer-major, got 'sideways'"),
        ({"checkpoint_memory": "much"}, "wanted a size"),
        (
            {"layer_schedule": "layer-major", "gradient_checkpointing": True},
            "leave gradient_checkpointing off",
        ),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **changes)
