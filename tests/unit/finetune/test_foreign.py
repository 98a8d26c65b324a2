# SPDX-License-Identifier: Apache-2.0
"""Adapters of other tools: the same logits in and out, and nothing is lost without a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finetune import attach_adapters, export_adapter, import_adapter, merge_adapters
from finetune.hot_experts import HotExperts
from finetune.layouts import LAYOUTS, Layout, common_name, dense_to_group, official_name
from modeling_dsv4.storage import PackedExperts

MakeModel = Callable[..., PreTrainedModel]
Stir = Callable[[torch.nn.Module], None]
Tensors = dict[str, torch.Tensor]
SOME = {f"layers.{i}.mlp.experts": ids for i, ids in enumerate([[1, 5], [0], [2, 3, 7]])}
FILE = "adapter_model.safetensors"


def _ids(batch: int = 4, size: int = 40) -> torch.Tensor:
    return torch.randint(5, 290, (batch, size))


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def _write(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE)
    return folder


def _pack(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp.experts = PackedExperts.from_plain(layer.mlp.experts)
    return model


@pytest.mark.parametrize("preset", ["all", "hot-experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["v4", "v4.1"])
def test_out_and_in_again_gives_equal_logits(
    make_model: MakeModel, stir: Stir, tmp_path: Path, kind: str, layout: Layout, preset: str
) -> None:
    hot = SOME if preset == "hot-experts" else None
    tuned, ids = attach_adapters(make_model(kind), preset, r=4, experts=hot), _ids()
    stir(tuned)
    expected = _logits(tuned, ids)
    # From the model and from its file the same bytes come out.
    tuned.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "from file", layout)
    folder = export_adapter(tuned, tmp_path / "from model", layout)
    assert (folder / FILE).read_bytes() == (tmp_path / "from file" / FILE).read_bytes()
    back = import_adapter(folder, make_model(kind))
    torch.testing.assert_close(_logits(back, ids), expected, atol=1e-5, rtol=0)
    assert (expected - _logits(make_model(kind), ids)).abs().max() > 1e-2
    # The scale is all that moved into other tensors; shapes and choice came back.
    shapes = {n: p.shape for n, p in tuned.named_parameters() if "lora_" in n}
    assert {n: p.shape for n, p in back.named_parameters() if "lora_" in n} == shapes
    chosen = HotExperts.of(back.peft_config["default"])
    assert (None if chosen is None else chosen.ids) == hot


def test_an_imported_adapter_is_one_of_ours(
    make_model: MakeModel, stir: Stir, tmp_path: Path
) -> None:
    tuned, ids = attach_adapters(make_model(), "hot-experts", r=4, experts=SOME), _ids()
    stir(tuned)
    folder = export_adapter(tuned, tmp_path / "official", "official")
    back = import_adapter(folder, _pack(make_model()))
    back.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(make_model(), tmp_path / "ours")
    torch.testing.assert_close(_logits(again, ids), _logits(tuned, ids), atol=1e-5, rtol=0)
    merged = merge_adapters(again)
    torch.testing.assert_close(_logits(merged, ids), _logits(tuned, ids), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="it was trained on the base model"):
        PeftModel.from_pretrained(make_model(seed=1), tmp_path / "ours")


def test_peft_itself_is_told_where_its_fused_experts_go(make_model: MakeModel) -> None:
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(NotImplementedError, match=r"finetune\.import_adapter"):
        get_peft_model(make_model(), config)


def test_the_fused_layout_of_peft_0_18_is_told_by_its_shapes(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Before 0.19 a parameter [E, 2F, D] was taken for (experts, in, out)."""
    e, r, d, f = 8, 3, 64, 32
    model, ids = make_model(), _ids()
    tensors: Tensors = {}
    for i, layer in enumerate(model.model.layers):
        for level, name, size_in, size_out in (
            (".base_layer", "gate_up_proj", 2 * f, d),
            ("", "down_proj", d, f),
        ):
            a, b = torch.randn(e * r, size_in) / 10, torch.randn(size_out, r * e) / 10
            delta = torch.einsum("oke,eki->eio", b.view(-1, r, e), a.view(e, r, -1))
            getattr(layer.mlp.experts, name).data += 2 * delta
            prefix = f"base_model.model.model.layers.{i}.mlp.experts{level}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    back = import_adapter(_write(tmp_path / "old", tensors), make_model())
    torch.testing.assert_close(_logits(back, ids), _logits(model, ids), atol=1e-4, rtol=0)
    # Half of it could be either, as D = 2F here.
    half = {name: t for name, t in tensors.items() if "base_layer" in name}
    with pytest.raises(ValueError, match="ambiguous shapes; give layout"):
        import_adapter(_write(tmp_path / "half", half), make_model())
    for layout in ("peft", "peft-0.18"):
        import_adapter(tmp_path / "half", make_model(), layout=layout)
    with pytest.raises(ValueError, match=r"8 experts of 48 x 32, got shapes"):
        import_adapter(tmp_path / "old", make_model(hidden_size=48))


