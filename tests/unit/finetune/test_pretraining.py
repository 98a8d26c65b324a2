# SPDX-License-Identifier: Apache-2.0
"""Pretraining by the Trainer is the loop that one would write by hand, and can be stopped."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.checkpoints import last_checkpoint
from finetune.expert_balance import ExpertBalance
from finetune.indexer_training import IndexerTeacher
from finetune.interruption import Interrupted
from finetune.pretraining import Pretrainer, pretrain
from finetune.pretraining_groups import make_optimizer
from finetune.pretraining_settings import Pretraining, Step, read_steps, schedule
from finetune.token_batches import TokenBatches

MakeModel = Callable[..., PreTrainedModel]
BOS = 0
RUN = Pretraining(steps=6, rows=2, length=24, warmup=2, document_start=BOS)


@pytest.fixture
def tokens() -> np.ndarray:
    """Documents of 12 to 40 tokens that count upwards."""
    dice = np.random.default_rng(0)
    documents = [
        [BOS, *range(start, start + size)]
        for start, size in zip(dice.integers(3, 200, 60), dice.integers(12, 40, 60), strict=True)
    ]
    return np.array([i for d in documents for i in d], dtype=np.uint16)


def by_hand(model: PreTrainedModel, tokens: np.ndarray, run: Pretraining) -> list[float]:
    """What `pretrain` should do, in plain torch: losses of the language model."""
    model.train()
    config = model.config
    batches = TokenBatches(tokens, run.length, run.rows, run.steps, run.seed, run.document_start)
    optimizer = make_optimizer(model, run.rates, run.matrix_decay)
    peaks = [g["lr"] for g in optimizer.param_groups]
    balance, teacher = ExpertBalance(model.model.layers), IndexerTeacher(model)
    sparse = config.index_topk, config.candidate_topk_blocks
    losses = []
    for step in range(run.steps):
        if step < run.sparse_from * run.steps:
            config.index_topk = config.candidate_topk_blocks = 1 << 20
        loss = model(**batches[step]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, run.steps, run.warmup, run.floor)
        optimizer.step()
        optimizer.zero_grad()
        balance.step(run.balance_rate * (1 - step / run.steps))
        config.index_topk, config.candidate_topk_blocks = sparse
        losses.append(loss.item() - teacher.added)
    balance.remove()
    teacher.remove()
    return losses


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether every tensor is the same, bit by bit; biases of routers are among them."""
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_run_is_the_plain_loop_bit_by_bit(make_model: MakeModel, tokens: np.ndarray) -> None:
    reference, model = make_model("v4.1"), make_model("v4.1")
    losses = by_hand(reference, tokens, RUN)
    steps = pretrain(model, tokens, RUN)
    assert [s.loss for s in steps] == losses
    assert same_weights(model, reference)
    assert [s.number for s in steps] == list(range(1, 7))
    assert losses[-1] < losses[0] - 0.3
    assert all(s.index_loss > 0 and s.busiest >= 1 and s.grad_norm > 0 for s in steps)
    assert all(0 < s.utilization < 1 for s in steps)


def test_a_stop_by_signal_loses_nothing(
    make_model: MakeModel, tokens: np.ndarray, tmp_path: Path
) -> None:
    whole, cut, again = (make_model("v4.1", seed=seed) for seed in (0, 0, 5))
    steps = pretrain(whole, tokens, RUN)

    def strike(step: Step, trainer: Pretrainer) -> None:
        if step.number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        pretrain(cut, tokens, RUN, tmp_path, tell=strike)
    assert stopped.value.step == 4
    # Biases have moved, and are no parameters.
    assert cut.model.layers[0].mlp.gate.e_score_correction_bias.any()

    rest: list[int] = []
    told = pretrain(
        again, tokens, RUN, tmp_path, resume=True, tell=lambda s, _: rest.append(s.number)
    )
    assert rest == [5, 6]
    quiet = [dataclasses.replace(s, seconds=0, utilization=0) for s in (*steps, *told)]
    assert quiet[:6] == quiet[6:]
    assert same_weights(again, whole)
    last = last_checkpoint(tmp_path)
    assert last is not None and read_steps(last) == told
    assert last.name == "checkpoint-6"


