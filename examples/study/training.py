# SPDX-License-Identifier: Apache-2.0
"""Train one variant with one seed: a line per step, and what is measured at the end."""

import csv
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano.data import Corpus
from nano.optim import schedule
from nano.train import Balance, Batches, optimizers
from torch import nn

from finetune.indexer_training import IndexerTeacher
from modeling_dsv4 import Dsv4ForCausalLM

from .context import measure_context
from .facts import FactBatches
from .memory import active_parameters, measure_memory, token_losses
from .residual import gains, recorded
from .routing import balance_loss, spread
from .variant import Variant

FIELDS = ("step", "loss", "grad_norm", "forward_gain", "backward_gain", "busiest", "entropy",
          "idle", "seconds")  # fmt: skip
# Steps between measurements of gains, and held-out rows of each domain.
_EVERY = 10
_ROWS = 16


def run(
    variant: Variant,
    corpus: Corpus,
    seed: int,
    folder: Path,
    steps: int | None = None,
    tell: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train, write `NAME-sSEED.csv` and `.json` into a folder, and return what was measured."""
    recipe = variant.recipe_for(seed)
    model = variant.build(corpus, seed).train()
    lines = []
    facts = FactBatches(corpus, recipe) if variant.group == "attention" else None
    for line in _train(model, corpus, recipe, steps or recipe.steps, facts):
        lines.append(line)
        if tell is not None:
            tell(line)
    batches = zip(lines, Batches(corpus.train, recipe), strict=False)
    read = np.concatenate([ids.numpy() for _, ids in batches])
    found = measure(model, variant, corpus, read)
    found |= {
        "variant": variant.name, "seed": seed, "steps": len(lines),
        "tokens": len(lines) * recipe.rows * recipe.length,
        "seconds": sum(line["seconds"] for line in lines), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if facts is not None:
        found["tokens"] = facts.tokens(len(lines))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{variant.name}-s{seed}"
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in line.items()} for line in lines)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _train(
    model: Dsv4ForCausalLM,
    corpus: Corpus,
    recipe: Any,
    steps: int,
    facts: FactBatches | None = None,
) -> Any:
    balance = Balance(model.model.layers)
    selects = bool(model.config.index_source_layer_ids)
    teacher = IndexerTeacher(model) if selects else None
    config = model.config
    aux = config.router_aux_loss_coef
    sparse = config.index_topk, config.candidate_topk_blocks
    optimizer = optimizers(model, recipe)
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizer]
    weights = [p for p in model.parameters() if p.requires_grad]
    pairs = facts or ((ids, ids) for ids in Batches(corpus.train, recipe))
    for number, (ids, labels) in zip(range(steps), pairs, strict=False):
        start = time.perf_counter()
        # Until the indexer has seen enough, queries read every entry, as in V3.2's warm-up.
        dense = selects and number < recipe.sparse_from * recipe.steps
        config.index_topk, config.candidate_topk_blocks = (1 << 20,) * 2 if dense else sparse
        with recorded(model) as combs:
            out = model(input_ids=ids, labels=labels, output_router_logits=aux > 0)
        loss = out.loss
        even = balance_loss(out.router_logits, config.num_experts_per_tok) if aux else 0.0
        (loss + aux * even).backward()
        norm = nn.utils.clip_grad_norm_(weights, recipe.clip)
        factor = schedule(number, recipe.steps, recipe.warmup, recipe.floor)
        for o, rates in zip(optimizer, peaks, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.step()
            o.zero_grad()
        loads = spread(balance.counts)
        balance.step(recipe.balance_rate * (1 - number / recipe.steps))
        seconds = time.perf_counter() - start
        kl = teacher.metrics()["kl"] if teacher is not None else 0.0
        line = {"step": number + 1, "loss": loss.item() - kl, "grad_norm": float(norm),
                **loads, "seconds": seconds}  # fmt: skip
        if number % _EVERY == 0 or number == steps - 1:
            forward, backward = gains(combs)
            line |= {"forward_gain": max(forward), "backward_gain": max(backward)}
        config.index_topk, config.candidate_topk_blocks = sparse
        yield line
        if not np.isfinite(line["loss"]):
            return


@torch.no_grad()
def measure(
    model: Dsv4ForCausalLM, variant: Variant, corpus: Corpus, read: np.ndarray
) -> dict[str, Any]:
    """Held-out loss by domain, kind of token or place; gains by depth; parameters.

    `read` [n, s]: the tokens that the model was trained on.
    """
    model.eval()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active": active_parameters(model),
    }
    if variant.group in ("memory", "routing"):
        found |= measure_memory(model, corpus, read, meaningful=variant.ids == "text")
    else:
        for name, domain in corpus.domains.items():
            losses = token_losses(model, domain.held_out[:_ROWS])
            by_place = [float(x.mean()) for x in np.array_split(losses, 8, axis=1)]
            found[name] = {"loss": float(losses.mean()), "by_place": by_place}
    if variant.group == "attention":
        found |= measure_context(model, corpus)
    ids = torch.from_numpy(corpus.domains["prose"].held_out[:2].astype(np.int64))
    with recorded(model) as combs:
        model(input_ids=ids, use_cache=False)
    found["forward_gain"], found["backward_gain"] = gains(combs)
    return found
