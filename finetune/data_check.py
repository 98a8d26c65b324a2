# SPDX-License-Identifier: Apache-2.0
"""Everything worth knowing about training data before a weight is loaded, in one pass."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .data import DataReport, Tally, pack_sizes
from .detectors import Detector
from .dialects import LAYOUTS, OTHER_LAYOUTS
from .duplicates import Fingerprints, Repeat, find_overlaps
from .encoding import Encoded, Rules, check_rules, write_chat
from .preference_check import Preferences, quantiles
from .preference_records import guess_objective, sides_of, with_answer
from .preview import show_runs
from .records import BadRecord, Record, iter_records, parse_value
from .redaction import Finding, scan_record
from .run_data import try_encode
from .sources import open_source

# What became of a record without examples; of one of preferences.
_LOST = {
    False: "records have no answer before the cut",
    True: "records have an answer behind the cut, or equal ones before it",
}
# Of several formats this one says the most; a chat that it cannot say no format can.
_WIDEST = "v4.1"


@dataclass
class FileCheck:
    """One file: rows by number of order, those that are no record, and what records hold."""

    path: str
    source: str
    bad: list[BadRecord] = field(default_factory=list)
    bad_rows: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    prints: Fingerprints = field(default_factory=Fingerprints)
    findings: list[Finding] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    samples: list[dict[str, Any]] = field(default_factory=list)
    preferences: Preferences = field(default_factory=Preferences)


@dataclass(frozen=True)
class DataCheck:
    """The verdict on a data file, and on an evaluation file beside it.

    Attributes:
        data: the file to train on.
        held_out: the evaluation file, if one was given.
        repeats: for every record of `data` what it repeats in `data`, or None.
        overlaps: likewise in `held_out`.
        rules: how records were encoded.
        report: what that did; None without a tokenizer.
        objective: what the records are for.
    """

    data: FileCheck
    held_out: FileCheck | None
    repeats: list[Repeat | None]
    overlaps: list[Repeat | None]
    rules: Rules
    report: DataReport | None
    objective: str = "sft"

    @property
    def compares(self) -> bool:
        """Whether the records are preferences."""
        return self.objective not in ("sft", "grpo")

    @property
    def files(self) -> list[FileCheck]:
        return [self.data] if self.held_out is None else [self.data, self.held_out]

    def errors(self) -> list[str]:
        """Reasons to refuse the data."""
        found = []
        for file in self.files:
            if file.bad:
                shown = "; ".join(map(str, file.bad[:5]))
                more = f"; and {len(file.bad) - 5} more lines" if len(file.bad) > 5 else ""
                found.append(f"{file.path}: {shown}{more}")
            elif not file.rows:
                found.append(f"{file.path}: wanted at least one record, got none")
        if self.objective == "kto" and len(self.data.preferences.prompts) == 1:
            found.append("kto: wanted at least two different prompts, got one")
        if self.report is not None and self.data.rows and not self.report.examples:
            limit = self.rules.max_length
            found.append(f"data: wanted answers within {limit} tokens, got none; raise max_length")
        return found

    def warnings(self) -> list[str]:
        """Reasons to look closer."""
        kinds = Counter(repeat.kind for repeat in self.repeats if repeat)
        overlaps = sum(repeat is not None for repeat in self.overlaps)
        findings = Counter(finding.kind for file in self.files for finding in file.findings)
        named = [
            (kinds["exact"], "records repeat earlier ones"),
            (kinds["normalised"], "records repeat earlier ones but for case, signs and blanks"),
            (kinds["near"], "records nearly repeat earlier ones"),
            (overlaps, "records equal, or nearly, one that is held out"),
        ]
        if self.compares:
            preferences = self.data.preferences
            named.append((preferences.contradicted(), "records prefer what another one rejects"))
            named.append((self.shared_prompts(), "prompts are in both files"))
            named += [
                (
                    preferences.answers[side] * (not preferences.answers[other]),
                    f"answers, all {side}",
                )
                for side, other in (("chosen", "rejected"), ("rejected", "chosen"))
            ]
        if self.report is not None:
            named += [
                (self.report.truncated, f"records are cut at {self.rules.max_length} tokens"),
                (self.report.dropped, _LOST[self.compares]),
                (self.report.reasoning_dropped, "answers lose their reasoning"),
            ]
        named += [(count, f"probable findings of {kind}") for kind, count in findings.items()]
        return [f"{count} {what}" for count, what in named if count]

    def to_dict(self) -> dict[str, Any]:
        """All of it, every bad line and finding included."""
        values: dict[str, Any] = {
            "objective": self.objective,
            **_file_dict(self.data),
            **self._repeat_dict(),
            **(self.data.preferences.to_dict() if self.compares else {}),
            **({} if self.report is None else self._token_dict(self.report)),
            "errors": self.errors(),
            "warnings": self.warnings(),
        }
        if self.held_out is not None:
            values["eval"] = _file_dict(self.held_out)
            if self.compares:
                values["shared_prompts"] = self.shared_prompts()
        if self.data.samples:
            values["samples"] = self.data.samples
        return values

    def shared_prompts(self) -> int:
        """Prompts of preferences that are in both files."""
        held_out = set() if self.held_out is None else self.held_out.preferences.prompts
        return len(self.data.preferences.prompts & held_out)

    def packing(self) -> dict[str, Any]:
        """Rows of `max_length` that the examples would fill, packed, and how well."""
        sizes, length = self.data.tally.sizes, self.rules.max_length
        rows = pack_sizes(sizes, length)
        return {"rows": len(rows), "fill": sum(sizes) / max(len(rows) * length, 1)}

    def quantiles(self) -> dict[str, int]:
        """Tokens of whole records, before any is cut."""
        return quantiles(self.data.tally.whole)

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, records) in bins that double."""
        bits = Counter(max(size, 1).bit_length() for size in self.data.tally.whole)
        if not bits:
            return []
        return [(2 ** (b - 1), 2**b, bits[b]) for b in range(min(bits), max(bits) + 1)]

    def _repeat_dict(self) -> dict[str, Any]:
        kinds = Counter(repeat.kind for repeat in self.repeats if repeat)
        others = self.data if self.held_out is None else self.held_out
        return {
            "duplicates": kinds["exact"],
            "normalised_duplicates": kinds["normalised"],
            "near_duplicates": kinds["near"],
            "overlap": sum(repeat is not None for repeat in self.overlaps),
            "repeats": _list_repeats(self.repeats, self.data, self.data),
            "overlaps": _list_repeats(self.overlaps, self.data, others),
        }

    def _token_dict(self, report: DataReport) -> dict[str, Any]:
        return {
            **report.to_dict(),
            "max_length": self.rules.max_length,
            "mask_share": report.label_tokens / max(report.tokens, 1),
            "quantiles": self.quantiles(),
            "histogram": [list(one) for one in self.histogram()],
            **({"packing": self.packing()} if self.objective == "sft" else {}),
        }


