# SPDX-License-Identifier: Apache-2.0
"""Training the nano is `finetune.pretraining` on its corpus; here is what surrounds it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.pretraining import pretrain
from finetune.pretraining_settings import Step
from modeling_dsv4 import Dsv4Config, Dsv4ForCausalLM

from .data import Corpus
from .recipe import Recipe, new_model


def train(
    corpus: Corpus, config: Dsv4Config, recipe: Recipe, output: Path | None = None, **how: Any
) -> tuple[Dsv4ForCausalLM, list[Step]]:
    """Train from first weights, or go on with what is in `output`; `how` goes to `pretrain`."""
    model = new_model(config, corpus.tokenizer, recipe)
    return model, pretrain(model, corpus.train, recipe, output, resume=True, **how)


@torch.no_grad()
def held_out_loss(model: Dsv4ForCausalLM, rows: np.ndarray, batch: int = 8) -> float:
    """Mean cross entropy of rows [r, 512] in nats per predicted token."""
    model.eval()
    total = 0.0
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch):
        total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    return total / len(rows)
