# SPDX-License-Identifier: Apache-2.0
"""From a trained model to a folder worth shipping: weights, measured numbers, curve and card."""

import csv
import json
import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from finetune.pretraining_settings import Step
from finetune.utilization import CountOperations, matmul_rate
from modeling_dsv4 import Dsv4ForCausalLM

from .ablate import WHOLE, ablate
from .card import card
from .data import Corpus, save_tokenizer
from .ngram import NGram
from .recipe import Plan, Recipe
from .train import held_out_loss

SHIPPED_ROWS = 16
MAX_BYTES = 37_000_000


def read_losses(path: Path) -> list[Step]:
    """Read back what `write_losses` wrote."""
    with path.open(newline="") as file:
        return [
            Step(int(row.pop("step")), **{k: float(v) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def write_losses(steps: Sequence[Step], path: Path) -> None:
    """One line a step."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["step", "loss", "index_loss", "busiest", "seconds"])
        for s in steps:
            # Nine digits tell every float32 from its neighbour.
            row = (f"{s.loss:.9g}", f"{s.index_loss:.6g}", f"{s.busiest:.4g}", f"{s.seconds:.3f}")
            out.writerow([s.number, *row])


def plot(steps: Sequence[Step], recipe: Recipe, stem: Path) -> None:
    """Write the training loss and the indexer's loss as SVG and PNG."""
    import matplotlib

    matplotlib.use("agg")
    # Ids and dates would differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "nano"
    from matplotlib import pyplot

    loss = np.array([s.loss for s in steps])
    width = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    seen = np.array([s.number for s in steps]) * recipe.step_tokens / 1e6
    figure, (top, low) = pyplot.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot(seen, loss, color="0.8", linewidth=0.8, label="each step")
    top.plot(seen[width - 1 :], smooth, color="C0", label=f"mean of {width} steps")
    top.set_ylabel("loss, nats per token")
    low.plot(seen, [s.index_loss for s in steps], color="C1", linewidth=0.8)
    low.set_ylabel("indexer, nats")
    low.set_xlabel("million tokens")
    for axes in (top, low):
        axes.axvline(recipe.sparse_from * recipe.tokens / 1e6, color="0.5", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    top.legend(frameon=False)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def count_flops(model: Dsv4ForCausalLM, rows: np.ndarray) -> float:
    """Operations of a token in training: forward and backward over rows [r, 512], counted."""
    ids = torch.from_numpy(rows.astype(np.int64))
    with CountOperations() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return counter.total / ids.numel()


def measure(
    model: Dsv4ForCausalLM, corpus: Corpus, steps: Sequence[Step], plan: Plan, threads: int
) -> dict[str, Any]:
    """Every number of the card: the model beside n-grams of the same tokens, and its ablations."""
    recipe = plan.recipe
    losses = ablate(model, corpus)
    ngram = NGram(corpus.train, model.config.vocab_size)
    domains = {}
    for name, domain in corpus.domains.items():
        loss = losses[WHOLE][name]
        nats = loss * domain.held_out[:, 1:].size
        domains[name] = {
            "training_tokens": len(domain.train),
            "perplexity": math.exp(loss),
            "bits_per_byte": nats / math.log(2) / domain.held_out_bytes,
            "ngram_perplexity": ngram.perplexities(domain.held_out),
            "shipped_rows_loss": held_out_loss(model, domain.held_out[:SHIPPED_ROWS]),
        }
    seconds = sum(s.seconds for s in steps)
    flops, rate = count_flops(model, corpus.domains["prose"].held_out[:4]), matmul_rate()
    tokens = len(steps) * recipe.step_tokens
    return {
        "parameters": model.num_parameters(),
        "plan": plan.name,
        "all_code": plan.all_code,
        "changes": plan.changes,
        "recipe": asdict(recipe),
        "steps": len(steps),
        "tokens_seen": tokens,
        "seconds": seconds,
        "flops_per_token": flops,
        "matmul_rate": rate,
        "utilization": flops * tokens / seconds / rate,
        "threads": threads,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "domains": domains,
        "held_out_loss": losses,
    }


@torch.no_grad()
def sample(model: Dsv4ForCausalLM, corpus: Corpus, prompt: str) -> str:
    """A short continuation, drawn with a fixed seed."""
    torch.manual_seed(0)
    ids = torch.tensor([corpus.tokenizer.encode(prompt).ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=50,
    )
    return corpus.tokenizer.decode(out[0].tolist())


def publish(
    model: Dsv4ForCausalLM,
    corpus: Corpus,
    steps: Sequence[Step],
    plan: Plan,
    folder: Path,
    threads: int,
) -> dict[str, Any]:
    """Write the folder whole or not at all; the numbers are those of the weights as written.

    `threads` is how many trained the model.

    Raises:
        ValueError: the weights take more than `MAX_BYTES`.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(draft)
    size = sum(f.stat().st_size for f in draft.glob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"the checkpoint: wanted at most {MAX_BYTES:,} bytes, got {size:,}")
    save_tokenizer(corpus.tokenizer, draft)
    written = Dsv4ForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    found = {"bytes": size, **measure(written, corpus, steps, plan, threads)}
    found["samples"] = [
        sample(written, corpus, prompt)
        for prompt in ("The people of the United States", "def _eval_simplify(self, **kwargs):\n")
    ]
    rows = {
        name: torch.from_numpy(domain.held_out[:SHIPPED_ROWS].astype(np.int16))
        for name, domain in corpus.domains.items()
    }
    save_file(rows, draft / "held_out.safetensors")
    write_losses(steps, draft / "losses.csv")
    plot(steps, plan.recipe, draft / "loss")
    (draft / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (draft / "README.md").write_text(card(found), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return found
