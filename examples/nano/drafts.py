# SPDX-License-Identifier: Apache-2.0
"""A DSpark head for the nano model: its shape, its first weights, its training."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.expert_balance import ExpertBalance
from finetune.muon import Muon
from finetune.pretraining_settings import schedule
from finetune.token_batches import TokenBatches
from modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.draft_training import draft_loss
from modeling_dsv4.precision import FLOAT32_NAMES

from .data import PAD, Corpus

# Two stages of four experts: as deep as 3 MB allow.
SHAPE = {
    "draft_kind": "dspark",
    "num_draft_layers": 2,
    "dspark_block_size": 5,
    "dspark_markov_rank": 32,
    "dspark_noise_token_id": PAD,
    "dspark_target_layer_ids": [2, 4, 5],
    "dspark_n_routed_experts": 4,
    "dspark_num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class DraftRecipe:
    """One training run; the same values give the same losses. Rates are peaks."""

    seed: int = 2
    steps: int = 1800
    rows: int = 4
    length: int = 256
    anchors: int = 64
    warmup: int = 30
    matrix_rate: float = 0.02
    rate: float = 4e-3
    balance_rate: float = 1e-2
    decay: float = 0.8
    clip: float = 1.0


@dataclass(frozen=True)
class DraftStep:
    """What one step reports: losses in nats, and agreement by place in the block."""

    number: int
    loss: float
    confidence_loss: float
    agreed: tuple[float, ...]
    seconds: float


def with_head(backbone: Dsv4ForCausalLM, recipe: DraftRecipe) -> Dsv4ForCausalLM:
    """The backbone, frozen, in a model with a fresh head; blocks of the head start silent."""
    torch.manual_seed(recipe.seed)
    fields = {k: v for k, v in backbone.config.to_dict().items() if k not in SHAPE}
    model = Dsv4ForCausalLM(type(backbone.config)(**fields, **SHAPE))
    report = model.load_state_dict(
        {k: v for k, v in backbone.state_dict().items() if not k.startswith("mtp.")}, strict=False
    )
    assert not report.unexpected_keys and all(k.startswith("mtp.") for k in report.missing_keys)
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    with torch.no_grad():
        for module in model.mtp.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.5 * module.in_features**-0.5)
        for stage in model.mtp.stages:
            grouped = stage.self_attn.o_a_proj.weight
            grouped.normal_(std=0.5 * grouped.shape[1] ** -0.5)
            stage.mlp.experts.gate_up_proj.normal_(std=0.5 * model.config.hidden_size**-0.5)
            for silent in (
                stage.self_attn.o_b_proj.weight,
                stage.mlp.experts.down_proj,
                stage.mlp.shared_experts.down_proj.weight,
            ):
                silent.zero_()
        model.mtp.stages[-1].markov_head.embed.weight.normal_(std=0.3)
        model.mtp.stages[-1].markov_head.head.weight.zero_()
        model.mtp.stages[-1].confidence_head.proj.weight.zero_()
    return model


def optimizers(model: Dsv4ForCausalLM, recipe: DraftRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the stages, AdamW for all else."""
    matrices, rest = [], []
    for name, p in model.mtp.named_parameters():
        small = p.dim() < 2 or any(x in name for x in ("_hc.", ".gate.", "markov", "confidence"))
        (rest if small else matrices).append(p)
    halves = [stage.mlp.experts.gate_up_proj for stage in model.mtp.stages]
    return [
        Muon(matrices, recipe.matrix_rate, halves=halves),
        torch.optim.AdamW(rest, recipe.rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]


def train_head(model: Dsv4ForCausalLM, corpus: Corpus, recipe: DraftRecipe) -> Iterator[DraftStep]:
    """Train the head of a model that `with_head` made, yielding a report after every step."""
    model.eval()
    balance = ExpertBalance(model.mtp)
    optimizer = optimizers(model, recipe)
    peaks = [o.param_groups[0]["lr"] for o in optimizer]
    weights = [p for p in model.mtp.parameters() if p.requires_grad]
    dice = torch.Generator().manual_seed(recipe.seed)
    text = TokenBatches(corpus.train, recipe.length, recipe.rows, recipe.steps, recipe.seed)
    last = recipe.length - SHAPE["dspark_block_size"]
    for number in range(recipe.steps):
        start, ids = time.perf_counter(), text[number]["input_ids"]
        anchors = 1 + torch.randperm(last, generator=dice)[: recipe.anchors]
        found = draft_loss(model, ids, anchors, recipe.decay)
        (found.tokens + found.confidence).backward()
        nn.utils.clip_grad_norm_(weights, recipe.clip)
        factor = schedule(number, recipe.steps, recipe.warmup)
        for o, rate in zip(optimizer, peaks, strict=True):
            o.param_groups[0]["lr"] = rate * factor
            o.step()
            o.zero_grad()
        balance.step(recipe.balance_rate * (1 - number / recipe.steps))
        losses = found.tokens.item(), found.confidence.item()
        seconds = time.perf_counter() - start
        yield DraftStep(number + 1, *losses, tuple(found.agreed.tolist()), seconds)


@torch.no_grad()
def measure(
    model: Dsv4ForCausalLM, held_out: Mapping[str, np.ndarray], rows: int = 16
) -> dict[str, Any]:
    """What the head guesses on the first held-out rows of each domain, blocks at fixed columns.

    Guesses are made behind the true text, and compared with what the backbone prefers there.
    """
    found = {}
    for name, texts in held_out.items():
        ids = torch.from_numpy(texts[:rows].astype(np.int64))
        anchors = torch.arange(40, ids.shape[1] - SHAPE["dspark_block_size"], 8)
        parts = [draft_loss(model, part, anchors) for part in ids.split(4)]
        found[name] = {
            "cross_entropy": float(torch.stack([p.tokens for p in parts]).mean()),
            "agreed": torch.stack([p.agreed for p in parts]).mean(0).tolist(),
            "sure": torch.stack([p.sure for p in parts]).mean(0).tolist(),
        }
    return {"held_out": found}


_TITLE = "## Draft head"


def section(found: dict[str, Any]) -> str:
    """The model card's part about the head."""
    recipe, minutes = found["recipe"], found["seconds"] / 60
    lines = [
        _TITLE,
        "",
        "A DSpark head of two stages with four experts each, trained beside the frozen backbone by "
        f"`python examples/train_draft.py`: {recipe['steps']} steps of {recipe['rows']} x "
        f"{recipe['length']} tokens, {minutes:.0f} minutes on {found['threads']} thread(s). Of its "
        "guesses behind held-out text these are what the backbone prefers, by place in the block; "
        "below each the head's mean confidence.",
        "",
        "| | " + " | ".join(str(i + 1) for i in range(5)) + " |",
        "|---" * 6 + "|",
    ]
    for name, domain in found["held_out"].items():
        for key in ("agreed", "sure"):
            cells = " | ".join(f"{100 * share:.0f} %" for share in domain[key])
            lines.append(f"| {name}, {key} | {cells} |")
    return "\n".join(lines) + "\n"


MAIN, HEAD = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def write_head(model: Dsv4ForCausalLM, folder: Path, found: dict[str, Any]) -> None:
    """Put the head beside the backbone's weights, which keep their bytes: a second shard."""
    one = folder / "model.safetensors"
    if one.exists():
        one.rename(folder / MAIN)
    wide = {n for n in model.state_dict() if set(n.split(".")) & set(FLOAT32_NAMES)}
    head = {
        k: (v if k in wide else v.to(torch.bfloat16)).contiguous()
        for k, v in model.state_dict().items()
        if k.startswith("mtp.")
    }
    save_file(head, folder / HEAD, metadata={"format": "pt"})
    shards = {name: load_file(folder / name) for name in (MAIN, HEAD)}
    index = {
        "metadata": {
            "total_size": sum(t.nbytes for shard in shards.values() for t in shard.values())
        },
        "weight_map": {key: name for name, shard in shards.items() for key in sorted(shard)},
    }
    text = json.dumps(index, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    file = folder / "config.json"
    fields = {**json.loads(file.read_text()), **SHAPE, "dspark_reads_outputs": False}
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    file.write_text(text, encoding="utf-8")
    (folder / "draft.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found:
        card = folder / "README.md"
        before = card.read_text(encoding="utf-8").partition(_TITLE)[0].rstrip("\n")
        card.write_text(f"{before}\n\n{section(found)}", encoding="utf-8")