def find_objective(path: str | Path) -> str:
    """What a file is for, by its first row that can be read: "sft", "dpo" (pairs) or "kto".

    Raises:
        ValueError: no such file, or of no known kind.
    """
    for row in open_source(path):
        try:
            return guess_objective(parse_value(row))
        except ValueError:
            continue
    return "sft"


def check_data(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    eval_data: str | Path | None = None,
    rules: Rules | None = None,
    detector: Detector | None = None,
    show: int = 0,
    objective: str | None = None,
) -> DataCheck:
    """Validate, count, compare and search a data file; nothing in it is an exception.

    Args:
        data: see `sources`.
        tokenizer: counts tokens; without it chats are checked against the widest format.
        eval_data: records held out, checked too, and compared with.
        rules: how a run would encode; a `max_length` of 2,048 by default.
        detector: looks for secrets and personal data; None looks for none.
        show: how many samples to keep, marked by what counts.
        objective: what the records are for, as in `RunConfig`; None is what the first row looks
            like, see `find_objective`.

    Raises:
        ValueError: a file is not there, of no known kind, or empty; rules that do not go with the
            objective.
    """
    rules = rules or Rules(2048)
    objective = objective or find_objective(data)
    check_rules(objective, rules)
    held_out = None
    if eval_data is not None:
        held_out = _read(eval_data, objective, tokenizer, rules, detector, 0)
    file = _read(data, objective, tokenizer, rules, detector, show)
    overlaps: list[Repeat | None] = [None] * len(file.rows)
    if held_out is not None:
        overlaps = find_overlaps(file.prints, held_out.prints)
    report = None
    if tokenizer is not None:
        report = file.tally.report(rules) if file.tally.sizes else DataReport(*[0] * 6)
    return DataCheck(file, held_out, file.prints.repeats(), overlaps, rules, report, objective)


