# SPDX-License-Identifier: Apache-2.0
"""Batches as transformers' own collators make them: the loss and gradients of each text alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

EXACT = {"atol": 1e-10, "rtol": 0}
LENGTHS = (30, 1, 17, 8)
FORMS: dict[str, dict[str, bool]] = {
    "position_ids": {},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["v4", "v41"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(request.param, torch.float64)


def _loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The summed loss in float64; the model's own is float32."""
    labels = inputs["labels"][:, 1:].flatten()
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**rest, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def _learn(model: Any, runs: list[dict[str, Any]]) -> tuple[float, Gradients]:
    model.zero_grad()
    losses = [_loss(model, inputs) for inputs in runs]
    torch.stack(losses).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sum(loss.item() for loss in losses), grads


@pytest.mark.parametrize("form", FORMS)
def test_a_flattened_batch_teaches_what_each_text_alone_teaches(model: Any, form: str) -> None:
    texts = [torch.randint(3, 64, (n,)) for n in LENGTHS]
    batch = DataCollatorWithFlattening(return_tensors="pt", **FORMS[form])(
        [{"input_ids": ids.tolist()} for ids in texts]
    )
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    # A text of one token has nothing to predict, but it may not join its neighbours either.
    alone = [{"input_ids": t[None], "labels": t[None]} for t in texts if len(t) > 1]
    expected, wanted = _learn(model, alone)
    loss, found = _learn(model, [batch])
    assert loss == pytest.approx(expected, abs=1e-9)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        # The slope of the Engram gate reaches 125, and single-pass norms have no epsilon.
        scale = float(grad.abs().max()) + 1
        torch.testing.assert_close(found[name], grad, atol=1e-9 * scale, rtol=1e-7, msg=name)


@torch.no_grad()
def test_the_loss_of_any_batch_is_the_mean_over_its_predicted_tokens(model: Any) -> None:
    texts = [torch.randint(3, 64, (n,)) for n in LENGTHS]
    alone = sum(_loss(model, {"input_ids": t[None], "labels": t[None]}) for t in texts)
    mean = float(alone) / sum(n - 1 for n in LENGTHS)
    features = [{"input_ids": t.tolist()} for t in texts]
    packed = DataCollatorWithFlattening(return_tensors="pt")(features)
    rows, mask, labels = (torch.full((4, 30), fill) for fill in (2, 0, -100))
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if row % 2 else slice(30 - len(text), 30)
        rows[row, place], mask[row, place], labels[row, place] = text, 1, text
    padded = {"input_ids": rows, "attention_mask": mask, "labels": labels}
    # A text that begins behind pads predicts its second token first: the pad's label is its first.
    first = (mask.cumsum(1) == 1) & mask.bool()
    padded["labels"] = labels.masked_fill(first, -100)
    for batch in (packed, padded):
        assert float(model(**batch, use_cache=False).loss) == pytest.approx(mean, rel=1e-5)


@torch.no_grad()
def test_a_document_knows_nothing_of_the_one_before(model: Any) -> None:
    texts = [torch.randint(3, 64, (n,)) for n in LENGTHS]
    other = [(texts[0] + 1) % 64, *texts[1:]]
    for form in FORMS.values():
        collate = DataCollatorWithFlattening(return_tensors="pt", **form)
        logits = [
            model(**collate([{"input_ids": ids.tolist()} for ids in some])).logits[0, 30:]
            for some in (texts, other)
        ]
        # Not bit for bit: experts sum in another order when other tokens sit beside.
        torch.testing.assert_close(*logits, **EXACT)


@torch.no_grad()
def test_packing_needs_neither_a_cache_nor_a_mask(model: Any) -> None:
    texts = [torch.randint(3, 64, (n,)) for n in LENGTHS]
    batch = DataCollatorWithFlattening(return_tensors="pt")(
        [{"input_ids": ids.tolist()} for ids in texts]
    )
    del batch["labels"]
    expected = torch.cat([model(t[None], use_cache=False).logits[0] for t in texts])
    for use_cache in (False, True):
        for more in ({}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
            logits = model(**batch, use_cache=use_cache, **more).logits[0]
            torch.testing.assert_close(logits, expected, **EXACT)