@pytest.mark.parametrize("names", ["official", "hf", "mixed"])
def test_gate_and_up_with_as_of_their_own_become_one_of_twice_the_rank(
    make_model: MakeModel, tmp_path: Path, names: str
) -> None:
    model, ids, tensors = make_model("v4.1"), _ids(), {}
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    for layer, expert in ((0, 2), (0, 6), (2, 7)):
        experts = model.model.layers[layer].mlp.experts
        for part, (out, inner) in shapes.items():
            if expert == 6 and part == "up_proj":
                continue
            a, b = torch.randn(3, inner) / 5, torch.randn(out, 3) / 5
            name = f"layers.{layer}.mlp.experts.{expert}.{part}"
            name = {
                "official": official_name(name),
                "hf": f"base_model.model.model.{name}",
                "mixed": f"model.{official_name(name)}",
            }[names]
            tensors |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
            # What rank and alpha of the config say, where no pattern says otherwise.
            delta = (b @ a) * (7.0 if part == "down_proj" else 2.0)
            if part == "down_proj":
                experts.down_proj.data[expert] += delta
            else:
                half = slice(0, 32) if part == "gate_proj" else slice(32, 64)
                experts.gate_up_proj.data[expert, half] += delta
    alphas = {r"experts\.\d+\.(down_proj|w2)": 21}
    folder = _write(tmp_path / "foreign", tensors, alpha_pattern=alphas)
    back = import_adapter(folder, make_model("v4.1"))
    torch.testing.assert_close(_logits(back, ids), _logits(model, ids), atol=1e-4, rtol=0)
    layers = back.get_base_model().model.layers
    assert layers[0].mlp.experts.hot == {"default": [2, 6]}
    assert layers[0].mlp.experts.r == {"default": 6}
    assert layers[2].mlp.experts.hot == {"default": [7]}
    assert not hasattr(layers[1].mlp.experts, "lora_A")


def test_a_dense_low_rank_beside_the_grouped_projection(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, ids = make_model(), _ids()
    weight = model.model.layers[1].self_attn.o_a_proj.weight
    a, b = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3)
    weight.data += 2.0 * b @ a
    names = ("layers.1.attn.wo_a.lora_A.weight", "layers.1.attn.wo_a.lora_B.weight")
    back = import_adapter(
        _write(tmp_path / "dense", dict(zip(names, (a, b), strict=True))), make_model()
    )
    torch.testing.assert_close(_logits(back, ids), _logits(model, ids), atol=1e-3, rtol=1e-3)


def test_groups_keep_the_columns_that_do_something() -> None:
    a, b = torch.randn(4, 5), torch.block_diag(torch.randn(3, 2), torch.randn(3, 2))
    banks = dense_to_group(a, b, 2)
    assert [tuple(bank.shape) for bank in banks] == [(2, 2, 5), (2, 3, 2)]
    delta = torch.cat([y @ x for x, y in zip(*banks, strict=True)])
    torch.testing.assert_close(delta, b @ a)
    fresh = dense_to_group(a, torch.zeros(6, 4), 2)
    assert torch.equal(fresh[0].flatten(0, 1), a)


