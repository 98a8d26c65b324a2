# SPDX-License-Identifier: Apache-2.0
"""Preferences: read strictly, encoded like answers, learned on pairs that were held out."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from finetune.overfit_gate import run_gate
from finetune.preference import (
    answer_log_prob,
    held_out_margin,
    prepare_preferences,
    split_answer,
)
from finetune.preference_records import encode_answer
from finetune.records import Record
from finetune.trainer import make_trainer

pytest.importorskip("trl")
MakeModel = Callable[..., PreTrainedModel]
OBJECTIVES = ("dpo", "kto", "orpo")


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make_run(tmp_path: Path, short_run: dict[str, Any]) -> Callable[..., RunConfig]:
    lines = [
        {
            "prompt": f"meter {i}" * (1 + i % 3),
            "chosen": f" lasts {i} years",
            "rejected": f" is {i} broken",
        }
        for i in range(16)
    ]
    data = _write(tmp_path / "pairs.jsonl", lines)
    own = {"data": str(data), "batch_size": 4, "learning_rate": 1e-2, "eval_fraction": 0.25}

    def make(objective: str, **changes: Any) -> RunConfig:
        return RunConfig(**short_run | own | {"objective": objective} | changes)

    return make


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_margin_rises_on_held_out_pairs(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    make_run: Callable[..., RunConfig],
    objective: str,
) -> None:
    config = make_run(objective)
    data = prepare_preferences(config, tokenizer)
    model = attach_adapters(make_model(), r=4)
    trainer = make_trainer(model, config, data, tokenizer)
    assert data.held_out is not None
    before = held_out_margin(model, data.held_out, tokenizer)
    trainer.train()
    assert before is not None
    assert (held_out_margin(model, data.held_out, tokenizer) or 0.0) > before + 1
    if objective == "kto":
        # Answers of one kind have no margin.
        one = copy.copy(data.held_out)
        one.labels = [True] * len(one.rows)
        assert held_out_margin(model, one, tokenizer) is None
    with model.disable_adapter():
        assert held_out_margin(model, data.held_out, tokenizer) == pytest.approx(before)
    assert list(model.peft_config) == ["default"]
    files = {p.name for p in (Path(config.output) / "checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_answer_is_on_the_side_that_its_line_says(
    tokenizer: PreTrainedTokenizerFast, make_run: Callable[..., RunConfig], objective: str
) -> None:
    """Margins cannot tell: sides exchanged in training and in measuring would look alike."""
    data = prepare_preferences(make_run(objective), tokenizer)
    assert data.held_out is not None
    for rows in (data.train, data.held_out):
        for row in (rows[i] for i in range(len(rows))):
            if objective == "kto":
                sides = [(row["completion_ids"], row["label"])]
            else:
                sides = [(row["chosen_ids"], True), (row["rejected_ids"], False)]
            for ids, wanted in sides:
                assert tokenizer.decode(ids).startswith(" lasts" if wanted else " is")


class StopAt(TrainerCallback):
    """Ends a run early, as an interruption would."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize(
    "objective",
    [
        "dpo",
        pytest.param("kto", marks=pytest.mark.slow),
        pytest.param("orpo", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_continues_to_the_same_bits(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    make_run: Callable[..., RunConfig],
    objective: str,
) -> None:
    config = make_run(objective, max_steps=6, eval_steps=6)
    data = prepare_preferences(config, tokenizer)

    def run(output: str, *callbacks: TrainerCallback, resume: str | None = None) -> Any:
        torch.manual_seed(0)
        model = attach_adapters(make_model(), "attention", r=4)
        named = dataclasses.replace(config, output=config.output + output)
        make_trainer(model, named, data, tokenizer, callbacks).train(resume_from_checkpoint=resume)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    whole = run("-whole")
    run("-cut", StopAt())
    resumed = run("-cut", resume=f"{config.output}-cut/checkpoint-4")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_orpo_is_what_trl_computes() -> None:
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    from finetune.preference_trainers import log1mexp, orpo_loss

    logits = torch.randn(4, 6, 11)
    labels = torch.randint(0, 11, (4, 6))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    counts = labels != -100
    mean = (logp * counts).sum(-1) / counts.sum(-1)
    theirs = trl.ORPOTrainer.odds_ratio_loss
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses = theirs(stub, mean[:2], mean[2:])[0]
    expected = (-mean[:2] - losses).mean()
    torch.testing.assert_close(orpo_loss(logits, labels, 0.3), expected)
    x = torch.tensor([-1e-6, -0.5, -0.7, -20.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), torch.log(-torch.expm1(x)))


def test_the_gate_knows_preferences(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run("dpo")
    data = prepare_preferences(config, tokenizer)
    trainer = make_trainer(attach_adapters(make_model(), r=4), config, data, tokenizer)
    batch = trainer.data_collator([data.train[i] for i in range(4)])
    result = run_gate(trainer, batch, 1e-2)
    assert result.first == pytest.approx(0.6931, abs=1e-3)
    assert result.last < 0.3


def test_answers_are_encoded_as_in_supervised_runs(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = Record(1, "prompt", {"prompt": "meter 1", "chosen": " lasts", "rejected": " ends"})
    chosen = encode_answer(pair, "chosen", tokenizer, 64)
    prompt, answer = split_answer(chosen)
    assert tokenizer.decode(prompt) == "<bos>meter 1"
    assert tokenizer.decode(answer) == " lasts<eos>"
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answers = {"chosen": [{"role": "assistant", "content": "yes"}]}
    long = encode_answer(Record(1, "prompt", {"prompt": talk, **answers}), "chosen", tokenizer, 256)
    prompt, answer = split_answer(long)
    assert "b" in tokenizer.decode(prompt)
    assert tokenizer.decode(answer).startswith("yes")
    assert long.num_labels == len(answer)
    model = make_model()
    logp = model(input_ids=torch.tensor([chosen.input_ids])).logits.detach().log_softmax(-1)[0]
    start = len(chosen.input_ids) - chosen.num_labels
    expected = sum(float(logp[i - 1, chosen.input_ids[i]]) for i in range(start, len(logp)))
    assert answer_log_prob(model, chosen, tokenizer) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="line 1: `chosen` begins behind 3 tokens"):
        encode_answer(pair, "chosen", tokenizer, 3)


def test_rated_answers_serve_kto_and_packing_is_refused(
    tokenizer: PreTrainedTokenizerFast, make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    lines = [{"prompt": f"meter {i}", "completion": " ok", "label": i % 2 == 0} for i in range(6)]
    data = _write(tmp_path / "rated.jsonl", lines)
    config = make_run("kto", data=str(data), eval_fraction=0.0)
    prepared = prepare_preferences(config, tokenizer)
    assert [prepared.train[i]["label"] for i in range(6)] == [True, False] * 3
    with pytest.raises(ValueError, match="packing: wanted false for objective kto"):
        prepare_preferences(dataclasses.replace(config, packing=True), tokenizer)


def test_the_divergence_is_measured_on_answers_to_other_prompts(
    tokenizer: PreTrainedTokenizerFast, make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    train = prepare_preferences(make_run("kto", eval_fraction=0.0), tokenizer).train
    rows = [train[i] for i in range(len(train))]
    for i, row in enumerate(rows):
        other = rows[(i - 1 - i % 2) % len(rows)]
        assert other["prompt_ids"] != row["prompt_ids"]
        assert row["KL_completion_ids"] == other["completion_ids"]
    pairs = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
    single = make_run("kto", data=str(_write(tmp_path / "1.jsonl", pairs)), eval_fraction=0.0)
    with pytest.raises(ValueError, match="kto: wanted at least two different prompts"):
        prepare_preferences(single, tokenizer)
