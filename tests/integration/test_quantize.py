# SPDX-License-Identifier: Apache-2.0
"""Converted models load, answer, train and save like any other, wherever their experts are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantize
from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.kernel_choice import set_kernels
from quantize.convert import convert
from quantize.experts import StoredExperts
from quantize.pack import PackFile

CASES = ("v4_a_fp8", "v41_b_fp8")
FP4 = quantize.get_recipe("fp4")


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A release and its conversion; read only."""
    target = tmp_path_factory.mktemp("converted") / request.param
    return golden_dir / request.param, convert(golden_dir / request.param, target, FP4)


def load(directory: Path, **kwargs: object) -> Dsv4ForCausalLM:
    model = Dsv4ForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)
    config = model.config
    if config.engram_layer_ids:
        # These checkpoints come without a tokenizer: any map of the right size will do.
        ids = torch.arange(config.vocab_size) % config.engram_compressed_vocab_size
        model.set_engram_token_map(ids)
    return model


def record_bytes(directory: Path) -> int:
    return PackFile.open(directory / "experts-layers-0.safetensors").layout.largest


def prompt(model: Dsv4ForCausalLM, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 90, (2, length))


def logits(model: Dsv4ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def stored(model: torch.nn.Module) -> list[StoredExperts]:
    return [m for m in model.modules() if isinstance(m, StoredExperts)]


def test_a_converted_release_answers_as_the_release(case: tuple[Path, Path]) -> None:
    release, converted = case
    a, b = load(release), load(converted)
    ids = prompt(a)
    # Experts in packs alone have a twin in C, which adds in another order.
    torch.testing.assert_close(logits(b, ids), logits(a, ids), rtol=1e-4, atol=1e-4)
    for model in (a, b):
        set_kernels(model, "torch")
    assert torch.equal(logits(a, ids), logits(b, ids))


@pytest.mark.parametrize("records", [1, 2, 3, 100])
def test_experts_on_disk_answer_bit_for_bit_as_resident_ones(
    case: tuple[Path, Path], records: int
) -> None:
    _, converted = case
    resident = load(converted)
    budget = records * record_bytes(converted)
    on_disk = load(converted, expert_memory=budget)
    ids = prompt(resident)
    assert torch.equal(logits(resident, ids), logits(on_disk, ids))
    if records < 100:
        assert all(m.packed is None for m in stored(on_disk))
        assert on_disk.memory_report()["experts"]["cpu"] <= budget


def test_generation_from_disk_is_generation_from_memory(case: tuple[Path, Path]) -> None:
    _, converted = case
    resident = load(converted)
    on_disk = load(converted, expert_memory=3 * record_bytes(converted))
    ids = prompt(resident, 9)[:1]
    wanted = resident.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    got = on_disk.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert torch.equal(wanted, got)


def test_bytes_read_per_token_are_misses_times_the_record(case: tuple[Path, Path]) -> None:
    _, converted = case
    size = record_bytes(converted)
    model = load(converted, expert_memory=size)
    ids = prompt(model, 12)[:1]
    layers, k = model.config.num_hidden_layers, model.config.num_experts_per_tok
    cache, before = None, dict.fromkeys(("bytes_read", "misses", "tokens"), 0)
    for t in range(12):
        with torch.no_grad():
            cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        stats = model.stats()
        read = {name: stats[name] - before[name] for name in before}
        assert read["tokens"] == 1
        assert read["misses"] == layers * k
        assert read["bytes_read"] == read["misses"] * size
        before = stats


def test_a_large_budget_reads_each_expert_once(case: tuple[Path, Path]) -> None:
    _, converted = case
    packs = [PackFile.open(p) for p in converted.glob("experts-layers-*.safetensors")]
    total = sum(p.nbytes for p in packs)
    model = load(converted, expert_memory=total - 1)
    for _ in range(4):
        logits(model, prompt(model))
    stats = model.stats()
    # One record short of everything.
    assert stats["misses"] < 2 * sum(p.num_experts for p in packs)
    assert stats["hits"] > 0
    assert model.memory_report()["experts"]["cpu"] <= total - 1


def test_less_than_one_expert_is_refused_with_numbers(case: tuple[Path, Path]) -> None:
    _, converted = case
    size = record_bytes(converted)
    with pytest.raises(ValueError, match=f"at least one expert of {size} bytes.*got {size - 1}"):
        load(converted, expert_memory=size - 1)


@pytest.mark.parametrize("records", [None, 2])
def test_a_saved_model_loads_again_with_equal_logits(
    case: tuple[Path, Path], tmp_path: Path, records: int | None
) -> None:
    _, converted = case
    size = record_bytes(converted)
    budget = {} if records is None else {"expert_memory": records * size}
    model = load(converted, **budget)
    ids = prompt(model)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "dsv4"
    assert "expert_memory" not in saved["quantization_config"]
    for pack in converted.glob("experts-*.safetensors"):
        assert (tmp_path / "saved" / pack.name).read_bytes() == pack.read_bytes()
    assert torch.equal(logits(load(tmp_path / "saved"), ids), wanted)
    assert torch.equal(logits(load(tmp_path / "saved", expert_memory=2 * size), ids), wanted)


def test_a_model_can_be_saved_over_itself(case: tuple[Path, Path], tmp_path: Path) -> None:
    _, converted = case
    copied = Path(shutil.copytree(converted, tmp_path / "copy"))
    model = load(copied, expert_memory=2 * record_bytes(copied))
    ids = prompt(model)
    wanted = logits(model, ids)
    model.save_pretrained(copied)
    assert torch.equal(logits(model, ids), wanted)
    assert torch.equal(logits(load(copied), ids), wanted)


def test_the_auto_class_loads_a_converted_model(case: tuple[Path, Path]) -> None:
    _, converted = case
    size = record_bytes(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, expert_memory=f"{2 * size}B")
    assert isinstance(model, Dsv4ForCausalLM)
    assert stored(model)[0].store is not None


def test_bfloat16_reads_the_same_experts(case: tuple[Path, Path]) -> None:
    _, converted = case
    a = load(converted).to(torch.bfloat16)
    b = load(converted, expert_memory=2 * record_bytes(converted)).to(torch.bfloat16)
    ids = prompt(a)
    assert torch.equal(logits(a, ids), logits(b, ids))
    assert logits(a, ids).isfinite().all()


def test_dequantize_gives_plain_experts_with_equal_logits(case: tuple[Path, Path]) -> None:
    _, converted = case
    plain = load(converted, dequantize=True)
    assert not stored(plain)
    assert not getattr(plain.config, "quantization_config", None)
    packed = load(converted)
    ids = prompt(plain)
    torch.testing.assert_close(logits(plain, ids), logits(packed, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_experts_on_disk_are_those_through_resident_ones(
    case: tuple[Path, Path], checkpointing: bool
) -> None:
    _, converted = case
    gradients = []
    ids = None
    for budget in ({}, {"expert_memory": record_bytes(converted)}):
        model = load(converted, **budget)
        ids = prompt(model, 24) if ids is None else ids
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
        first = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        gradients.append(first.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_a_missing_pack_is_named(case: tuple[Path, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(case[1], tmp_path / "copy"))
    (copied / "experts-layers-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"experts-layers-1.*: this expert pack is missing"):
        load(copied)


def test_a_pack_of_another_layer_is_named(case: tuple[Path, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(case[1], tmp_path / "copy"))
    shutil.copy(copied / "experts-layers-0.safetensors", copied / "experts-layers-1.safetensors")
    with pytest.raises(ValueError, match="wanted an expert pack with module"):
        load(copied)


def test_a_converted_model_without_quantize_says_what_to_import(
    golden_dir: Path, tmp_path: Path
) -> None:
    target = convert(golden_dir / "v4_a_fp8", tmp_path / "out", FP4)
    program = (
        "import sys\n"
        "from modeling_dsv4 import Dsv4ForCausalLM\n"
        "try:\n"
        "    Dsv4ForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", program, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "import quantize" in done.stderr
