# SPDX-License-Identifier: Apache-2.0
"""Decode behind long contexts with the cache's entries in memory, in host memory and on disk.

    python benchmarks/kv_tier.py                     # 64k and 256k tokens, v4-small
    python benchmarks/kv_tier.py --shape v41-small
    python benchmarks/kv_tier.py --prompts           # a prompt's cache read back against the prompt
    python benchmarks/kv_tier.py --prefill           # a prompt read into a cache of each place

A pinned small model whose rows are as wide as the release's (head_dim 512, index keys of 128,
index_topk 512), random weights, float32. The context is not read: a file of `Dsv4Cache.save` over
4,096 tokens is widened to so many, its rows drawn from the true ones, and loaded into each tier.
Every tier is a process of its own and decodes the same tokens; all must give the same bits. "cold"
drops the files from the page cache before every token. "MiB" is anonymous memory behind the last
token less that before the cache was loaded. Linux only: it reads /proc.

A prompt is read 4,096 tokens at a time, the later ones through entries of the earlier.

The program fails if bits differ, if memory on disk does not fall by nine tenths of the entries'
bytes, or if reading a prompt's cache back takes more than a tenth of reading the prompt.
"""

import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from context import SHAPES, memory_mib
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

READ = 4096
ROWS = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_topk": 512}
TIERS = ("resident", "host", "disk, warm", "disk, cold")
MOST_RELOAD, LEAST_SAVED = 0.1, 0.9


@dataclass
class Run:
    """One tier: seconds to load and of a token, its bytes and reads, MiB, the logits' hash."""

    load: float
    token: float
    kv_bytes: float
    kv_rows: float
    kv_reads: float
    kv_seconds: float
    mib: float
    disk: int
    digest: str


def make_model(shape: str, threads: int) -> Any:
    """The pinned model; always the same weights."""
    from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Dsv4Config.from_json_file(SHAPES / f"{shape}.json")
    for name, value in ROWS.items():
        setattr(config, name, value)
    model = Dsv4ForCausalLM(config).eval()
    if config.engram_layer_ids:
        used = config.engram_compressed_vocab_size
        model.set_engram_token_map(torch.arange(config.vocab_size) % used)
    return model


def drawn_ids(model: Any, count: int, seed: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, count), generator=dice)


@torch.no_grad()
def write_context(shape: str, tokens: int, threads: int, storage: str, path: Path) -> None:
    """A cache file of so many tokens, its rows drawn from those of a true prompt."""
    from modeling_dsv4 import Dsv4Cache

    model = make_model(shape, threads)
    cache = Dsv4Cache(model.config, storage=storage)
    model(drawn_ids(model, READ, 1), past_key_values=cache, logits_to_keep=1)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["facts"])
    dice = torch.Generator().manual_seed(2)
    for name, x in held.items():
        if name.endswith((".entries", ".index_keys")) and x.shape[1]:
            count = x.shape[1] * tokens // READ
            at = torch.randint(0, x.shape[1], (count,), generator=dice)
            held[name] = x[:, at]
        elif name.startswith("state.entries."):
            held[name] = x * tokens // READ
    # A multiple of every window and ring: what is unfinished, and which slot is next, stays.
    held["state.seen"] = held["state.seen"] * 0 + tokens
    facts["columns"] = tokens
    save_file(held, path, metadata | {"facts": json.dumps(facts)})


def drop_page_cache(cache: Any) -> None:
    from modeling_dsv4.cache_tiers import FileRows

    for _, store in cache.named_stores():
        if isinstance(store, FileRows) and store.batch:
            os.fdatasync(store.fileno())
            os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def decode(shape: str, path: Path, tier: str, folder: str, count: int, threads: int) -> Run:
    """Load into a tier and decode; meant for a process of its own."""
    from modeling_dsv4 import Dsv4Cache

    model = make_model(shape, threads)
    ids = drawn_ids(model, count + 4, 3)
    model(ids[:, :256], logits_to_keep=1)
    before = memory_mib("self/status", "RssAnon")
    offload = {"resident": None, "host": "cpu"}.get(tier, folder)
    start = time.perf_counter()
    cache = Dsv4Cache.load(path, model.config, offload=offload)
    load = time.perf_counter() - start
    seconds, digest = [], hashlib.sha256()
    for i, token in enumerate(ids.split(1, dim=1)):
        if tier.endswith("cold"):
            drop_page_cache(cache)
        if i == 4:
            counts = vars(cache.offload_counts).copy()
        start = time.perf_counter()
        logits = model(token, past_key_values=cache).logits
        seconds.append(time.perf_counter() - start)
        digest.update(logits.numpy().tobytes())
    told = {k: (v - counts[k]) / count for k, v in vars(cache.offload_counts).items()}
    return Run(
        load, statistics.median(seconds[4:]), told["kv_bytes"], told["kv_rows"], told["kv_reads"],
        told["kv_seconds"], memory_mib("self/status", "RssAnon") - before, cache.disk_bytes(),
        digest.hexdigest(),
    )  # fmt: skip


