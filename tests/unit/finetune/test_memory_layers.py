# SPDX-License-Identifier: Apache-2.0
"""Memory adapters in a model: what they compute, whom they leave alone, and PEFT's habits."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters, merge_adapters
from finetune.adapters import count_adapters, load_adapters
from finetune.layer_major import LayerMajor
from finetune.memory_attach import activate_memory, find_collisions, find_touched
from finetune.memory_layers import EditedRows, LoraEngram, memory_layers
from finetune.memory_rows import choose_memory_rows
from modeling_dsv4 import ops
from modeling_dsv4.moe import Dsv4Experts

MakeModel = Callable[..., PreTrainedModel]
Stir = Callable[[torch.nn.Module], None]
# Ids of two corpora, and of texts that share no token with them.
FIRST, SECOND, OTHERS = range(20, 60), range(60, 100), range(100, 290)


def _ids(tokens: range, batch: int = 2, size: int = 24) -> torch.Tensor:
    return torch.randint(tokens.start, tokens.stop, (batch, size))


def _logits(model: torch.nn.Module, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


@pytest.fixture
def make(make_model: MakeModel) -> Callable[..., PreTrainedModel]:
    """V4.1 models with two Engram layers and tables that collide now and then."""

    def make_one(**changes: Any) -> PreTrainedModel:
        return make_model("v4.1", engram_vocab_size=8000, engram_layer_ids=[0, 2], **changes)

    return make_one


@pytest.fixture
def attach(
    tokenizer: PreTrainedTokenizerFast, stir: Stir
) -> Callable[[PreTrainedModel, torch.Tensor], PeftModel]:
    """Memory of some documents [n, S], with numbers in every tensor."""

    def attach_one(model: PreTrainedModel, corpus: torch.Tensor, **more: Any) -> PeftModel:
        rows = choose_memory_rows(model, tokenizer, corpus.tolist())
        tuned = attach_adapters(model, "memory", r=4, memory=rows, **more)
        stir(tuned)
        return tuned.eval()

    return attach_one


Attach = Callable[..., PeftModel]


def test_fresh_memory_changes_nothing(make: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = make(), _ids(FIRST)
    before = _logits(model, ids)
    rows = choose_memory_rows(model, tokenizer, ids.tolist())
    tuned = attach_adapters(model, "memory", r=4, memory=rows)
    assert bool(find_touched(tuned, ids)[:, 1:].any(1).all())
    assert torch.equal(_logits(tuned, ids), before)


# --- what is computed ---------------------------------------------------------------------------


def _by_hand(
    layer: LoraEngram, streams: torch.Tensor, rows: torch.Tensor, name: str = "default"
) -> torch.Tensor:
    """The definition, a token at a time: written n-grams, their deltas, the low rank there."""
    base, edited = layer.get_base_layer(), layer.lora_rows[name]
    delta = dict(zip(edited.ids.tolist(), edited.delta, strict=True))
    out = []
    for hidden, read in zip(streams.flatten(0, 1), rows.flatten(0, 1).tolist(), strict=True):
        memory, written = base.embed.weight[read], False
        for start in range(0, len(read), edited.heads):
            order = range(start, start + edited.heads)
            if all(read[i] in delta for i in order):
                written = True
                more = [delta[r] if i in order else 0 * delta[r] for i, r in enumerate(read)
                        if r in delta or i in order]  # fmt: skip
                full = torch.zeros_like(memory)
                known = [i for i, r in enumerate(read) if r in delta or i in order]
                memory = memory + full.index_put((torch.tensor(known),), torch.stack(more))
        flat = memory.flatten()
        projected = base.kv_proj.weight @ flat
        if written:
            low = layer.lora_A[name].weight @ flat
            projected = projected + layer.scaling[name] * (layer.lora_B[name].weight @ low)
        n, d = hidden.shape
        key, value = projected[: n * d].view(n, d), projected[n * d :]
        out.append(
            ops.engram_add(
                hidden, key, value, base.q_weight, base.k_weight, None, base.gate.eps, "torch"
            )[1]
        )
    return torch.stack(out).view_as(streams)


def test_the_layer_computes_the_definition_and_its_gradients(
    make: MakeModel, attach: Attach
) -> None:
    tuned = attach(make(), _ids(FIRST))
    layer = memory_layers(tuned)[1]
    edited = layer.lora_rows["default"]
    streams = torch.randn(1, 9, 2, 64)
    rows = torch.randint(0, edited.table_rows, (1, 9, 6))
    rows[0, 1, :2] = edited.ids[edited.places[3].long()]  # one n-gram, whole
    rows[0, 2, 0] = edited.ids[5]  # a lone row
    rows[0, 3] = edited.ids[torch.arange(6)]  # all of them
    rows[0, 4, 1], rows[0, 4, 2] = edited.ids[0], edited.ids[1]  # of two orders
    found, grads = [], []
    for compute in (layer, lambda *args: _by_hand(layer, *args[:2])):
        tuned.zero_grad()
        found.append(compute(streams, rows, None))
        (found[-1] * torch.arange(found[-1].numel()).view_as(found[-1]).cos()).sum().backward()
        grads.append({n: p.grad for n, p in layer.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert set(grads[0]) == {"lora_A.default.weight", "lora_B.default.weight",
                             "lora_rows.default.delta"}  # fmt: skip
    for key, grad in grads[0].items():
        assert bool(grad.abs().max() > 0), key
        torch.testing.assert_close(grad, grads[1][key], atol=1e-4, rtol=1e-4, msg=key)
    changed = (found[0] - layer.base_layer(streams, rows, None)).abs().amax((0, 2, 3))
    assert (changed > 0).tolist() == [False, True, False, True, *[False] * 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_positions_without_a_written_n_gram_keep_their_bits_beside_others(
    make: MakeModel, attach: Attach, dtype: torch.dtype
) -> None:
    tuned = attach(make().to(dtype), _ids(FIRST))
    for layer in memory_layers(tuned):
        edited = layer.lora_rows["default"]
        assert edited.delta.dtype is torch.float32
        rows = torch.randint(0, edited.table_rows, (4, 30, 6))
        hit = edited.find(rows)[1].any(-1)
        rows[:, ::3, 2:4] = edited.ids[edited.places[torch.randint(0, len(edited.places), (4, 10))]]
        hit[:, ::3] = True
        streams = torch.randn(4, 30, 2, 64, dtype=dtype)
        on, off = layer(streams, rows, None), layer.base_layer(streams, rows, None)
        assert torch.equal(on[~hit], off[~hit])
        assert not torch.equal(on[hit], off[hit])


def test_every_memory_tensor_learns_and_nothing_else(
    make: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = _ids(FIRST, 4)
    model = make()
    rows = choose_memory_rows(model, tokenizer, ids.tolist())
    tuned = attach_adapters(model, "memory", r=4, memory=rows).train()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert count_adapters(tuned)["tensors"] == len(trained) == 2 * 3
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(tuned(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in trained.items():
        if "delta" in name:
            # The last token of a document teaches nothing.
            assert (parameter.grad.abs().sum(1) > 0).float().mean() > 0.9, name
        else:
            assert bool(parameter.grad.abs().max() > 0), name


def test_checkpointing_gives_equal_gradients(make: MakeModel, attach: Attach) -> None:
    ids, grads = _ids(FIRST), []
    for checkpointing in (False, True):
        tuned = attach(make(), ids).train()
        if checkpointing:
            tuned.activation_checkpointing_enable({"use_reentrant": False})
        tuned(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_layer_at_a_time_gives_equal_gradients(make: MakeModel, attach: Attach) -> None:
    ids, grads = _ids(FIRST), []
    for by_layer in (False, True):
        tuned = attach(make(), ids).train()
        if by_layer:
            LayerMajor(tuned).step([{"input_ids": ids, "labels": ids}])
        else:
            tuned(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert bool(grad.abs().max() > 0), name
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4, msg=name)


# --- isolation ----------------------------------------------------------------------------------


def _decode(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of 10 tokens, then of steps on its cache."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :10], use_cache=True)
        parts = [out.logits]
        for at in range(10, ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("run", [_logits, _decode])
def test_a_text_without_written_n_grams_is_answered_bit_for_bit(
    make: MakeModel, attach: Attach, run: Callable[..., torch.Tensor]
) -> None:
    own, ids = _ids(FIRST, 6), _ids(OTHERS, 3)
    tuned, plain = attach(make(), own), make()
    assert not find_touched(tuned, ids).any()
    assert torch.equal(run(tuned, ids), run(plain, ids))
    with tuned.disable_adapter():
        assert torch.equal(run(tuned, ids), run(plain, ids))
    assert not torch.equal(run(tuned, own[:1]), run(plain, own[:1]))


class _RowByRow(Dsv4Experts):
    """Experts that compute each row by itself, so that no neighbour moves a rounding."""

    def open_expert(self, expert: int) -> tuple[Any, Any]:
        up, down = self.gate_up_proj[expert], self.down_proj[expert]
        return (lambda x: (x[:, None] * up).sum(-1)), (lambda x: (x[:, None] * down).sum(-1))

    def _one_by_one(self, *args: torch.Tensor) -> torch.Tensor:
        return super(Dsv4Experts, self)._one_by_one(*args)


def _pack(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(ids.shape[1]).repeat(len(ids))[None]
    out = _logits(model, ids.flatten()[None], position_ids=places)
    return out.view(*ids.shape, -1)


@pytest.mark.parametrize("run", [_logits, _pack, _decode])
def test_a_text_beside_one_that_is_written_keeps_its_bits(
    make: MakeModel, attach: Attach, run: Callable[..., torch.Tensor]
) -> None:
    # A text that changes its routing gives its neighbours' experts other numbers of rows, and a
    # matrix product may round by its size: with and without adapters. Experts that take each row
    # alone show that nothing else passes from text to text.
    model, own = make(), _ids(FIRST, 2)
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = _RowByRow
    tuned = attach(model, own)
    ids = torch.cat((own[:1], _ids(OTHERS, 2), own[1:], _ids(OTHERS, 1)))
    assert find_touched(tuned, ids).any(1).tolist() == [True, False, False, True, False]
    on = run(tuned, ids)
    with tuned.disable_adapter():
        off = run(tuned, ids)
    for row, written in enumerate((True, False, False, True, False)):
        assert torch.equal(on[row], off[row]) != written


def test_rows_of_a_batch_may_have_their_own_adapter(
    make: MakeModel, attach: Attach, stir: Stir
) -> None:
    ids = _ids(FIRST).repeat(2, 1)
    tuned = attach(make(), ids)
    layer = memory_layers(tuned)[0]
    streams, rows = torch.randn(4, 24, 2, 64), torch.randint(0, 400, (4, 24, 6))
    edited = layer.lora_rows["default"]
    rows[:, :, :2] = edited.ids[edited.places[0].long()]
    mixed = layer(streams, rows, None, adapter_names=["default", "__base__"] * 2)
    on, off = layer(streams, rows, None), layer.base_layer(streams, rows, None)
    assert torch.equal(mixed[::2], on[::2])
    assert torch.equal(mixed[1::2], off[1::2])
    out = _logits(tuned, ids, adapter_names=["default", "__base__"] * 2)
    assert not torch.equal(out[0], out[3])
    torch.testing.assert_close(out[0], _logits(tuned, ids)[0], atol=1e-5, rtol=0)


# --- PEFT's habits ------------------------------------------------------------------------------


def test_saved_memory_loads_by_pefts_own_call(
    make: MakeModel, attach: Attach, tmp_path: Path
) -> None:
    ids = _ids(FIRST)
    tuned = attach(make(), ids)
    expected = _logits(tuned, ids)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(_logits(PeftModel.from_pretrained(make(), tmp_path), ids), expected)
    loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(_logits(loaded, ids), expected)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        kinds = {k: file.get_tensor(k).dtype for k in file.keys()}  # noqa: SIM118
    prefix = "base_model.model.model.layers.2.engram"
    assert kinds[f"{prefix}.lora_rows.ids"] is torch.int64
    assert kinds[f"{prefix}.lora_rows.delta"] is torch.float32
    assert len(kinds) == 2 * 7


def test_removing_memory_unlearns_it_exactly(
    make: MakeModel, attach: Attach, tmp_path: Path
) -> None:
    ids, plain = _ids(FIRST), make()
    before, weights = _logits(plain, ids), {k: v.clone() for k, v in plain.state_dict().items()}
    tuned = attach(plain, ids)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not torch.equal(_logits(tuned, ids), before)
    with tuned.disable_adapter():
        assert torch.equal(_logits(tuned, ids), before)
    tuned.load_adapter(tmp_path, "second")
    tuned.delete_adapter("second")
    assert not torch.equal(_logits(tuned, ids), before)
    tuned.delete_adapter("default")
    assert torch.equal(_logits(tuned.base_model.model, ids), before)
    model = tuned.unload()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in weights.items()
    }
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(_logits(model, ids), before)


def _two(
    make: MakeModel, attach: Attach, folder: Path, corpora: Sequence[torch.Tensor]
) -> PeftModel:
    """A model with adapters "a" and "b", written for two corpora."""
    for name, corpus in zip("ab", corpora, strict=True):
        one = attach(make(), corpus, adapter_name=name)
        one.save_pretrained(folder, save_embedding_layers=False)
    tuned = PeftModel.from_pretrained(make(), folder / "a", adapter_name="a")
    tuned.load_adapter(folder / "b", "b")
    return tuned.eval()


def test_memories_without_a_common_n_gram_compose_by_union(
    make: MakeModel, attach: Attach, tmp_path: Path
) -> None:
    texts = {"a": _ids(FIRST), "b": _ids(SECOND)}
    tuned = _two(make, attach, tmp_path, list(texts.values()))
    alone = {}
    for name, ids in texts.items():
        tuned.set_adapter(name)
        alone[name] = _logits(tuned, ids)
    assert not torch.equal(_logits(tuned, texts["a"]), alone["a"])
    found = activate_memory(tuned, ["a", "b"])
    # The tables are small: some rows are common, no n-gram is.
    assert sum(len(collision.rows) for collision in found) > 0
    assert not any(collision.grams for collision in found)
    for name, ids in texts.items():
        assert torch.equal(_logits(tuned, ids), alone[name])


def test_common_n_grams_are_reported_with_their_rows(
    make: MakeModel, attach: Attach, tmp_path: Path
) -> None:
    common = [30, 31, 32, 33]
    corpora = [_ids(FIRST), _ids(SECOND)]
    for corpus in corpora:
        corpus[0, 4:8] = torch.tensor(common)
    tuned = _two(make, attach, tmp_path, corpora)
    found = find_collisions(tuned)
    assert [collision.layer for collision in found] == [0, 2]
    for collision in found:
        assert collision.names == ("a", "b")
        assert {(30, 31), (31, 32, 33), (30, 31, 32, 33)} <= set(collision.grams)
        layer = memory_layers(tuned)[collision.layer // 2]
        one, other = (set(layer.lora_rows[name].ids.tolist()) for name in "ab")
        assert collision.rows.tolist() == sorted(one & other)
    tuned.set_adapter("b")
    with pytest.raises(ValueError, match=r"a and b have both written \d+ n-grams of layer 0"):
        activate_memory(tuned, ["a", "b"])
    assert tuned.base_model.active_adapters == ["b"]
    with pytest.warns(UserWarning, match="n-grams of layer 2"):
        activate_memory(tuned, ["a", "b"], collisions="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activate_memory(tuned, ["a", "b"], collisions="allow")
    assert tuned.base_model.active_adapters == ["a", "b"]
    with pytest.raises(ValueError, match="wanted some of a, b, got c"):
        activate_memory(tuned, ["a", "c"])
    with pytest.raises(ValueError, match="wanted one of error, warn, allow"):
        activate_memory(tuned, ["a"], collisions="ask")  # type: ignore[arg-type]


def test_merging_is_refused_with_the_reason(make: MakeModel, attach: Attach) -> None:
    ids = _ids(FIRST)
    tuned = attach(make(), ids)
    before = _logits(tuned, ids)
    for merge in (lambda: merge_adapters(tuned), tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(ValueError, match="acts only where a text reads one of its rows"):
            merge()
    with pytest.raises(NotImplementedError, match="activate_memory"):
        tuned.add_weighted_adapter(["default"], [0.5], "half")
    assert torch.equal(_logits(tuned, ids), before)


def test_memory_of_another_hashing_is_refused(
    make: MakeModel, attach: Attach, tmp_path: Path
) -> None:
    attach(make(), _ids(FIRST)).save_pretrained(tmp_path, save_embedding_layers=False)
    other = make()
    other.set_engram_token_map(torch.arange(290).roll(1))
    with pytest.raises(ValueError, match="another Engram token map"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="engram_pad_token_id 2, got a model with 3"):
        load_adapters(make(engram_pad_token_id=3), tmp_path)
    model = make()
    before = set(dict(model.named_modules()))
    config = LoraConfig.from_pretrained(tmp_path)
    config.auto_mapping["engram_memory"]["version"] = 2
    with pytest.raises(ValueError, match="wanted format 1, got 2"):
        get_peft_model(model, config)
    assert set(dict(model.named_modules())) == before


def test_damaged_rows_are_refused(make: MakeModel, attach: Attach, tmp_path: Path) -> None:
    attach(make(), _ids(FIRST)).save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("rows.ids"))
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="wanted ascending rows"):
        PeftModel.from_pretrained(make(), tmp_path)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing tensors, e\.g\. .*rows\.default\.ids"):
        PeftModel.from_pretrained(make(), tmp_path)


def test_memory_wants_its_rows(make: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make()
    rows = choose_memory_rows(model, tokenizer, _ids(FIRST).tolist())
    with pytest.raises(ValueError, match="wanted the rows that it may write"):
        attach_adapters(model, "memory")
    with pytest.raises(ValueError, match='wanted preset "memory"'):
        attach_adapters(model, "attention", memory=rows)
    model.set_engram_token_map(torch.arange(290).roll(1))
    with pytest.raises(ValueError, match="chosen for this model"):
        attach_adapters(model, "memory", memory=rows)
    with pytest.raises(ValueError, match="choose_memory_rows"):
        get_peft_model(model, LoraConfig(r=2, target_modules=r"model\.layers\.\d+\.engram"))


def test_rows_that_were_never_set_meet_nothing() -> None:
    edited = EditedRows(4, torch.nn.Embedding(50, 8), 2, 3, 2)
    assert not edited.find(torch.arange(48).view(8, 6))[1].any()
    none = EditedRows(0, torch.nn.Embedding(50, 8), 0, 3, 2)
    assert not none.find(torch.arange(48).view(8, 6))[1].any()
    assert F.embedding(torch.tensor(0), edited.delta).abs().sum() == 0
