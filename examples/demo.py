# SPDX-License-Identifier: Apache-2.0
"""The main job once, end to end, on the nano model: load, generate, quantize, run from disk, tune.

Offline, on a CPU, in a few minutes. Every figure of the table is measured in this run; the
same figures go to demo.json. `--model` takes any Dsv4 directory with a tokenizer
and a held_out.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

# Threads that wait by spinning for long starve a busy machine: ten times slower, measured.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize
from finetune.adapters import load_adapters, merge_adapters
from finetune.config import RunConfig
from finetune.running import train
from quantize.convert import convert

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = {"prose": "The Congress of the United States", "code": "def "}
NEW_TOKENS = 48
EXPERT_MEMORY = "256KiB"
ENGRAM_MEMORY = "64KiB"
SHARES = (1 / 8, 1 / 4, 1 / 2)


def load(path: Path, **kwargs: Any) -> Any:
    """Load a model for float32 computing, whatever its storage."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Perplexity of token rows [r, 512]."""
    losses = [model(part, labels=part, use_cache=False).loss.item() for part in rows.split(8)]
    return math.exp(sum(losses) / len(losses))


def generate(model: Any, tokenizer: Any, prompt: str) -> tuple[torch.Tensor, float]:
    """Greedy continuation, and new tokens per second."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    begun = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return out[0], NEW_TOKENS / (time.perf_counter() - begun)


def tier_bytes(model: Any) -> dict[str, int]:
    """Bytes in memory and on disk over all parts of a model."""
    report = model.memory_report()
    disk = sum(part.get("disk", 0) for part in report.values())
    total = sum(sum(part.values()) for part in report.values())
    return {"memory": total - disk, "disk": disk}


def folder_bytes(path: Path) -> int:
    """Bytes of a model's weight files."""
    files = (f for f in path.glob("*.safetensors") if f.name != "held_out.safetensors")
    return sum(f.stat().st_size for f in files)


def measure(model: Any, tokenizer: Any, held_out: dict[str, torch.Tensor], path: Path) -> dict:
    """Figures of one way of running the model."""
    texts, seconds = {}, 0.0
    generate(model, tokenizer, PROMPTS["prose"])  # the first one warms caches and threads
    for name, prompt in PROMPTS.items():
        texts[name], speed = generate(model, tokenizer, prompt)
        seconds += NEW_TOKENS / speed
    return {
        "perplexity": {k: perplexity(model, rows.long()) for k, rows in held_out.items()},
        "bytes_on_disk": folder_bytes(path),
        "bytes_in_memory": tier_bytes(model)["memory"],
        "tokens_per_second": NEW_TOKENS * len(PROMPTS) / seconds,
        "generated": {k: tokenizer.decode(ids) for k, ids in texts.items()},
    }


def experts_read(model: Any, tokenizer: Any) -> dict[str, float]:
    """Expert records used and read per token of one generation from disk, of all there are."""
    config = model.config
    before = model.stats()
    ids, _ = generate(model, tokenizer, PROMPTS["prose"])
    after = model.stats()
    tokens = len(ids) - 1
    return {
        "all": config.num_hidden_layers * config.n_routed_experts,
        "routed_per_token": config.num_hidden_layers * config.num_experts_per_tok,
        "read_per_token": (after["misses"] - before["misses"]) / tokens,
        "bytes_read_per_token": (after["bytes_read"] - before["bytes_read"]) / tokens,
    }


def tiers(packed: Path, tokenizer: Any, wanted: str) -> list[dict[str, Any]]:
    """What a text costs with a share of the experts in memory, the rest and Engram on disk."""
    from quantize.pack import PackFile

    total = sum(PackFile.open(file).nbytes for file in packed.glob("experts-layers-*.safetensors"))
    rows = []
    for share in SHARES:
        model = load(packed, expert_memory=int(share * total), engram_memory=ENGRAM_MEMORY)
        ids, speed = generate(model, tokenizer, PROMPTS["prose"])
        stats, tokens = model.stats(), len(ids) - 1
        rows.append({
            "share": share,
            "hit_rate": stats["hits"] / (stats["hits"] + stats["misses"]),
            "expert_bytes_per_token": stats["bytes_read"] / tokens,
            "engram_rows_per_token": stats["engram_rows"] / tokens,
            "engram_hit_rate": stats["engram_hits"] / stats["engram_rows"],
            "tokens_per_second": speed,
            "same_text": tokenizer.decode(ids) == wanted,
        })  # fmt: skip
    return rows


