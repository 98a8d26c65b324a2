# SPDX-License-Identifier: Apache-2.0
"""`dsv4-quantize report`: models against their source on one text, as data, a table and a plot.

Bits per weight are bytes of the weight files x 8 / parameters, with everything that is in the
files: scales, codebooks, padding, headers, and the part that no recipe touches.
"""

import copy
import gc
import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

from modeling_dsv4.checkpoint import fit_config
from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.modeling_dsv4 import Dsv4ForCausalLM
from modeling_dsv4.safetensors_file import DTYPES, read_header, read_index
from modeling_dsv4.weight_map import our_inventory

from .checksums import write_text
from .quality import Progress, Quality, Reference, compare, noise_floor
from .sizes import format_size

DEFAULT_SPACE = 8 * 10**9
# Longer rows pass the layers in chunks, and a layer would be seen in parts.
LONGEST_ROW = 8192
_EXPERTS = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weight files, and of the routed experts in them."""

    nbytes: int
    expert_bytes: int
    parameters: int
    expert_parameters: int

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.nbytes / self.parameters

    @property
    def expert_bits(self) -> float:
        """Bits per weight of the routed experts."""
        return 8 * self.expert_bytes / max(self.expert_parameters, 1)


@dataclass(frozen=True)
class Entry:
    """One model of a report: where it is, how large, how good."""

    name: str
    sizes: Sizes
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        bits = {"bits": self.sizes.bits, "expert_bits": self.sizes.expert_bits}
        return {"name": self.name, **asdict(self.sizes), **bits, **asdict(self.quality)}


@dataclass(frozen=True)
class Report:
    """A source, its noise floor against itself, and the models compared with it."""

    text: str
    rows: int
    length: int
    source: Entry
    floor: Quality
    targets: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {
            "text": self.text,
            "rows": self.rows,
            "length": self.length,
            "layer_error": "relative, per layer: the source's streams enter it (teacher-forced)",
            "layer_drift": "relative, per layer: the model's own streams enter it",
            "source": self.source.to_dict(),
            "floor": asdict(self.floor),
            "targets": [entry.to_dict() for entry in self.targets],
        }


def read_config(source: Path) -> Dsv4Config:
    """A source's configuration, without parts that its files leave out."""
    config = Dsv4Config.from_pretrained(source)
    fit_config(config, read_index(source))
    return config


def measure_sizes(directory: Path, config: Dsv4Config) -> Sizes:
    """Bytes of a directory's weights and packs, and the parameters that they stand for."""
    files = set(read_index(directory).values()) | set(directory.glob("experts-*.safetensors"))
    files |= set(directory.glob("engram-*.safetensors"))
    expert_bytes = 0
    for path in files:
        if path.name.startswith("experts-"):
            expert_bytes += path.stat().st_size
            continue
        header = read_header(path)
        expert_bytes += sum(i.end - i.start for n, i in header.items() if _EXPERTS.search(n))
    plain = copy.copy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    counts = {
        name: math.prod(shape)
        for name, (dtype, shape) in our_inventory(plain).items()
        if DTYPES[dtype].is_floating_point
    }
    return Sizes(
        nbytes=sum(path.stat().st_size for path in files),
        expert_bytes=expert_bytes,
        parameters=sum(counts.values()),
        expert_parameters=sum(n for name, n in counts.items() if _EXPERTS.search(name)),
    )