def _read(
    path: str | Path,
    objective: str,
    tokenizer: PreTrainedTokenizerBase | None,
    rules: Rules,
    detector: Detector | None,
    show: int,
) -> FileCheck:
    file = FileCheck(str(path), open_source(path).describe())
    for row, item in enumerate(iter_records(path, objective)):
        encoded = item if isinstance(item, BadRecord) else _encode(item, tokenizer, rules)
        if isinstance(item, BadRecord) or isinstance(encoded, BadRecord):
            assert isinstance(encoded, BadRecord)
            reason = encoded.reason if detector is None else detector.redact(encoded.reason)
            file.bad.append(BadRecord(encoded.line, encoded.place, reason))
            file.bad_rows.append(row)
            continue
        file.rows.append(row)
        file.places.append(item.place)
        file.layouts[item.layout] += 1
        file.prints.add(item)
        if detector is not None:
            file.findings += scan_record(item, detector)
        if item.form in ("preference", "rated"):
            file.preferences.add(item, encoded)
        if encoded is not None:
            file.tally.add(encoded)
            for at, example in enumerate(encoded.examples[: show - len(file.samples)]):
                runs = show_runs(example, tokenizer)
                if detector is not None:
                    runs = [run | {"text": detector.redact(run["text"])} for run in runs]
                side = f", {encoded.sides[at]}" if encoded.sides else ""
                file.samples.append({"place": f"{item.place}{side}", "runs": runs})
    return file


def _encode(
    item: Record, tokenizer: PreTrainedTokenizerBase | None, rules: Rules
) -> Encoded | BadRecord | None:
    """A record as a run would encode it; without a tokenizer chats are only written."""
    if tokenizer is not None:
        return try_encode(item, tokenizer, rules)
    compared = item.form in ("preference", "rated")
    for one in [with_answer(item, key) for key in sides_of(item)] if compared else [item]:
        try:
            if one.form == "messages":
                write_chat(one, _WIDEST, rules.thinking)
        except ValueError as error:
            return BadRecord(item.line, item.place, str(error))
    return None


def _file_dict(file: FileCheck) -> dict[str, Any]:
    return {
        "data": file.path,
        "source": file.source,
        "records": len(file.rows),
        **{name: file.layouts[name] for name in LAYOUTS},
        **{name: file.layouts[name] for name in OTHER_LAYOUTS if file.layouts[name]},
        "bad_lines": len(file.bad),
        "bad": [one.to_dict() for one in file.bad],
        "found": dict(Counter(finding.kind for finding in file.findings)),
        "findings": [finding.to_dict() for finding in file.findings],
    }


def _list_repeats(
    repeats: Sequence[Repeat | None], file: FileCheck, others: FileCheck
) -> list[dict[str, Any]]:
    return [
        {"place": file.places[i], "of": others.places[repeat.of], "kind": repeat.kind}
        for i, repeat in enumerate(repeats)
        if repeat
    ]
