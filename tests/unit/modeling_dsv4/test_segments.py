# SPDX-License-Identifier: Apache-2.0
"""Documents, places and compression windows, as read from masks, positions and borders."""

from typing import Any

import pytest
import torch

from modeling_dsv4.segments import RowState, Segments, find_segments, find_step


def _find(shape: tuple[int, int], state: RowState | None = None, **given: Any) -> Segments:
    return find_segments(shape, state or RowState.empty(shape[0], torch.device("cpu")), **given)


def _continued(ids: int, ratios: list[int], **given: Any) -> RowState:
    """The state behind a first pass of so many tokens in one row."""
    return _find((1, ids), **given).after(ratios)


# --- documents ----------------------------------------------------------------------------------


def test_a_plain_row_is_one_document() -> None:
    s = _find((2, 4))
    assert s.fresh and s.columns is None
    assert s.start.tolist() == [[0] * 4] * 2
    assert s.local.tolist() == s.position.tolist() == [[0, 1, 2, 3]] * 2


def test_pads_are_dropped_and_rows_moved_to_the_left() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    s = _find((4, 5), attention_mask=mask)
    assert s.columns is not None and s.columns[:3].tolist() == [[2, 3, 4], [0, 1, 2], [0, 2, 4]]
    assert s.count.tolist() == [3, 3, 3, 0]
    assert s.position[:3].tolist() == [[0, 1, 2]] * 3
    assert s.valid.tolist() == [[True] * 3] * 3 + [[False] * 3]


def test_a_mask_without_pads_is_no_mask() -> None:
    s = _find((2, 4), attention_mask=torch.ones(2, 9))
    assert s.columns is None and s.fresh


def test_real_tokens_go_back_to_their_columns() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    s = _find((2, 4), attention_mask=mask)
    x = torch.arange(8.0).view(2, 4, 1)
    picked = s.pick(x)
    assert picked[0, :, 0].tolist() == [1, 2, 3] and picked[1, :2, 0].tolist() == [4, 5]
    assert s.restore(picked + 1, 4)[..., 0].tolist() == [[0, 2, 3, 4], [5, 6, 0, 0]]


@pytest.mark.parametrize("how", ["position_ids", "seq_idx", "cu_seq_lens"])
def test_a_restart_begins_a_document(how: str) -> None:
    given = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
        "seq_idx": torch.tensor([[7, 7, 7, 2, 2, 7]]),
        "cu_seq_lens": torch.tensor([0, 3, 5, 6], dtype=torch.int32),
    }
    s = _find((1, 6), **{how: given[how]})
    assert s.start.tolist() == [[0, 0, 0, 3, 3, 5]]
    assert s.local.tolist() == s.position.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert not s.fresh


def test_equal_neighbours_of_one_token_are_two_documents() -> None:
    s = _find((1, 4), position_ids=torch.tensor([[0, 0, 0, 1]]))
    assert s.start.tolist() == [[0, 1, 2, 2]]


def test_positions_may_start_anywhere_and_are_shared_by_the_rows() -> None:
    s = _find((2, 3), position_ids=torch.tensor([[100, 101, 102]]))
    assert s.fresh and s.local.tolist() == [[0, 1, 2]] * 2
    assert s.position.tolist() == [[100, 101, 102]] * 2
    state = s.after([])
    assert _find((2, 2), state).position.tolist() == [[103, 104]] * 2
    following = torch.tensor([[103, 104], [103, 104]])
    assert _find((2, 2), state, position_ids=following).start.tolist() == [[0, 0]] * 2


