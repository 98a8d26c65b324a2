# SPDX-License-Identifier: Apache-2.0
"""What a pass returns besides its result, and which keywords it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, ops, outputs
from modeling_dsv4 import attention as attention_module

KINDS = ["v4", "v41"]
Make = Callable[..., Any]
EXACT = {"atol": 1e-12, "rtol": 0}


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _look(model: Any, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, ...]:
    return model(ids, output_attentions=True, **more).attentions


# --- attention probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probabilities_are_those_the_values_were_read_with(
    tiny: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(kind, torch.float64), _ids(2, 30)
    model.set_attn_implementation("eager")
    read, mixed = [], ops.read_values

    def spy(p: torch.Tensor, window: torch.Tensor, entries: torch.Tensor | None) -> torch.Tensor:
        read.append((window, entries, mixed(p, window, entries)))
        return read[-1][2]

    monkeypatch.setattr(ops, "read_values", spy)
    found = _look(model, ids)
    assert len(found) == len(read) == model.config.num_hidden_layers
    for p, (window, entries, out) in zip(found, read, strict=True):
        keys = window if entries is None else torch.cat((window, entries), dim=1)
        torch.testing.assert_close(torch.einsum("bhst,btc->bshc", p, keys), out, **EXACT)
        # Less than 1: the rest went to the sink.
        assert float(p.min()) == 0 and bool((p.sum(-1) < 1).all())
    far = torch.ones(30, 30).tril(-model.config.sliding_window) + torch.ones(30, 30).triu(1)
    assert float(found[0][..., far.bool()].abs().max()) == 0
    assert float(found[0][..., ~far.bool()].min()) > 0


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_looking_changes_no_bit_and_blocks_change_no_probability(
    tiny: Make, kind: str, attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(kind), _ids(2, 50)
    model.set_attn_implementation(attn)
    maps = []
    for numbers, dense_up_to in ((1 << 24, 8), (5000, 8), (5000, 0)):
        monkeypatch.setattr(attention_module, "_BLOCK_NUMBERS", numbers)
        monkeypatch.setattr(attention_module, "_DENSE_UP_TO", dense_up_to)
        out = model(ids, output_attentions=True)
        assert torch.equal(out.logits, model(ids).logits)
        maps.append(out.attentions)
    for other in maps[1:]:
        for p, q in zip(maps[0], other, strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cached_step_sees_the_columns_of_the_whole_pass(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind, torch.float64), _ids(2, 31)
    whole, cache = _look(model, ids), Dsv4Cache(model.config)
    model(ids[:, :29], past_key_values=cache)
    last = _look(model, ids[:, 29:], past_key_values=cache)
    reach = model.config.sliding_window - 1 + 2
    for p, q in zip(whole, last, strict=True):
        columns = torch.cat((p[..., 31 - reach : 31], p[..., 31:]), dim=-1)
        torch.testing.assert_close(q, columns[:, :, 29:], **EXACT)


@torch.no_grad()
def test_pads_and_documents_have_columns_and_no_probability(tiny: Make) -> None:
    model, ids = tiny("v4", torch.float64), _ids(1, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    alone = _look(model, ids[:, 6:])
    documents = torch.cat((torch.arange(6), torch.arange(14)))[None]
    for p, q in zip(_look(model, ids, position_ids=documents), alone, strict=True):
        torch.testing.assert_close(p[:, :, 6:, 6:20], q[..., :14], **EXACT)
    for p, q in zip(_look(model, ids.expand(2, -1), attention_mask=mask), alone, strict=True):
        assert float(p[1, :, :6].abs().max()) == 0 and float(p[1, ..., :6].abs().max()) == 0
        torch.testing.assert_close(p[1:, :, 6:, 6:20], q[..., :14], **EXACT)
        torch.testing.assert_close(p[1:, :, 6:, 20 : 20 + q.shape[-1] - 14], q[..., 14:], **EXACT)


def test_the_result_follows_from_the_probabilities_returned(tiny: Make) -> None:
    model = tiny("v4", attn_implementation="eager")
    out = model(_ids(1, 20), output_attentions=True, output_hidden_states=True, use_cache=False)
    for tensor in (*out.attentions, *out.hidden_states):
        tensor.retain_grad()
    out.logits.sum().backward()
    assert all(float(t.grad.abs().max()) > 0 for t in (*out.attentions, *out.hidden_states))


def test_probabilities_of_a_long_input_are_refused_before_anything_is_computed(tiny: Make) -> None:
    model = tiny("v4")
    with pytest.raises(ValueError, match=r"at most 1073741824 probabilities.*look at a shorter"):
        _look(model, _ids(1, 9000))
    with pytest.raises(ValueError, match="at most"):
        outputs.Wanted(None, True, False).check_size(model.config, 1, 600, 10**6)


# --- hidden states, tuples, losses --------------------------------------------------------------


@torch.no_grad()
def test_numbers_choose_hidden_states(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 9)
    every = model(ids, output_hidden_states=True).hidden_states
    for asked, kept in ((0, [0]), (-1, [4]), ([1, -2, 77], [1, 3]), ([], [])):
        found = model(ids, output_hidden_states=asked).hidden_states
        assert [i for i, h in enumerate(found) if h is not None] == kept
        assert all(torch.equal(found[i], every[i]) for i in kept)
    assert model(ids, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_a_tuple_has_the_same_things_in_the_same_order(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 9)
    for part in (model, model.model):
        out = part(ids, output_attentions=True, output_hidden_states=True)
        plain = part(ids, output_attentions=True, output_hidden_states=True, return_dict=False)
        assert type(plain) is tuple and len(plain) == len(out)
        assert torch.equal(plain[0], out[0]) and torch.equal(plain[-1][0], out.attentions[0])
    model.config.return_dict = False
    assert type(model(ids)) is tuple
    model.config.return_dict, model.config.output_hidden_states = True, True
    assert model(ids).hidden_states is not None


@torch.no_grad()
def test_long_inputs_in_chunks_answer_with_a_tuple_too(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("v4"), _ids(1, 40)
    expected = model(ids).logits
    monkeypatch.setattr("modeling_dsv4.modeling_dsv4._CHUNK_TOKENS", 16)
    model.config.return_dict = False
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_labels_that_are_shifted_already_replace_the_others(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(2, 9)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    assert torch.equal(model(ids, labels=_ids(2, 9), shift_labels=shifted).loss, expected)
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected)


# --- keywords -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_keyword_nobody_knows_is_an_error(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 4)
    for part in (model, model.model):
        with pytest.raises(TypeError, match=r"\['token_type'\]; did you mean 'token_types'"):
            part(ids, token_type=ids)
        with pytest.raises(TypeError, match=r"\['zzz'\]; it takes input_ids, attention_mask"):
            part(ids, zzz=None)
    known = {"max_length_q": 4, "max_length_k": 4, "is_causal": True, "num_items_in_batch": None}
    assert torch.equal(model(ids, **known).logits, model(ids).logits)


# --- attn_implementation ------------------------------------------------------------------------


@torch.no_grad()
def test_both_names_of_attention_compute_the_same(tiny: Make, tiny_config: Make) -> None:
    model, ids = tiny("v4", torch.float64), _ids(2, 30)
    assert model.config._attn_implementation == "sdpa"
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, fused, atol=1e-10, rtol=0)
    assert not torch.equal(model(ids).logits, fused)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager", "foo"])
def test_other_names_of_attention_are_answered(tiny: Make, name: str) -> None:
    model = tiny("window")
    with pytest.raises(ValueError, match=r'window, compressed entries and a sink.*wanted "sdpa"'):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="is not supported: here"):
        type(model)._from_config(model.config, attn_implementation=name)


def test_sinks_that_learn_are_computed_plainly_and_frozen_ones_fused(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, calls = tiny("window").train(), _ids(1, 9), []
    fused = ops.fused_sink_attention
    monkeypatch.setattr(
        ops, "fused_sink_attention", lambda *a: (calls.append(1), fused(*a))[1]
    )
    model(ids, labels=ids).loss.backward()
    assert not calls and model.model.layers[0].self_attn.sinks.grad is not None
    model.model.layers[0].self_attn.sinks.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 1
