# SPDX-License-Identifier: Apache-2.0
"""What the nano's draft head is worth: guesses accepted by place, tokens a pass of the backbone.

Drafting is exact, so that only its speed is measured: every text is the backbone's own.
"""

import hashlib
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano.drafts import measure

from modeling_dsv4 import Dsv4ForCausalLM

PROMPT, NEW, ROWS, PARTS = 128, 48, 80, 5


def measure_drafting(folder: Path, texts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Continue held-out prompts with every number of guesses, greedily and by sampling.

    The 80 prompts of a domain are decoded in five parts, whose counts stand apart in the log, so
    that tables can say how far prompts differ.

    Args:
        folder: of a model with a DSpark head.
        texts: {domain: held-out rows [>= 80, >= 128]}.

    Returns:
        runs: guesses checked and accepted by place, for each domain, way of choosing, number of
        guesses and part, and once more without the head's Markov part; same: greedy texts equal to
        those without guesses. behind_text: how often guesses behind true text are what the
        backbone prefers there, and how sure the head was.
    """
    model = Dsv4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs: list[dict[str, Any]] = []
    most = model.config.dspark_block_size
    for domain, rows in texts.items():
        prompts = torch.from_numpy(rows[:ROWS, :PROMPT].astype(np.int64)).split(ROWS // PARTS)
        for number, ids in enumerate(prompts):
            plain = decode(model, ids, None, sample=False)[0]
            for sample, guesses, markov in product(
                (False, True), range(1, most + 1), (True, False)
            ):
                if not markov and guesses < most:
                    continue
                torch.manual_seed(number)
                with nullcontext() if markov else without_markov(model):
                    text, counts = decode(model, ids, guesses, sample)
                runs.append({"domain": domain, "sample": sample, "guesses": guesses,
                             "markov": markov, "part": number, **counts})  # fmt: skip
                if not sample:
                    runs[-1]["same"] = int((text == plain).all(1).sum())
    head = folder / "model-00002-of-00002.safetensors"
    return {
        "prompts": ROWS, "prompt_tokens": PROMPT, "new_tokens": NEW,
        "torch": torch.__version__, "machine": platform.machine(),
        "head_sha256": hashlib.sha256(head.read_bytes()).hexdigest(),
        "behind_text": measure(model, texts, ROWS)["held_out"], "runs": runs,
    }  # fmt: skip


@contextmanager
def without_markov(model: Dsv4ForCausalLM) -> Iterator[None]:
    """Guess every token of a block without looking at the one before it."""
    head = model.mtp.stages[-1].markov_head.head
    handle = head.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def decode(
    model: Dsv4ForCausalLM, ids: torch.Tensor, guesses: int | None, sample: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Texts [B, prompt + new], and how many guesses were checked and accepted, by place.

    Near the end of the longest row all rows of a batch check fewer guesses: a place has its own
    number of tries.
    """
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "draft": guesses}
    settings |= {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    if guesses is None:
        return out.sequences, {}
    return out.sequences, {"made": out.drafting.made, "right": out.drafting.right}


def by_place(runs: list[dict[str, Any]]) -> tuple[list[float], float]:
    """How often each guess was accepted if those before it were, and tokens a pass.

    Args:
        runs: of one part, or of several that are taken together.
    """
    places = max(len(r["made"]) for r in runs)
    made, right = (
        [sum(r[key][i] for r in runs if i < len(r[key])) for i in range(places)]
        for key in ("made", "right")
    )
    reached = [1.0, *(b / a for a, b in zip(made, right, strict=True))]
    steps = [b / a if a else math.nan for a, b in pairwise(reached)]
    return steps, sum(reached)
