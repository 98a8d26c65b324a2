# SPDX-License-Identifier: Apache-2.0
"""`check` on preferences: what it counts, names, refuses and writes; runs refuse the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.clean_copy import write_clean
from finetune.cli import app, run
from finetune.config import RunConfig
from finetune.data_check import check_data, find_objective
from finetune.detectors import Detector
from finetune.encoding import Rules
from finetune.preference import prepare_preferences
from finetune.preference_records import read_preferences

MAIL = "jo@mail.corp-site.de"
KEY = "AKIAIOSFODNN7REALKEY"


def _pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


ROWS: list[Any] = [
    _pair("the meter", " lasts nine years", " ends", id=7),
    "{",
    _pair("the meter", " same", " same "),
    _pair("the meter", " ", " ends"),
    _pair("the meter", " ends", " lasts nine years"),
    _pair("the battery", f" ask {MAIL}", f" the key is {KEY}"),
    _pair("the meter", " lasts nine years", " ends"),
    _pair("The Meter", " lasts nine years!", " ends"),
    _pair("in eval", " yes", " no"),
    _pair("long", " battery" * 100, " no"),
    {"prompt": "p", "completion": "c"},
]
SIDES = ("chosen", "rejected")
# What stands at these lines is no pair.
BAD = [2, 3, 4, 11]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "d.jsonl", *ROWS)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return _write(tmp_path / "e.jsonl", _pair("in eval", " yes", " no"), _pair("long", "p", "q"))


def _write(path: Path, *rows: Any) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


def test_pairs_are_counted_and_named_like_other_records(
    data: Path, held_out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check = check_data(data, tokenizer, eval_data=held_out, rules=Rules(80), detector=Detector())
    values = check.to_dict()
    assert values["objective"] == "dpo"
    assert [one["line"] for one in values["bad"]] == BAD
    assert "`chosen` equal to `rejected`" in values["bad"][1]["reason"]
    assert (values["records"], values["preference"]) == (7, 7)
    assert values["repeats"] == [
        {"place": "line 7", "of": "line 1", "kind": "exact"},
        {"place": "line 8", "of": "line 1", "kind": "normalised"},
    ]
    assert values["overlaps"] == [{"place": "line 9", "of": "line 1", "kind": "exact"}]
    assert [(one["line"], one["key"]) for one in values["findings"]] == [
        (6, "chosen"),
        (6, "rejected"),
    ]
    # Lines 1 and 7 prefer what line 5 rejects.
    assert values["contradicted"] == 3
    assert values["prompts"] == 5
    assert (values["truncated"], values["dropped"], values["split"]) == (1, 0, 0)
    assert values["examples"] == 14
    assert values["shared_prompts"] == 2
    words = " ".join(values["warnings"])
    assert "2 prompts are in both files" in words
    assert "1 records are cut at 80 tokens" in words
    assert "3 records prefer what another one rejects" in words


def test_tokens_are_counted_by_side(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    values = check_data(data, tokenizer, rules=Rules(512)).to_dict()
    for side in SIDES:
        # An answer and its end.
        sizes = [len(tokenizer(row[side])["input_ids"]) + 1 for row in _good()]
        found = values["sides"][side]
        assert (found["answers"], found["tokens"]) == (7, sum(sizes))
        assert found["mean"] == pytest.approx(sum(sizes) / 7)
        assert found["quantiles"]["p100"] == max(sizes)
        assert found["quantiles"]["p50"] == sorted(sizes)[3]
    longest = tokenizer("long")["input_ids"] + tokenizer(" battery" * 100)["input_ids"]
    assert values["quantiles"]["p100"] == len(longest) + 2
    # All but line 5, whose sides are exchanged, and line 6, where the key is the longer one.
    sizes = {side: [len(tokenizer(r[side])["input_ids"]) for r in _good()] for side in SIDES}
    pairs = zip(sizes["chosen"], sizes["rejected"], strict=True)
    assert values["chosen_longer"] == sum(one > other for one, other in pairs)
    assert 0 < values["chosen_longer"] < 7
    assert "packing" not in values


def _good() -> list[dict[str, Any]]:
    return [row for i, row in enumerate(ROWS, start=1) if i not in BAD]


def test_rated_answers_are_known_by_their_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "c", "label": False},
        {"prompt": "q", "completion": "d", "label": True},
        {"prompt": "q", "completion": "e", "label": "maybe"},
    ]
    file = _write(tmp_path / "r.jsonl", *rows)
    check = check_data(file, tokenizer)
    values = check.to_dict()
    assert (values["objective"], values["rated"], values["contradicted"]) == ("kto", 3, 2)
    assert [values["sides"][side]["answers"] for side in ("chosen", "rejected")] == [2, 1]
    assert "`label`: wanted true or false" in values["bad"][0]["reason"]
    # The other label makes it no copy.
    assert values["repeats"] == []
    one = _write(tmp_path / "one.jsonl", rows[0])
    verdict = check_data(one)
    assert verdict.errors() == ["kto: wanted at least two different prompts, got one"]
    assert "1 answers, all chosen" in verdict.warnings()
    assert check_data(one, objective="sft").errors() == []


def test_the_first_readable_row_says_what_a_file_is_for(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row, objective in (
        (ROWS[0], "dpo"),
        ({"chosen": talk, "rejected": talk}, "dpo"),
        ({"prompt": "p", "completion": "c", "label": True}, "kto"),
        ({"prompt": "p", "completion": "c", "label": "science"}, "sft"),
        ({"text": "t"}, "sft"),
    ):
        assert find_objective(_write(tmp_path / "x.jsonl", "{", row)) == objective
    assert find_objective(_write(tmp_path / "x.jsonl", "{")) == "sft"


def test_without_a_tokenizer_chats_are_still_checked(tmp_path: Path) -> None:
    yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    user = {"role": "user", "content": "q"}
    rows = [_pair([user], [yes], [no]), _pair([yes], [yes], [no])]  # type: ignore[arg-type]
    check = check_data(_write(tmp_path / "c.jsonl", *rows))
    assert [one.line for one in check.data.bad] == [2]
    assert "chat: wanted a user message, got assistant" in check.data.bad[0].reason


def test_a_clean_copy_of_preferences_can_be_trained_on(
    data: Path, held_out: Path, tmp_path: Path
) -> None:
    detector, copy = Detector(), tmp_path / "clean.jsonl"
    check = check_data(data, eval_data=held_out, detector=detector)
    summary = write_clean(check, copy, detector)
    assert summary["left_out"] == {
        "bad": 4,
        "exact duplicate": 1,
        "normalised duplicate": 1,
        "overlap": 1,
    }
    rows = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ROWS[0]
    assert rows[2]["chosen"] == " ask [EMAIL]"
    assert KEY not in copy.read_text(encoding="utf-8")
    assert len(read_preferences(copy, "dpo")) == summary["written"] == 4
    whole = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [whole[0], {"role": "assistant", "content": "b"}]
    talks = _write(tmp_path / "t.jsonl", {"chosen": whole, "rejected": other, "id": 1})
    write_clean(check_data(talks), tmp_path / "t clean.jsonl")
    assert json.loads((tmp_path / "t clean.jsonl").read_text()) == {
        "prompt": whole[:1],
        "chosen": whole[1:],
        "rejected": other[1:],
        "id": 1,
    }


def test_the_program_refuses_bad_pairs_and_shows_samples_by_side(
    tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")

    def program(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(lambda: app(["check", *map(str, words)]))
        out = capsys.readouterr()
        return code, " ".join(out.out.split()), " ".join(out.err.split())

    code, out, err = program(data, "--model", tmp_path / "model", "--show", 2)
    assert code == 1
    assert "d.jsonl: line 2: not JSON" in err
    assert "line 1, chosen <bos>the meter{+ lasts nine years<eos>+}" in out
    assert "line 1, rejected <bos>the meter{+ ends<eos>+}" in out
    assert "prompts 5 different" in out
    assert "rejected 7, " in out
    assert "objective dpo" in out
    assert program(data, "--objective", "cpo")[0] == 2
    code, _, err = program(data, "--long", "split")
    assert (code, "long: wanted cut or reject for objective dpo" in err) == (1, True)
    code, _, err = program(data, "--objective", "sft", "--quiet")
    assert "wanted an answer to learn, got preferences" in err


@pytest.fixture
def make_run(data: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        values = {"model": "m", "data": str(data), "output": "o", "objective": "dpo"}
        return RunConfig(**values | changes)

    return make


def test_a_run_checks_as_the_command_does(
    tokenizer: PreTrainedTokenizerFast,
    make_run: Callable[..., RunConfig],
    data: Path,
    held_out: Path,
) -> None:
    with pytest.raises(ValueError, match=r"line 2: not JSON.*; line 11: "):
        prepare_preferences(make_run(), tokenizer)
    skips = make_run(
        on_bad="skip", eval_data=str(held_out), drop_overlap=True, drop_duplicates=True
    )
    prepared = prepare_preferences(skips, tokenizer)
    assert [one["line"] for one in prepared.left_out["skipped"]] == BAD
    assert prepared.left_out["removed"] == {"duplicates": 2, "overlap": 1}
    assert len(prepared.train) == 4
    assert prepared.held_out is not None
    assert len(prepared.held_out) == 2
    cut = prepare_preferences(make_run(on_bad="skip", max_length=5, eval_fraction=0), tokenizer)
    checked = check_data(data, tokenizer, rules=Rules(5)).report
    assert checked is not None
    assert cut.train_report == checked
    assert cut.train_report.dropped == 7 - len(cut.train) == 3
    with pytest.raises(ValueError, match="long: wanted cut or reject for objective orpo"):
        prepare_preferences(make_run(objective="orpo", long="split"), tokenizer)