def test_a_finished_run_that_goes_on_is_as_it_was(
    make_model: MakeModel, tokens: np.ndarray, tmp_path: Path
) -> None:
    first, again = make_model("v4.1"), make_model("v4.1", seed=1)
    steps = pretrain(first, tokens, RUN, tmp_path, stop_at=2)
    assert pretrain(again, tokens, RUN, tmp_path, resume=True, stop_at=2) == steps
    assert same_weights(first, again)
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(first, tokens, RUN, tmp_path)
    other = dataclasses.replace(RUN, rate=1.0, checkpoint_minutes=1)
    with pytest.raises(ValueError, match="got another rate; give another directory"):
        pretrain(first, tokens, other, tmp_path, resume=True)
    with pytest.raises(ValueError, match="got another data; give another directory"):
        pretrain(first, tokens[::-1].copy(), RUN, tmp_path, resume=True)


def test_checkpoints_come_by_the_clock(
    make_model: MakeModel, tokens: np.ndarray, tmp_path: Path
) -> None:
    found = []
    often = dataclasses.replace(RUN, steps=3, checkpoint_minutes=0)
    pretrain(
        make_model("v4.1"),
        tokens,
        often,
        tmp_path,
        tell=lambda s, _: found.append(len(list(tmp_path.glob("checkpoint-*")))),
    )
    # Told before it is saved; the newest two stay.
    assert found == [0, 1, 2]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_a_checkpoint_of_the_dense_phase_says_how_the_model_selects(
    make_model: MakeModel, tokens: np.ndarray, tmp_path: Path
) -> None:
    model, seen = make_model("v4.1"), []
    model.register_forward_pre_hook(lambda m, _: seen.append(m.config.index_topk))
    own = model.config.index_topk
    pretrain(model, tokens, dataclasses.replace(RUN, steps=4), tmp_path)
    assert [k > 1000 for k in seen] == [True, True, False, False]
    pretrain(make_model("v4.1"), tokens, RUN, tmp_path / "early", stop_at=1)
    written = json.loads((tmp_path / "early/checkpoint-1/config.json").read_text())
    assert written["index_topk"] == own == model.config.index_topk


def test_accumulated_batches_are_one_large_one(make_model: MakeModel, tokens: np.ndarray) -> None:
    large, small = make_model("v4.1"), make_model("v4.1")
    # Marks of documents would make batches of unequal many labels.
    plain = dataclasses.replace(RUN, document_start=None, rows=4, steps=2)
    wanted = pretrain(large, tokens, plain)
    found = pretrain(small, tokens, dataclasses.replace(plain, rows=1, accumulation=4))
    for one, other in zip(wanted, found, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=2e-3)
        assert other.busiest == pytest.approx(one.busiest, abs=0.1)
    assert found[0].loss == pytest.approx(wanted[0].loss, abs=1e-5)


def test_a_document_learns_nothing_from_the_one_before(
    make_model: MakeModel, tokens: np.ndarray
) -> None:
    model = make_model("v4.1")
    rows = TokenBatches(tokens, 24, 16, 1, 1, BOS)[0]
    starts = [int((places == 0).nonzero()[-1]) for places in rows["position_ids"]]
    which, at = next((i, at) for i, at in enumerate(starts) if 4 < at < 20)
    row = {key: value[which] for key, value in rows.items()}
    other = row["input_ids"].clone()
    other[:at] = 7
    places = row["position_ids"][None]
    with torch.no_grad():
        apart, across = (
            [model(input_ids=ids[None], **how).logits[0, at:] for ids in (row["input_ids"], other)]
            for how in ({"position_ids": places}, {})
        )
    torch.testing.assert_close(*apart, atol=1e-5, rtol=0)
    assert (across[0] - across[1]).abs().max() > 0.1


