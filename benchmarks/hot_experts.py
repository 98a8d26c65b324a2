# SPDX-License-Identifier: Apache-2.0
"""How many experts cover how much of a text's routing, and what adapters on them alone learn.

    python benchmarks/hot_experts.py models/nano-v41 --data examples/data/private.jsonl

Each share trains the same steps on the same data from the same seed; the ratio is the held-out
improvement over that of adapters on all experts, in the same run.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finetune.config import RunConfig
from finetune.hot_experts import SCORES, choose_hot_experts, measure_routing
from finetune.loading import load_model, load_tokenizer
from finetune.prepare import prepare_data
from finetune.running import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("examples/data/private.jsonl"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5, 0.9, 1.0])
    parser.add_argument("--steps", type=int, default=0, help="also train; 0 counts alone")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    settings = {
        "model": str(args.model),
        "data": str(args.data),
        "preset": "hot-experts",
        "max_length": 256,
        "learning_rate": args.learning_rate,
        "report_to": "none",
        "overfit_gate": "off",
        "keep_best": False,
        "max_steps": args.steps or None,
    }
    config = RunConfig(**settings, output=str(folder / "count"))
    model = load_model(args.model, dtype="float32")
    rows = prepare_data(config, load_tokenizer(args.model)).train
    mass = measure_routing(model, ({"input_ids": ids} for ids in _ids(rows)))
    table = Table(title=f"{args.model.name}: {mass.tokens:,} tokens counted")
    heads = ("share", *(f"experts by {score}" for score in SCORES), "parameters")
    for head in (*heads, "held-out loss", "improvement / all"):
        table.add_column(head, justify="right")
    runs = {share: _run(settings, share, folder) for share in args.shares} if args.steps else {}
    every = max(runs, default=None)
    for share in args.shares:
        chosen = [choose_hot_experts(mass, share, score) for score in SCORES]
        counts = [sum(len(ids) for ids in hot.ids.values()) for hot in chosen]
        total = chosen[0].num_experts * len(chosen[0].ids)
        cells = [f"{share:.0%}", *(f"{count} of {total}" for count in counts)]
        if share in runs:
            result, whole = runs[share], runs[every]
            gain = result.held_out_loss_before - result.held_out_loss_after
            best = whole.held_out_loss_before - whole.held_out_loss_after
            before, after = result.held_out_loss_before, result.held_out_loss_after
            cells += [
                f"{result.trained_parameters:,}",
                f"{before:.3f} -> {after:.3f}",
                f"{gain / best:.2f}",
            ]
        table.add_row(*cells)
    Console(width=110).print(table)


def _ids(rows):
    import torch

    return (torch.tensor([rows[i]["input_ids"]]) for i in range(len(rows)))


def _run(settings: dict, share: float, folder: Path):
    return train(RunConfig(**settings, hot_share=share, output=str(folder / str(share))))


if __name__ == "__main__":
    main()
