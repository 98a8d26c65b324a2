# SPDX-License-Identifier: Apache-2.0
"""GRPO on our models: rewards rise, left pads change nothing, a stopped run goes on to the bits."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.config import RunConfig
from finetune.prepare import prepare_data
from finetune.rewards import mean_reward
from finetune.trainer import make_trainer

pytest.importorskip("trl")
MakeModel = Callable[..., PreTrainedModel]
MakeRun = Callable[..., RunConfig]


@pytest.fixture
def make_run(tmp_path: Path, short_run: dict[str, Any]) -> MakeRun:
    """Questions of quite different lengths, whose answers should have a vowel."""
    lines = [
        {"prompt": "meter " * (1 + 3 * (i % 4)) + str(i), "regex": "[aeiou]"} for i in range(10)
    ]
    data = tmp_path / "tasks.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"objective": "grpo", "data": str(data), "batch_size": 16, "max_new_tokens": 6}
    steady = {"learning_rate": 3e-2, "schedule": "constant", "warmup_ratio": 0.0}
    return lambda **changes: RunConfig(
        **short_run | own | steady | {"eval_fraction": 0.2} | changes
    )


def _adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _expected_reward(model: torch.nn.Module, rows: Any, tokenizer: Any) -> float:
    """Of answers of one token, at temperature 1."""
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(290)]
    found = []
    for (question,), task in zip(rows.rows, rows.tasks, strict=True):
        ids = torch.tensor([question.input_ids])
        chances = model(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1)
        found.append(float(chances @ torch.tensor([task.reward(text) for text in texts])))
    return sum(found) / len(found)


def test_rewarded_answers_become_likelier(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, make_run: MakeRun
) -> None:
    config = make_run(max_new_tokens=1, batch_size=32, group_size=16)
    data = prepare_data(config, tokenizer)
    torch.manual_seed(0)
    model = attach_adapters(make_model(), "attention+shared", r=8)
    trainer = make_trainer(model, config, data, tokenizer)
    assert list(model.peft_config) == ["default"]
    before, chance = _adapters(model), _expected_reward(model, data.held_out, tokenizer)
    trainer.train()
    assert _expected_reward(model, data.held_out, tokenizer) > chance + 0.2
    after = _adapters(model)
    assert after.keys() == before.keys()
    assert not [name for name in after if torch.equal(after[name], before[name])]
    # What is held out is measured greedily, and logged as such.
    log = trainer.state.log_history
    asked: dict[str, Any] = {"max_new_tokens": 1, "batch_size": 32}
    held = [entry["eval_reward"] for entry in log if "eval_reward" in entry]
    assert len(held) == 2
    assert held[-1] == mean_reward(model, data.held_out, tokenizer, **asked)  # type: ignore[arg-type]
    drawn = [entry for entry in log if "reward" in entry]
    assert len(drawn) == 8
    assert all(entry["tokens"] > 0 and entry["kl"] >= 0 for entry in drawn)
    # Questions and answers of every row, each once.
    assert [entry["tokens"] for entry in drawn] == [entry["num_tokens"] for entry in drawn]


def test_nothing_is_learned_from_behind_the_end_of_an_answer(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, make_run: MakeRun
) -> None:
    config = make_run(max_new_tokens=24)
    lines = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    for line in lines[::2]:
        line["stop"] = "e"
    Path(config.data).write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = prepare_data(config, tokenizer)
    model = attach_adapters(make_model(), "attention+shared", r=8)
    trainer: Any = make_trainer(model, config, data, tokenizer)
    rows = [{"prompt": str(i), "task": i} for i in range(len(data.train)) for _ in range(8)]
    torch.manual_seed(0)
    got = trainer._generate_and_score_completions(rows)
    cut = 0
    for row, ids, mask in zip(rows, got["completion_ids"], got["completion_mask"], strict=True):
        learned = ids[mask.bool()].tolist()
        text, before = (
            tokenizer.decode(x, skip_special_tokens=True) for x in (learned, learned[:-1])
        )
        if data.train.tasks[row["task"]].question.stop is None:
            assert len(learned) == 24 or learned[-1] in trainer.eos_token_ids
        else:
            assert "e" not in before
            cut += "e" in text and len(learned) < 24
    assert cut > 4


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
def test_left_pads_change_no_probability(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    make_run: MakeRun,
    stir: Callable[[torch.nn.Module], None],
    kind: str,
) -> None:
    """What the update is computed from is what every answer has behind its question alone."""
    config = make_run(beta=0.0)
    data = prepare_data(config, tokenizer)
    model = attach_adapters(make_model(kind), "attention", r=4)
    stir(model)
    trainer: Any = make_trainer(model, config, data, tokenizer)
    prompts = [{"prompt": str(at), "task": at} for at in (0, 0, 3, 3)]
    trainer.num_generations = 2
    model.train()
    made = trainer._generate_and_score_completions(prompts)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    assert made["prompt_mask"][:, 0].tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    keep = made["completion_ids"].shape[1]
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]
        for row in range(4):
            alone = ids[row, mask[row].bool()][None]
            count = int(made["completion_mask"][row].sum())
            logp = model(input_ids=alone, use_cache=False).logits[0].float().log_softmax(-1)
            expected = logp[:-1].gather(-1, alone[0, 1:, None])[-count:, 0]
            torch.testing.assert_close(found[row, :count], expected, atol=2e-4, rtol=1e-4)


def test_a_stopped_run_of_grpo_continues_to_the_same_bits(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, make_run: MakeRun
) -> None:
    config = make_run(max_steps=4, eval_steps=4, save_steps=2, batch_size=8, accumulation=2)
    data = prepare_data(config, tokenizer)

    def run(output: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = attach_adapters(make_model(), "attention", r=4)
        named = dataclasses.replace(config, output=config.output + output)
        make_trainer(model, named, data, tokenizer).train(resume_from_checkpoint=resume)
        return _adapters(model)

    whole = run("-whole")
    resumed = run("-resumed", f"{config.output}-whole/checkpoint-2")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
