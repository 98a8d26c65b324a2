# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, stopped, starved of disk or given other data, and then continued.

Processes are real and so are the signals; the model is tiny. Many kills at random instants are
`pytest -m slow tests/integration/test_finetune_resume.py --log-cli-level=INFO`.
"""

import hashlib
import json
import logging
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.callbacks import read_log
from finetune.checkpoints import is_whole, last_checkpoint, list_checkpoints
from finetune.config import RunConfig
from finetune.running import train
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

logger = logging.getLogger(__name__)
ADAPTER = "adapter_model.safetensors"
STEPS = 6

# Where a run is hit: code that a process of its own executes before it trains. Each place is met at
# the step that a test names, by the signal `hit`, `hits` times at most.
HOOKS = """
import errno, os, signal
from pathlib import Path
import finetune.checkpoints as checkpoints
import finetune.running as running
from finetune.checkpoints import SafeCheckpoints
from finetune.interruption import Interrupted
from finetune.trainer import AdapterTrainer

left = [hits]

def strike():
    if left[0]:
        left[0] -= 1
        os.kill(os.getpid(), getattr(signal, hit))

def before(owner, name, due):
    plain = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if due(*args):
            strike()
        return plain(*args, **kwargs)
    setattr(owner, name, wrapped)

at = lambda self, *rest: self.state.global_step == step
places = {
    "step": lambda: before(AdapterTrainer, "training_step", at),
    "evaluation": lambda: before(AdapterTrainer, "get_eval_dataloader", at),
    "checkpoint": lambda: before(SafeCheckpoints, "_save_optimizer_and_scheduler", at),
    "files": lambda: before(SafeCheckpoints, "_save_rng_state", at),
    "seal": lambda: before(checkpoints, "_seal", lambda folder: str(step) in folder.name),
    "rename": lambda: before(checkpoints, "_remove", lambda folder: str(step) in folder.name),
    "result": lambda: before(running, "_measure", lambda *rest: True),
}
places[place]()
try:
    running.train(config, resume=resume)
except Interrupted as cut:
    print(cut.checkpoint)
    raise SystemExit(cut.exit_code)
"""
FULL = """
import resource, signal
import finetune.running as running
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    running.train(config, resume=resume)
except OSError as error:
    Path(message).write_text(str(error))
    raise SystemExit(1)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with its tokenizer, and sixteen records beside it.

    Thirteen of them train: an epoch is four steps, and a run ends in the middle of its second.
    """
    directory = tmp_path_factory.mktemp("base")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the meter lasts nine years"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(directory)
    config = Dsv4Config(
        vocab_size=280,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        sliding_window=8,
        compress_ratios=[0, 4],
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        hc_mult=2,
        hc_sinkhorn_iters=2,
        initializer_range=0.1,
        yarn=None,
        max_position_embeddings=256,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dsv4ForCausalLM(config).save_pretrained(directory)
    lines = [{"prompt": f"meter {i}", "completion": f" lasts {i * i} years"} for i in range(16)]
    (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture(scope="module")
def make_run(base: Path) -> Callable[..., RunConfig]:
    def make(output: Path, **changes: Any) -> RunConfig:
        values = {
            "model": str(base),
            "data": str(base / "data.jsonl"),
            "output": str(output),
            "rank": 2,
            "dropout": 0.1,
            "eval_fraction": 0.2,
            "max_steps": STEPS,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 2,
            "report_to": "none",
        }
        return RunConfig(**values | changes)

    return make


@pytest.fixture(scope="module")
def whole(make_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(make_run(output))
    return output


class Runs:
    """Starts runs in processes of their own."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["finetune.running"])

    def start(self, code: str, **names: Any) -> multiprocessing.Process:
        torch.set_num_threads(1)
        process = self.context.Process(target=exec, args=(code, {"hits": 1, **names}))
        process.start()
        return process

    def end(self, code: str, **names: Any) -> int:
        """Exit code; negative for a signal's number."""
        process = self.start(code, **names)
        process.join(60)
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


