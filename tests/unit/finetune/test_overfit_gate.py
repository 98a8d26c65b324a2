# SPDX-License-Identifier: Apache-2.0
"""The gate learns what can be learned, says why it could not, and leaves no trace."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.config import RunConfig
from finetune.data import Examples, encode_records
from finetune.overfit_gate import diagnose, run_gate
from finetune.prepare import Prepared
from finetune.records import Record
from finetune.state_files import random_state
from finetune.trainer import AdapterTrainer, make_trainer

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[AdapterTrainer, dict[str, torch.Tensor]]]:
    """A trainer and one batch."""
    records = [
        Record(i, "prompt", {"prompt": f"meter {i}", "completion": f" lasts {i} years"})
        for i in range(3)
    ]
    examples, report = encode_records(records, tokenizer, 64)
    data = Prepared(Examples(examples), None, report, report)
    config = RunConfig("m", "d", str(tmp_path), report_to="none", dropout=0.1)

    def build() -> tuple[AdapterTrainer, dict[str, torch.Tensor]]:
        model = attach_adapters(make_model(), r=4, dropout=0.1)
        trainer = make_trainer(model, config, data, tokenizer)
        return trainer, trainer.data_collator([data.train[i] for i in range(3)])

    return build


def test_a_batch_is_learned_and_nothing_is_changed(make: Callable[..., tuple]) -> None:
    trainer, batch = make()
    model = trainer.model.eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    copies = {key: value.clone() for key, value in batch.items()}
    dice = random_state()
    result = run_gate(trainer, batch, 1e-2)
    assert result.last < 0.5 * result.first
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert torch.equal(random_state()["torch"], dice["torch"])
    assert all(torch.equal(batch[key], copies[key]) for key in copies)


def test_a_failure_is_explained_and_leaves_no_trace_either(make: Callable[..., tuple]) -> None:
    trainer, batch = make()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"from 5\.\d+ to 5\.\d+, wanted below 0\.9 of it"):
        run_gate(trainer, batch, 1e4)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for module in trainer.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, 0.0)
    with pytest.raises(ValueError, match="no gradient reaches the adapters"):
        run_gate(trainer, batch, 1e-2, steps=2)


def test_a_broken_base_is_told_from_a_high_rate(make: Callable[..., tuple]) -> None:
    trainer, batch = make()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite from the start"):
        run_gate(trainer, batch, 1e-2, steps=2)


@pytest.mark.parametrize(
    ("losses", "norms", "labels", "words"),
    [
        ([2.0, 2.0], [1.0, 1.0], 0, "no token of the batch counts"),
        ([2.0, float("inf")], [1.0, 1.0], 4, "much too high"),
        ([2.0, 3.0, 1.9], [1.0, 1.0, 1.0], 4, "the loss jumps"),
        ([2.0, 1.99], [1.0, 1.0], None, "barely moved"),
    ],
)
def test_reasons(losses: list[float], norms: list[float], labels: int | None, words: str) -> None:
    assert words in diagnose(losses, norms, labels)
