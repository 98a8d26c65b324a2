# SPDX-License-Identifier: Apache-2.0
"""Engram: what memory adds to the streams, and which rows a token looks up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import ops
from modeling_dsv4.cache_stores import Ring
from modeling_dsv4.engram import Engram, lookup_rows
from modeling_dsv4.engram_hash import DEAD, EngramHash
from modeling_dsv4.segments import RowState, find_segments


@pytest.fixture
def engram(tiny_config: Callable[..., Any], enliven: Callable[..., None]) -> Engram:
    module = Engram(tiny_config("v41"), 4)
    enliven(module)
    return module.double()


@pytest.fixture
def hashing(tiny_config: Callable[..., Any]) -> EngramHash:
    found = EngramHash(tiny_config("v41"))
    # A map that merges ids, with the pad somewhere else than at 2.
    found.set_token_map((torch.arange(64) * 5 + 3) % 48)
    return found


# --- what is added ------------------------------------------------------------------------------


def _naive(m: Engram, streams: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The equations, token by token: [S, N, D]."""
    out = streams.clone()
    for t in range(streams.shape[0]):
        memory = torch.cat([m.embed.weight[r] for r in rows[t]]) @ m.kv_proj.weight.T
        value = memory[4 * 32 :]
        for n in range(4):
            h, k = streams[t, n], memory[n * 32 : (n + 1) * 32]
            dot = (h * m.q_weight[n] * m.k_weight[n] * k).sum() / 32**0.5
            dot = dot / (h.square().mean() * k.square().mean()).sqrt()
            gate = torch.sigmoid(dot.abs().clamp(min=1e-6).sqrt() * dot.sign())
            out[t, n] = h + gate * value
    return out


def test_memory_is_added_to_every_stream_by_its_own_gate(engram: Engram) -> None:
    streams = torch.randn(1, 7, 4, 32, dtype=torch.float64)
    rows = torch.randint(0, engram.embed.num_embeddings, (1, 7, 6))
    found = engram(streams, rows, None)
    torch.testing.assert_close(found[0], _naive(engram, streams[0], rows[0]))


def test_an_image_token_gets_nothing(engram: Engram) -> None:
    streams, rows = torch.randn(1, 3, 4, 32).double(), torch.randint(0, 99, (1, 3, 6))
    live = torch.tensor([[True, False, True]])
    found, full = engram(streams, rows, live), engram(streams, rows, None)
    assert torch.equal(found[:, 1], streams[:, 1])
    assert torch.equal(found[:, ::2], full[:, ::2])


