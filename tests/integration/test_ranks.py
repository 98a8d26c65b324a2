# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on two processes learns what one process learns; they write once and stop together.

The file is both sides: `torchrun` runs it as a program on a CPU with gloo, and the tests compare
what came out with runs of this process that take twice the accumulation.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from finetune.callbacks import read_log
from finetune.checkpoints import SafeCheckpoints, is_whole, list_checkpoints
from finetune.config import RunConfig
from finetune.interruption import Interrupted
from finetune.ranks import check_same, deal, join_ranks, own_rank
from finetune.running import train
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM
from modeling_dsv4.engram_hash import build_token_map
from quantize.config import get_recipe
from quantize.convert import convert

ADAPTER = "adapter_model.safetensors"
STEPS = 4
# What two processes run, and one with twice the accumulation.
EQUAL: dict[str, dict[str, Any]] = {
    "padded": {"overfit_gate": "on"},
    "packed": {
        "packing": True,
        "max_length": 48,
        "accumulation": 1,
        "preset": "hot-experts",
        "hot_share": 0.4,
    },
    "shards": {"max_steps": 3},
    "codes in shards": {"model": "codes", "max_steps": 2, "packing": True, "max_length": 48},
    "memory": {"model": "memory", "preset": "memory", "memory_rows": 24},
}
ALONE: tuple[dict[str, Any], ...] = (
    {"layer_schedule": "layer-major"},
    {"train_indexer": True},
    {"objective": "grpo", "group_size": 2},
)
# Preferences: of 5 held-out pairs, and of 10 rated answers, processes have unequal parts.
PREFER = {name: {"objective": name, "max_steps": 2} for name in ("dpo", "kto", "orpo")}
# As `accelerate launch --config_file examples/accelerate/fsdp2.yaml` says it to its processes.
SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Dsv4DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# Sums of gradients in another order, as the optimizer's first steps enlarge them.
CLOSE = 2e-5
LOAD = {"busiest_expert", "idle_experts"}


