# SPDX-License-Identifier: Apache-2.0
"""Pads leave no trace: in a batch, every choice and every written token is that of the row alone.

`test_exactness.py` compares logits. Here it is what lies behind them: which entries a query chose,
which experts it was sent to, which rows of memory it read. All of these are integers, equal or not.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, trace

Found = dict[str, torch.Tensor]
WIDTH, STEPS = 41, 5
# (pads on the left, on the right) of every row.
LAYOUTS = {
    "left": [(0, 0), (14, 0)],
    "right": [(0, 0), (0, 36)],
    "mixed": [(13, 0), (0, 18), (9, 11)],
}


@pytest.fixture(scope="module", params=["v4", "v41"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(request.param, torch.float64)


def _batch(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask: pads hold random ids, which nothing may read."""
    pads = LAYOUTS[layout]
    ids = torch.randint(0, 64, (len(pads), WIDTH))
    column = torch.arange(WIDTH)
    mask = torch.stack([(column >= a) & (column < WIDTH - b) for a, b in pads])
    return ids, mask.long()


def _choices(found: Found, row: int, rows: int, tokens: int) -> dict[str, list[Any]]:
    """The integers of one row's first `tokens` real tokens, by name."""
    taken: dict[str, list[Any]] = {}
    for name, x in found.items():
        if name.endswith(("indexer.ids", "indexer.candidates")):
            taken[name] = [{int(i) for i in ids if i >= 0} for ids in x[row, :tokens]]
        elif name.endswith("gate.indices"):
            taken[name] = x.view(rows, -1, x.shape[-1])[row, :tokens].sort(-1).values.tolist()
        elif name.endswith("engram.rows"):
            taken[name] = x[row, :tokens].tolist()
    return taken


def _check_choices(model: Any, batch: dict[str, list[Any]], alone: dict[str, list[Any]]) -> None:
    """Equal; a row alone may be so short that its layer takes all entries without choosing."""
    assert alone.keys() <= batch.keys()
    for name, chosen in batch.items():
        if name in alone:
            assert chosen == alone[name], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_choice_of_a_padded_row_is_that_of_the_row_alone(model: Any, layout: str) -> None:
    ids, mask = _batch(layout)
    found = trace(model, input_ids=ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        text = ids[row : row + 1, real]
        alone = trace(model, input_ids=text)
        n = text.shape[1]
        batch_choices = _choices(found, row, len(ids), n)
        _check_choices(model, batch_choices, _choices(alone, 0, 1, n))
        for name in found.keys() - alone.keys():
            # Nothing to choose alone: in the batch the row takes all that it sees.
            ratio = model.config.compress_ratios[int(name.split(".")[1])]
            if name.endswith("indexer.ids"):
                assert batch_choices[name] == [set(range((t + 1) // ratio)) for t in range(n)]


@torch.no_grad()
def _write(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[Found]]:
    """Greedy tokens [rows, STEPS], and a trace of each decoding step."""
    # Rings without slack: what is not written right is overwritten at once.
    cache = Dsv4Cache(model.config, max_rewind=0)
    out = model(ids, attention_mask=mask, past_key_values=cache)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    logits = out.logits[torch.arange(len(ids)), last]
    said, traces = [logits.argmax(-1)], []
    while len(said) < STEPS:
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        found = trace(
            model,
            input_ids=said[-1][:, None],
            attention_mask=mask,
            past_key_values=cache,
        )
        traces.append(found)
        said.append(found["logits"][:, -1].argmax(-1))
    return torch.stack(said, 1), traces


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_rows_write_and_choose_what_each_row_alone_does(model: Any, layout: str) -> None:
    ids, mask = _batch(layout)
    said, traces = _write(model, ids, mask)
    assert said.unique().numel() > 3
    for row, real in enumerate(mask.bool()):
        text = ids[row : row + 1, real]
        expected, alone = _write(model, text, torch.ones_like(text))
        assert torch.equal(said[row : row + 1], expected)
        for found, wanted in zip(traces, alone, strict=True):
            _check_choices(model, _choices(found, row, len(ids), 1), _choices(wanted, 0, 1, 1))


@torch.no_grad()
def test_a_decoded_token_chooses_what_it_chooses_in_one_pass(model: Any) -> None:
    ids = torch.randint(0, 64, (1, WIDTH))
    full = trace(model, input_ids=ids)
    cache = model(ids[:, :-STEPS], use_cache=True).past_key_values
    for at in range(WIDTH - STEPS, WIDTH):
        step = trace(model, input_ids=ids[:, at : at + 1], past_key_values=cache)
        chosen, wanted = _choices(step, 0, 1, 1), _choices(full, 0, 1, at + 1)
        assert chosen == {name: values[-1:] for name, values in wanted.items()}