def test_a_gate_of_zero_leaves_the_model_without_engram(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("v41"), torch.randint(3, 64, (1, 20))
    with torch.no_grad():
        usual = model(ids).logits
        monkeypatch.setattr(ops, "engram_gate", lambda h, *rest: torch.zeros_like(h[..., 0]))
        shut = model(ids).logits
        for layer in model.model.layers:
            layer.engram = None
        assert torch.equal(shut, model(ids).logits)
    assert (usual - shut).abs().max() > 0.1


def test_half_streams_are_added_to_in_float32_and_rounded_once(engram: Engram) -> None:
    half = engram.float().to(torch.bfloat16)
    streams = torch.randn(1, 9, 4, 32).to(torch.bfloat16)
    rows = torch.randint(0, 99, (1, 9, 6))
    seen: list[torch.Tensor] = []
    half.kv_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    gates: list[torch.Tensor] = []
    half.gate.register_forward_hook(lambda module, args, out: gates.append(out[0]))
    found = half(streams, rows, None)
    value = seen[0][..., 4 * 32 :].float()
    expected = streams.float() + gates[0][..., None] * value[..., None, :]
    assert gates[0].dtype is torch.float32 and torch.equal(found, expected.to(torch.bfloat16))


def test_only_rows_that_were_read_get_a_gradient(engram: Engram) -> None:
    rows = torch.tensor([[[1, 5, 5, 9, 2, 3]]])
    engram(torch.randn(1, 1, 4, 32).double(), rows, None).sum().backward()
    touched = engram.embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [1, 2, 3, 5, 9]


# --- which rows are read ------------------------------------------------------------------------


def _naive_rows(h: EngramHash, ids: list[int], dead: set[int] = frozenset()) -> torch.Tensor:
    """Rows [2, S, 6] of one document, by the release's loops."""
    pad, found = int(h.token_map[2]), torch.zeros(2, len(ids), 6, dtype=torch.long)
    for layer in range(2):
        for t in range(len(ids)):
            context, broken = [], False
            for i in range(4):
                broken = broken or t - i < 0 or (t - i) in dead
                context.append(pad if broken else int(h.token_map[ids[t - i]]))
            mixed, column, offset = context[0] * int(h.multipliers[layer, 0]), 0, 0
            for order in range(3):
                mixed ^= context[order + 1] * int(h.multipliers[layer, order + 1])
                for head in range(2):
                    prime = int(h.primes[layer, order, head])
                    found[layer, t, column] = mixed % prime + offset
                    column, offset = column + 1, offset + prime
    return found


def _state() -> RowState:
    return RowState.empty(1, torch.device("cpu"))


def test_rows_follow_the_release(hashing: EngramHash) -> None:
    ids = torch.randint(0, 64, (1, 12))
    found = lookup_rows(hashing, ids, None, find_segments((1, 12), _state()), None)
    assert torch.equal(found[:, 0], _naive_rows(hashing, ids[0].tolist()))


def test_look_back_stops_for_good_at_an_image(hashing: EngramHash) -> None:
    ids, live = torch.randint(0, 64, (1, 12)), torch.ones(1, 12, dtype=torch.bool)
    live[0, [0, 6]] = False
    found = lookup_rows(hashing, ids, live, find_segments((1, 12), _state()), None)
    assert torch.equal(found[:, 0], _naive_rows(hashing, ids[0].tolist(), {0, 6}))


def test_look_back_stops_at_the_start_of_a_document(hashing: EngramHash) -> None:
    ids = torch.randint(0, 64, (1, 12))
    positions = torch.cat((torch.arange(5), torch.arange(1), torch.arange(6)))[None]
    segments = find_segments((1, 12), _state(), position_ids=positions)
    found = lookup_rows(hashing, ids, None, segments, None)
    parts = [_naive_rows(hashing, part) for part in map(list, ids[0].split([5, 1, 6]))]
    assert torch.equal(found[:, 0], torch.cat(parts, 1))


def test_three_ids_are_remembered_from_pass_to_pass(hashing: EngramHash) -> None:
    ids, live = torch.randint(0, 64, (1, 20)), torch.ones(1, 20, dtype=torch.bool)
    live[0, 9] = False
    ring, state, at, found = Ring(3), _state(), 0, []
    for size in (1, 1, 2, 5, 1, 1, 9):
        part = slice(at, at + size)
        segments = find_segments((1, size), state)
        found.append(lookup_rows(hashing, ids[:, part], live[:, part], segments, ring))
        state, at = segments.after([]), at + size
    assert torch.equal(torch.cat(found, 2)[:, 0], _naive_rows(hashing, ids[0].tolist(), {9}))


def test_dead_positions_are_remembered_as_dead(hashing: EngramHash) -> None:
    ring, live = Ring(3), torch.tensor([[True, False, True]])
    lookup_rows(hashing, torch.tensor([[5, 6, 7]]), live, find_segments((1, 3), _state()), ring)
    assert ring.data.tolist() == [[28, DEAD, 38]]
    assert hashing.compress(torch.tensor([-1, 64, 63])).tolist() == [DEAD, DEAD, 30]


def test_without_a_map_the_model_says_what_is_missing(tiny_config: Callable[..., Any]) -> None:
    hashing = EngramHash(tiny_config("v41"))
    with pytest.raises(ValueError, match="set_engram_token_map"):
        lookup_rows(hashing, torch.tensor([[3]]), None, find_segments((1, 1), _state()), None)


def test_training_a_packed_row_keeps_no_history(tiny: Callable[..., Any]) -> None:
    # Checkpointing runs a layer twice; the rows of a token must not depend on that.
    model = tiny("v41").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (1, 15))
    first, second = (model(ids, labels=ids, use_cache=True) for _ in range(2))
    first.loss.backward()
    assert first.past_key_values is None and torch.equal(first.logits, second.logits)
