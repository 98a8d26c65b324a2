# SPDX-License-Identifier: Apache-2.0
"""What a memory adapter's files say of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune import attach_adapters
from finetune.memory_inspect import describe_memory, is_memory
from finetune.memory_layers import memory_layers
from finetune.memory_rows import MemoryRows, choose_memory_rows

MakeModel = Callable[..., PreTrainedModel]
CORPUS = ["the battery lasts nine years", "the meter lasts nine days"]


@pytest.fixture
def tuned(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, stir: Callable
) -> tuple[PeftModel, MemoryRows]:
    model = make_model("v4.1", engram_vocab_size=200, engram_layer_ids=[0, 2])
    rows = choose_memory_rows(model, tokenizer, CORPUS, ["the meter"])
    out = attach_adapters(model, "memory", r=2, memory=rows)
    stir(out)
    return out, rows


def test_every_written_n_gram_is_listed_with_its_rows(
    tuned: tuple[PeftModel, MemoryRows], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, rows = tuned
    with torch.no_grad():
        memory_layers(model)[0].lora_rows["default"].delta[3] = 0
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert is_memory(tmp_path)
    told = describe_memory(tmp_path, tokenizer)
    assert told["rank"] == 2
    assert told["bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert told["hash_identity"] == rows.identity
    listed = {tuple(gram["tokens"]): gram for gram in told["ngrams"]}
    assert len(listed) == len(rows.grams)
    for number, (gram, uses) in enumerate(zip(rows.grams, rows.uses, strict=True)):
        tokens = tuple(token for token in gram.tolist() if token >= 0)
        found = listed[tokens]
        assert found["text"] == tokenizer.decode(list(tokens))
        assert any(found["text"] in text for text in CORPUS)
        assert [found["in_corpus"], found["in_background"]] == uses.tolist()
        expected, total = [], 0.0
        for at, layer in enumerate(memory_layers(model)):
            edited = layer.lora_rows["default"]
            for head, place in enumerate(rows.layers[at].places[number].tolist()):
                norm = float(edited.delta[place].detach().norm())
                total += norm**2
                sharing = int((rows.layers[at].places == place).sum())
                expected.append((2 * at, head, int(edited.ids[place]), norm, sharing))
        names = ("layer", "head", "row", "norm", "shared_by")
        assert [tuple(row[n] for n in names) for row in found["rows"]] == expected
        assert found["norm"] == pytest.approx(total**0.5)
    norms = [gram["norm"] for gram in told["ngrams"]]
    assert norms == sorted(norms, reverse=True)
    first, second = told["layers"]
    assert (first["layer"], second["layer"], first["width"]) == (0, 2, 16)
    assert first["rows"] - first["written"] == 1
    assert second["rows"] == second["written"] == len(rows.layers[1].ids)
    assert describe_memory(tmp_path)["ngrams"][0]["text"] is None


def test_the_chance_of_a_stray_n_gram_is_what_drawing_rows_gives(
    tuned: tuple[PeftModel, MemoryRows], tmp_path: Path
) -> None:
    model, _ = tuned
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    dice = np.random.default_rng(0)
    for told, layer in zip(describe_memory(tmp_path)["layers"], memory_layers(model), strict=True):
        hashing = model.get_base_model().model.engram_hash
        primes, starts = (x[layer.position].flatten() for x in (hashing.primes, hashing.offsets))
        drawn = np.stack([dice.integers(0, int(p), 200_000) for p in primes], 1)
        hit = layer.lora_rows["default"].find(torch.from_numpy(drawn) + starts)[1].any(-1)
        assert float(hit.double().mean()) == pytest.approx(told["chance"], rel=0.1)
        assert 0.001 < told["chance"] < 0.2


def test_other_adapters_are_no_memory(make_model: MakeModel, tmp_path: Path) -> None:
    attach_adapters(make_model(), "attention", r=2).save_pretrained(tmp_path / "lora")
    for folder in (tmp_path, tmp_path / "lora"):
        assert not is_memory(folder)
        with pytest.raises(ValueError, match="wanted the directory of a memory adapter"):
            describe_memory(folder)