def test_every_official_name_has_one_of_ours_and_back() -> None:
    for official in (
        "layers.3.attn.wq_a",
        "layers.3.attn.wo_b",
        "layers.3.attn.indexer.wq_b",
        "layers.3.attn.compressor.wkv",
        "layers.3.ffn.shared_experts.w3",
        "layers.3.ffn.experts.17.w2",
    ):
        ours = common_name(official)
        assert ours != official
        assert official_name(ours) == official
        assert common_name(f"model.{ours}") == ours
    assert common_name("lm_head") == official_name("lm_head") == "lm_head"
    assert common_name("layers.1.ffn.experts.2.w3") == "layers.1.mlp.experts.2.up_proj"


def test_every_expert_is_there_for_vllm_and_only_the_chosen_for_others(
    make_model: MakeModel, stir: Stir, tmp_path: Path
) -> None:
    tuned = attach_adapters(make_model(), "hot-experts", r=4, experts=SOME)
    stir(tuned)
    named = {"vllm": "layers.1.ffn.experts.0.w1", "hf": "model.layers.1.mlp.experts.0.gate_proj"}
    for layout, count in (("vllm", 3 * 8), ("hf", 6)):
        folder = export_adapter(tuned, tmp_path / layout, layout)
        tensors = load_file(folder / FILE)
        assert len(tensors) == count * 3 * 2
        assert tensors[f"base_model.model.{named[layout]}.lora_A.weight"].shape == (2, 64)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"] == 2
        assert config["rank_pattern"] == {}
    assert not load_file(tmp_path / "vllm" / FILE)[
        "base_model.model.layers.1.ffn.experts.3.w3.lora_A.weight"
    ].any()


def _vllm_reads(folder: Path, experts: int) -> dict[str, torch.Tensor]:
    """B A of every module by vLLM's name, read by its rules; ValueError where it refuses."""
    config = json.loads((folder / "adapter_config.json").read_text())
    leaves = {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w3", "down_proj"}
    known = {f"experts.{e}.w{i}" for e in range(experts) for i in (1, 2, 3)}
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / FILE).items():
        name, side, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        name = f"model.{name}" if name.startswith("layers.") else name
        name = name.replace(".shared_experts.w2", ".shared_experts.down_proj")
        at = name.find(".experts")
        if name[at + 1 :] not in known if at >= 0 else name.rpartition(".")[2] not in leaves:
            raise ValueError(f"unexpected {name}")
        sides.setdefault(name, {})[side] = tensor
    for layer in {name.rpartition(".experts.")[0] for name in sides if ".ffn.experts." in name}:
        for i in (1, 2, 3):
            # Refuses to stack what is missing or of another rank.
            torch.stack([sides[f"{layer}.experts.{e}.w{i}"]["lora_A"] for e in range(experts)])
    scale = config["lora_alpha"] / config["r"]
    assert max(pair["lora_A"].shape[0] for pair in sides.values()) == config["r"]
    return {name: scale * pair["lora_B"] @ pair["lora_A"] for name, pair in sides.items()}


