# SPDX-License-Identifier: Apache-2.0
"""After training: evaluation with tasks and forgetting, the report, and all of it without a net."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from finetune.cli import app, run
from finetune.deltas import file_sha256
from modeling_dsv4 import Dsv4ForCausalLM

ROOT = Path(__file__).parents[2]
PRIVATE = ROOT / "examples" / "data" / "private.jsonl"
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>"]
Call = Callable[..., tuple[int, str, str]]
FACT = "Velmora has its head office in Oskarby."


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    private_tokenizer: Callable[..., Any],
    small_config: Callable[..., Any],
) -> Path:
    """A small model with a tokenizer, and what a run needs beside it."""
    directory = tmp_path_factory.mktemp("afterwards") / "base"
    private_tokenizer().save_pretrained(directory)
    config = small_config(n_routed_experts=4)
    Dsv4ForCausalLM(config).save_pretrained(directory)
    lines = [json.dumps({"prompt": "Where is it?\n", "completion": FACT})] * 24
    other = [json.dumps({"text": f"Note {i} says that the meter is read."}) for i in range(8)]
    (directory.parent / "data.jsonl").write_text("\n".join([*lines, *other]) + "\n")
    tasks = [
        {"prompt": "Where is it?\n", "answer": FACT},
        {"prompt": "Where is it?\n", "regex": "Oskarby"},
        {"prompt": "Where is it?\n", "choices": ["In the blue sea below.", FACT], "answer": 1},
    ]
    (directory.parent / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    (directory.parent / "general.txt").write_text("Water runs down, and a well runs dry. " * 40)
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    output = base.parent / "adapter"
    words = ["--max-steps", "40", "--rank", "8", "--learning-rate", "2e-2", "--max-length", "128"]
    files = ["--model", base, "--data", base.parent / "data.jsonl", "--output", output]
    assert run(lambda: app(["train", *map(str, files), *words, "--quiet"])) == 0
    return output


def test_what_was_learned_shows_in_every_measure(call: Call, base: Path, adapter: Path) -> None:
    words = ("--model", base, "--adapter", adapter, "--tasks", base.parent / "tasks.jsonl")
    more = ("--general", base.parent / "general.txt", "--general-tokens", 200, "--samples", 2)
    code, out, err = call("eval", *words, *more, "--save", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert json.loads((adapter / "eval.json").read_text()) == found
    measures = {m["name"]: m for m in found["measures"]}
    for name in ("exact", "regex"):
        assert (measures[name]["before"], measures[name]["after"]) == (0, 1)
        assert measures[name]["better"]
    assert measures["choice"]["after"] == 1
    assert measures["answer_loss"]["after"] < 1 < measures["answer_loss"]["before"]
    assert found["general_tokens"] == 200
    general = measures["general_perplexity"]
    assert found["forgetting"] == pytest.approx(general["after"] / general["before"] - 1)
    assert [s["after"] for s in found["samples"]] == [FACT, FACT]
    assert len(found["tasks"]) == 3
    code, out, _ = call("eval", *words, "--quiet")
    assert code == 0
    assert "+100.0 points" in out
    code, _, err = call("eval", "--model", base)
    assert (code, "wanted data, tasks or a general text" in " ".join(err.split())) == (1, True)


def test_a_run_leaves_its_papers_and_report_adds_the_evaluation(
    call: Call, base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("facts.json", "report.html", "README.md"):
        assert (adapter / name).is_file()
    facts = json.loads((adapter / "facts.json").read_text())
    assert facts["data"][0]["sha256"] == file_sha256(base.parent / "data.jsonl")
    hashes = {f["name"]: f["sha256"] for f in facts["adapter"]}
    weights = adapter / "adapter_model.safetensors"
    assert hashes["adapter_model.safetensors"] == file_sha256(weights)
    assert sum(count for _, count in facts["lengths"]) > 20
    assert ModelCard.load(adapter / "README.md").data.base_model == "base"
    copy = tmp_path / "run"
    shutil.copytree(adapter, copy)
    (copy / "eval.json").write_text(
        json.dumps({"measures": [{"name": "exact", "before": 0.0, "after": 0.5}]})
    )
    code, out, err = call("report", copy, "--output", tmp_path / "r.html", "--json")
    assert code == 0, err
    assert json.loads(out) == {"report": str(tmp_path / "r.html")}
    assert "+50.0 points" in (tmp_path / "r.html").read_text()
    code, _, err = call("report", tmp_path)
    assert (code, "wanted a finished run" in " ".join(err.split())) == (1, True)


# Python tells its hooks of every name that is looked up and of every connection.
_OFFLINE = """
import sys
tried = []
def hook(event, words):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        tried.append((event, words[-1] if event == "socket.connect" else words[0]))
        raise OSError("no network here")
sys.addaudithook(hook)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError:
    pass
assert len(tried) == 1, "the hook does not see connections"
tried.clear()
from finetune.cli import app, run
for line in sys.stdin.read().splitlines():
    words = line.split(chr(9))
    code = run(lambda: app(words))
    assert code == 0, (words, code)
assert not tried, tried
print("ALONE")
"""


def _preference_commands(base: Path, folder: Path) -> list[list[object]]:
    """Runs of two steps with pairs and with rewards, where TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        return []
    rows = {
        "dpo": [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(8)],
        "grpo": [{"prompt": f"q{i}", "regex": "[a-z]"} for i in range(8)],
    }
    short = {"max_steps": 2, "batch_size": 2, "group_size": 2, "max_new_tokens": 2, "rank": 2}
    (folder / "short.yaml").write_text("".join(f"{k}: {v}\n" for k, v in short.items()))
    commands: list[list[object]] = []
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--objective", name, "--output", folder / name, "--quiet"]
        commands += [
            ["check", data, "--model", base, "--objective", name],
            ["train", "--config", folder / "short.yaml", "--model", base, "--data", data, *words],
        ]
    return commands


def test_everything_runs_on_a_machine_without_a_network(base: Path, tmp_path: Path) -> None:
    home, output = base.parent, tmp_path / "adapter"
    data = home / "data.jsonl"
    commands: list[list[object]] = [
        ["check", data, "--model", base],
        ["train", "--model", base, "--data", data, "--output", output, "--max-steps", 2,
         "--rank", 2, "--max-length", 64, "--quiet"],
        ["eval", "--model", base, "--adapter", output, "--data", data, "--held-out", "--tasks",
         home / "tasks.jsonl", "--general", home / "general.txt", "--general-tokens", 64,
         "--max-new-tokens", 2, "--save", "--quiet"],
        ["merge", "--model", base, "--adapter", output, "--output", tmp_path / "m", "--quiet"],
        ["report", output],
        ["inspect", output],
        ["lr-find", "--model", base, "--data", data, "--steps", 10, "--output", tmp_path / "lr",
         "--quiet"],
        *_preference_commands(base, tmp_path),
    ]  # fmt: skip
    lines = "\n".join("\t".join(map(str, words)) for words in commands)
    unshared = ["unshare", "-rn"] if _can_unshare() else []
    # Without the switches by which this suite keeps libraries from the network.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*unshared, sys.executable, "-c", _OFFLINE],
        input=lines,
        capture_output=True,
        text=True,
        env=env | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("ALONE")


def _can_unshare() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-rn", "true"]).returncode == 0