def in_own_process(function: Any, *given: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


@torch.no_grad()
def prompts(shape: str, tokens: int, threads: int, folder: str) -> tuple[float, float, float, int]:
    """Seconds to read a prompt, to read its cache back, warm and cold, and the file's bytes."""
    from modeling_dsv4 import Dsv4Cache

    model = make_model(shape, threads)
    ids = drawn_ids(model, tokens + 1, 4)
    cache, path = Dsv4Cache(model.config), Path(folder) / "prompt"
    model(ids[:, :256], logits_to_keep=1)
    start = time.perf_counter()
    model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
    read = time.perf_counter() - start
    cache.save(path, ids[:, :tokens])
    found = []
    for cold in (False, True):
        if cold:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        again = Dsv4Cache.load(path, model.config, ids)
        found.append(time.perf_counter() - start)
    last = ids[:, tokens:]
    one, two = (model(last, past_key_values=c).logits for c in (cache, again))
    if not torch.equal(one, two):
        sys.exit("a cache read back gave other logits")
    return read, *found, path.stat().st_size


def compare_prompts(shape: str, sizes: list[int], threads: int, folder: str) -> list[str]:
    table = Table(title=f"{shape}: a prompt's cache on disk", box=box.SIMPLE)
    for name in ("tokens", "read s", "reload s", "cold s", "ratio", "limit", "MiB"):
        table.add_column(name, justify="right")
    broken = []
    for tokens in sizes:
        read, warm, cold, size = in_own_process(prompts, shape, tokens, threads, folder)
        cells = (f"{read:.2f}", f"{warm:.4f}", f"{cold:.4f}", f"{cold / read:.4f}")
        table.add_row(f"{tokens:,}", *cells, f"{MOST_RELOAD}", f"{size / 2**20:.1f}")
        if cold > MOST_RELOAD * read:
            broken.append(f"{tokens} tokens: read back in {cold:.3f} s, read in {read:.3f} s")
    Console(width=100).print(table)
    return broken


@torch.no_grad()
def read_prompt(shape: str, tokens: int, tier: str, folder: str, threads: int) -> list[Any]:
    """Read a prompt into a cache: seconds, MiB that it added, and the last logits' hash."""
    from modeling_dsv4 import Dsv4Cache

    model = make_model(shape, threads)
    ids = drawn_ids(model, tokens, 4)
    model(ids[:, :256], logits_to_keep=1)
    before = memory_mib("self/status", "RssAnon")
    cache = Dsv4Cache(model.config, offload={"resident": None, "host": "cpu"}.get(tier, folder))
    start = time.perf_counter()
    for part in ids.split(READ, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    return [seconds, memory_mib("self/status", "RssAnon") - before, digest]


def compare_prefills(shape: str, sizes: list[int], threads: int, folder: str) -> list[str]:
    table = Table(title=f"{shape}, {threads} threads: reading a prompt", box=box.SIMPLE)
    for name in ("tokens", "entries", "s", "of resident", "MiB"):
        table.add_column(name, justify="right")
    broken = []
    for tokens in sizes:
        places = ("resident", "host", "disk")
        runs = [in_own_process(read_prompt, shape, tokens, x, folder, threads) for x in places]
        for place, (seconds, mib, digest) in zip(places, runs, strict=True):
            ratio = f"{seconds / runs[0][0]:.3f}"
            table.add_row(f"{tokens:,}", place, f"{seconds:.2f}", ratio, f"{mib:.0f}")
            if digest != runs[0][2]:
                broken.append(f"{place} at {tokens} tokens: other logits than resident")
    Console(width=100).print(table)
    return broken


def compare_tiers(
    shape: str, sizes: list[int], count: int, threads: int, storage: str, folder: str
) -> list[str]:
    title = f"{shape}, {storage}, float32, {threads} threads: a token by where entries lie"
    table = Table(title=title, box=box.SIMPLE)
    for name in ("context", "entries", "load s", "ms", "ratio", "fetch ms", "rows", "kB", "reads",
                 "MiB", "file MiB"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    broken = []
    for tokens in sizes:
        path = Path(folder) / "context"
        in_own_process(write_context, shape, tokens, threads, storage, path)
        runs = {
            tier: in_own_process(decode, shape, path, tier, folder, count, threads)
            for tier in TIERS
        }
        first = runs["resident"]
        for tier, run in runs.items():
            table.add_row(
                f"{tokens:,}", tier, f"{run.load:.3f}", f"{1e3 * run.token:.2f}",
                f"{run.token / first.token:.3f}", f"{1e3 * run.kv_seconds:.2f}",
                f"{run.kv_rows:.0f}", f"{run.kv_bytes / 1e3:.0f}", f"{run.kv_reads:.0f}",
                f"{run.mib:.1f}", f"{run.disk / 2**20:.1f}",
            )  # fmt: skip
            if run.digest != first.digest:
                broken.append(f"{tier} at {tokens} tokens: other logits than resident")
            saved = (first.mib - run.mib) * 2**20
            if run.disk and saved < LEAST_SAVED * run.disk:
                broken.append(f"{tier} at {tokens} tokens: saves {saved:.0f} of {run.disk} bytes")
    Console(width=120).print(table)
    return broken


def main(
    shape: Annotated[str, typer.Option(help="A file of benchmarks/shapes.")] = "v4-small",
    most: Annotated[int, typer.Option(help="No context beyond so many tokens.")] = 1 << 18,
    tokens: Annotated[int, typer.Option(help="Decoded.")] = 32,
    storage: Annotated[str, typer.Option(help="plain or packed.")] = "plain",
    only_prompts: Annotated[bool, typer.Option("--prompts", help="Caches of prompts.")] = False,
    prefill: Annotated[bool, typer.Option(help="Prompts into caches of each place.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    directory: Annotated[Path | None, typer.Option(help="On the disk that is meant.")] = None,
) -> None:
    """Measure decoding by where a cache's entries lie, or prompts' caches on disk."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        if only_prompts or prefill:
            sizes = [size for size in (8192, 32768) if size <= most] or [most]
            compare = compare_prefills if prefill else compare_prompts
            broken = compare(shape, sizes, threads, folder)
        else:
            sizes = [size for size in (1 << 16, 1 << 18) if size <= most] or [most]
            broken = compare_tiers(shape, sizes, tokens, threads, storage, folder)
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    typer.run(main)