def tune(base: Path, work: Path) -> dict[str, Any]:
    """LoRA on the private data over the quantized model; merged against attached."""
    run = RunConfig(
        model=str(base),
        data=str(ROOT / "examples" / "data" / "private.jsonl"),
        output=str(work / "adapter"),
        rank=16,
        learning_rate=2e-3,
        epochs=4,
        batch_size=8,
        max_length=256,
        eval_fraction=0.15,
        dtype="float32",
    )
    result = train(run)
    attached = load_adapters(load(base), run.output).eval()
    merged = merge_adapters(load_adapters(load(base, dequantize=True), run.output)).eval()
    ids = torch.arange(5, 133)[None]
    with torch.no_grad():
        gap = (attached(ids).logits - merged(ids).logits).abs().max().item()
    return {
        "held_out_loss_before": result.held_out_loss_before,
        "held_out_loss_after": result.held_out_loss_after,
        "steps": result.steps,
        "seconds": result.seconds,
        "trained_parameters": result.trained_parameters,
        "merged_minus_attached": gap,
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the one table."""
    table = Table(title=f"{found['model']}: {found['parameters'] / 1e6:.2f} M parameters")
    for column in ("", "plain", "fp4 resident", "fp4 from disk"):
        table.add_column(column, justify="left" if not column else "right")
    ways = [found[k] for k in ("plain", "fp4", "fp4_disk")]
    for domain in ways[0]["perplexity"]:
        table.add_row(f"perplexity, {domain}", *(f"{w['perplexity'][domain]:.3f}" for w in ways))
    table.add_row("MB on disk", *(f"{w['bytes_on_disk'] / 1e6:.2f}" for w in ways))
    table.add_row("MB in memory", *(f"{w['bytes_in_memory'] / 1e6:.2f}" for w in ways))
    table.add_row("tokens/s", *(f"{w['tokens_per_second']:.1f}" for w in ways))
    read = found["experts"]
    table.add_row(
        "experts read per token, of all", "", "", f"{read['read_per_token']:.1f} of {read['all']}"
    )
    same = "yes" if found["disk_equals_resident"] else "NO"
    table.add_row("same text as resident fp4", "", "", same)
    lora = found["lora"]
    table.add_section()
    table.add_row(
        "held-out loss before / after LoRA",
        "",
        f"{lora['held_out_loss_before']:.3f} / {lora['held_out_loss_after']:.3f}",
        "",
    )
    table.add_row("merged - attached, max logit", "", f"{lora['merged_minus_attached']:.1e}", "")
    console.print(table)


def show_tiers(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print what each share of resident experts costs."""
    table = Table(
        "experts in memory", "hits", "kB read a token", "Engram hits", "tokens/s", "same text",
        title="experts and Engram tables on disk, fp4",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['share']:.3f}", f"{row['hit_rate']:.2f}",
            f"{row['expert_bytes_per_token'] / 1e3:.0f}", f"{row['engram_hit_rate']:.2f}",
            f"{row['tokens_per_second']:.1f}", "yes" if row["same_text"] else "NO",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "nano-v41")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--output", type=Path, default=ROOT / "demo.json")
    args = parser.parse_args()
    console, begun = Console(), time.perf_counter()
    torch.manual_seed(0)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held_out = load_file(args.model / "held_out.safetensors")
    found: dict[str, Any] = {"model": args.model.name}

    plain = load(args.model)
    found["parameters"] = plain.num_parameters()
    found["plain"] = measure(plain, tokenizer, held_out, args.model)
    for name, text in found["plain"]["generated"].items():
        console.print(f"[bold]{name}[/bold] {text!r}")
    del plain

    packed = convert(args.model, args.work / "fp4", quantize.get_recipe("fp4"))
    resident = load(packed)
    found["fp4"] = measure(resident, tokenizer, held_out, packed)
    del resident
    disk = load(packed, expert_memory=EXPERT_MEMORY)
    found["fp4_disk"] = measure(disk, tokenizer, held_out, packed)
    found["experts"] = experts_read(disk, tokenizer)
    found["disk_equals_resident"] = found["fp4"]["generated"] == found["fp4_disk"]["generated"]
    del disk
    found["tiers"] = tiers(packed, tokenizer, found["fp4"]["generated"]["prose"])

    found["lora"] = tune(packed, args.work)
    found["seconds"] = time.perf_counter() - begun
    show(console, found)
    show_tiers(console, found["tiers"])
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"{found['seconds']:.0f} s; figures in {args.output.name}")
    lora = found["lora"]
    same = found["disk_equals_resident"] and all(row["same_text"] for row in found["tiers"])
    if not same or lora["merged_minus_attached"] > 1e-3:
        raise SystemExit("the demo's own checks failed: see the table")
    if lora["held_out_loss_after"] >= lora["held_out_loss_before"]:
        raise SystemExit("LoRA did not lower the held-out loss: see the table")


if __name__ == "__main__":
    main()
