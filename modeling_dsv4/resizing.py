# SPDX-License-Identifier: Apache-2.0
"""`resize_token_embeddings`: what a vocabulary of another size means for tables by token id.

| table | more ids | fewer ids |
|---|---|---|
| embedding, lm_head, a draft's Markov head | new rows, as transformers fills them | rows dropped |
| experts by token id (hash layers) | refused: nobody knows the experts of a new id | rows dropped |
| Engram token map | refused: a compressed id more would move every row of the tables | see below |

Fewer ids are refused where a special id would be lost, or where the shorter token map would no
longer name every compressed id, of which the hash is a function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from .draft import MarkovHead
from .engram_hash import DEAD, EngramHash
from .moe import Dsv4Router
from .storage import FrozenStorage

if TYPE_CHECKING:
    from .modeling_dsv4 import Dsv4PreTrainedModel

_SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "image_token_id",
    "engram_pad_token_id",
    "dspark_noise_token_id",
)


def resize_vocabulary(
    model: Dsv4PreTrainedModel,
    size: int | None,
    multiple: int | None = None,
    mean_resizing: bool = True,
) -> nn.Embedding:
    """Resize every table by token id to `size`, rounded up to a multiple; nothing on an error.

    Raises:
        ValueError: see the table above; packed or offloaded embeddings.
    """
    old = model.config.vocab_size
    target = old if size is None else size
    if multiple:
        target = -(-target // multiple) * multiple
    if target != old:
        _check(model, target)
    table = PreTrainedModel.resize_token_embeddings(model, size, multiple, mean_resizing)
    if target == old:
        return table
    for module in model.modules():
        if isinstance(module, MarkovHead):
            module.embed = model._get_resized_embeddings(
                module.embed, target, mean_resizing=mean_resizing
            )
            module.head = model._get_resized_lm_head(
                module.head, target, mean_resizing=mean_resizing
            )
        elif isinstance(module, Dsv4Router) and module.hashed:
            module.tid2eid = module.tid2eid[:target].clone()
        elif isinstance(module, EngramHash):
            module.token_map = module.token_map[:target].clone()
    return table


def _check(model: Dsv4PreTrainedModel, target: int) -> None:
    config, old = model.config, model.config.vocab_size
    by_id = [
        name
        for name, there in (
            ("experts chosen by token id", config.num_hash_layers),
            ("memory looked up by token id", config.engram_layer_ids),
        )
        if there
    ]
    if target > old and by_id:
        raise ValueError(
            f"resize_token_embeddings: wanted at most the {old} ids this model was trained with, "
            f"got {target}: it has {' and '.join(by_id)}, which a new id would not have. Use ids "
            "of the vocabulary that the tokenizer leaves free"
        )
    held: dict[str, int] = {}
    for name in _SPECIAL_IDS:
        value = getattr(config, name)
        if name != "engram_pad_token_id" or config.engram_layer_ids:
            ids = value if isinstance(value, list) else [value]
            held[name] = max((i for i in ids if i is not None), default=-1)
    lost = {name: i for name, i in held.items() if target <= i < old}
    if lost or target < 1:
        raise ValueError(
            f"resize_token_embeddings: wanted room for the special ids {lost}, got {target} ids"
        )
    for module in model.modules():
        if isinstance(module, EngramHash):
            _check_map(module, target)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(table, "weight", None)
        plain = weight is not None and not weight.is_meta and not isinstance(table, FrozenStorage)
        if table is not None and not plain:
            raise ValueError(
                "resize_token_embeddings: wanted plain embeddings in memory, got "
                f"{type(table).__name__}; load with dequantize=True and without offloading"
            )


def _check_map(hashing: EngramHash, target: int) -> None:
    if bool((hashing.token_map == DEAD).all()):
        return
    kept, count = hashing.token_map[:target], hashing.config.engram_compressed_vocab_size
    if int(kept.unique().numel()) != count:
        raise ValueError(
            f"resize_token_embeddings: wanted a token map that names all {count} compressed ids, "
            f"its first {target} ids name {int(kept.unique().numel())}; the hash depends on all"
        )
