# SPDX-License-Identifier: Apache-2.0
"""Train one variant with one seed: a line per step, and what is measured at the end."""

import csv
import json
import platform
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano.data import Corpus
from nano.recipe import Recipe
from transformers import TrainerCallback

from finetune.pretraining import Pretrainer, pretrain
from finetune.pretraining_settings import Step
from finetune.token_batches import TokenBatches
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
    facts = FactBatches(corpus, recipe) if variant.group == "attention" else None
    lines = _train(model, corpus, recipe, steps or recipe.steps, facts, tell)
    text = TokenBatches(corpus.train, recipe.length, recipe.rows, len(lines), recipe.seed)
    read = np.concatenate([text[i]["input_ids"].numpy() for i in range(len(lines))])
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
    recipe: Recipe,
    steps: int,
    facts: FactBatches | None = None,
    tell: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """A line per step; the run ends early where the loss is no number any more."""
    gauge = Gauge(model, steps)
    lines: list[dict[str, float]] = []

    def note(step: Step, trainer: Pretrainer) -> None:
        line = {"step": step.number, "loss": step.loss, "grad_norm": step.grad_norm,
                **spread(trainer.balance.last), "seconds": step.seconds}  # fmt: skip
        lines.append(line | gauge.found)
        if tell is not None:
            tell(lines[-1])

    aux, top_k = model.config.router_aux_loss_coef, model.config.num_experts_per_tok
    # It is asked of the configuration: a pass of the Trainer has no keywords but a batch's.
    model.config.output_router_logits = aux > 0
    batches = corpus.train if facts is None else [
        {"input_ids": ids, "labels": labels}
        for (ids, labels), _ in zip(facts, range(steps), strict=False)
    ]  # fmt: skip
    pretrain(
        model, batches, recipe, stop_at=steps, tell=note, callbacks=[gauge],
        more_loss=(lambda out: aux * balance_loss(out.router_logits, top_k)) if aux else None,
    )  # fmt: skip
    return lines


class Gauge(TrainerCallback):
    """Records what every site mixes, and measures gains every few steps.

    Attributes:
        found: largest forward and backward gain of the last step; empty where not measured.
    """

    def __init__(self, model: Dsv4ForCausalLM, steps: int) -> None:
        self.model, self.steps = model, steps
        self.found: dict[str, float] = {}
        self._stack = ExitStack()
        self._combs: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._combs = self._stack.enter_context(recorded(self.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stack.close()
        self.found = {}
        if (state.global_step - 1) % _EVERY == 0 or state.global_step == self.steps:
            forward, backward = gains(self._combs)
            self.found = {"forward_gain": max(forward), "backward_gain": max(backward)}


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