def read_rows(text: Path, model: Path, length: int, limit: int | None = None) -> torch.Tensor:
    """Cut a text into rows of tokens [R, length]; the rest that fills no row is left out.

    Args:
        text: UTF-8, read with the model's tokenizer; or a safetensors file of token rows [r, S].
        model: directory with a tokenizer.
        length: tokens a row.
        limit: rows at most.

    Raises:
        ValueError: no such file, no tokenizer, less text than one row.
    """
    if not text.is_file():
        raise ValueError(f"{text}: wanted a file of text, found none")
    if not 2 <= length <= LONGEST_ROW:
        raise ValueError(f"wanted rows of 2 to {LONGEST_ROW} tokens, got {length}")
    if text.suffix == ".safetensors":
        from safetensors.torch import load_file

        ids = torch.cat([rows.flatten() for _, rows in sorted(load_file(text).items())]).long()
    else:
        ids = _tokens(text, model)
    rows = ids[: ids.numel() // length * length].view(-1, length)[:limit]
    if not rows.numel():
        raise ValueError(
            f"{text}: wanted at least one row of {length} tokens, got {ids.numel()} tokens; give a "
            "longer text, or a smaller --length"
        )
    return rows


def _tokens(text: Path, model: Path) -> torch.Tensor:
    if not (model / "tokenizer.json").is_file():
        raise ValueError(
            f"{model}: wanted tokenizer.json to read a text with, found none; copy the tokenizer "
            "there, or give a safetensors file of token rows as --text"
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: wanted UTF-8 text: {error}") from None
    return torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)


def report(
    source: Path,
    targets: Sequence[Path],
    text: Path,
    *,
    length: int = 512,
    rows: int | None = None,
    layer_rows: int = 1,
    expert_memory: str | int | None = None,
    space: int = DEFAULT_SPACE,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure targets against their source; one model is in memory at a time.

    Args:
        source: any Dsv4 directory; computed with in float32 whatever its storage.
        targets: directories made from it.
        text: see `read_rows`; every model reads the same tokens, the source's.
        length: tokens a row.
        rows: rows at most, None for the whole text.
        layer_rows: rows on which layers are compared.
        expert_memory: resident experts of converted models, None for what fits.
        space: bytes that the source's logits and streams may take on disk.
        work: where they lie meanwhile; None is the system's folder for temporary files.
        progress: called with (model, tokens done).

    Raises:
        ValueError: unusable text or model, too little space for the source's logits.
    """
    for directory in (source, *targets):
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory}: wanted a model directory, found no config.json")
    ids = read_rows(text, source, length, rows)
    config = read_config(source)
    layer_rows = min(layer_rows, len(ids))
    check_space(config, ids, layer_rows, space, work)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        reference = Reference(ids, Path(folder), layer_rows)
        model = _load(source, None)
        own = reference.fill(model, progress)
        floor = noise_floor(model, reference, progress)
        del model
        entries = []
        for target in targets:
            gc.collect()
            model = _load(target, expert_memory)
            quality = compare(model, reference, target.name, progress)
            sizes = measure_sizes(target, config)
            entries.append(Entry(target.name, sizes, quality))
            del model
    origin = Entry(source.name, measure_sizes(source, config), own)
    return Report(text.name, len(ids), length, origin, floor, tuple(entries))


def check_space(
    config: Dsv4Config, ids: torch.Tensor, layer_rows: int, space: int, work: Path | None
) -> None:
    """Refuse before any work what the allowance, or the disk, cannot hold."""
    row_logits = 4 * ids.shape[1] * config.vocab_size
    streams = 4 * config.num_hidden_layers * ids.shape[1] * config.hc_mult * config.hidden_size
    need = len(ids) * row_logits + layer_rows * streams
    room = min(space, shutil.disk_usage(work or tempfile.gettempdir()).free)
    if need <= room:
        return
    held = max((room - layer_rows * streams) // row_logits, 0)
    raise ValueError(
        f"wanted {format_size(need)} for the source's logits of {ids.numel()} tokens and the "
        f"streams of its layers, got {format_size(room)}; --rows {held} fit"
    )


def _load(directory: Path, expert_memory: str | int | None) -> Any:
    packed = any(directory.glob("experts-*.safetensors"))
    budget = expert_memory if packed else None
    # Tokens are what this program counts; transformers would draw a bar of its own for weights.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = Dsv4ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, expert_memory=budget
        )
        if model.device.type == "cpu":
            # Experts of a release are added up by torch: those in packs have to be, to be compared.
            model.set_kernels("torch")
        return model.eval()
    finally:
        if shown:
            logging.enable_progress_bar()


# --- what people read ---------------------------------------------------------------------------


def tables(found: Report) -> tuple[Table, Table]:
    """What each model predicts, and what its layers compute; the source stands first."""
    source, said = found.source, found.source.quality
    title = f"{source.name}: {said.tokens} tokens of {found.text}"
    models = _empty_table(
        title, "model", "size", "bits", "experts", "KLD", "median", "p99", "top-1 %", "perplexity"
    )
    models.add_row(source.name, *_size_cells(source.sizes), *[""] * 4, f"{said.perplexity:.3f}")
    models.add_row("  with itself", *[""] * 3, *_quality_cells(found.floor))
    layers = _empty_table("relative error of streams", "model", "worst layer", "drift at the end")
    for entry in found.targets:
        models.add_row(entry.name, *_size_cells(entry.sizes), *_quality_cells(entry.quality))
        error, drift = entry.quality.layer_error, entry.quality.layer_drift
        worst = max(range(len(error)), key=error.__getitem__)
        layers.add_row(entry.name, f"{error[worst]:.2%} (layer {worst})", f"{drift[-1]:.2%}")
    return models, layers


def _empty_table(title: str, *columns: str) -> Table:
    out = Table(title=title, box=SIMPLE)
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", overflow="fold")
    return out


def _size_cells(sizes: Sizes) -> tuple[str, ...]:
    return format_size(sizes.nbytes), f"{sizes.bits:.2f}", f"{sizes.expert_bits:.2f}"


def _quality_cells(q: Quality) -> tuple[str, ...]:
    klds = [f"{x:.3g}" for x in (q.kld_mean, q.kld_median, q.kld_p99)]
    return (*klds, f"{100 * q.top1:.2f}", f"{q.perplexity:.3f}")


def plot(found: Report, path: Path) -> None:
    """Draw mean KLD over bits per weight as `path`.svg and .png; the floor is a line."""
    points = [Point(e.name, e.sizes.bits, e.quality.kld_mean) for e in found.targets]
    title = f"{found.source.name}: {found.source.quality.tokens} tokens"
    draw({"": points}, path, title, found.floor.kld_mean)


@dataclass(frozen=True)
class Point:
    """A model in a plot."""

    name: str
    bits: float
    kld: float


def import_pyplot() -> Any:
    """Give matplotlib's pyplot, drawing into files; or say what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "a plot wants matplotlib, which is not installed: pip install 'dsv4[report]', or leave "
            "the plot out with --no-plot"
        ) from None
    matplotlib.use("Agg")
    # Identifiers in an SVG are random otherwise: the same report would be another file.
    matplotlib.rcParams["svg.hashsalt"] = "dsv4"
    from matplotlib import pyplot

    return pyplot


def draw(series: dict[str, list[Point]], path: Path, title: str, floor: float) -> None:
    """Draw series of points, KLD on a logarithmic axis; exact zeros stand on its lower edge."""
    pyplot = import_pyplot()
    klds = [p.kld for points in series.values() for p in points if p.kld > 0] or [floor or 1.0]
    # A floor far below all points would press them into a line.
    shows_floor = 0 < floor >= min(klds) / 100
    edge = min([*klds, floor if shows_floor else math.inf]) / 2
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for label, points in series.items():
        ordered = sorted(points, key=lambda p: (p.bits, p.kld))
        (dots,) = axes.plot([p.bits for p in ordered], [max(p.kld, edge) for p in ordered],
                            "o", label=label or None, markersize=4)  # fmt: skip
        best = _frontier(ordered)
        axes.plot([p.bits for p in best], [max(p.kld, edge) for p in best],
                  color=dots.get_color(), linewidth=1)  # fmt: skip
        for p in best:
            told = p.name if p.kld > 0 else f"{p.name} (exactly 0)"
            axes.annotate(told, (p.bits, max(p.kld, edge)), fontsize=6, rotation=20,
                          color=dots.get_color(), xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    if shows_floor:
        axes.axhline(floor, linestyle=":", color="gray", label="source against itself")
    elif floor > 0:
        title = f"{title} (source against itself: {floor:.0e})"
    axes.set_yscale("log")
    axes.set(xlabel="bits per weight", ylabel="mean KLD to the source, nats", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.tight_layout()
    for kind in ("svg", "png"):
        # Written by date, two runs would differ.
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150,
                       metadata={"Date": None} if kind == "svg" else {})  # fmt: skip
    pyplot.close(figure)


def _frontier(ordered: Sequence[Point]) -> list[Point]:
    """Points, by bits, that nothing of fewer bits in their series equals."""
    best: list[Point] = []
    for p in ordered:
        if not best or p.kld < best[-1].kld:
            best.append(p)
    return best


def write(found: Report, output: Path, with_plot: bool = True) -> None:
    """Write report.json, and report.svg and .png, into a directory."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.json", json.dumps(found.to_dict(), indent=1) + "\n")
    if with_plot:
        plot(found, output / "report")
