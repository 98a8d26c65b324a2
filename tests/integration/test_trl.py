# SPDX-License-Identifier: Apache-2.0
"""TRL's supervised trainer on our models with our adapters, as its own settings have it."""

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


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["v4", "v41"])
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
