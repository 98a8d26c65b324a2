# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on our models with our adapters, as TRL's own settings have them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune import attach_adapters

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset
WORDS = "<bos> <eos> <pad> <unk> meter battery lasts years is not of the".split() + [
    str(i) for i in range(30)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _pairs() -> Any:
    """Documents of 5 to 13 tokens."""
    return Dataset.from_list(
        [
            {"prompt": f"meter {i} of" + " the" * (i % 9), "completion": f" lasts {i} years"}
            for i in range(24)
        ]
    )


def _trainer(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any
) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trl.SFTTrainer(
        model=attach_adapters(model, r=4),
        args=trl.SFTConfig(**settings | changes),
        train_dataset=_pairs(),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(("kind", "packing"), [("v4", True), ("v41", False)])
def test_a_few_steps_lower_the_loss(
    tiny: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    kind: str,
    packing: bool,
) -> None:
    """TRL switches autocast on, and asks the config for experts and an auxiliary loss."""
    model = tiny(kind)
    experts = model.config.n_routed_experts
    assert (model.config.num_experts, model.config.num_local_experts) == (experts, experts)
    trainer = _trainer(model, tokenizer, tmp_path, packing=packing)
    assert trainer.args.bf16
    assert not trainer.aux_loss_enabled
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trainer.optimizer.state) == len(trained)


@pytest.mark.parametrize("kind", ["v4", "v41"])
def test_a_packed_batch_is_its_documents(
    tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    trainer = _trainer(tiny(kind), tokenizer, tmp_path, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    stops = [*starts[1:], batch["input_ids"].shape[1]]
    assert len(starts) > 8
    model = trainer.model.eval()
    with torch.no_grad():
        packed = model(**batch).logits[0]
        for start, stop in zip(starts, stops, strict=True):
            alone = model(input_ids=batch["input_ids"][:, start:stop]).logits[0]
            torch.testing.assert_close(packed[start:stop], alone, atol=2e-4, rtol=1e-4)


def _count_years(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.split().count("years")) for text in completions]


@pytest.mark.parametrize("kind", ["v4", pytest.param("v41", marks=pytest.mark.slow)])
def test_rewarded_words_become_more_frequent(
    tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    """GRPO generates in batches that are padded on the left."""
    prompts = [{"prompt": f"meter {i} of" + " the" * (i % 5)} for i in range(16)]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trl.GRPOTrainer(
        model=attach_adapters(tiny(kind), "attention", r=4),
        reward_funcs=_count_years,
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])


TASK = """
task: meters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.slow
def test_lm_eval_measures_base_and_adapter(
    tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its harness, offline, on models that are loaded already."""
    harness = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    texts = [f"the meter lasts {i} years and the battery {i} of the" for i in range(6)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    task = TASK.replace("FILE", str(tmp_path / "texts.jsonl"))
    (tmp_path / "meters.yaml").write_text(task)
    base = tiny("v4")

    def measure(model: Any) -> tuple[float, float]:
        held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
        found = harness.simple_evaluate(
            model=held,
            tasks=["meters"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0,
        )["results"]["meters"]["bits_per_byte,none"]
        nats = 0.0
        for text in texts:
            ids = torch.tensor([[0, *tokenizer(text).input_ids]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits.log_softmax(-1)
            nats -= float(logp[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        return found, nats / math.log(2) / sum(len(text.encode()) for text in texts)

    results = [measure(base)]
    model = attach_adapters(base, r=4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    results.append(measure(model))
    for theirs, ours in results:
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert abs(results[0][0] - results[1][0]) > 0.01
