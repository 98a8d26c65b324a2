# SPDX-License-Identifier: Apache-2.0
"""A run's data: bad records refuse it or are skipped, splits, repeats left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.config import RunConfig
from finetune.data import Example, encode_records
from finetune.prepare import check_fingerprint, fingerprint, prepare_data
from finetune.records import read_records, split_records
from finetune.run_data import build_held_out, build_run_data

BACKWARDS = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}


def _write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _texts(count: int, word: str = "text") -> list[dict[str, str]]:
    return [{"text": f"{word} number {i} of this file"} for i in range(count)]


def _config(data: str, **changes: Any) -> RunConfig:
    return RunConfig(model="m", output="o", data=data, **{"max_length": 64, **changes})


def _content(examples: list[Example]) -> list[list[int]]:
    return [example.input_ids for example in examples]


def test_it_is_the_split_and_encoding_of_the_records(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = _config(_write(tmp_path / "d.jsonl", *_texts(30)), eval_fraction=0.2, seed=3)
    data = build_run_data(config, tokenizer)
    sides = split_records(read_records(config.data), 0.2, 3)
    for side, examples, report in zip(
        sides,
        (data.train, data.held_out),
        (data.train_report, data.held_out_report),
        strict=True,
    ):
        expected, counted = encode_records(side, tokenizer, 64)
        assert _content(examples) == _content(expected)
        assert report == counted
    held_out, report = build_held_out(config, config.data, tokenizer)
    assert (_content(held_out), report) == (_content(data.held_out), data.held_out_report)


@pytest.mark.parametrize("where", ["parsing", "encoding", "length"])
def test_bad_records_refuse_a_run_or_are_skipped_and_listed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, where: str
) -> None:
    bad: Any = {"parsing": "{", "encoding": BACKWARDS, "length": {"text": "meter " * 90}}[where]
    rows = _texts(10)
    file = _write(tmp_path / "d.jsonl", *rows[:4], bad, *rows[4:])
    reason = {
        "parsing": "not JSON",
        "encoding": "chat: wanted an answer behind each question",
        "length": "wanted at most 64 tokens",
    }[where]
    with pytest.raises(ValueError, match=rf"d\.jsonl: line 5: {reason}"):
        build_run_data(_config(file, long="reject"), tokenizer)
    data = build_run_data(_config(file, long="reject", on_bad="skip"), tokenizer)
    (skipped,) = data.skipped
    assert (skipped["file"], skipped["line"], skipped["place"]) == (file, 5, "line 5")
    assert skipped["reason"].startswith(reason)
    assert len(data.train) + len(data.held_out) == 10


def test_a_file_of_bad_records_alone_is_refused_even_if_they_are_skipped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = _write(tmp_path / "d.jsonl", "{", BACKWARDS)
    with pytest.raises(ValueError, match=r"line 1: not JSON.*; line 2: chat: wanted"):
        build_run_data(_config(file, on_bad="skip"), tokenizer)


def test_a_file_of_its_own_is_held_out_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train = _write(tmp_path / "d.jsonl", *_texts(10))
    held = _write(tmp_path / "e.jsonl", *_texts(3, "other"))
    config = _config(train, eval_data=held, eval_fraction=0.5)
    data = build_run_data(config, tokenizer)
    assert (len(data.train), len(data.held_out)) == (10, 3)
    assert _content(build_held_out(config, train, tokenizer)[0]) == _content(data.held_out)
    bad = _write(tmp_path / "bad.jsonl", *_texts(3), "{")
    with pytest.raises(ValueError, match=r"bad\.jsonl: line 4: not JSON"):
        build_run_data(_config(train, eval_data=bad), tokenizer)


def test_repeats_are_left_out_on_request(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = "meter battery lasts nine years too and the old one did not last so long at all".split()
    near = " ".join(words * 3), " ".join([*(words * 3), "today"])
    train = _write(
        tmp_path / "d.jsonl",
        *({"text": text} for text in ("one", "two", "One!", "two", *near, "held", "HELD.")),
    )
    held = _write(tmp_path / "e.jsonl", {"text": "held"}, {"text": near[1] + " or so"})
    found = {}
    for name, changes in {
        "none": {},
        "copies": {"drop_duplicates": True},
        "overlap": {"drop_overlap": True},
        "both": {"drop_duplicates": True, "drop_overlap": True},
    }.items():
        data = build_run_data(_config(train, eval_data=held, max_length=256, **changes), tokenizer)
        found[name] = (len(data.train), data.removed)
        assert len(data.held_out) == 2
    assert found == {
        "none": (8, {}),
        "copies": (5, {"duplicates": 3}),
        "overlap": (4, {"overlap": 4}),
        "both": (2, {"duplicates": 2, "overlap": 4}),
    }


def test_training_on_nothing_but_the_held_out_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train = _write(tmp_path / "d.jsonl", {"text": "held"})
    config = _config(train, eval_data=train, drop_overlap=True)
    with pytest.raises(ValueError, match="wanted records that are not held out, got 1 that all"):
        build_run_data(config, tokenizer)


def test_overlap_of_a_split_is_of_near_repeats(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Copies land on one side by themselves; what differs in a sign does not."""
    rows = [{"text": f"{text}{sign}"} for text in "abcdefghij" for sign in (" x", " x.")]
    config = _config(_write(tmp_path / "d.jsonl", *rows), eval_fraction=0.3, drop_overlap=True)
    data = build_run_data(config, tokenizer)

    def letters(examples: list[Example]) -> set[str]:
        return {tokenizer.decode(example.input_ids)[5] for example in examples}

    assert data.removed["overlap"] > 0
    assert not letters(data.train) & letters(data.held_out)


@pytest.mark.parametrize("changes", [{"long": "split"}, {"packing": True}])
def test_settings_of_supervised_data_are_refused_for_preferences(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]
) -> None:
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}: wanted .* for objective dpo, got"):
        prepare_data(_config("d.jsonl", objective="dpo", **changes), tokenizer)


def test_pairs_are_no_texts_whose_loss_could_be_evaluated(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = _config("d.jsonl", objective="kto")
    with pytest.raises(ValueError, match="wanted a supervised run, got objective kto"):
        build_held_out(config, "d.jsonl", tokenizer)


def test_a_held_out_file_is_part_of_the_fingerprint(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train, held = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _write(train, {"text": "one"})
    _write(held, {"text": "two"})
    config = _config(str(train), eval_data=str(held))
    before = fingerprint(config, prepare_data(config, tokenizer))
    held.write_text('{"text":  "two"}\n')
    after = fingerprint(config, prepare_data(config, tokenizer))
    check_fingerprint(after, {k: v for k, v in before.items() if k != "eval_data_sha256"})
    with pytest.raises(ValueError, match="the file of eval_data changed"):
        check_fingerprint(after, before)
