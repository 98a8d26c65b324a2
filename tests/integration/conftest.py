# SPDX-License-Identifier: Apache-2.0
"""What the tests of whole runs share: the program in this process, and a small model's parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRIVATE = Path(__file__).parents[2] / "examples" / "data" / "private.jsonl"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, standard output, standard error."""
    from finetune.cli import app, run

    def invoke(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(lambda: app([str(word) for word in words]))
        out = capsys.readouterr()
        return code, out.out, out.err

    return invoke


@pytest.fixture(scope="session")
def private_tokenizer(train_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """`private_tokenizer(vocab_size)`: trained on the shipped data."""
    return lambda vocab_size=320: train_tokenizer([PRIVATE.read_text(encoding="utf-8")], vocab_size)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Any]:
    """`small_config(field=value, ...)`: a V4 of two layers that learns within a few steps."""
    from modeling_dsv4 import Dsv4Config

    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hash_layers": 0,
        "sliding_window": 8,
        "compress_ratios": [0, 4],
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "initializer_range": 0.1,
        "yarn": None,
        "max_position_embeddings": 512,
        "pad_token_id": 2,
    }
    return lambda **changes: Dsv4Config(**values | changes)
