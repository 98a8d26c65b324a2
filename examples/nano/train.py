# SPDX-License-Identifier: Apache-2.0
"""The training loop: a pure function of corpus, configuration and recipe."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

from .data import Corpus
from .indexing import IndexTeacher
from .optim import Muon, schedule
from .recipe import Recipe, new_model


@dataclass(frozen=True)
class Step:
    """What one step reports: losses in nats per token and the largest share of one expert."""

    number: int
    loss: float
    index_loss: float
    busiest: float
    seconds: float


class Batches:
    """Rows of the training stream: every epoch starts at a new offset and in a new order."""

    def __init__(self, tokens: np.ndarray, recipe: Recipe) -> None:
        self.tokens, self.recipe = tokens, recipe

    def __iter__(self) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(self.recipe.seed)
        size, rows = self.recipe.length, self.recipe.rows
        while True:
            start = int(rng.integers(size))
            count = (len(self.tokens) - start) // size
            order = rng.permutation(count)
            for at in range(0, count - rows + 1, rows):
                first = start + size * order[at : at + rows]
                batch = np.stack([self.tokens[i : i + size] for i in first])
                yield torch.from_numpy(batch.astype(np.int64))


class Balance:
    """Keeps experts equally busy without a loss (Wang et al., 2024; `noaux_tc`).

    After every step the selection bias of an expert that got less than its share rises by a fixed
    amount, that of the others falls.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.gates = [layer.mlp.gate for layer in layers]
        self.counts = [torch.zeros_like(g.e_score_correction_bias) for g in self.gates]
        for gate, counts in zip(self.gates, self.counts, strict=True):
            gate.register_forward_hook(lambda _m, _a, out, counts=counts: self._count(out, counts))

    def _count(self, output: tuple[torch.Tensor, ...], counts: torch.Tensor) -> None:
        counts += torch.bincount(output[2].flatten(), minlength=len(counts))

    def step(self, rate: float) -> float:
        """Move the biases; returns the largest load of an expert over the mean load."""
        worst = 0.0
        for gate, counts in zip(self.gates, self.counts, strict=True):
            gate.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)
            worst = max(worst, float(counts.max() / counts.mean()))
            counts.zero_()
        return worst


def optimizers(model: Dsv4ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW in groups of their own rate for the rest.

    Engram tables: five times the common rate and no decay (Engram §4.1).
    """
    groups: dict[str, list[nn.Parameter]] = {
        k: [] for k in ("matrix", "rest", "embed", "head", "table", "index")
    }
    halves = [layer.mlp.experts.gate_up_proj for layer in model.model.layers]
    for name, p in model.named_parameters():
        groups[_group(name, p)].append(p)
    muon = Muon(
        groups["matrix"], recipe.matrix_rate, weight_decay=recipe.matrix_decay, halves=halves
    )
    rates = {
        "rest": recipe.rate,
        "embed": recipe.embed_rate,
        "head": recipe.head_rate,
        "table": recipe.table_rate,
        "index": recipe.index_rate,
    }
    adam = torch.optim.AdamW(
        [{"params": groups[k], "lr": rate} for k, rate in rates.items()],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        foreach=True,
    )
    return [muon, adam]


def _group(name: str, p: nn.Parameter) -> str:
    if ".indexer." in name:
        return "index"
    if "embed_tokens" in name:
        return "embed"
    if "lm_head" in name:
        return "head"
    if "engram.embed" in name:
        return "table"
    small = p.dim() < 2 or "_hc." in name or ".gate.weight" in name or "engram." in name
    return "matrix" if not small or "engram.kv_proj" in name else "rest"


def train(
    corpus: Corpus, config: Dsv4Config, recipe: Recipe
) -> Iterator[tuple[Dsv4ForCausalLM, Step]]:
    """Train, yielding the model and a report after every step."""
    model = new_model(config, corpus.tokenizer, recipe).train()
    balance, teacher = Balance(model.model.layers), IndexTeacher(model, recipe.teach_rows)
    optimizer = optimizers(model, recipe)
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizer]
    sparse = config.index_topk, config.candidate_topk_blocks
    weights = [p for p in model.parameters() if p.requires_grad]
    for number, ids in zip(range(recipe.steps), Batches(corpus.train, recipe), strict=False):
        start = time.perf_counter()
        all_visible = number < recipe.sparse_from * recipe.steps
        config.index_topk, config.candidate_topk_blocks = (1 << 20,) * 2 if all_visible else sparse
        loss = model(input_ids=ids, labels=ids).loss
        index_loss = teacher.loss()
        (loss + index_loss).backward()
        nn.utils.clip_grad_norm_(weights, recipe.clip)
        factor = schedule(number, recipe.steps, recipe.warmup, recipe.floor)
        for o, rates in zip(optimizer, peaks, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.step()
            o.zero_grad()
        busiest = balance.step(recipe.balance_rate * (1 - number / recipe.steps))
        config.index_topk, config.candidate_topk_blocks = sparse
        seconds = time.perf_counter() - start
        yield model, Step(number + 1, loss.item(), index_loss.item(), busiest, seconds)


@torch.no_grad()
def held_out_loss(model: Dsv4ForCausalLM, rows: np.ndarray, batch: int = 8) -> float:
    """Mean cross entropy of rows [r, 512] in nats per predicted token."""
    model.eval()
    total = 0.0
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch):
        total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    return total / len(rows)
