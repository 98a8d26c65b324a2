# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: scores, choice, candidate blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import indexer as indexer_module
from modeling_dsv4.formats import hadamard
from modeling_dsv4.indexer import Indexer, Selection, visible
from modeling_dsv4.rotary import rotate, rotation
from modeling_dsv4.segments import RowState, Segments, find_segments

S = 30
Make = Callable[..., Indexer]


@pytest.fixture
def make(tiny_config: Callable[..., Any], enliven: Callable[..., None]) -> Make:
    def build(kind: str, layer: int, **changes: Any) -> Indexer:
        config = tiny_config(kind, **changes)
        module = Indexer(config, layer, config.compress_ratios[layer])
        enliven(module)
        return module.double()

    return build


def _segments(columns: int = S, **given: Any) -> Segments:
    return find_segments((1, columns), RowState.empty(1, torch.device("cpu")), **given)


@torch.no_grad()
def _run(
    m: Indexer, segments: Segments, keys: torch.Tensor, before: Selection | None = None
) -> tuple[Selection, torch.Tensor]:
    """What the indexer chooses, and its scores [S, T] from the equation."""
    generator = torch.Generator().manual_seed(3)
    s = segments.row.shape[1]
    x = torch.randn(1, s, 32, generator=generator).double()
    q_latent = torch.randn(1, s, 16, generator=generator).double()
    turn = rotation(segments.position, m.config, compressed=True)
    chosen = m(x, q_latent, keys, turn, segments, before or Selection())
    scores = torch.zeros(s, keys.shape[1]).double()
    for h in range(m.heads):
        q = q_latent[0] @ m.q_b_proj.weight[h * 8 : (h + 1) * 8].T
        q = rotate(q, turn[0])
        w = x[0] @ m.weights_proj.weight[h] / (8 * m.heads) ** 0.5
        scores += (q @ keys[0].T).clamp(min=0) * w[:, None]
    return chosen, scores


def _sets(ids: torch.Tensor) -> list[set[int]]:
    return [{int(i) for i in row if i >= 0} for row in ids[0]]


def _best(scores: torch.Tensor, allowed: torch.Tensor, k: int) -> list[set[int]]:
    found = []
    for row, keep in zip(scores, allowed, strict=True):
        ids = keep.nonzero().flatten()
        found.append(set(ids[row[ids].argsort(descending=True)[:k]].tolist()))
    return found