def test_a_later_pass_continues_the_last_document() -> None:
    state = _continued(5, [], position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert state.seen.tolist() == [5] and state.start.tolist() == [3]
    s = _find((1, 3), state, position_ids=torch.tensor([[2, 3, 0]]))
    assert s.row.tolist() == [[5, 6, 7]]
    assert s.start.tolist() == [[3, 3, 7]] and s.local.tolist() == [[2, 3, 0]]
    assert _find((1, 2), state).position.tolist() == [[2, 3]]


def test_pads_do_not_move_a_state() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    state = _find((2, 4), attention_mask=mask).after([2])
    assert state.seen.tolist() == [2, 0] and state.entries[2].tolist() == [1, 0]
    later = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1]])
    s = _find((2, 2), state, attention_mask=later)
    assert s.row.tolist() == [[2, 3], [0, 1]] and s.count.tolist() == [1, 2]
    assert s.after([2]).seen.tolist() == [3, 2]


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 2, 4, 128])
def test_a_window_is_visible_from_its_last_token_on(ratio: int) -> None:
    for length in (ratio - 1, ratio, ratio + 1, 2 * ratio, 3 * ratio + 1):
        if length:
            w = _find((1, length)).windows(ratio)
            expected = [(t + 1) // ratio for t in range(length)]
            assert w.upto.tolist() == w.own.tolist() == [expected]
            assert w.count.tolist() == [length // ratio]
            assert w.last.tolist() == [[ratio * i + ratio - 1 for i in range(length // ratio)]]


def test_windows_turn_at_the_position_of_their_first_token() -> None:
    s = _find((1, 9), position_ids=torch.arange(30, 39)[None])
    assert s.windows(4).position.tolist() == [[30, 34]]
    state = _continued(6, [4])
    w = _find((1, 7), state).windows(4)
    assert w.last.tolist() == [[1, 5]] and w.position.tolist() == [[4, 8]]
    assert w.upto.tolist() == [[1, 2, 2, 2, 2, 3, 3]]


def test_windows_do_not_reach_across_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    w = _find((1, 9), position_ids=positions).windows(2)
    assert w.last.tolist() == [[1, 4, 6]]
    assert w.position.tolist() == [[0, 0, 2]]
    # Entries count up along the row, but a document sees its own alone.
    assert w.upto.tolist() == [[0, 1, 1, 1, 2, 2, 3, 3, 3]]
    assert w.own.tolist() == [[0, 1, 1, 0, 1, 1, 2, 2, 0]]
    assert w.overlap.tolist() == [[False, False, True]]


def test_the_first_window_of_a_document_overlaps_nothing() -> None:
    assert _find((1, 12)).windows(4).overlap.tolist() == [[False, True, True]]
    state = _continued(5, [4])
    assert _find((1, 7), state).windows(4).overlap.tolist() == [[True, True]]


def test_windows_of_unequal_rows_are_padded() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    w = _find((2, 5), attention_mask=mask).windows(2)
    assert w.last.tolist() == [[1, 3], [1, -1]] and w.count.tolist() == [2, 1]
    assert w.own[1, :3].tolist() == [0, 1, 1]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 4), (2, 3)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape)
    with pytest.raises(ValueError, match=r"attention_mask: wanted \[2, >= 4\]"):
        _find((2, 4), attention_mask=mask)


def test_positions_that_neither_continue_nor_restart_are_refused() -> None:
    state = _continued(5, [])
    with pytest.raises(ValueError, match="stands at position 5, got 9"):
        _find((1, 1), state, position_ids=torch.tensor([[9]]))
    assert _find((1, 1), state, position_ids=torch.tensor([[0]])).start.tolist() == [[5]]


def test_borders_of_another_row_are_refused() -> None:
    with pytest.raises(ValueError, match="one packed row of 5 tokens, got 1 x 4"):
        _find((1, 4), cu_seq_lens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="got 2 x 4"):
        _find((2, 4), cu_seq_lens=torch.tensor([0, 2, 4]))


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, [[2], [0], [5]], [[0], [0], [0]]], ids=str)
@pytest.mark.parametrize("pads", [None, [[1], [1], [0]], [[0], [0], [0]]], ids=str)
def test_a_step_stands_where_any_other_column_stands(positions: Any, pads: Any) -> None:
    # Rows of 2, 0 and 9 tokens, whose last one is in the second document, at its fifth place.
    mask = torch.zeros(3, 9, dtype=torch.long)
    mask[0, 7:], mask[2] = 1, 1
    places = torch.tensor([[0] * 8 + [1], [0] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    state = _find((3, 9), attention_mask=mask, position_ids=places).after([2, 4])
    given = {
        name: torch.tensor(x)
        for name, x in (("position_ids", positions), ("attention_mask", pads))
        if x is not None
    }
    step, other = find_step(state, **given), _find((3, 1), state, **given)
    real = step.valid[:, 0]
    assert torch.equal(step.count, other.count)
    for name in ("row", "start", "position", "local"):
        assert torch.equal(getattr(step, name)[real], getattr(other, name)[real]), name
    states = (step.after([2, 4]).tensors(), other.after([2, 4]).tensors())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    for ratio in (2, 4):
        found, wanted = step.windows(ratio), other.windows(ratio)
        assert found.last.shape == (3, 1)
        assert torch.equal(found.count, wanted.count)
        for name in ("upto", "own"):
            assert torch.equal(getattr(found, name)[real], getattr(wanted, name)[real]), name
    x = torch.randn(3, 1, 4)
    assert torch.equal(step.restore(x, 1), x * real[:, None, None])


def test_a_step_that_may_not_look_takes_all_positions_but_0_to_continue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = _continued(5, [2])
    with pytest.raises(ValueError, match="row 0 stands at position 5, got 7"):
        find_step(state, position_ids=torch.tensor([[7]]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    step = find_step(state, position_ids=torch.tensor([[7]]))
    assert step.position.tolist() == [[5]] and step.start.tolist() == [[0]]
    step = find_step(state, position_ids=torch.tensor([[0]]))
    assert step.position.tolist() == [[0]] and step.start.tolist() == [[5]]
