# SPDX-License-Identifier: Apache-2.0
"""The indexer learns from attention: its own loss reaches it, and nothing else is moved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from finetune import attach_adapters, indexer_training
from finetune.indexer_training import IndexerTeacher, teach_indexer
from modeling_dsv4 import ops
from modeling_dsv4.storage import Fp8Linear

Tiny = Callable[..., PreTrainedModel]
Grads = dict[str, torch.Tensor]
KINDS = ("v4", "v41")
# So many entries may be chosen that nothing is left out.
ALL = {"index_topk": 64, "candidate_topk_blocks": 64}


def _changes(kind: str, some: dict[str, int] = ALL) -> dict[str, int]:
    return {k: v for k, v in some.items() if kind == "v41" or not k.startswith("candidate")}


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(5, 64, shape)


def _stir(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def _attach(model: PreTrainedModel, preset: str = "attention", **more: Any) -> torch.nn.Module:
    tuned = attach_adapters(model, preset, r=4, train_indexer=True, **more).train()
    _stir(tuned)
    return tuned


def _grads(model: torch.nn.Module) -> Grads:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _run(model: torch.nn.Module, ids: torch.Tensor, **more: Any) -> tuple[Grads, IndexerTeacher]:
    """One backward pass with a teacher: gradients, and the teacher with its metrics."""
    model.zero_grad()
    with teach_indexer(model, entries=more.pop("entries", "visible")) as teacher:
        model(input_ids=ids, labels=more.pop("labels", ids), **more).loss.backward()
    return _grads(model), teacher


def _reference(
    model: torch.nn.Module, ids: torch.Tensor, chosen_only: bool
) -> tuple[torch.Tensor, float, float]:
    """The same from the model's own attention maps and its indexers called with gradients."""
    backbone = model.get_base_model().model
    seen: dict[int, tuple] = {}
    keys: dict[int, torch.Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda m, args, out: seen.__setitem__(m.layer_idx, (args, out[1]))
        )
        for layer in backbone.layers
    ]
    handles += [
        layer.self_attn.compressor.register_forward_hook(
            lambda m, args, out, i=i: keys.__setitem__(i, out.detach())
        )
        for i, layer in enumerate(backbone.layers)
        if layer.self_attn.compressor is not None
    ]
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    losses, kls, uniforms = [], [], []
    last: torch.Tensor | None = None
    for i, layer in enumerate(backbone.layers):
        attention = layer.self_attn
        if attention.indexer is None:
            continue
        (x, segments, turns, *_), shared = seen[i]
        q_latent = attention.q_a_norm(attention.q_a_proj(x)).detach()
        if attention.indexer.owns_keys:
            last = attention.indexer.make_keys(x.detach(), keys[i], segments, None)
        query, weight = attention.indexer._queries(x, q_latent, turns[True], slice(None))
        scores = ops.index_scores(query, last, weight)
        target = maps[i][..., ids.shape[1] :].sum(1)
        own = (torch.arange(ids.shape[1]) + 1) // attention.ratio
        keep = torch.arange(target.shape[-1]) < own[:, None]
        keep = keep.expand_as(target)
        if chosen_only and shared.ids is not None:
            keep = keep & ops.chosen_mask(shared.ids, target.shape[-1])
        rows = keep.sum(-1) >= 2
        layer_kl = []
        for p, s, m in zip(target[rows], scores[rows], keep[rows], strict=True):
            p = p[m] / p[m].sum()
            layer_kl.append((p * (p.log() - s[m].log_softmax(-1))).sum())
            uniforms.append((p * (p * len(p)).log()).sum().item())
        kls += [v.item() for v in layer_kl]
        losses.append(torch.stack(layer_kl).mean())
    return torch.stack(losses).mean(), sum(kls) / len(kls), sum(uniforms) / len(uniforms)