def make_run(base: Path, output: Path, **changes: Any) -> RunConfig:
    changes["model"] = str(base / changes.get("model", "plain"))
    data = "pairs.jsonl" if "objective" in changes else "data.jsonl"
    values = {
        "data": str(base / data),
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

    seed = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seed = torch.initial_seed()

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


class Look(TrainerCallback):
    """Sees whether a model is sharded, and how much of it is here."""

    seen = (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = [p for p in kwargs["model"].parameters() if isinstance(p, DTensor)]
        self.seen = sum(p.numel() for p in held), sum(p.to_local().numel() for p in held)


def run_shards(base: Path, out: Path, ends: dict[str, Any]) -> None:
    """The same with FSDP2, which accelerate leaves to accelerators: told otherwise, torch can."""
    os.environ.update(SHARDS)
    plain = make_run(base, out / "shards", **EQUAL["shards"])
    ends["shards on CPUs"] = try_run(lambda: train(replace(plain, output=str(out / "cpu"))))
    made = AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = make  # type: ignore[method-assign]
    look = Look()
    for name in ("shards", "codes in shards"):
        config = make_run(base, out / name, **EQUAL[name])
        ends[name] = train(config, callbacks=[look]).to_dict()
        ends[f"{name} seen"] = look.seen
    stopped = make_run(base, out / "shards stopped", **EQUAL["shards"])
    ends["shards stop"] = try_run(lambda: train(stopped, callbacks=[Strike()]))
    ends["shards resume"] = train(stopped, resume=True).to_dict()
    for what in (
        {"preset": "full"},
        {"overfit_gate": "on"},
        {"max_length": 9000},
        {"optimizer": "adamw_8bit"},
        {"objective": "dpo"},
    ):
        config = make_run(base, out / "refused", **what)
        ends[f"shards {next(iter(what))}"] = try_run(lambda c=config: train(c))


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
    for name, changes in (EQUAL | PREFER).items():
        if "shards" not in name:
            ends[name] = train(make_run(base, out / name, **changes)).to_dict()
    drops = make_run(base, out / "whole", dropout=0.3)
    train(drops)
    stopped = replace(drops, output=str(out / "stopped"))
    strike = Strike()
    ends["stop"] = try_run(lambda: train(stopped, callbacks=[strike]))
    ends["seed"] = strike.seed
    ends["resume"] = try_run(lambda: train(stopped, resume=True))
    ends["again"] = try_run(lambda: train(stopped))
    ends["finished"] = train(stopped, resume=True).steps
    ends["full"] = fail_to_write(replace(drops, output=str(out / "full")))
    ends["differs"] = try_run(lambda: check_same(rank, "data"))
    for setting in ALONE:
        config = make_run(base, out / "refused", **setting)
        ends[f"refused {next(iter(setting))}"] = try_run(lambda c=config: train(c))
    run_shards(base, out, ends)
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
    ).save_pretrained(folder / "plain")
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
        Dsv4ForCausalLM(config).save_pretrained(folder / "plain")
    convert(folder / "plain", folder / "codes", get_recipe("fp4"))
    _save_memory_model(folder / "memory", folder / "plain", config)
    lines = [
        {"prompt": f"meter {i}", "completion": " lasts" + f" {i * i}" * (1 + i * i % 5)}
        for i in range(44)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [
        {"prompt": f"meter {i}", "chosen": f" lasts {i}" * (1 + i % 3), "rejected": f" ends{i}" * 2}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def _save_memory_model(folder: Path, like: Path, config: Dsv4Config) -> None:
    """A model with Engram tables, of V4.1's kind, and the tokenizer of another."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(like)
    token_map = build_token_map(tokenizer, config.vocab_size)
    values = config.to_dict() | {
        "compress_ratios": [0, 2],
        "compressor_overlap_ratio": None,
        "compressor_position_bias": False,
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1],
        "index_key": "latent",
        "index_hadamard": False,
        "q_head_norm": False,
        "hc_single_pass": True,
        "router_weight_eps": 1e-20,
        "engram_layer_ids": [0],
        "engram_vocab_size": 4000,
        "engram_n_heads": 2,
        "engram_head_dim": 16,
        "engram_compressed_vocab_size": int(token_map.max()) + 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dsv4ForCausalLM(Dsv4Config.from_dict(values))
    model.set_engram_token_map(token_map)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        for word in ("steps", "trained_parameters", "train_data", "overfit_gate"):
            assert two[name][word] == getattr(one, word)
        assert two[name]["held_out_loss_before"] == pytest.approx(one.held_out_loss_before, 1e-6)
        assert two[name]["held_out_loss_after"] == pytest.approx(one.held_out_loss_after, 1e-5)
    assert one.held_out_loss_after < one.held_out_loss_before - 0.004
    logs = [read_log(folder / "log.jsonl") for folder in (tmp_path / "one", out / name)]
    for mine, theirs in zip(*logs, strict=True):
        for key in mine.keys() & {"step", "loss", "eval_loss", "grad_norm", "tokens"} | LOAD:
            assert theirs.get(key, 0) == pytest.approx(mine.get(key, 0), 1e-4), key


@pytest.mark.parametrize("name", PREFER)
def test_held_out_preferences_count_once_however_many_processes_share_them(
    base: Path, out: Path, ends: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    config = make_run(base, tmp_path / "one", **PREFER[name])
    one = train(replace(config, accumulation=2 * config.accumulation))
    assert one.held_out_data["examples"] == 10
    logs = [read_log(folder / "log.jsonl") for folder in (tmp_path / "one", out / name)]
    held = [[entry for entry in log if "eval_loss" in entry] for log in logs]
    assert len(held[0]) == len(held[1]) == 1
    for key in held[0][0].keys() - {"time", "epoch", "eval_num_tokens"}:
        assert held[1][0][key] == pytest.approx(held[0][0][key], rel=1e-4, abs=1e-5), key
    assert "eval_rewards/margins" in held[0][0] or name != "dpo"
    for two in ends:
        assert two[name]["held_out_margin_after"] == pytest.approx(one.held_out_margin_after, 1e-4)
    expected, got = load_file(tmp_path / "one" / ADAPTER), load_file(out / name / ADAPTER)
    for key, tensor in expected.items():
        assert (got[key] - tensor).abs().max() < CLOSE, key


def test_a_signal_to_one_process_stops_both_and_both_go_on(
    out: Path, ends: list[dict[str, Any]]
) -> None:
    for two in ends:
        assert two["stop"] == f"Interrupted: {out / 'stopped' / 'checkpoint-2'}"
        assert (two["resume"], two["finished"]) == ("done", STEPS)
        assert "holds a run already" in two["again"]
    whole, stopped = out / "whole", out / "stopped"
    assert (stopped / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [two["seed"] for two in ends] == [0, 1]
    assert all(is_whole(folder) for folder in list_checkpoints(stopped))


def test_shards_hold_a_half_each_and_go_on_as_they_stopped(
    out: Path, ends: list[dict[str, Any]]
) -> None:
    for name in ("shards", "codes in shards"):
        assert ends[0][f"{name} seen"][0] == ends[1][f"{name} seen"][0] > 0
        assert sum(two[f"{name} seen"][1] for two in ends) == ends[0][f"{name} seen"][0]
    stopped = out / "shards stopped"
    for two in ends:
        assert two["shards stop"] == f"Interrupted: {stopped / 'checkpoint-2'}"
        for word in ("before", "after"):
            key = f"held_out_loss_{word}"
            assert two["shards resume"][key] == two["shards"][key]
    assert (stopped / ADAPTER).read_bytes() == (out / "shards" / ADAPTER).read_bytes()
    for file in ("optimizer", "scheduler"):
        name = f"checkpoint-3/{file}.safetensors"
        one, other = load_file(stopped / name), load_file(out / "shards" / name)
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_what_shards_cannot_do_says_so(ends: list[dict[str, Any]]) -> None:
    for two in ends:
        assert "accelerate shards over several accelerators, got CPUs" in two["shards on CPUs"]
        for setting in ("preset", "overfit_gate", "max_length", "optimizer", "objective"):
            assert two[f"shards {setting}"].startswith("NotImplementedError: FSDP with " + setting)


def test_a_checkpoint_is_continued_by_as_many_processes(base: Path, out: Path) -> None:
    (out / "stopped" / "result.json").unlink()
    with pytest.raises(ValueError, match="written by 2 processes, got 1"):
        train(make_run(base, out / "stopped", dropout=0.3), resume=True)


def test_the_shipped_settings_are_those_that_are_tested() -> None:
    folder = Path(__file__).parents[2] / "examples" / "accelerate"
    shards = yaml.safe_load((folder / "fsdp2.yaml").read_text())
    assert shards["distributed_type"] == "FSDP"
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    told = {
        names.get(key, key.upper()): str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in shards["fsdp_config"].items()
    }
    assert told == {key: value for key, value in SHARDS.items() if key != "ACCELERATE_USE_FSDP"}
    plain = yaml.safe_load((folder / "ddp.yaml").read_text())
    assert plain["distributed_type"] == "MULTI_GPU"
    assert plain.keys() == shards.keys() - {"fsdp_config"}


def test_what_one_process_fails_at_all_fail_at(out: Path, ends: list[dict[str, Any]]) -> None:
    assert "no space left" in ends[1]["full"]
    assert "process 1 of 2: no space left" in ends[0]["full"]
    assert list_checkpoints(out / "full") == []
    assert not [path for path in (out / "full").iterdir() if path.name.startswith(".")]
    for two in ends:
        assert "got 0 in process 0 and 1 in process 1" in two["differs"]


def test_the_first_process_alone_writes(ends: list[dict[str, Any]]) -> None:
    first, second = ({Path(path).name for path in two["written"]} for two in ends)
    assert "log.jsonl" in first
    assert any("run.yaml" in name for name in first)
    assert second == set()


def test_what_wants_one_process_says_so(ends: list[dict[str, Any]]) -> None:
    for two in ends:
        for setting in (next(iter(one)) for one in ALONE):
            assert re.match(f"NotImplementedError: {setting}.*got 2", two[f"refused {setting}"])


def test_every_row_is_in_one_process(ends: list[dict[str, Any]]) -> None:
    assert [two["dealt"] for two in ends] == [[0, 2, 4], [1, 3]]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
