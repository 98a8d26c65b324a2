# SPDX-License-Identifier: Apache-2.0
"""The preset `full`: weights train where they are plain and a text should teach them."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from finetune import attach_adapters, teach_indexer, train_weights
from modeling_dsv4.storage import Fp8Linear, PackedExperts

MakeModel = Callable[..., PreTrainedModel]
KINDS = ("v4", "v4.1")


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_weight_has_a_gradient_after_the_second_step(
    make_model: MakeModel, kind: str
) -> None:
    model, ids = make_model(kind), torch.randint(5, 290, (8, 40))
    count = train_weights(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert count == {
        "tensors": len(trained),
        "parameters": sum(p.numel() for p in trained.values()),
    }
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert any("e_score_correction_bias" in name for name in buffers)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in trained.items():
        # Experts: each one's own matrix, too.
        matrices = parameter.grad if parameter.dim() == 3 else parameter.grad[None]
        assert bool((matrices.flatten(1).abs().sum(1) > 0).all()), name
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("what", ["experts", "linear"])
def test_packed_weights_are_refused_and_left_frozen_or_not_as_they_were(
    make_model: MakeModel, what: str
) -> None:
    model = make_model()
    layer = model.model.layers[1]
    if what == "experts":
        layer.mlp.experts = PackedExperts.from_plain(layer.mlp.experts)
        name = "model.layers.1.mlp.experts"
    else:
        layer.self_attn.q_a_proj = Fp8Linear.from_plain(layer.self_attn.q_a_proj, 32)
        name = "model.layers.1.self_attn.q_a_proj"
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"1 packed modules, e.g. {name};.*dequantize=True"):
        train_weights(model)
    assert not any(p.requires_grad for p in model.parameters())
    # What is left out anyway may be packed.
    model = make_model("v4.1")
    indexer = model.model.layers[1].self_attn.indexer
    indexer.q_b_proj = Fp8Linear.from_plain(indexer.q_b_proj, 32)
    assert train_weights(model)["tensors"]


def test_groups_are_given_back_when_asked_for(make_model: MakeModel) -> None:
    def trained(*also: str) -> set[str]:
        model = make_model("v4.1")
        train_weights(model, also=also)
        return {n for n, p in model.named_parameters() if p.requires_grad}

    base = trained()
    more = {
        "compressors": "model.layers.1.self_attn.compressor.kv_proj.weight",
        "router": "model.layers.0.mlp.gate.weight",
        "tables": "model.layers.1.engram.embed.weight",
        "sinks": "model.layers.0.self_attn.sinks",
        "indexer": "model.layers.1.self_attn.indexer.k_norm.weight",
    }
    for group, name in more.items():
        assert name not in base
        assert base < trained(group)
        assert name in trained(group)
    for wrong in ("drafts", "routers"):
        with pytest.raises(ValueError, match=f"wanted some of indexer, .*got {wrong}"):
            trained(wrong)


def test_the_indexers_own_weights_can_be_taught(make_model: MakeModel) -> None:
    model, ids = make_model("v4.1"), torch.randint(5, 290, (2, 40))
    train_weights(model, also=("indexer",))
    with teach_indexer(model.train()):
        model(input_ids=ids, labels=ids).loss.backward()
    found = [(n, p.grad) for n, p in model.named_parameters() if ".indexer." in n]
    assert all(grad is not None and grad.abs().max() > 0 for _, grad in found)


def test_there_are_no_adapters_in_it(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"no adapters in it; wanted finetune.train_weights"):
        attach_adapters(make_model(), "full")