@pytest.mark.parametrize("preset", ["all", "hot-experts"])
def test_vllm_finds_every_map_under_its_own_name(
    make_model: MakeModel, stir: Stir, tmp_path: Path, preset: str
) -> None:
    """vLLM refuses names that it has no module for, and fills its stacks expert by expert."""
    hot = SOME if preset == "hot-experts" else None
    tuned = attach_adapters(make_model(), preset, r=4, experts=hot)
    stir(tuned)
    read = _vllm_reads(export_adapter(tuned, tmp_path / "vllm", "vllm"), 8)
    plain, merged = make_model().state_dict(), merge_adapters(tuned).state_dict()
    for layer in range(3):
        where = f"layers.{layer}.mlp.experts"
        for e in range(8):
            gate_up = torch.cat(
                [read[f"model.layers.{layer}.ffn.experts.{e}.w{i}"] for i in (1, 3)]
            )
            for delta, key in (
                (gate_up, f"model.{where}.gate_up_proj"),
                (read[f"model.layers.{layer}.ffn.experts.{e}.w2"], f"model.{where}.down_proj"),
            ):
                moved = merged[key][e] - plain[key][e]
                torch.testing.assert_close(delta, moved, atol=1e-5, rtol=1e-4)
                assert bool(moved.any()) == (hot is None or e in SOME[where])
    if preset == "all":
        for ours, theirs in (("q_a_proj", "wq_a"), ("o_a_proj", "wo_a"), ("o_b_proj", "wo_b")):
            key = f"model.layers.1.self_attn.{ours}.weight"
            delta = read[f"model.layers.1.attn.{theirs}"]
            torch.testing.assert_close(delta, merged[key] - plain[key], atol=1e-5, rtol=1e-4)
        assert len(read) == 3 * (5 + 3 + 3 * 8)
    other = export_adapter(tmp_path / "vllm", tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.\d\.mlp"):
        _vllm_reads(other, 8)


def test_a_few_patterns_say_all_ranks(make_model: MakeModel, tmp_path: Path) -> None:
    tuned = attach_adapters(make_model(), "all", r=8)
    folder = export_adapter(tuned, tmp_path / "out", "official")
    config = json.loads((folder / "adapter_config.json").read_text())
    # The grouped projection's two groups are one matrix of twice the rank.
    assert config["r"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"layers\.\d+\.ffn\.experts\.\d+\.w1"] == 4
    assert len(config["rank_pattern"]) == 4 + 3 + 3


def _pair(module: str, out: int = 64, inner: int = 64) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.randn(3, inner),
        f"{module}.lora_B.weight": torch.randn(out, 3),
    }


GOOD = "model.layers.0.self_attn.q_a_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_pair("model.layers.9.self_attn.q_a_proj", 32), r"1 low ranks .*layers.9.self_attn.q_a"),
        (_pair("layers.0.ffn.experts.8.w1", 32), r"1 low ranks .*experts.8.gate_proj \[32, 64\]"),
        (_pair("layers.0.ffn.experts.0.w4", 32), r"1 low ranks .*experts.0.w4"),
        (_pair("layers.0.attn.wq_a", 32) | _pair("layers.0.attn.wq_x"), r"layers.0.attn.wq_x"),
        (_pair(GOOD, 33), r"q_a_proj \[33, 64\]"),
        (_pair(GOOD, 32) | {"model.norm.weight": torch.ones(3)}, "1 of 3 tensors are no low ranks"),
        (_pair(GOOD, 32) | {f"{GOOD}.lora_embedding_A": torch.ones(3)}, "1 of 3 tensors"),
        ({f"{GOOD}.lora_A.weight": torch.ones(3, 64)}, "1 modules have A or B alone"),
        (_pair(GOOD, 32) | _pair("layers.0.attn.wq_a", 32), "1 maps have two low ranks"),
        (
            {k: v[:2] if "_A" in k else v for k, v in _pair(GOOD, 32).items()},
            r"wanted A \[r, in\] and B \[out, r\]",
        ),
        ({k: v * 0 for k, v in _pair("layers.0.ffn.experts.0.w1", 32).items()}, "only zeros"),
        ({}, "a file without tensors"),
    ],
)
def test_what_has_no_place_is_told_with_counts_and_names(
    make_model: MakeModel, tmp_path: Path, tensors: Tensors, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_adapter(_write(tmp_path / "bad", tensors), make_model())


def test_files_that_are_no_adapter_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted .*adapter_config.json, found none"):
        import_adapter(tmp_path, make_model())
    for config, message in (
        ({"peft_type": "IA3"}, "wanted a LORA adapter, got IA3"),
        ({"use_dora": True}, "got DoRA or biases"),
    ):
        with pytest.raises(ValueError, match=message):
            import_adapter(_write(tmp_path / "x", _pair(GOOD, 32), **config), make_model())
    tuned = attach_adapters(make_model(), "attention", r=2)
    with pytest.raises(ValueError, match="wanted an empty or new directory"):
        export_adapter(tuned, tmp_path)
    with pytest.raises(ValueError, match="layout: wanted one of official, hf"):
        export_adapter(tuned, tmp_path / "y", "mlx")  # type: ignore[arg-type]
