# SPDX-License-Identifier: Apache-2.0
"""Inputs of each step of `generate`: numbers of documents, and where a prompt's end is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=["v4", "v41"])
def model(request: pytest.FixtureRequest, tiny: Make) -> Any:
    return tiny(request.param, torch.float64)


def _write(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **settings, **given)[:, ids.shape[1] :]


@pytest.mark.parametrize("columns", [60, 230])
@pytest.mark.parametrize("how", ["seq_idx", "cu_seq_lens_q", "position_ids"])
def test_a_packed_prompt_is_continued_as_its_last_document(
    model: Any, how: str, columns: int
) -> None:
    ids = torch.randint(3, 64, (1, columns))
    borders = torch.tensor([0, 20, columns])
    given = {
        "seq_idx": (torch.arange(columns) >= 20).long()[None],
        "cu_seq_lens_q": borders,
        "position_ids": torch.cat((torch.arange(20), torch.arange(columns - 20)))[None],
    }
    assert torch.equal(_write(model, ids, **{how: given[how]}), _write(model, ids[:, 20:]))


def test_numbers_of_documents_want_a_cache(model: Any) -> None:
    ids, numbers = torch.randint(3, 64, (1, 30)), (torch.arange(30) >= 20).long()[None]
    with pytest.raises(ValueError, match="leave use_cache on"):
        _write(model, ids, seq_idx=numbers, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1])
def test_positions_go_on_behind_a_document_that_a_number_began(model: Any, kept: int) -> None:
    ids, more = torch.randint(3, 64, (1, 230)), torch.randint(3, 64, (1, 1))
    numbers, cache = (torch.arange(230) >= 20).long()[None], Dsv4Cache(model.config)
    places = torch.arange(231)[None]
    given = {"seq_idx": numbers, "position_ids": places[:, :230], "logits_to_keep": kept}
    model(ids, past_key_values=cache, **given)
    out = model(more, position_ids=places[:, 230:], past_key_values=cache).logits
    alone = model(torch.cat((ids[:, 20:], more), 1)).logits[:, -1:]
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=0)


def test_what_is_kept_must_be_a_number_of_tokens(model: Any) -> None:
    ids = torch.randint(3, 64, (1, 9))
    with pytest.raises(ValueError, match="wanted 0"):
        model(ids, logits_to_keep=-5)
    for wrong in (0, -5):
        with pytest.raises(ValueError, match="wanted at least 1"):
            model.model(ids, last_tokens=wrong)
