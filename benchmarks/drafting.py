# SPDX-License-Identifier: Apache-2.0
"""Decode the nano model with and without its draft head: prose, code, chat; resident and on disk.

    python benchmarks/drafting.py                     tables; some minutes
    python benchmarks/drafting.py --json result.json  the same as data too

Teacher-forced: how often the head's guesses behind a fixed held-out text are what the backbone
prefers there, by place in the block; for code and prose on the shipped held-out rows, for chat on
the conversations of examples/data, which the model never saw the like of. Free: greedy texts behind
the heads of the same texts, one sequence at a time, and what share of them equals plain decoding's.
On disk: experts in FP4 behind a store that holds a quarter of them, their files dropped from the
page cache before each run.

All of it is float32: in bfloat16 a pass of one token and one of several round differently, and
where two tokens are nearly alike the texts part.

Runs of one kind take turns, and the median of their times counts. The program fails if one kind of
text gives less than 1.6 tokens a pass, or if texts differ.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# The program beside this one.
from offload import drop_page_cache
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "models" / "nano-v41"
WANTED = 1.6
KINDS: tuple[int | str | None, ...] = (None, 1, 3, 5, "auto")
PLACES = ("resident", "on disk")


@dataclass
class Run:
    """One kind of text, one place of the experts, one number of guesses."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    bytes_read: float = 0.0
    same: int = 0
    texts: int = 0
    made: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)


def chats(count: int) -> list[torch.Tensor]:
    """Conversations and questions in the nano's chat template, as ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    found = []
    for line in (ROOT / "examples" / "data" / "private.jsonl").read_text().splitlines():
        messages = json.loads(line).get("messages")
        if messages:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            found.append(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]))
    return [ids for ids in found if ids.shape[1] >= 24][:count]


def forced(model: Any, texts: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """Shares of guesses that agree, by place, behind fixed texts."""
    from modeling_dsv4.draft_training import draft_loss

    found, size = {}, model.config.dspark_block_size
    with torch.no_grad():
        for name, rows in texts.items():
            shares = []
            for ids in rows:
                anchors = torch.arange(8, ids.shape[1] - size, 4)
                shares.append(draft_loss(model, ids, anchors).agreed * len(anchors))
            counts = sum(len(torch.arange(8, ids.shape[1] - size, 4)) for ids in rows)
            found[name] = (torch.stack(shares).sum(0) / counts).tolist()
    return found


def free(model: Any, prompts: list[torch.Tensor], new: int, repeats: int, packs: list[Path]) -> Any:
    """Greedy texts with each number of guesses, in turns: {kind: Run}."""
    runs = {kind: Run() for kind in KINDS}
    plain: list[torch.Tensor] = []
    for _ in range(repeats):
        for kind, run in runs.items():
            drop_page_cache(*packs)
            before, start = model.stats().get("bytes_read", 0), time.perf_counter()
            texts = [write(model, ids, new, kind, run) for ids in prompts]
            run.seconds.append(time.perf_counter() - start)
            run.bytes_read += model.stats().get("bytes_read", 0) - before
            plain = texts if kind is None else plain
            run.same += sum(torch.equal(a, b) for a, b in zip(texts, plain, strict=True))
            run.texts += len(texts)
    return runs


def write(model: Any, ids: torch.Tensor, new: int, kind: int | str | None, run: Run) -> Any:
    """One text; its counters go to the run."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        draft=kind,
        return_dict_in_generate=True,
    )
    counts = getattr(out, "drafting", None)
    run.tokens += new - 1
    run.passes += new - 1 if counts is None else counts.passes
    if counts is not None:
        size = max(len(run.made), len(counts.made))
        for name in ("made", "right"):
            old, more = getattr(run, name), getattr(counts, name)
            both = [old + [0] * (size - len(old)), more + [0] * (size - len(more))]
            setattr(run, name, [a + b for a, b in zip(*both, strict=True)])
    return out.sequences


