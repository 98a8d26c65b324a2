# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on two processes learns what one process learns; they write once and stop together.

The file is both sides: `torchrun` runs it as a program on a CPU with gloo, and the tests compare
what came out with runs of this process that take twice the accumulation.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from finetune.callbacks import read_log
from finetune.checkpoints import SafeCheckpoints, is_whole, last_checkpoint, list_checkpoints
from finetune.config import RunConfig
from finetune.interruption import Interrupted
from finetune.ranks import check_ranks, check_same, deal, join_ranks, own_rank
from finetune.running import train
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

ADAPTER = "adapter_model.safetensors"
STEPS = 4
# What two processes run, and one with twice the accumulation.
EQUAL: dict[str, dict[str, Any]] = {
    "padded": {"overfit_gate": "on"},
    "packed": {"packing": True, "max_length": 48, "accumulation": 1},
    "hot": {"preset": "hot-experts", "hot_share": 0.4, "max_steps": 2},
}
# Sums of gradients in another order, as the optimizer's first steps enlarge them.
CLOSE = 2e-5


def make_run(base: Path, output: Path, **changes: Any) -> RunConfig:
    values = {
        "model": str(base),
        "data": str(base / "data.jsonl"),
        "output": str(output),
        "rank": 2,
        "eval_fraction": 0.2,
        "max_steps": STEPS,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "report_to": "none",
        "overfit_gate": "off",
        "dtype": "float32",
    }
    return RunConfig(**values | changes)


# --- what each process does ---------------------------------------------------------------------


class Strike(TrainerCallback):
    """A signal to the second process alone, behind its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and own_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def try_run(run: Callable[[], Any]) -> str:
    """How something ends."""
    try:
        run()
    except (Interrupted, ValueError, OSError, NotImplementedError) as error:
        more = getattr(error, "checkpoint", None)
        return f"{type(error).__name__}: {more or error}"
    return "done"


def fail_to_write(config: RunConfig) -> str:
    """Let the second process fail at its part of a checkpoint."""
    plain = SafeCheckpoints._save_rng_state

    def full(self: Any, folder: str) -> None:
        if own_rank() == 1:
            raise OSError("no space left")
        plain(self, folder)

    SafeCheckpoints._save_rng_state = full  # type: ignore[method-assign]
    try:
        return try_run(lambda: train(config))
    finally:
        SafeCheckpoints._save_rng_state = plain  # type: ignore[method-assign]


def main(base: Path, out: Path) -> None:
    """Run everything in this process and write how it ended."""
    join_ranks()
    rank = own_rank()
    opened: list[str] = []

    def watch(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            opened.append(str(args[0]))

    sys.addaudithook(watch)
    ends: dict[str, Any] = {"dealt": deal(range(5))}
    for name, changes in EQUAL.items():
        ends[name] = train(make_run(base, out / name, **changes)).to_dict()
    drops = make_run(base, out / "whole", dropout=0.3)
    train(drops)
    stopped = replace(drops, output=str(out / "stopped"))
    ends["stop"] = try_run(lambda: train(stopped, callbacks=[Strike()]))
    ends["resume"] = try_run(lambda: train(stopped, resume=True))
    ends["again"] = try_run(lambda: train(stopped))
    ends["finished"] = train(stopped, resume=True).steps
    ends["full"] = fail_to_write(replace(drops, output=str(out / "full")))
    ends["differs"] = try_run(lambda: check_same(rank, "data"))
    for setting in ({"layer_schedule": "layer-major"}, {"train_indexer": True}):
        config = make_run(base, out / "refused", **setting)
        ends[f"refused {next(iter(setting))}"] = try_run(lambda c=config: train(c))
    ends["written"] = sorted({p for p in opened if p.startswith(str(out))})
    (out.parent / f"rank{rank}.json").write_text(json.dumps(ends))
    torch.distributed.destroy_process_group()


# --- what must come out -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its tokenizer, and records of quite different lengths."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate([*alphabet, "<eos>"])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    config = Dsv4Config(
        vocab_size=260,
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
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dsv4ForCausalLM(config).save_pretrained(folder)
    lines = [
        {"prompt": f"meter {i}", "completion": " lasts" + f" {i * i}" * (1 + i * i % 5)}
        for i in range(44)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def out(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, __file__, str(base), str(folder)],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ends(out: Path) -> list[dict[str, Any]]:
    """How everything ended in each of them."""
    return [json.loads((out.parent / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_learn_what_one_does(
    base: Path, out: Path, ends: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    config = make_run(base, tmp_path / "one", **EQUAL[name])
    config = replace(config, accumulation=2 * config.accumulation)
    one = train(config)
    expected, got = load_file(tmp_path / "one" / ADAPTER), load_file(out / name / ADAPTER)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert (got[key] - tensor).abs().max() < CLOSE, key
    for two in ends:
        for word in ("steps", "held_out_data", "trained_parameters"):
            assert two[word := word] == getattr(one, word) if word in two else True
        assert two[name]["steps"] == one.steps
        assert two[name]["held_out_loss_before"] == pytest.approx(one.held_out_loss_before, 1e-6)
        assert two[name]["held_out_loss_after"] == pytest.approx(one.held_out_loss_after, 1e-5)
        assert two[name]["overfit_gate"] == one.overfit_gate
    assert one.held_out_loss_after < one.held_out_loss_before - 0.01
    logs = [read_log(folder / "log.jsonl") for folder in (tmp_path / "one", out / name)]
    for mine, theirs in zip(*logs, strict=True):
        for key in ("step", "loss", "eval_loss", "grad_norm", "tokens", "busiest_expert"):
            assert theirs.get(key) == pytest.approx(mine.get(key), 1e-4), key


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