@pytest.mark.parametrize(("kind", "layer", "ratio"), [("v4", 1, 4), ("v41", 1, 2), ("v41", 3, 1)])
def test_the_best_visible_entries_are_chosen(make: Make, kind: str, layer: int, ratio: int) -> None:
    m, segments = make(kind, layer, index_topk=3), _segments()
    keys = torch.randn(1, S // ratio, 8, dtype=torch.float64)
    chosen, scores = _run(m, segments, keys)
    allowed = torch.arange(S // ratio) < ((torch.arange(S) + 1) // ratio)[:, None]
    assert _sets(chosen.ids) == _best(scores, allowed, 3)
    assert chosen.ids.dtype is torch.int32


@torch.no_grad()
def test_scores_are_scaled_by_the_roots_of_channels_and_heads(make: Make) -> None:
    # No choice depends on it; whoever trains the indexer on its scores does.
    m, segments, keys = make("v4", 1), _segments(), torch.randn(1, 7, 8).double()
    seen: list[torch.Tensor] = []
    m._scores = lambda *args: seen.append(Indexer._scores(m, *args)) or seen[-1]
    _, scores = _run(m, segments, keys)
    found, allowed = torch.cat(seen, 1)[0], visible(segments.windows(4), slice(0, S), 7)[0]
    torch.testing.assert_close(found[allowed], scores[allowed], atol=1e-6, rtol=1e-5)
    assert bool((found[~allowed] == -torch.inf).all()) and 0 < int(allowed.sum()) < 7 * S


def test_a_query_that_sees_fewer_entries_than_k_chooses_fewer(make: Make) -> None:
    chosen, _ = _run(make("v4", 1), _segments(), torch.randn(1, 7, 8).double())
    assert [len(ids) for ids in _sets(chosen.ids)] == [min((t + 1) // 4, 4) for t in range(S)]


def test_with_no_more_entries_than_k_all_that_is_visible_is_chosen(make: Make) -> None:
    chosen, _ = _run(make("v4", 1), _segments(), torch.randn(1, 4, 8).double())
    assert chosen.ids is None and chosen.candidates is None


def test_documents_choose_among_their_own_entries(make: Make) -> None:
    positions = torch.cat((torch.arange(17), torch.arange(13)))[None]
    segments = _segments(position_ids=positions)
    m, keys = make("v41", 1, index_topk=3), torch.randn(1, 14, 8).double()
    chosen, scores = _run(m, segments, keys)
    entry, token = torch.arange(14), torch.arange(S)[:, None]
    first = torch.where(token < 17, 0, 8)
    allowed = (entry >= first) & (entry < first + (positions[0][:, None] + 1) // 2)
    assert torch.equal(visible(segments.windows(2), slice(0, S), 14)[0], allowed)
    assert _sets(chosen.ids) == _best(scores, allowed, 3)


def test_blocks_of_queries_choose_what_one_block_chooses(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in (3, 5):
        m, keys = make("v41", layer), torch.randn(1, S, 8).double()
        before = Selection(None, _run(make("v41", 3), _segments(), keys)[0].candidates)
        whole, _ = _run(m, _segments(), keys, before if layer == 5 else None)
        monkeypatch.setattr(indexer_module, "_BLOCK_NUMBERS", 7 * S * (m.heads + 4))
        divided, _ = _run(m, _segments(), keys, before if layer == 5 else None)
        monkeypatch.undo()
        assert torch.equal(whole.ids, divided.ids)
        assert torch.equal(whole.candidates, divided.candidates)


def test_a_rotated_basis_changes_no_score(make: Make) -> None:
    # V4 multiplies index queries and keys by a Hadamard matrix before it rounds them. It is
    # orthogonal: without the rounding nothing changes, and this package leaves it out.
    q, k = torch.randn(9, 128), torch.randn(12, 128)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-4, rtol=0)


# --- candidates ---------------------------------------------------------------------------------


def _blocks(scores: torch.Tensor, seen: int, size: int, keep: int) -> set[int]:
    """First entries of the blocks one query keeps."""
    best = {b: float(scores[b : min(b + size, seen)].max()) for b in range(0, seen, size)}
    newest = (seen - 1) // size * size
    others = sorted((b for b in best if b != newest), key=lambda b: -best[b])
    return {newest, *others[: keep - 1]}


@pytest.mark.parametrize("length", [S, S - 1], ids=["whole blocks", "a last block half full"])
def test_the_source_keeps_the_best_blocks_and_always_the_newest(make: Make, length: int) -> None:
    keys = torch.randn(1, length, 8).double()
    chosen, scores = _run(make("v41", 3), _segments(length), keys)
    for t, found in enumerate(_sets(chosen.candidates)):
        assert found == _blocks(scores[t], t + 1, size=2, keep=3), t
    newest = torch.arange(length) // 2 * 2
    assert all(int(n) in found for n, found in zip(newest, _sets(chosen.candidates), strict=True))


def test_the_sources_own_choice_is_not_restricted(make: Make) -> None:
    chosen, scores = _run(make("v41", 3, index_topk=5), _segments(), torch.randn(1, S, 8).double())
    allowed = torch.arange(S) <= torch.arange(S)[:, None]
    assert _sets(chosen.ids) == _best(scores, allowed, 5)
    inside = [{e for b in found for e in (b, b + 1)} for found in _sets(chosen.candidates)]
    assert any(ids - room for ids, room in zip(_sets(chosen.ids), inside, strict=True))


def test_later_sources_choose_inside_the_candidates(make: Make) -> None:
    keys = torch.randn(1, S, 8).double()
    first, _ = _run(make("v41", 3), _segments(), keys)
    later, scores = _run(make("v41", 5), _segments(), keys, first)
    allowed = torch.zeros(S, S, dtype=torch.bool)
    for t, blocks in enumerate(_sets(first.candidates)):
        allowed[t, [e for b in blocks for e in (b, b + 1) if e <= t]] = True
    assert _sets(later.ids) == _best(scores, allowed, 4)
    assert torch.equal(later.candidates, first.candidates)


def test_few_blocks_are_no_restriction(make: Make) -> None:
    chosen, _ = _run(make("v41", 3), _segments(6), torch.randn(1, 6, 8).double())
    assert chosen.candidates is None and chosen.ids is not None


def test_blocks_are_counted_from_the_start_of_the_document(make: Make) -> None:
    # The second document begins at an odd entry, inside what would be a block of the row.
    positions = torch.cat((torch.arange(13), torch.arange(17)))[None]
    keys = torch.randn(1, S, 8).double()
    chosen, scores = _run(make("v41", 3), _segments(position_ids=positions), keys)
    for t in range(13, S):
        expected = {13 + b for b in _blocks(scores[t, 13:], t - 12, size=2, keep=3)}
        assert _sets(chosen.candidates)[t] == expected, t


def test_choosing_has_no_gradient(make: Make) -> None:
    m, segments = make("v4", 1), _segments()
    x = torch.randn(1, S, 32).double().requires_grad_()
    turn = rotation(segments.position, m.config, compressed=True)
    keys, latent = torch.randn(1, 7, 8).double(), torch.randn(1, S, 16).double()
    chosen = m(x, latent, keys, turn, segments, Selection())
    assert not chosen.ids.requires_grad