def test_what_is_added_to_the_loss_trains_and_is_not_told(
    make_model: MakeModel, tokens: np.ndarray
) -> None:
    plain, heavy = make_model("v4.1"), make_model("v4.1")
    wanted = pretrain(plain, tokens, RUN, stop_at=2)
    found = pretrain(
        heavy,
        tokens,
        RUN,
        stop_at=2,
        more_loss=lambda outputs: 5 + 0.1 * outputs.logits.square().mean(),
    )
    assert found[0].loss == pytest.approx(wanted[0].loss, abs=1e-5)
    assert found[1].loss != pytest.approx(wanted[1].loss, abs=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(make_model: MakeModel, tokens: np.ndarray) -> None:
    model = make_model("v4.1")

    def spoil(step: Step, trainer: Pretrainer) -> None:
        if step.number == 2:
            model.lm_head.weight.data.fill_(math.nan)

    steps = pretrain(model, tokens, RUN, tell=spoil)
    assert [math.isfinite(s.loss) for s in steps] == [True, True, False]


def test_a_model_is_left_as_it_was_where_a_run_fails(
    make_model: MakeModel, tokens: np.ndarray
) -> None:
    model = make_model("v4.1")
    own = model.config.index_topk

    def fail(outputs: object) -> torch.Tensor:
        raise RuntimeError(f"at {model.config.index_topk}")

    with pytest.raises(RuntimeError, match="at 1048576"):
        pretrain(model, tokens, RUN, more_loss=fail)
    assert model.config.index_topk == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_of_ones_own_are_read_in_their_order(
    make_model: MakeModel, tokens: np.ndarray
) -> None:
    one, other = make_model("v4.1"), make_model("v4.1")
    batches = [TokenBatches(tokens, 24, 2, 3, RUN.seed, BOS)[i] for i in range(3)]
    assert [s.loss for s in pretrain(one, batches, RUN, stop_at=3)] == [
        s.loss for s in pretrain(other, tokens, RUN, stop_at=3)
    ]
    # As wide and as many as they like.
    row = torch.arange(30)[None]
    batches[1] = {"input_ids": row, "labels": row}
    assert len(pretrain(one, batches, RUN, stop_at=3)) == 3
    with pytest.raises(ValueError, match="wanted 4 batches, got 3"):
        pretrain(one, batches, RUN, stop_at=4)


def test_wrong_settings_are_refused(make_model: MakeModel, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rows: wanted at least 1, got 0"):
        Pretraining(rows=0)
    with pytest.raises(ValueError, match="stop_at: wanted 1 to 6 steps, got 7"):
        pretrain(make_model("v4.1"), tokens, RUN, stop_at=7)
    with pytest.raises(ValueError, match="matrix_rate: wanted a finite number of at least 0"):
        Pretraining(matrix_rate=-1.0)
    with pytest.raises(ValueError, match="sparse_from: wanted a fraction of the steps"):
        Pretraining(sparse_from=7)
    size = make_model("v4.1").config.vocab_size
    with pytest.raises(ValueError, match=rf"data: wanted ids of 0 to {size - 1}, got 1000 to"):
        pretrain(make_model("v4.1"), tokens.astype(np.int64) + 1000, Pretraining(1, 6, 2, 24))
    with pytest.raises(ValueError, match=r"tokens: wanted .n. ids, got float64"):
        pretrain(make_model("v4.1"), tokens.astype(np.float64), RUN)
    with pytest.raises(ValueError, match="document_start: wanted an id of the stream, got 289"):
        pretrain(make_model("v4.1"), tokens, dataclasses.replace(RUN, document_start=289))


def test_the_schedule_rises_once_and_ends_at_its_floor() -> None:
    rates = [schedule(i, 100, 10, floor=0.1) for i in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1
    assert rates[100] == pytest.approx(0.1)
