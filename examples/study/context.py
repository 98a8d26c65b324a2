# SPDX-License-Identifier: Apache-2.0
"""What a kind of attention does with a long context: loss by place, recall, operations, bytes."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from nano.data import Corpus
from torch.utils.flop_counter import FlopCounterMode

from modeling_dsv4 import Dsv4ForCausalLM

from .facts import CHANCE, PROBES, Words, recall
from .memory import token_losses

LENGTH = 8192
# Places double: the first 128 tokens, the next 128, the next 256, ...
EDGES = [0, *(128 << i for i in range(7))]

# Rows of each length that are asked.
_MOST = 40


@torch.no_grad()
def measure_context(model: Dsv4ForCausalLM, corpus: Corpus, seed: int = 0) -> dict[str, Any]:
    """Loss by place in rows of 8,192 held-out tokens, recall of facts in them, and their cost.

    Operations are counted while a row runs, without fused kernels, whose operations the counter
    does not see; bytes are those of the cache that the row leaves behind. Both are the same for any
    weights. Every model gets the same questions.
    """
    model.set_kernels("torch")
    found: dict[str, Any] = {}
    rows = {name: d.held_out.reshape(-1, LENGTH) for name, d in corpus.domains.items()}
    for name, some in rows.items():
        losses = token_losses(model, some[:3], batch=1)
        found[f"{name}_by_place"] = [
            float(losses[:, start:stop].mean()) for start, stop in pairwise(EDGES)
        ]
    every = np.concatenate(list(rows.values()))
    words = Words.of(corpus.tokenizer)
    found["recall"] = {
        str(size): recall(model, every.reshape(-1, size)[:_MOST], words, seed) for size in PROBES
    }
    found["chance"] = CHANCE
    found |= measure_cost(model, every[:1])
    model.set_kernels("auto")
    return found


def measure_cost(model: Dsv4ForCausalLM, row: np.ndarray) -> dict[str, int]:
    """What a row [1, s] costs.

    Returns:
        `flops`: operations of the layers at all its tokens; `prefill_flops`: those that a prompt
        needs before its first answer, when layers may leave out tokens that nothing reads;
        `cache_bytes`: of the cache that it leaves behind.
    """
    ids = torch.from_numpy(row.astype(np.int64))
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        with FlopCounterMode(display=False) as every:
            model.model(input_ids=ids, use_cache=False)
        with FlopCounterMode(display=False) as prompt:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finally:
        model.config._attn_implementation = implementation
    return {
        "flops": every.get_total_flops(),
        "prefill_flops": prompt.get_total_flops(),
        "cache_bytes": out.past_key_values.memory_bytes(),
    }
