# SPDX-License-Identifier: Apache-2.0
"""A converted V4 model as one GGUF file, by the tensor names that llama.cpp's converter publishes.

The names and keys are those of `conversion/deepseek.py` for the architecture `deepseek4`, which the
released `gguf` package does not list yet; docs/quantization.md says what of it was checked. Nothing
is rounded: FP4 experts become MXFP4 blocks with the same codes and scales, FP8 becomes BF16.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from modeling_dsv4.configuration_dsv4 import Dsv4Config
from modeling_dsv4.formats import FP4_GROUP, fp8_block_format
from modeling_dsv4.weight_map import Piece

from .export import Converted

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[str, int], None]
ARCHITECTURE = "deepseek4"
_GLOBAL = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.experts.0.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.0.w3.weight": "ffn_up_exps.weight",
    "ffn.experts.0.w2.weight": "ffn_down_exps.weight",
}
# llama.cpp keeps the router in float32, whatever it was in.
_WIDE = ("ffn_gate_inp.weight",)


def gguf_name(official: str) -> str | None:
    """Name of a tensor in GGUF; None for drafts and vision, which are left out.

    Routed experts are one tensor there, named by expert 0.
    """
    if official in _GLOBAL:
        return _GLOBAL[official]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", official)
    if match is None:
        return None
    return f"blk.{match[1]}.{_LAYER[match[2]]}"


def to_mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rearrange FP4 [..., K / 2] uint8 and E8M0 [..., K / 32] into blocks [..., K / 32, 17] uint8.

    A block is its scale's byte, then 16 bytes: element i in the low half, element i + 16 in the
    high half. Ours have elements 2 i and 2 i + 1 in a byte.
    """
    pairs = codes.view(torch.uint8).unflatten(-1, (-1, FP4_GROUP // 2))
    values = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    low, high = values.chunk(2, dim=-1)
    return torch.cat((scale.view(torch.uint8)[..., None], low | (high << 4)), dim=-1)


@dataclass(frozen=True)
class Streamed:
    """What the writer takes for an array: rows that are made when they are written."""

    nbytes: int
    pieces: Callable[[], Iterator["np.ndarray"]]

    def tofile(self, file: BinaryIO) -> None:
        """Write all rows."""
        for piece in self.pieces():
            piece.tofile(file)


def export_gguf(
    directory: str | Path, output: str | Path, progress: Progress | None = None
) -> Path:
    """Write a converted V4 model as a GGUF file, without its tokenizer, drafts and vision.

    Args:
        directory: what `convert` wrote with recipe `fp4`.
        output: new file.
        progress: called with (tensor, bytes written).

    Raises:
        ValueError: V4.1, experts in another format than fp4, a file that exists.
        ImportError: without the package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("wanted the package gguf; pip install 'dsv4[gguf]'") from error
    model, output = Converted(directory), Path(output)
    _check(model, output)
    beside = output.with_name(output.name + ".partial")
    writer: Any = gguf.GGUFWriter(beside, ARCHITECTURE)
    for key, value in describe(model.config).items():
        _add(writer, key, value)
    tensors = list(_tensors(model, gguf))
    for name, shape, dtype, data in tensors:
        kind = gguf.GGMLQuantizationType(dtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_shape = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(name, bytes_shape, _uint8(), data.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, _, data in tensors:
            writer.write_tensor_data(data)
            if progress is not None:
                progress(name, data.nbytes)
        writer.close()
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(output)
    return output


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _check(model: Converted, output: Path) -> None:
    config = model.config
    if config.hc_single_pass or config.engram_layer_ids or config.index_key != "compressor":
        raise ValueError(
            f"{model.directory}: wanted a V4 model, got V4.1; llama.cpp publishes no settled names "
            "for its tensors. Export --format official instead"
        )
    if model.formats() != {"fp4"}:
        raise ValueError(
            f"{model.directory}: wanted experts in fp4, which GGUF knows as MXFP4, got "
            f"{sorted(model.formats())}; GGUF has no such types. Convert by recipe fp4"
        )
    if output.exists():
        raise ValueError(f"{output}: wanted a new file, got one that exists")


def describe(config: Dsv4Config) -> dict[str, Any]:
    """Return {key without the architecture's prefix: value} of the file's header."""
    layers = config.num_hidden_layers
    found: dict[str, Any] = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.output_lora_rank": config.o_lora_rank,
        "attention.output_group_count": config.o_groups,
        "attention.compress_ratios": list(config.compress_ratios),
        "attention.compress_rope_freq_base": float(config.compress_rope_theta),
        "attention.sliding_window": config.sliding_window,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "hash_layer_count": config.num_hash_layers,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(config.hc_eps),
    }
    if config.swiglu_limit:
        found["swiglu_clamp_exp"] = [float(config.swiglu_limit)] * layers
    if config.yarn:
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.yarn["factor"]),
            "rope.scaling.original_context_length": int(
                config.yarn["original_max_position_embeddings"]
            ),
            "rope.scaling.yarn_beta_fast": float(config.yarn["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(config.yarn["beta_slow"]),
        }
    return found


def _add(writer: Any, key: str, value: Any) -> None:
    name = f"{ARCHITECTURE}.{key}"
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _tensors(model: Converted, gguf: Any) -> Iterator[tuple[str, tuple[int, ...], int, Streamed]]:
    """Yield (name, shape, type, data) of every tensor that is written."""
    types = gguf.GGMLQuantizationType
    scales = {piece.ours: piece for piece in model.pieces() if piece.is_scale}
    for piece in model.pieces():
        if piece.is_scale or piece.expert not in (None, 0):
            continue
        name = gguf_name(piece.official)
        if name is None:
            continue
        if piece.expert == 0:
            module, _, projection = piece.ours.rpartition(".")
            count = model.pack(module).num_experts
            rows, half = piece.shape
            shape = (count, rows, 2 * half)
            nbytes = count * rows * (2 * half // FP4_GROUP) * 17
            data = Streamed(nbytes, _experts(model, module, projection, piece.part))
            yield name, shape, types.MXFP4, data
            continue
        dtype = _dense_type(piece, name)
        size = torch.Size(piece.shape).numel() * dtype.itemsize
        kind = {torch.bfloat16: types.BF16, torch.float32: types.F32, torch.int32: types.I32}[dtype]
        yield name, piece.shape, kind, Streamed(size, _dense(model, piece, dtype, scales))


def _dense_type(piece: Piece, name: str) -> torch.dtype:
    if piece.kind == "i64":
        return torch.int32
    wide = piece.kind == "f32" or len(piece.shape) < 2 or name.endswith(_WIDE)
    return torch.float32 if wide else torch.bfloat16


def _experts(
    model: Converted, module: str, projection: str, part: int
) -> Callable[[], Iterator["np.ndarray"]]:
    def pieces() -> Iterator["np.ndarray"]:
        for e in range(model.pack(module).num_experts):
            parts = model.expert(module, e)[projection]
            if projection == "gate_up_proj":
                parts = {suffix: tensor[part] for suffix, tensor in parts.items()}
            yield to_mxfp4(parts[""], parts["_scale"]).numpy()

    return pieces


def _dense(
    model: Converted, piece: Piece, dtype: torch.dtype, scales: Mapping[str, Piece]
) -> Callable[[], Iterator["np.ndarray"]]:
    def pieces() -> Iterator["np.ndarray"]:
        tensor = model.dense(piece)
        if piece.kind == "fp8":
            (block, _) = model.config.quantization_config["weight_block_size"]
            parts = {"": tensor, "_scale": model.dense(scales[f"{piece.ours}_scale_inv"])}
            tensor = fp8_block_format(block).unpack(parts, torch.float32)
        converted = tensor.to(dtype)
        if not torch.equal(converted.to(torch.float64), tensor.to(torch.float64)):
            raise ValueError(f"{piece.ours}: does not fit {dtype} without rounding")
        yield converted.contiguous().flatten().view(torch.uint8).numpy()

    return pieces
