# SPDX-License-Identifier: Apache-2.0
"""One HTML file that says what a run was: curves, answers, data, hashes, settings, machine.

Everything is inside: no script, no font, no picture from elsewhere, so that it can be archived,
mailed and read in ten years. The figures are those of the run's own files; nothing is computed by a
model here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .charts import bar_chart, line_chart
from .config import read_yaml
from .deltas import CONFIG
from .facts import FACTS_FILE, collect_facts, write_facts
from .files import write_text
from .measures import EVAL_FILE, Measure
from .model_card import model_card, write_card
from .report_style import STYLE

REPORT_FILE = "report.html"
RUN_FILE, RESULT_FILE = "run.yaml", "result.json"
# What a check of the data found, if somebody kept it beside the run.
CHECK_FILE = "check.json"
Rows = Iterable[Sequence[object]]


def finish_run(
    directory: str | Path,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    *,
    argv: Sequence[str] | None = None,
    lengths: Sequence[int] = (),
    sources: Mapping[str, Any] | None = None,
) -> None:
    """Write facts, card and report beside an adapter that has just been trained.

    Args:
        directory: with the adapter's files.
        config: the run's settings.
        result: what it measured.
        argv: the command; None is this process's.
        lengths: tokens of each training document.
        sources: `facts.hash_sources` of before it was trained; None hashes now.
    """
    facts = collect_facts(directory, config, argv=argv, lengths=lengths, sources=sources)
    write_facts(directory, facts)
    _write_card(directory, model_card(config, result, facts))
    write_text(Path(directory, REPORT_FILE), render(config, result, facts))


def report_run(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished run again, with what eval.json and check.json added since.

    The card is written again too, since its figures are those of the evaluation.

    Args:
        directory: of the run.
        output: the HTML file; None is report.html in the run's directory.

    Raises:
        ValueError: no finished run there.
    """
    directory = Path(directory)
    for name in (RUN_FILE, RESULT_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"report: wanted a finished run in {directory}, found no {name}")
    config, result = read_yaml(directory / RUN_FILE), _read(directory / RESULT_FILE) or {}
    evaluation, found = _read(directory / EVAL_FILE), _read(directory / CHECK_FILE)
    facts = _read(directory / FACTS_FILE)
    if facts is None:
        # Of a run of before facts were kept: what can still be seen.
        facts = collect_facts(directory, config, argv=())
    _write_card(directory, model_card(config, result, facts, evaluation))
    path = directory / REPORT_FILE if output is None else Path(output)
    write_text(path, render(config, result, facts, evaluation, found))
    return path


def _write_card(directory: str | Path, card: ModelCard) -> None:
    # PEFT's card is of an adapter; weights that were trained themselves are none.
    if Path(directory, CONFIG).is_file():
        write_card(directory, card)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON, got {error}") from error
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: wanted a JSON object with values, got {str(value)[:40]}")
    return value


