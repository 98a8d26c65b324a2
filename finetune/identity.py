# SPDX-License-Identifier: Apache-2.0
"""Which base model an adapter belongs to.

The identity hashes what no storage format touches: the shape of the model, its norms, its routers
and some rows of its embedding table, rounded to bfloat16. So a model, its quantized copies and its
dequantized ones are the same base, and one that was trained otherwise is another. Merging leaves
all of these as they are: a merged model passes as its base.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MODEL_TYPES = ("dsv4", "deepseek_v41")
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
)
# Relative to the backbone, so that a causal LM and its bare backbone are one model.
_TENSORS = re.compile(
    r"(?:model\.)?((?:layers\.\d+\.(?:input_layernorm|post_attention_layernorm"
    r"|self_attn\.(?:q_a_norm|kv_norm)|mlp\.gate)|norm|embed_tokens)\.weight)"
)
# Rows of the embedding table that count: models with fresh norms differ here, and a few rows show.
_ROWS = 64


def is_ours(model: nn.Module) -> bool:
    """Whether a model is of this family."""
    return getattr(getattr(model, "config", None), "model_type", None) in MODEL_TYPES


def base_identity(model: nn.Module) -> str | None:
    """Identity of a base model, "sha256:..."; None while its weights are on the meta device.

    Args:
        model: without adapters, or with: they are beside the weights that count.
    """
    state = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for name, tensor in state.items() if _TENSORS.fullmatch(name)):
        return None
    return digest_identity(model.config, ((name, tensor.detach) for name, tensor in state.items()))


def digest_identity(config: Any, tensors: Iterable[tuple[str, Callable[[], torch.Tensor]]]) -> str:
    """Identity of a model by its configuration and its tensors, asked for if they count."""
    digest = hashlib.sha256()
    for field in _FIELDS:
        digest.update(f"{field}={getattr(config, field, None)}\n".encode())
    for name, get in sorted(tensors, key=lambda named: named[0]):
        match = _TENSORS.fullmatch(name)
        if match is None:
            continue
        tensor = get()
        digest.update(f"{match[1]} {tuple(tensor.shape)}\n".encode())
        if match[1].startswith("embed_tokens"):
            tensor = tensor[:: max(1, len(tensor) // _ROWS)]
        rounded = tensor.to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
