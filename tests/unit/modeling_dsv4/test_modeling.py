# SPDX-License-Identifier: Apache-2.0
"""The assembled model: causality, gradients, inputs and outputs, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modeling_dsv4 import Dsv4ForCausalLM, Dsv4Model, hyper_ops
from modeling_dsv4.hyper_connection import HyperConnection, first_pre
from modeling_dsv4.layers import RMSNorm
from modeling_dsv4.weight_map import our_inventory

KINDS = ["v4", "v41"]
Make = Callable[..., Any]


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


# --- causality ----------------------------------------------------------------------------------

# Every kind of layer, alone and first, at lengths around multiples of its window.
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"compress_ratios": [0]},
    "sparse": {"compress_ratios": [4]},
    "heavy": {"compress_ratios": [8]},
    "two": {"compress_ratios": [2], "kv": [0]},
    "one": {"compress_ratios": [1], "kv": [0]},
}


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_token_changes_nothing_before_itself(tiny: Make, layer: str) -> None:
    fields = dict(LAYERS[layer])
    sources = fields.pop("kv", None)
    kind = "v41" if sources else "v4"
    if sources:
        fields |= {
            "kv_source_layer_ids": sources,
            "index_source_layer_ids": sources,
            "candidate_source_layer_id": 0 if layer == "one" else None,
            "engram_layer_ids": [0],
        }
    model = tiny(kind, torch.float64, num_hidden_layers=1, **fields)
    for length in (7, 8, 9, 33):
        ids = _ids(1, length)
        before = model(ids).logits[0]
        for t in range(length):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 64
            after = model(changed).logits[0]
            torch.testing.assert_close(after[:t], before[:t], atol=1e-12, rtol=0)
            assert (after[t] - before[t]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_comes_from_the_future_and_the_whole_past_gives_one(
    tiny: Make, kind: str
) -> None:
    model, ids = tiny(kind, torch.float64), _ids(1, 41)
    embeds = F.embedding(ids, model.model.embed_tokens.weight).detach().requires_grad_()
    out = model(ids, inputs_embeds=embeds).logits
    (grad,) = torch.autograd.grad(out[0, 30].square().sum(), embeds)
    touched = grad[0].abs().amax(-1) > 0
    assert not bool(touched[31:].any()) and bool(touched[:31].all())


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_loss_passes_finite_differences(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind, torch.float64), _ids(2, 19)
    names = [
        "model.layers.0.attn_hc.fn",
        "model.layers.1.attn_hc.base",
        "model.layers.1.ffn_hc.scale",
        "model.layers.1.self_attn.kv_proj.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.1.self_attn.q_b_proj.weight",
        "model.layers.1.self_attn.compressor.kv_proj.weight",
        "model.layers.1.self_attn.compressor.gate_proj.weight",
        "model.layers.2.self_attn.o_a_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.norm.weight",
        *(["model.hc_head.hc_fn"] if kind == "v4" else ["model.layers.4.engram.k_weight"]),
        *([] if kind == "v4" else ["model.layers.4.engram.kv_proj.weight"]),
    ]
    found = dict(model.named_parameters())

    def loss() -> torch.Tensor:
        # transformers' own loss is float32, too coarse for differences.
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for name in names:
        p = found[name]
        direction = torch.randn_like(p)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p += step * direction
                losses.append(loss())
                p -= step * direction
        slope = float((losses[0] - losses[1]) / 2e-6)
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("learning_sinks", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(
    tiny: Make, kind: str, reentrant: bool, learning_sinks: bool
) -> None:
    model, ids = tiny(kind, torch.float64).train(), _ids(2, 30)
    # Attention is computed plainly where sinks learn, and fused where they do not.
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_(learning_sinks)
    positions = torch.cat((torch.arange(17), torch.arange(13)))[None].expand(2, -1)
    grads, losses = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.zero_grad()
        # Layers run twice under checkpointing: a cache that was asked for would be written twice.
        out = model(ids, position_ids=positions, labels=ids, use_cache=checkpointing)
        assert out.past_key_values is None
        out.loss.backward()
        losses.append(out.loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses) and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_but_those_behind_a_choice(tiny: Make, kind: str) -> None:
    model = tiny(kind).train()
    ids = _ids(4, 40)
    model(ids, labels=ids).loss.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    # The choice of entries has no gradient; the last site of V4.1 hands its `post` and `comb` on
    # to streams that are collapsed, and its `pre` to the head: nothing is silent there.
    assert silent == {n for n, _ in model.named_parameters() if ".indexer." in n}


def test_training_parts_the_streams(tiny_config: Make) -> None:
    # All streams start as one embedding; symmetric weights would keep them equal for ever.
    for kind in KINDS:
        model = Dsv4ForCausalLM(tiny_config(kind)).train()
        if kind == "v41":
            model.set_engram_token_map(torch.arange(64) % 48)
        ids = _ids(4, 20)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(10):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        out = model(ids, output_hidden_states=True)
        streams = out.hidden_states[-1]
        spread = (streams - streams.mean(2, keepdim=True)).abs().mean() / streams.abs().mean()
        assert spread > 1e-3 and losses[-1] < losses[0]
        assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.2)


# --- streams ------------------------------------------------------------------------------------


@torch.no_grad()
def test_single_pass_coefficients_come_from_the_site_before(tiny: Make) -> None:
    # Two layers unrolled by hand. `pre` is delayed by one site; `post` and `comb` are not.
    model, ids = tiny("v41", torch.float64), _ids(1, 12)
    seen: dict[str, list[torch.Tensor]] = {"in": [], "out": []}
    for layer in model.model.layers[:2]:
        for norm, block in (
            (layer.input_layernorm, layer.self_attn),
            (layer.post_attention_layernorm, layer.mlp),
        ):
            norm.register_forward_hook(lambda m, a, o: seen["in"].append(a[0]))
            block.register_forward_hook(lambda m, a, o: seen["out"].append(o[0]))
    out = model(ids, output_hidden_states=True)
    streams = model.model.embed_tokens(ids)[:, :, None].expand(-1, -1, 4, -1)
    pre, n = first_pre(streams), 0
    for i, layer in enumerate(model.model.layers[:2]):
        torch.testing.assert_close(out.hidden_states[i], streams)
        if layer.engram is not None:
            hashing = model.model.engram_hash
            back = [F.pad(hashing.compress(ids), (k, 0), value=-1)[:, :12] for k in range(4)]
            rows = hashing.rows(0, hashing.cut_context(torch.stack(back, -1)))
            streams = layer.engram(streams, rows, None)
        for site in (layer.attn_hc, layer.ffn_hc):
            _, own, post, comb, _ = site(streams)
            collapsed = torch.einsum("bsn,bsnd->bsd", pre, streams)
            torch.testing.assert_close(seen["in"][n], collapsed)
            mixed = torch.einsum("bsjk,bsjd->bskd", comb, streams)
            streams = mixed + post[..., None] * seen["out"][n][:, :, None]
            pre, n = own, n + 1
    torch.testing.assert_close(out.hidden_states[2], streams)


@torch.no_grad()
def test_the_last_collapse_is_a_head_of_its_own_or_the_last_handed_coefficients(
    tiny: Make,
) -> None:
    for kind in KINDS:
        model, ids = tiny(kind, torch.float64), _ids(1, 12)
        handed: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda m, a, o, to=handed: to.append(o[1]))
        out = model(ids, output_hidden_states=True)
        streams = out.hidden_states[-1]
        if kind == "v4":
            collapsed = model.model.hc_head(streams)
        else:
            assert model.model.hc_head is None
            collapsed = hyper_ops.collapse_ref(streams, handed[0])
        logits = model.model.norm(collapsed) @ model.lm_head.weight.T
        torch.testing.assert_close(out.logits, logits)


# --- inputs and outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_have_the_documented_shapes(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind), _ids(2, 9)
    out = model(ids, output_hidden_states=True, output_router_logits=True)
    layers = model.config.num_hidden_layers
    assert out.logits.shape == (2, 9, 64) and out.loss is None
    assert [h.shape for h in out.hidden_states] == [(2, 9, 4, 32)] * (layers + 1)
    assert [r.shape for r in out.router_logits] == [(18, 4)] * layers
    assert model(ids).hidden_states is None and model(ids).router_logits is None
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids).past_key_values.get_seq_length() == 9


@torch.no_grad()
def test_only_the_positions_asked_for_get_logits(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    some = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, full[:, some])
    # The head of a release is wide: positions nobody asked for must not pass it.
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, a, o: rows.append(o.shape[1]))
    model(ids, logits_to_keep=2)
    assert rows == [2]


@torch.no_grad()
def test_the_loss_is_that_of_the_next_token_where_one_is_wanted(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(2, 9)
    labels = ids.clone()
    labels[0, :5], labels[1, 7:] = -100, -100
    out = model(ids, labels=labels)
    logp = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = labels[:, 1:] >= 0
    assert float(out.loss) == pytest.approx(-float(logp[kept].mean()), rel=1e-5)
    counted = model(ids, labels=labels, num_items_in_batch=40).loss
    assert float(counted) == pytest.approx(-float(logp[kept].sum()) / 40, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_take_the_place_of_ids_where_ids_are_not_needed(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind), _ids(1, 9)
    embeds = model.model.embed_tokens(ids)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, inputs_embeds=embeds).logits, expected)
    # Hash routing and n-grams want ids; a model with neither does not.
    missing = "hash-routed layers choose" if kind == "v4" else "Engram is read by id"
    with pytest.raises(ValueError, match=missing):
        model(inputs_embeds=embeds)
    plain = tiny("v4", num_hash_layers=0)
    embeds = plain.model.embed_tokens(ids)
    torch.testing.assert_close(plain(inputs_embeds=embeds).logits, plain(ids).logits)


@torch.no_grad()
def test_keys_of_foreign_collators_are_ignored(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 9)
    expected = model(ids).logits
    assert torch.equal(model(ids, token_type_ids=ids, pixel_values=None).logits, expected)


def test_nonsense_is_refused(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 4)
    with pytest.raises(ValueError, match="wanted input_ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(ValueError, match="pixel_values: the vision tower is carried"):
        model(ids, pixel_values=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="masks of four"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="this model has no Engram layers"):
        model.set_engram_token_map(torch.arange(64))


@pytest.mark.parametrize(
    ("token_map", "complaint"),
    [
        (torch.arange(63) % 48, "one id for each of 64 tokens"),
        (torch.arange(64) % 47, "compressed ids 0..47"),
        (torch.arange(64), "got 64 ids"),
        (torch.arange(64) % 48 - 1, "ids >= 0"),
        ((torch.arange(64) % 48).float(), "integers"),
    ],
)
def test_a_wrong_token_map_is_refused(tiny: Make, token_map: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny("v41").set_engram_token_map(token_map)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_grow_with_the_context_and_not_with_its_square(
    tiny: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from modeling_dsv4 import attention, indexer

    class Largest(TorchDispatchMode):
        """Remembers the largest tensor that any operation returned."""

        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and not func.is_view:
                    self.numel = max(self.numel, x.numel())
            return out

    # The budget of a block is meant for real contexts; here it would hide what grows.
    for module in (attention, indexer):
        monkeypatch.setattr(module, "_BLOCK_NUMBERS", 1 << 18)
    model = tiny(kind, index_n_heads=2, index_topk=16, candidate_topk_blocks=16)
    largest = []
    for length in (2048, 4096):
        ids = _ids(1, length)
        with Largest() as seen:
            model(ids, labels=ids, use_cache=True).loss.backward()
        largest.append(seen.numel)
        model.zero_grad()
    assert largest[1] <= 2.2 * largest[0]
    # A quarter of S x S would be the scores of a ratio-4 layer.
    assert largest[1] < 4096 * 4096 / 16


# --- the module itself --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_of_a_model_are_those_of_its_inventory(tiny: Make, kind: str) -> None:
    model = tiny(kind)
    found = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert found == {n: shape for n, (_, shape) in our_inventory(model.config).items()}
    assert not any(n.startswith("mtp") for n in found)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_weight_is_used_behind_its_modules_back(tiny: Make, kind: str) -> None:
    # Adapters and offloading hook into the call of a module: who reads a child's weight without
    # calling the child computes without them, and with offloading from memory that was given back.
    model = tiny(kind)
    called: set[str] = set()
    owners = {
        n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    }
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: called.add(name))
    model(_ids(2, 40))
    assert owners <= called, owners - called


def test_every_norm_has_the_epsilon_of_the_configuration(tiny: Make) -> None:
    # A released V4.1 says 1e-20: inputs as small as that are normed, not flushed.
    model = tiny("v41", rms_norm_eps=1e-20)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    small = {m: torch.full((2, m.weight.shape[0]), 1e-10) for m in norms}
    for m, x in small.items():
        torch.testing.assert_close(m(x), m.weight.expand_as(x) * 0.5**0.5)
    assert len(norms) == 7 * 4 + 2 + 2 + 1
    sites = [m for m in model.modules() if isinstance(m, HyperConnection)]
    assert len(sites) == 14 and all(m.rms_eps == 1e-20 for m in sites)
    assert {layer.engram.gate.eps for layer in model.model.layers if layer.engram} == {1e-20}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copy_is_independent_and_equal(tiny: Make, kind: str) -> None:
    model, ids = tiny(kind), _ids(1, 12)
    other, expected = copy.deepcopy(model), model(ids).logits
    assert torch.equal(other(ids).logits, expected)
    for p in other.parameters():
        p.zero_()
    assert torch.equal(model(ids).logits, expected)
    assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_the_head_computes_in_float32_under_any_dtype(tiny: Make) -> None:
    model, ids = tiny("v4", torch.bfloat16), _ids(1, 9)
    out = model.model(ids).last_hidden_state
    assert out.dtype is torch.bfloat16
    logits = model(ids).logits
    torch.testing.assert_close(logits, out.float() @ model.lm_head.weight.float().T)
    assert logits.dtype is torch.float32


@torch.no_grad()
def test_the_backbone_alone_gives_the_hidden_states(tiny: Make) -> None:
    model, ids = tiny("v41"), _ids(1, 9)
    backbone = Dsv4Model(model.config).eval()
    backbone.load_state_dict(model.model.state_dict())
    hidden = backbone(ids).last_hidden_state
    assert hidden.shape == (1, 9, 32)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(ids).logits)