def render(
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    found: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML document."""
    name = Path(str(config["output"])).name or "adapter"
    sections = [
        ("Result", _summary(config, result)),
        ("Curves", _curves(result)),
        ("Evaluation", _evaluation(evaluation)),
        ("Answers before and after", _samples(evaluation)),
        ("Data", _data(result, facts, found)),
        ("Base and adapter", _files(facts)),
        ("Command and settings", _settings(config, facts)),
        ("Machine and versions", _machine(facts)),
    ]
    body = "".join(
        f'<section id="s{i}"><h2>{escape(title)}</h2>{content}</section>'
        for i, (title, content) in enumerate(sections)
    )
    links = "".join(f'<a href="#s{i}">{escape(title)}</a>' for i, (title, _) in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: fine-tuning report</title><style>{STYLE}</style></head><body>"
        f"<header><p>Fine-tuning report</p><h1>{escape(name)}</h1>"
        f"<p>finished {escape(str(facts['finished']))}</p><nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Rows, kind: str = "") -> str:
    """A table; the first cell of each row names it."""
    top = "".join(f"<th>{escape(word)}</th>" for word in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(_say(cell))}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(_say(first))}</th>{cells}</tr>')
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return (
        f'<div class="wide"><table class="{kind}">{thead}'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _say(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    before, after = result.get("held_out_loss_before"), result.get("held_out_loss_after")
    cards: list[tuple[str, str, str]] = []
    if before is not None and after is not None:
        cards.append(("held-out loss", f"{after:.4f}", f"{before:.4f} before training"))
    for word in ("margin", "reward"):
        after = result.get(f"held_out_{word}_after")
        if after is not None:
            note = f"{result[f'held_out_{word}_before']:.4f} before training"
            cards.append((f"held-out {word}", f"{after:.4f}", note))
    seconds, steps = float(result.get("seconds", 0)), int(result.get("steps", 0))
    each = f"{seconds / steps:.2f} s a step" if steps else ""
    cards += [
        ("steps", f"{steps:,}", each),
        ("time", _duration(seconds), ""),
        ("trained parameters", f"{result.get('trained_parameters', 0):,}",
         f"preset {config.get('preset')}, rank {config.get('rank')}"),
    ]  # fmt: skip
    return "".join(
        f'<div class="card"><p>{escape(title)}</p><strong>{escape(value)}</strong>'
        f"<p>{escape(note)}</p></div>"
        for title, value, note in cards
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _curves(result: Mapping[str, Any]) -> str:
    history = result.get("history") or []

    def points(key: str) -> list[tuple[float, float]]:
        return [(float(e["step"]), float(e[key])) for e in history if key in e and "step" in e]

    held = points("eval_loss")
    for step, key in ((0.0, "held_out_loss_before"), (result.get("steps"), "held_out_loss_after")):
        value = result.get(key)
        if value is not None and step is not None and float(step) not in dict(held):
            held.append((float(step), float(value)))
    loss = line_chart("Loss", [("training", points("loss")), ("held out", sorted(held))])
    rate = line_chart("Learning rate", [("learning rate", points("learning_rate"))])
    norm = line_chart("Gradient norm", [("gradient norm", points("grad_norm"))])
    return loss + rate + norm or "<p>No step was logged.</p>"


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation or not evaluation.get("measures"):
        return "<p>None yet: <code>dsv4-finetune eval --save</code>, then report again.</p>"
    rows = [Measure(m["name"], m["before"], m["after"]).words() for m in evaluation["measures"]]
    table = _table(("", "base", "with adapter", "difference"), rows, "figures")
    lost = evaluation.get("forgetting")
    said = (
        f"<p>Perplexity of general text changed by {lost:+.1%}: what the base could do before is "
        f"{'kept' if lost < 0.05 else 'partly lost'}.</p>"
        if lost is not None
        else "<p>Forgetting was not measured: give <code>--general</code> a text.</p>"
    )
    keys = ("data", "held_out", "examples", "label_tokens", "tasks_file", "num_tasks", "general",
            "general_tokens")  # fmt: skip
    on = [(key.replace("_", " "), evaluation[key]) for key in keys if key in evaluation]
    return table + said + "<h3>Measured on</h3>" + _table((), on)


def _samples(evaluation: Mapping[str, Any] | None) -> str:
    samples = (evaluation or {}).get("samples") or []
    if not samples:
        return "<p>None yet: <code>dsv4-finetune eval --samples 5 --save</code>.</p>"
    parts = []
    for sample in samples:
        rows = [("wanted", sample["answer"]), ("base", sample["before"])]
        if sample["after"] is not None:
            rows.append(("with adapter", sample["after"]))
        said = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v) or '&nbsp;'}</dd>" for k, v in rows)
        parts.append(
            f'<div class="sample"><p>{escape(sample["question"])}</p><dl>{said}</dl></div>'
        )
    return "".join(parts)


def _data(
    result: Mapping[str, Any], facts: Mapping[str, Any], found: Mapping[str, Any] | None
) -> str:
    train, held = result.get("train_data") or {}, result.get("held_out_data") or {}
    keys = [key for key in train if isinstance(train[key], int | float)]
    rows = [(key.replace("_", " "), train[key], held.get(key)) for key in keys]
    parts = [
        _table(("file", "bytes", "sha256"), ((f["name"], f["bytes"], f["sha256"]) for f in
               (*facts["data"], *facts.get("eval_data", ()))), "hashes"),
        _table(("", "training", "held out"), rows, "figures"),
        bar_chart("Tokens of a training document", facts.get("lengths") or (), x="tokens"),
    ]  # fmt: skip
    if found:
        parts.append("<h3>Findings of the check</h3>" + _table((), _flat(found)))
    else:
        parts.append(
            "<p>No check of the data is kept with this run: <code>dsv4-finetune check DATA --json "
            f"&gt; {CHECK_FILE}</code> in its directory, then report again.</p>"
        )
    return "".join(parts)


def _files(facts: Mapping[str, Any]) -> str:
    base = facts["base"]
    rows = [("base", base["path"]), ("identity", base["identity"])]
    files = [("base", f) for f in base["files"]] + [("adapter", f) for f in facts["adapter"]]
    listed = ((f["name"], which, f["bytes"], f["sha256"]) for which, f in files)
    return (
        _table((), rows, "hashes")
        + _table(("file", "of", "bytes", "sha256"), listed, "hashes")
        + "<p>The identity hashes the base's shape, norms, routers and some rows of its embedding: "
        "a base and its quantized copies have the same. Weights above 1 GiB have no hash of "
        "their own here.</p>"
    )


def _settings(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    command = f"<pre>{escape(facts['command'])}</pre>" if facts["command"] else "<p>Unknown.</p>"
    return command + _table((), _flat(config))


def _machine(facts: Mapping[str, Any]) -> str:
    machine = dict(facts["machine"])
    machine["memory"] = f"{machine.pop('memory_bytes') / 2**30:.1f} GiB"
    return _table((), _flat(machine)) + _table(("package", "version"), facts["versions"].items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as rows."""
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(str, value)) or None))
        else:
            rows.append((name, value))
    return rows
