# SPDX-License-Identifier: Apache-2.0
"""One variant of the study: a JSON file each in `variants/`, over the base of its group."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nano.data import BOS, EOS, PAD, Corpus
from nano.recipe import Recipe
from torch import nn

from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.engram_hash import build_token_map

from .memory import shuffle_ids
from .residual import replace_sites

FOLDER = Path(__file__).parent / "variants"
LOGS = Path(__file__).parent / "logs"


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: of the file.
        group: residual, memory or attention; what is compared with what.
        title: in tables.
        config: fields of `Dsv4Config` over those of the group.
        recipe: fields of `Recipe` over its defaults.
        connection: "mhc", "hc" or "plain".
        ids: "text", or "shuffled" for rows of Engram that say nothing.
    """

    name: str
    group: str
    title: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    connection: str = "mhc"
    ids: str = "text"
    order: int = field(default=0, compare=False)

    @classmethod
    def read(cls, name: str) -> "Variant":
        """Read `variants/NAME.json` over `variants/GROUP.base.json`."""
        given = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        base = json.loads((FOLDER / f"{given['group']}.base.json").read_text(encoding="utf-8"))
        for part in ("config", "recipe"):
            given[part] = {**base[part], **given.get(part, {})}
        return cls(name=name, **given)

    @classmethod
    def all(cls) -> "list[Variant]":
        """Every variant, group by group, in the order of their tables."""
        names = [p.stem for p in FOLDER.glob("*.json") if not p.stem.endswith(".base")]
        return sorted(map(cls.read, names), key=lambda v: (v.group, v.order))

    def recipe_for(self, seed: int) -> Recipe:
        return Recipe(seed=seed, **self.recipe)

    def build(self, corpus: Corpus, seed: int) -> Dsv4ForCausalLM:
        """A model in its first weights; every block starts silent, as the nano's do."""
        torch.manual_seed(seed)
        fields = {
            "vocab_size": corpus.tokenizer.get_vocab_size(),
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **self.config,
        }
        if fields.get("engram_layer_ids"):
            token_map = build_token_map(corpus.tokenizer)
            fields["engram_pad_token_id"] = PAD
            fields["engram_compressed_vocab_size"] = int(token_map.max()) + 1
        model = Dsv4ForCausalLM(Dsv4Config(**fields))
        if fields.get("engram_layer_ids"):
            model.set_engram_token_map(token_map)
        _first_weights(model, Recipe().embed_std)
        replace_sites(model, self.connection)
        if self.ids == "shuffled":
            shuffle_ids(model, seed)
        return model


@torch.no_grad()
def _first_weights(model: Dsv4ForCausalLM, embed_std: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=0.5 * module.in_features**-0.5)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        grouped = attention.o_a_proj.weight
        grouped.normal_(std=0.5 * grouped.shape[1] ** -0.5)
        mlp.experts.gate_up_proj.normal_(std=0.5 * model.config.hidden_size**-0.5)
        silent = (attention.o_b_proj.weight, mlp.experts.down_proj,
                  mlp.shared_experts.down_proj.weight)  # fmt: skip
        for weight in silent:
            weight.zero_()
    model.model.embed_tokens.weight.normal_(std=embed_std)
    model.lm_head.weight.zero_()
