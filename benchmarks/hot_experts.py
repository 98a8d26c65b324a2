# SPDX-License-Identifier: Apache-2.0
"""How many experts cover how much of a text's routing, and what adapters on them alone learn.

    python benchmarks/hot_experts.py                              # networkx, nano-v41
    python benchmarks/hot_experts.py M --data my.jsonl --steps 0  # count alone

Each share trains the same steps on the same data from the same seed; the ratio is the held-out
improvement over that of adapters on all experts, in the same run. Without --data the text is that
of `finetune_domain.py`, half of it what the nano was trained on; "forgotten" is by how much the
perplexity of some more of that grows.
"""

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_domain import NANO, general_texts, read_entries, split, write_jsonl
from rich.console import Console
from rich.table import Table

from finetune.config import RunConfig
from finetune.evaluate import evaluate_files
from finetune.hot_experts import DEFAULT_SHARE, SCORES, choose_hot_experts, measure_routing
from finetune.loading import load_model, load_tokenizer
from finetune.prepare import prepare_data
from finetune.running import train


@dataclass(frozen=True)
class Run:
    """What one share cost and gave; `forgot`: how much general perplexity grew."""

    parameters: int
    nbytes: int
    seconds: float
    before: float
    after: float
    forgot: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=NANO)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5, 0.9, 1.0])
    parser.add_argument("--steps", type=int, default=60, help="0 counts alone")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def domain(folder: Path) -> dict[str, Path]:
    """Files of a domain with general text mixed in, of what is held out, and of general text."""
    learned, held = split(read_entries())
    general = general_texts(sum(len(e.text) for e in learned))
    kept, general = general[::8], [t for i, t in enumerate(general) if i % 8]
    records = [{"text": e.text} for e in learned] + [{"text": t} for t in general]
    random.Random(1).shuffle(records)
    files = {"data": records, "eval_data": [{"text": e.text} for e in held]}
    files["general"] = [{"text": t} for t in kept]
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in files.items()}


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Count once, train once a share, and print both beside each other."""
    files = {"data": args.data} if args.data else domain(folder)
    settings = {
        "model": str(args.model),
        "preset": "hot-experts",
        "max_length": 512,
        "packing": True,
        "batch_size": 2,
        "learning_rate": args.learning_rate,
        "dtype": "float32",
        "report_to": "none",
        "overfit_gate": "off",
        "keep_best": False,
        "max_steps": args.steps or None,
        **{name: str(file) for name, file in files.items() if name != "general"},
    }
    config = RunConfig(**settings, output=str(folder / "count"))
    model = load_model(args.model, dtype="float32")
    rows = prepare_data(config, load_tokenizer(args.model)).train
    read = (torch.tensor([rows[i]["input_ids"]]) for i in range(len(rows)))
    mass = measure_routing(model, ({"input_ids": ids} for ids in read))
    del model
    runs = {}
    if args.steps:
        runs = {s: run(settings, s, folder, files.get("general")) for s in args.shares}
    table = Table(title=f"{args.model.name}, {args.steps} steps; {mass.tokens:,} tokens counted")
    heads = ("share", *(f"experts by {score}" for score in SCORES), "parameters", "adapter")
    for head in (*heads, "s/step", "held-out loss", "improvement / all", "forgotten"):
        table.add_column(head, justify="right")
    for share in args.shares:
        chosen = [choose_hot_experts(mass, share, score) for score in SCORES]
        total = chosen[0].num_experts * len(chosen[0].ids)
        counts = [f"{sum(len(ids) for ids in hot.ids.values())} of {total}" for hot in chosen]
        name = f"{share:.0%}{' (default)' if share == DEFAULT_SHARE else ''}"
        cells = _cells(runs[share], runs[max(runs)], args.steps) if share in runs else ()
        table.add_row(name, *counts, *cells)
    Console(width=150).print(table)


def run(settings: dict[str, Any], share: float, folder: Path, general: Path | None) -> Run:
    """Train adapters on the experts that cover a share."""
    output = folder / str(share)
    found = train(RunConfig(**settings, hot_share=share, output=str(output)))
    assert found.held_out_loss_before is not None and found.held_out_loss_after is not None
    forgot = None
    if general is not None:
        checked = evaluate_files(settings["model"], adapter=output, general=general, max_length=512)
        forgot = checked.forgetting
    return Run(
        found.trained_parameters,
        (output / "adapter_model.safetensors").stat().st_size,
        found.seconds,
        found.held_out_loss_before,
        found.held_out_loss_after,
        forgot,
    )


def _cells(run: Run, whole: Run, steps: int) -> tuple[str, ...]:
    return (
        f"{run.parameters:,}",
        f"{run.nbytes / 1e6:.2f} MB",
        f"{run.seconds / steps:.2f}",
        f"{run.before:.3f} -> {run.after:.3f}",
        f"{(run.before - run.after) / (whole.before - whole.after):.2f}",
        "" if run.forgot is None else f"{run.forgot:+.1%}",
    )


if __name__ == "__main__":
    main()