@pytest.mark.parametrize("entries", ["visible", "selected"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics_are_those_of_the_definition(
    tiny: Tiny, kind: str, entries: Any
) -> None:
    # Chosen among more than there are places for, so that "selected" is another set.
    some = ALL if entries == "visible" else {"index_topk": 4, "candidate_topk_blocks": 3}
    model, ids = _attach(tiny(kind, **_changes(kind, some))), _ids(2, 40)
    model.zero_grad()
    plain = model(input_ids=ids, labels=ids).loss.detach()
    with teach_indexer(model, weight=0.5, entries=entries) as teacher:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    found, numbers = _grads(model), teacher.metrics()
    assert teacher.metrics() == {}
    model.zero_grad()
    expected, kl, uniform = _reference(model, ids, entries == "selected")
    (0.5 * expected).backward()
    torch.testing.assert_close(loss.detach(), plain + 0.5 * expected.detach(), atol=1e-5, rtol=0)
    assert numbers["kl"] == pytest.approx(kl, abs=1e-5)
    assert numbers["kl_uniform"] == pytest.approx(uniform, abs=1e-5)
    assert numbers["captured"] == pytest.approx(1 - kl / uniform, abs=1e-4)
    names = [n for n, p in model.named_parameters() if "indexer" in n and p.requires_grad]
    assert names
    for name in names:
        wanted = model.get_parameter(name).grad
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_losses_keep_apart(tiny: Tiny, kind: str) -> None:
    model, ids = _attach(tiny(kind), "all"), _ids(2, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    alone = _grads(model)
    assert all((grad is None) == ("indexer" in name) for name, grad in alone.items())
    both, _ = _run(model, ids)
    for name, grad in both.items():
        if "indexer" in name:
            assert grad.abs().max() > 0, name
        else:
            assert torch.equal(grad, alone[name]), name
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks_give_the_same(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _attach(tiny(kind)), _ids(2, 40)
    whole, teacher = _run(model, ids)
    expected = teacher.metrics()
    monkeypatch.setattr(indexer_training, "_BLOCK_NUMBERS", 1 << 14)
    parts, teacher = _run(model, ids)
    assert teacher.metrics() == pytest.approx(expected, abs=1e-5)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("kind", "sizes"), [("v4", (31, 44)), ("v41", (40, 40))])
def test_padded_and_packed_rows_teach_as_documents_do_alone(
    tiny: Tiny, kind: str, sizes: tuple[int, int]
) -> None:
    # Documents of a length count equally in every layer; V4's layers all count alike.
    model, docs = _attach(tiny(kind)), [_ids(1, size) for size in sizes]
    expected: Grads = {}
    counts = []
    for ids in docs:
        grads, teacher = _run(model, ids)
        counts.append(teacher._total.queries)
        for name, grad in grads.items():
            if "indexer" in name:
                expected[name] = expected.get(name, 0) + grad * counts[-1]
    packed = torch.cat(docs, 1)
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    pads = ((50 - sizes[0], 0), (0, 50 - sizes[1]))
    padded = torch.cat([F.pad(d, pad, value=2) for d, pad in zip(docs, pads, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(d), p) for d, p in zip(docs, pads, strict=True)])
    for ids, more in (
        (packed, {"position_ids": positions}),
        (padded, {"attention_mask": mask}),
        (padded.flip(0), {"attention_mask": mask.flip(0)}),
    ):
        grads, teacher = _run(model, ids, **more)
        assert teacher._total.queries == sum(counts)
        for name, grad in expected.items():
            wanted = grad / sum(counts)
            torch.testing.assert_close(grads[name], wanted, atol=2e-6, rtol=2e-3, msg=name)


def test_checkpointing_gives_equal_gradients_and_counts_once(tiny: Tiny) -> None:
    ids, found = _ids(2, 40), []
    for checkpointing in (False, True):
        model = _attach(tiny("v41"))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(_run(model, ids))
    for name, grad in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert found[0][1]._total.queries == found[1][1]._total.queries > 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_teaches_the_indexer_and_leaves_the_rest(tiny: Tiny, kind: str) -> None:
    model, ids = _attach(tiny(kind)), _ids(2, 40)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "indexer" in n]
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in names}
    optimizer = torch.optim.Adam([model.get_parameter(n) for n in names], lr=3e-2)
    seen = []
    with teach_indexer(model) as teacher:
        for _ in range(25):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            seen.append(teacher.metrics())
    assert seen[-1]["kl"] < 0.7 * seen[0]["kl"]
    assert seen[-1]["captured"] > seen[0]["captured"]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_it_stands_beside_packed_weights_and_nothing_happens_in_evaluation(tiny: Tiny) -> None:
    base = tiny("v4", index_head_dim=32, qk_rope_head_dim=8)
    for layer in base.model.layers:
        indexer = layer.self_attn.indexer
        if indexer is not None:
            indexer.q_b_proj = Fp8Linear.from_plain(indexer.q_b_proj, 16)
    model, ids = _attach(base), _ids(2, 40)
    grads, _ = _run(model, ids)
    name = next(n for n in grads if "indexer.q_b_proj.lora_A" in n)
    assert grads[name].abs().max() > 0
    with teach_indexer(model) as teacher:
        expected = model.eval()(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            model.train()(input_ids=ids, labels=ids)
        model(input_ids=ids)
        assert teacher._total.queries > 0
        teacher.metrics()
        model.eval()(input_ids=ids, labels=ids)
        assert teacher.metrics() == {}
    model.train()(input_ids=ids, labels=ids)
    assert teacher.metrics() == {}
    assert torch.equal(model.eval()(input_ids=ids, labels=ids).loss, expected)


def test_wrong_use_is_told(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="train_indexer=True"):
        teach_indexer(attach_adapters(tiny("v4"), "attention", r=2))
    with pytest.raises(ValueError, match="wanted a model with an indexer"):
        attach_adapters(tiny("window"), "attention", train_indexer=True)
    model, ids = _attach(tiny("v4")), _ids(1, 20)
    with pytest.raises(ValueError, match="entries: wanted one of visible, selected"):
        teach_indexer(model, entries="all")  # type: ignore[arg-type]
    with teach_indexer(model), pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids, labels=ids, use_cache=True)
