# SPDX-License-Identifier: Apache-2.0
"""What a kind of attention does with a long context: loss by place, operations, bytes of cache."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from nano.data import Corpus
from torch.utils.flop_counter import FlopCounterMode

from modeling_dsv4 import Dsv4ForCausalLM

from .memory import token_losses

LENGTH = 8192


@torch.no_grad()
def measure_context(model: Dsv4ForCausalLM, corpus: Corpus) -> dict[str, Any]:
    """Loss by place in rows of 8,192 held-out tokens, and what such a row costs.

    Operations are counted while a row runs, on torch's own kernels, so that all of them are seen;
    bytes are those of the cache that the row leaves behind.
    """
    model.set_kernels("torch")
    found: dict[str, Any] = {}
    for name, domain in corpus.domains.items():
        rows = domain.held_out.reshape(-1, LENGTH)[:2]
        losses = token_losses(model, rows, batch=1)
        # Places double: the first 128 tokens, the next 128, the next 256, ...
        edges = [0, *(128 << i for i in range(7))]
        found[f"{name}_by_place"] = [
            float(losses[:, start:stop].mean()) for start, stop in pairwise(edges)
        ]
    ids = torch.from_numpy(
        corpus.domains["prose"].held_out.reshape(-1, LENGTH)[:1].astype(np.int64)
    )
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    found["flops"] = counter.get_total_flops()
    found["cache_bytes"] = out.past_key_values.memory_bytes()
    model.set_kernels("auto")
    return found
