# SPDX-License-Identifier: Apache-2.0
"""Train a DSpark head for the nano model beside its frozen backbone: a quarter of an hour.

    python examples/train_draft.py                     train, measure, write into models/nano-v41
    python examples/train_draft.py --output DIR        write a copy of the folder instead
    python examples/train_draft.py --steps 20 --check  repeat 20 steps, compare the loss

The backbone's file is not touched: the head becomes a second shard. Texts as pretrain_nano.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from nano.data import load_corpus
from nano.drafts import DraftRecipe, DraftStep, measure, train_head, with_head, write_head
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from modeling_dsv4 import Dsv4ForCausalLM

NANO = Path(__file__).resolve().parents[1] / "models" / "nano-v41"
# Other threads and machines sum in another order.
TOLERANCE = 0.05
console = Console()


def train(
    folder: Path, recipe: DraftRecipe, stop: int
) -> tuple[Dsv4ForCausalLM, list[DraftStep], dict[str, object]]:
    """A model with a trained head, its steps, and what it can do on held-out text."""
    corpus = load_corpus(Tokenizer.from_file(str(folder / "tokenizer.json")))
    model = with_head(Dsv4ForCausalLM.from_pretrained(folder, dtype=torch.float32), recipe)
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    steps: list[DraftStep] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=stop)
        for step in train_head(model, corpus, recipe):
            steps.append(step)
            last = steps[-20:]
            loss = sum(s.loss for s in last) / len(last)
            first = sum(s.agreed[0] for s in last) / len(last)
            text = f"loss {loss:.3f}, first guess right {first:.0%}"
            progress.update(task, advance=1, description=text)
            if step.number == stop:
                break
    texts = {name: domain.held_out for name, domain in corpus.domains.items()}
    return model, steps, measure(model, texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=NANO, help="folder of the backbone")
    parser.add_argument("--output", type=Path, help="folder to write; default: the model's own")
    parser.add_argument("--steps", type=int, help="stop after so many steps of the same schedule")
    parser.add_argument("--check", action="store_true", help="compare the loss; write nothing")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = DraftRecipe()
    stop = args.steps or recipe.steps
    model, steps, found = train(args.model, recipe, stop)
    found = {
        "recipe": asdict(recipe),
        "seconds": sum(s.seconds for s in steps),
        "threads": args.threads,
        "torch": torch.__version__,
        "losses": [s.loss for s in steps[9::10]],
        **found,
    }
    if args.check:
        stored = json.loads((args.model / "draft.json").read_text())["losses"][stop // 10 - 1]
        difference = abs(steps[stop // 10 * 10 - 1].loss - stored)
        console.print(f"step {stop // 10 * 10}: difference {difference:.1e}")
        if difference > TOLERANCE:
            raise SystemExit(f"not reproduced: wanted a difference of at most {TOLERANCE}")
        return
    output = args.output or args.model
    if output != args.model:
        shutil.copytree(args.model, output)
    write_head(model, output, found)
    for name, domain in found["held_out"].items():
        agreed = ", ".join(f"{share:.0%}" for share in domain["agreed"])
        console.print(f"{name}: guesses that are the backbone's choice, by place: {agreed}")


if __name__ == "__main__":
    main()
