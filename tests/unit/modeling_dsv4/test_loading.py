# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained`: its arguments, and what it refuses before a weight is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM, Dsv4Model
from modeling_dsv4.layers import Dsv4Linear

Make = Callable[..., Any]
WEIGHTS = "model.safetensors"


@pytest.fixture
def own(tiny: Make, tmp_path: Path) -> Path:
    """A tiny V4.1 model in our own layout."""
    tiny("v41").save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def v41(golden_dir: Path, tmp_path: Path) -> Path:
    """A tiny V4.1 release that a test may break."""
    return shutil.copytree(golden_dir / "v41_b_fp8", tmp_path / "v41")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            fields.pop(name)
        else:
            fields[name] = value
    path.write_text(json.dumps(fields))


def _load(folder: Path | str, **more: Any) -> Any:
    return Dsv4ForCausalLM.from_pretrained(folder, **more).eval()


# --- what it takes ------------------------------------------------------------------------------


def test_storage_stays_packed_unless_it_is_asked_to_widen(golden_dir: Path) -> None:
    packed, plain = (_load(golden_dir / "v41_b_fp8", dequantize=wide) for wide in (False, True))
    report, wide = packed.memory_report(), plain.memory_report()
    kinds = {t.dtype for t in packed.parameters()}
    assert {torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8} <= kinds
    assert {t.dtype for t in plain.parameters()} == {torch.bfloat16, torch.float32}
    assert getattr(plain.config, "quantization_config", None) is None
    assert packed.config.quantization_config is not None
    # Codes of 4 bits and one byte of scale for 32 of them, against 16 bits.
    assert report["experts"]["cpu"] / wide["experts"]["cpu"] == pytest.approx(17 / 64, rel=1e-6)
    assert report["engram"]["cpu"] < 0.6 * wide["engram"]["cpu"]
    assert report["vision"] == wide["vision"]


def test_a_report_counts_every_byte_once(golden_dir: Path) -> None:
    model = _load(golden_dir / "v41_c_bf16")
    tensors = (*model.parameters(), *model.buffers())
    total = sum(sum(tiers.values()) for tiers in model.memory_report().values())
    assert total == sum(t.nbytes for t in tensors)
    assert model.stats() == {}


def test_a_configuration_may_be_given(golden_dir: Path, own: Path) -> None:
    config = Dsv4Config.from_pretrained(own)
    config.index_topk = 3
    model = _load(own, config=config)
    assert model.config.index_topk == 3 and config.index_topk == 3
    assert model.config is not config
    folder = golden_dir / "v4_b_bf16_mtp"
    assert _load(folder, config=folder).config.num_draft_layers == 1


def test_fields_of_the_configuration_may_be_overridden(own: Path) -> None:
    model = _load(own, index_topk=2, dtype=torch.float32)
    assert model.config.index_topk == 2 and model.dtype is torch.float32


def test_loading_says_what_it_loaded(golden_dir: Path, own: Path) -> None:
    for folder in (golden_dir / "v41_a_bf16", own):
        _, info = Dsv4ForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert not info["mismatched_keys"]


def test_a_report_that_is_asked_for_lists_what_is_missing(own: Path) -> None:
    tensors = load_file(own / WEIGHTS)
    gone = tensors.pop("lm_head.weight")
    save_file({**tensors, "more": gone}, own / WEIGHTS, metadata={"format": "pt"})
    _, info = Dsv4ForCausalLM.from_pretrained(own, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and info["unexpected_keys"] == {"more"}
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\); 1 not expected \(more\)"):
        _load(own)


@pytest.mark.parametrize("layout", ["own", "release", "state_dict"])
def test_linear_maps_become_fast_ones_once_all_is_loaded(
    own: Path, golden_dir: Path, tiny: Make, layout: str
) -> None:
    """Before, a library that quantizes has to find `nn.Linear` itself."""
    plain = tiny("v4")
    maps = {name for name, m in plain.named_modules() if type(m) is nn.Linear}
    assert any(name.endswith("shared_experts.up_proj") for name in maps)
    assert not any(type(m) is Dsv4Linear for m in plain.modules())
    if layout == "state_dict":
        state = plain.state_dict()
        model = Dsv4ForCausalLM.from_pretrained(None, config=plain.config, state_dict=state)
        assert {name for name, m in model.named_modules() if type(m) is Dsv4Linear} == maps
    elif layout == "own":
        model, _ = Dsv4ForCausalLM.from_pretrained(own, output_loading_info=True)
    else:
        model = Dsv4ForCausalLM.from_pretrained(golden_dir / "v4_c_bf16_dspark")
    kinds = {type(m) for m in model.modules()}
    assert Dsv4Linear in kinds and nn.Linear not in kinds


def test_generation_settings_come_along(golden_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_dir / "v4_b_bf16_mtp", tmp_path / "x")
    settings = {"do_sample": True, "temperature": 0.37, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = _load(folder)
    assert model.generation_config.temperature == 0.37
    assert model.generation_config.eos_token_id == 7


def test_a_folder_inside_a_folder_loads(own: Path) -> None:
    assert _load(own.parent, subfolder="own").config.num_hidden_layers == 7


def test_a_state_dict_is_transformers_business(tiny: Make) -> None:
    model = tiny("v4")
    again = Dsv4ForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.float32
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_backbone_saved_alone_loads_as_a_backbone(tiny: Make, tmp_path: Path) -> None:
    model, ids = tiny("v41"), torch.randint(3, 64, (1, 9))
    model.model.save_pretrained(tmp_path)
    again = Dsv4Model.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        torch.testing.assert_close(again(ids).last_hidden_state, expected, atol=1e-4, rtol=0)


def test_a_backbone_saved_alone_can_be_given_a_head(tiny: Make, tmp_path: Path) -> None:
    # As everywhere in transformers; its report says that the head is new.
    tiny("v4").model.save_pretrained(tmp_path)
    _, info = Dsv4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    _change(tmp_path, "norm.weight", None)
    with pytest.raises(ValueError, match=r"1 missing \(norm\.weight\)"):
        _load(tmp_path)


def test_a_backbone_takes_its_part_of_a_whole_model(tiny: Make, own: Path) -> None:
    backbone = Dsv4Model.from_pretrained(own, dtype=torch.float32)
    state = tiny("v41").model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items())