def _same(output: Path, whole: Path) -> None:
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    names = {p.name for p in output.iterdir() if not p.name.startswith("checkpoint")}
    assert names == {p.name for p in whole.iterdir() if not p.name.startswith("checkpoint")}
    for folder in list_checkpoints(output):
        assert is_whole(folder)


def _evaluations(output: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["eval_loss"]) for e in read_log(output / "log.jsonl") if "eval_loss" in e]


def test_the_same_seed_gives_the_same_bytes(
    make_run: Callable[..., RunConfig], whole: Path, tmp_path: Path
) -> None:
    train(make_run(tmp_path / "again"))
    _same(tmp_path / "again", whole)
    train(make_run(tmp_path / "other", seed=1))
    assert (tmp_path / "other" / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes()


def test_the_overfit_gate_changes_no_byte(
    make_run: Callable[..., RunConfig], whole: Path, tmp_path: Path
) -> None:
    result = train(make_run(tmp_path / "out", overfit_gate="on"))
    assert result.overfit_gate is not None
    assert result.overfit_gate["last"] < 0.9 * result.overfit_gate["first"]
    _same(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("place", "step", "saved"),
    [
        pytest.param("step", 1, None, marks=pytest.mark.slow),
        ("step", 3, "checkpoint-2"),
        ("checkpoint", 4, "checkpoint-2"),
        pytest.param("files", 4, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param("seal", 4, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param("rename", 4, "checkpoint-2", marks=pytest.mark.slow),
        ("evaluation", 4, "checkpoint-2"),
        ("result", 0, "checkpoint-6"),
    ],
)
def test_a_killed_run_ends_like_an_undisturbed_one(
    make_run: Callable[..., RunConfig],
    runs: Runs,
    whole: Path,
    tmp_path: Path,
    place: str,
    step: int,
    saved: str | None,
) -> None:
    config = make_run(tmp_path / "out")
    code = runs.end(HOOKS, config=config, resume=False, place=place, step=step, hit="SIGKILL")
    assert code == -signal.SIGKILL
    last = last_checkpoint(config.output)
    assert (last and last.name) == {
        1: None,
        3: "checkpoint-2",
        4: "checkpoint-2",
        0: "checkpoint-6",
    }[step]
    train(config, resume=True)
    _same(tmp_path / "out", whole)
    assert _evaluations(tmp_path / "out") == _evaluations(whole)


@pytest.mark.parametrize(
    ("hit", "place", "step", "saved"),
    [
        ("SIGTERM", "step", 2, "checkpoint-3"),
        ("SIGINT", "step", 3, "checkpoint-4"),
        pytest.param("SIGTERM", "evaluation", 2, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param("SIGINT", "checkpoint", 4, "checkpoint-4", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "result", 0, "checkpoint-6", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_finishes_its_step_and_saves_it(
    make_run: Callable[..., RunConfig],
    runs: Runs,
    whole: Path,
    tmp_path: Path,
    hit: str,
    place: str,
    step: int,
    saved: str,
) -> None:
    config = make_run(tmp_path / "out")
    code = runs.end(HOOKS, config=config, resume=False, place=place, step=step, hit=hit)
    assert code == 128 + getattr(signal, hit)
    last = last_checkpoint(config.output)
    assert last is not None
    assert last.name == saved
    assert not (tmp_path / "out" / ADAPTER).exists()
    train(config, resume=True)
    _same(tmp_path / "out", whole)
    assert _evaluations(tmp_path / "out") == _evaluations(whole)


def test_the_second_signal_stops_at_once(
    make_run: Callable[..., RunConfig], runs: Runs, tmp_path: Path
) -> None:
    """A step of two batches, hit in both."""
    config = make_run(tmp_path / "out")
    names = {"place": "step", "step": 2, "hit": "SIGINT", "hits": 2}
    assert runs.end(HOOKS, config=config, resume=False, **names) == 130
    last = last_checkpoint(config.output)
    assert (last and last.name) == "checkpoint-2"


def test_a_full_disk_costs_one_checkpoint_and_no_more(
    make_run: Callable[..., RunConfig], runs: Runs, whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files, between that of the adapter and of the optimizer's state."""
    config = make_run(tmp_path / "out")
    runs.end(HOOKS, config=config, resume=False, place="step", step=3, hit="SIGKILL")
    folder = tmp_path / "out" / "checkpoint-2"
    sizes = [(folder / name).stat().st_size for name in (ADAPTER, "optimizer.safetensors")]
    assert sizes[0] < sizes[1]
    message = tmp_path / "message"
    names = {"limit": sum(sizes) // 2, "message": message, "Path": Path}
    assert runs.end(FULL, config=config, resume=True, **names) == 1
    text = message.read_text()
    assert "checkpoint-4: could not write the checkpoint (" in text
    assert f"{folder} is intact. Make room and continue with --resume" in text
    assert [p.name for p in (tmp_path / "out").iterdir() if "checkpoint" in p.name] == [folder.name]
    train(config, resume=True)
    _same(tmp_path / "out", whole)


def test_torn_checkpoints_are_passed_over(
    make_run: Callable[..., RunConfig], runs: Runs, whole: Path, tmp_path: Path
) -> None:
    config = make_run(tmp_path / "out")
    runs.end(HOOKS, config=config, resume=False, place="step", step=5, hit="SIGKILL")
    torn = tmp_path / "out" / "checkpoint-4" / "optimizer.safetensors"
    spoilt = bytearray(torn.read_bytes())
    spoilt[-1] ^= 1
    torn.write_bytes(spoilt)
    assert last_checkpoint(config.output) == tmp_path / "out" / "checkpoint-2"
    train(config, resume=True)
    _same(tmp_path / "out", whole)


def test_other_data_is_refused_with_both_hashes(
    make_run: Callable[..., RunConfig], runs: Runs, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes((base / "data.jsonl").read_bytes())
    config = make_run(tmp_path / "out", data=str(data))
    runs.end(HOOKS, config=config, resume=False, place="step", step=3, hit="SIGKILL")
    earlier = json.loads((tmp_path / "out" / "data.json").read_text())
    data.write_text(data.read_text().replace("lasts 4 years", "lasts 5 years"))
    changed = hashlib.sha256(data.read_bytes()).hexdigest()
    hashes = f"wanted data_sha256 {earlier['data_sha256']}, got {changed}"
    with pytest.raises(ValueError, match=f"the data file changed: {hashes}"):
        train(config, resume=True)
    data.write_bytes((base / "data.jsonl").read_bytes())
    (tmp_path / "out" / "data.json").write_text(json.dumps(earlier | {"examples_sha256": "0" * 64}))
    with pytest.raises(
        ValueError, match=f"wanted examples_sha256 {'0' * 64}, got {earlier['examples_sha256']}"
    ):
        train(config, resume=True)


def test_a_finished_run_gives_its_result_again(
    make_run: Callable[..., RunConfig], whole: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    result = train(make_run(whole), resume=True)
    assert result.steps == STEPS
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_checkpoints_hold_no_pickle(whole: Path) -> None:
    found = {p.suffix for folder in list_checkpoints(whole) for p in folder.iterdir()}
    assert found <= {".json", ".safetensors", ".md"}


@pytest.mark.slow
def test_kills_at_random_instants_change_no_byte(
    make_run: Callable[..., RunConfig], runs: Runs, whole: Path, tmp_path: Path
) -> None:
    dice, kills, rounds = random.Random(0), 0, 0
    plain = "import finetune.running as running; running.train(config, resume=resume)"
    start = time.perf_counter()
    assert runs.end(plain, config=make_run(tmp_path / "timed"), resume=False) == 0
    seconds = time.perf_counter() - start
    while kills < 60:
        rounds += 1
        config = make_run(tmp_path / f"out-{rounds}")
        while True:
            resume = Path(config.output, "run.yaml").is_file()
            process = runs.start(plain, config=config, resume=resume)
            process.join(dice.uniform(0, 1.2 * seconds))
            if not process.is_alive():
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            for folder in list_checkpoints(config.output):
                assert is_whole(folder)
        _same(Path(config.output), whole)
    logger.info("%d kills in %d runs, all byte-identical", kills, rounds)
