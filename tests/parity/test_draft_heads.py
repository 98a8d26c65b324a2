# SPDX-License-Identifier: Apache-2.0
"""What draft heads guess, against the official reference: after every step of decoding.

As with logits, two right implementations differ by about 1e-4; a wrong reading point, position or
mask by more than 0.1.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache

DSPARK = ["v4_c_bf16_dspark", "v41_a_bf16", "v41_c_bf16"]
ATOL = 5e-4
Load = Callable[[str], Any]


def _drafting_cache(model: Any, **more: Any) -> Dsv4Cache:
    cache = Dsv4Cache(model.config, **more)
    cache.drafts.begin(None)
    return cache


@torch.no_grad()
def _drafts(case: Any, chunks: list[int], **more: Any) -> list[Any]:
    """The drafts behind the last chunks, made on the reference's own guesses."""
    model, ids, types = case.model, case.inputs["input_ids"], case.inputs.get("token_types")
    cache, at, drafts = _drafting_cache(model, **more), 0, []
    forced = case.expected["spec_output_ids_f32"].long()
    count, first = case.expected["spec_logits_f32"].shape[1], ids.shape[1] - len(forced)
    for size in chunks:
        told = {} if types is None else {"token_types": types[:, at : at + size]}
        model(ids[:, at : at + size], past_key_values=cache, **told)
        at += size
        if at <= first:
            continue
        guesses = forced[at - 1 - first]

        def pick(tokens: torch.Tensor, _: torch.Tensor, guesses: Any = guesses) -> torch.Tensor:
            return guesses[tokens.shape[1] + 1][None]

        state = cache.state
        drafts.append(model.mtp.propose(model, guesses[:1], count, state, cache.drafts, pick))
    return drafts


@pytest.mark.parametrize("name", DSPARK)
def test_dspark_guesses_what_the_reference_guesses(golden: Load, name: str) -> None:
    case = golden(name)
    logits, confidence = (case.expected[f"spec_{k}_f32"] for k in ("logits", "confidence"))
    steps = 10
    # The prompt in two chunks, the second shorter than a window.
    prompt = case.inputs["input_ids"].shape[1] - steps
    drafts = _drafts(case, [prompt - 7, 7] + [1] * steps)[-steps:]
    for draft, wanted, sure in zip(drafts, logits[-steps:], confidence[-steps:], strict=True):
        torch.testing.assert_close(draft.logits[0], wanted, atol=ATOL, rtol=0)
        torch.testing.assert_close(draft.confidence[0], sure, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", DSPARK)
def test_a_prompt_in_one_pass_leaves_the_same_keys(golden: Load, name: str) -> None:
    case = golden(name)
    (draft,) = _drafts(case, [case.inputs["input_ids"].shape[1]])
    torch.testing.assert_close(
        draft.logits[0], case.expected["spec_logits_f32"][-1], atol=ATOL, rtol=0
    )


@torch.no_grad()
def test_mtp_guesses_what_the_reference_guesses(golden: Load) -> None:
    case = golden("v4_b_bf16_mtp")
    model, ids, wanted = case.model, case.inputs["input_ids"], case.expected["mtp_logits_f32"]
    cache, first = _drafting_cache(model), ids.shape[1] - 10
    model(ids[:, :first], past_key_values=cache)
    found = []
    for at in range(first, ids.shape[1]):

        def pick(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return logits.argmax(-1)

        draft = model.mtp.propose(model, ids[:, at], 1, cache.state, cache.drafts, pick)
        found.append(draft.logits[0, 0])
        model(ids[:, at : at + 1], past_key_values=cache)
    torch.testing.assert_close(torch.stack(found), wanted[-len(found) :], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", DSPARK)
def test_the_point_where_streams_are_read_matters(golden: Load, name: str) -> None:
    # The wrong one does not fail, its guesses are merely seldom right.
    case, head = golden(name), golden(name).model.mtp
    wanted, right = case.expected["spec_logits_f32"][-1], head.points
    layers = case.model.config.num_hidden_layers
    try:
        shift = -1 if case.model.config.dspark_reads_outputs else 1
        head.points = tuple(min(i + shift, layers) for i in right)
        (draft,) = _drafts(case, [case.inputs["input_ids"].shape[1]])
    finally:
        head.points = right
    assert (draft.logits[0] - wanted).abs().max() > 0.1