# --- what it refuses ----------------------------------------------------------------------------


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a model directory or a repository name"):
        _load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="found neither"):
        _load("one/two/three")


def test_an_unregistered_storage_method_is_named(own: Path) -> None:
    _edit_config(own, quantization_config={"quant_method": "q17"})
    with pytest.raises(ValueError, match="quant_method='q17', which is not registered"):
        _load(own)


def test_a_quantized_directory_says_what_to_import(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "dsv4", raising=False)
    _edit_config(own, quantization_config={"quant_method": "dsv4"})
    with pytest.raises(ValueError, match="`import quantize` first"):
        _load(own)


@pytest.mark.parametrize("budget", ["expert_memory", "engram_memory"])
def test_budgets_want_a_converted_directory(own: Path, golden_dir: Path, budget: str) -> None:
    for folder in (own, golden_dir / "v4_a_fp8"):
        with pytest.raises(ValueError, match=f"{budget}: wanted a directory made by"):
            _load(folder, **{budget: "1GiB"})


def test_unknown_fields_are_named(own: Path, v41: Path) -> None:
    for folder in (own, v41):
        _edit_config(folder, attention_twist=3)
        with pytest.raises(ValueError, match="attention_twist"):
            _load(folder)


def test_layer_kinds_that_are_not_known_are_refused(golden_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_dir / "v4_native_nano", tmp_path / "nano")
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    _edit_config(folder, layer_types=[*kinds[:-1], "linear_attention"])
    with pytest.raises(ValueError, match="linear_attention"):
        _load(folder)


def _change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "missing": ("", None, r"1 missing \({name}\)"),
    "extra": ("_twist", torch.zeros(2), r"1 not expected \({name}_twist\)"),
    "misshapen": ("", torch.zeros(3), r"shape or dtype \({name}: wanted F32 \[4\], got F32 \[3\]"),
    "recast": ("", torch.zeros(4, dtype=torch.int32), r"{name}: wanted F32 \[4\], got I32 \[4\]"),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [("own", "model.layers.1.self_attn.sinks"), ("v41", "layers.1.attn.attn_sink")],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_an_error_in_every_layout(
    request: pytest.FixtureRequest, layout: str, name: str, fault: str
) -> None:
    folder = request.getfixturevalue(layout)
    suffix, tensor, match = FAULTS[fault]
    _change(folder, name + suffix, tensor)
    with pytest.raises(ValueError, match=match.replace("{name}", name)):
        _load(folder)


@pytest.mark.parametrize("layout", ["own", "v41"])
def test_a_truncated_file_is_an_error_in_every_layout(
    request: pytest.FixtureRequest, layout: str
) -> None:
    folder = request.getfixturevalue(layout)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        _load(folder)
    (folder / WEIGHTS).write_bytes(data[:6])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        _load(folder)
    (folder / WEIGHTS).write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        _load(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
@pytest.mark.parametrize("layout", ["own", "v41"])
def test_an_index_cannot_name_files_elsewhere(
    request: pytest.FixtureRequest, layout: str, name: str
) -> None:
    folder = request.getfixturevalue(layout)
    names = dict.fromkeys(load_file(folder / WEIGHTS), name)
    shutil.move(folder / WEIGHTS, folder.parent / "secret.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="wanted plain names"):
        _load(folder)


def test_a_directory_without_weights_is_refused(own: Path) -> None:
    (own / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"wanted model\.safetensors"):
        _load(own)


# --- the Engram token map -----------------------------------------------------------------------


def test_without_a_tokenizer_the_first_pass_says_what_is_missing(golden_dir: Path) -> None:
    model = _load(golden_dir / "v41_c_bf16")
    with pytest.raises(ValueError, match="no token map; load a checkpoint that has one"):
        model(torch.tensor([[3, 4]]))


def test_the_map_is_saved_with_the_model(own: Path, tiny: Make) -> None:
    loaded = _load(own)
    assert torch.equal(loaded.model.engram_hash.token_map, torch.arange(64) % 48)
    ids = torch.randint(3, 64, (1, 12))
    again = _load(own, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tiny("v41")(ids).logits, atol=1e-4, rtol=0)


def _tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{i:03}": i for i in range(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w000")).save(str(folder / "tokenizer.json"))


def test_the_map_is_built_from_the_tokenizer_beside_a_release(v41: Path) -> None:
    # 112 words, all different when written small; the configuration wants 71 ids.
    text = json.loads((v41 / "config.json").read_text())["text_config"]
    wanted = text["engram_compressed_vocab_size"]
    assert wanted < text["vocab_size"]
    _tokenizer(v41, text["vocab_size"])
    with pytest.raises(ValueError, match="not the tokenizer of this checkpoint"):
        _load(v41)
    from tokenizers import Tokenizer, models

    words = {("W" if i % wanted != i else "w") + f"{i % wanted:03}": i for i in range(112)}
    assert len(words) == 112
    Tokenizer(models.WordLevel(words, unk_token="w000")).save(str(v41 / "tokenizer.json"))
    model = _load(v41)
    assert torch.equal(model.model.engram_hash.token_map, torch.arange(112) % wanted)


def test_a_broken_tokenizer_is_refused(v41: Path) -> None:
    (v41 / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        _load(v41)