def models(folder: Path, share: float) -> dict[str, tuple[Any, list[Path]]]:
    """The nano in float32, and with FP4 experts on disk, of which a share may stay."""
    import quantize  # noqa: F401  (knows the storage)
    from modeling_dsv4 import Dsv4ForCausalLM
    from quantize.config import get_recipe
    from quantize.convert import convert

    packed = convert(NANO, folder / "fp4", get_recipe("fp4"))
    packs = sorted(packed.glob("experts-*.safetensors"))
    budget = int(share * sum(path.stat().st_size for path in packs))
    found = {}
    for place, path, more in zip(
        PLACES, (NANO, packed), ({}, {"expert_memory": budget}), strict=True
    ):
        model = Dsv4ForCausalLM.from_pretrained(path, dtype=torch.float32, **more).eval()
        model.generation_config.eos_token_id = None
        found[place] = (model, packs if more else [])
    return found


def table_of(found: dict[str, dict[str, Any]], title: str) -> Table:
    """One row per place, text and number of guesses."""
    table = Table("experts", "text", "draft", title=title, box=box.SIMPLE)
    columns = (
        "tokens/pass",
        "guesses right, by place, %",
        "tokens/s",
        "faster",
        "read/token",
        "same",
    )
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for place, texts in found.items():
        for text, runs in texts.items():
            for kind, run in runs.items():
                seconds = statistics.median(run.seconds)
                rate = run.tokens / len(run.seconds) / seconds
                shares = [f"{100 * r / m:.0f}" for r, m in zip(run.right, run.made, strict=True)]
                read = f"{run.bytes_read / run.tokens / 1024:.0f} KiB" if run.bytes_read else "-"
                faster = statistics.median(runs[None].seconds) / seconds
                each = f"{run.tokens / run.passes:.2f}"
                same = f"{run.same}/{run.texts}"
                row = (place, text, str(kind), each, " ".join(shares))
                table.add_row(*row, f"{rate:.0f}", f"{faster:.2f}x", read, same)
    return table


def broken_promises(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers do not keep, as sentences."""
    broken = []
    for place, texts in found.items():
        for text, runs in texts.items():
            best = max(run.tokens / run.passes for run in runs.values())
            if best < WANTED:
                broken.append(f"{text}, {place}: {best:.2f} tokens a pass, wanted {WANTED}")
            for kind, run in runs.items():
                if run.same != run.texts:
                    broken.append(f"{text}, {place}, draft={kind}: other texts than plain decoding")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=4, help="of each kind")
    parser.add_argument("--new", type=int, default=64, help="tokens to write behind each")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts in memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = load_file(NANO / "held_out.safetensors")
    texts = {name: list(ids[: args.texts].long().split(1)) for name, ids in rows.items()}
    texts["chat"] = chats(args.texts)
    prompts = {name: [ids[:, : min(64, ids.shape[1])] for ids in ts] for name, ts in texts.items()}
    with tempfile.TemporaryDirectory() as folder:
        loaded = models(Path(folder), args.share)
        agreed = forced(loaded["resident"][0], texts)
        found = {
            place: {
                name: free(model, ids, args.new, args.repeats, packs)
                for name, ids in prompts.items()
            }
            for place, (model, packs) in loaded.items()
        }
    console = Console(width=110)
    for name, shares in agreed.items():
        percent = " ".join(f"{100 * share:.0f}" for share in shares)
        console.print(f"teacher-forced on {name}: guesses that agree, by place, %: {percent}")
    title = (
        f"greedy, {args.new} tokens: float32, {args.threads} threads, torch {torch.__version__}"
    )
    console.print(table_of(found, title))
    if args.json:
        data = {
            place: {
                name: {str(kind): asdict(run) for kind, run in runs.items()}
                for name, runs in kinds.items()
            }
            for place, kinds in found.items()
        }
        args.json.write_text(json.dumps({"forced": agreed, **data}) + "\n")
    broken = broken_promises(found)
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    main()
