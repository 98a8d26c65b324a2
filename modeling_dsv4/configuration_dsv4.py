# SPDX-License-Identifier: Apache-2.0
"""One flat configuration for both released families, DeepSeek-V4 and DeepSeek-V4.1.

Every mechanism is a field of its own (`hc_single_pass`, `index_key`, `compress_ratios`, ...), so a
variant is a set of values, never a class. A release's own config.json is translated by
`translate_config` and kept verbatim in `official_config`.
"""

from bisect import bisect_right
from dataclasses import field, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .translate_config import is_foreign_config, translate_config
from .validate_config import check_config

# What transformers itself puts into any config.json besides the fields of the base class.
_COMMON_KEYS = frozenset(
    "_name_or_path _commit_hash _attn_implementation_internal _experts_implementation_internal "
    "_output_attentions add_cross_attention attn_implementation auto_map "
    "cross_attention_hidden_size experts_implementation finetuning_task is_decoder model_type "
    "name_or_path num_labels output_attentions prefix pruned_heads quantization_config "
    "task_specific_params tie_encoder_decoder tokenizer_class torch_dtype torchscript "
    "transformers_weights use_bfloat16".split()
)
_FLASH_YARN = {
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}


class Dsv4Config(PreTrainedConfig):
    """Architecture of a Dsv4 model; the defaults are DeepSeek-V4-Flash without its draft block.

    Fields keep the release's names where it has them. Those that need a word:

    Args:
        compress_ratios: tokens per compressed entry, one per layer; 0 means window only.
        compressor_overlap_ratio: the ratio whose windows overlap by one (4 in V4; None in V4.1).
        compressor_position_bias: whether gated compressors add a learned bias per slot (V4: yes).
        kv_source_layer_ids: layers that compress KV themselves; the others read the last one below.
        index_source_layer_ids: layers that score and select; the others reuse the last selection.
            A compressed layer with no index source above its KV source attends to every entry.
        index_key: "compressor", an own small compressor per index source (V4), or "latent", a
            projection of the KV entry (V4.1).
        candidate_source_layer_id: index source whose best blocks bound the later sources' search.
        yarn: YaRN parameters of the compressed layers, or None. Not called `rope_scaling`, which
            transformers checks against its own vocabulary.
        hc_single_pass: whether the pre-weights of a site come from the site before (V4.1).
        router_weight_eps: added to the sum that normalises routing weights.
        router_bias_vl: whether the router has a second bias for image tokens.
        engram_num_embeddings: rows of each Engram table: the sum of its generated primes. Another
            value is replaced by that sum; a checkpoint of another size is then refused.
        draft_kind: None, "mtp" (one block) or "dspark" (parallel stages); see `draft.py`.
        dspark_reads_outputs: whether the head reads the streams that leave its target layers (V4),
            or those that enter them (V4.1); follows from `hc_single_pass` where not given.
        vision_config: the vision tower's shapes; its weights are only carried along.
        carries_vision: whether the weights hold that tower; set when a checkpoint is read.
        official_config: the config.json this one was translated from, for writing it back.
        quantization_config: storage of the release (`quant_method` "dsv4_release") or of a
            quantizer; absent when every weight is plain.
    """

    model_type = "dsv4"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
    # What transformers splits over processes; docs/parallel.md says why the rest is not split.
    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    hidden_act: str = "silu"
    swiglu_limit: float | None = 10.0
    rms_norm_eps: float = 1e-6
    q_head_norm: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: dict[str, Any] | None = field(default_factory=lambda: dict(_FLASH_YARN))

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    router_weight_eps: float = 0.0
    num_hash_layers: int = 3
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    router_bias_vl: bool = False

    sliding_window: int = 128
    # These three follow from the others where they are not given.
    compress_ratios: list[int] = field(default=None)  # type: ignore[arg-type]
    compressor_overlap_ratio: int | None = 4
    compressor_position_bias: bool = True
    kv_source_layer_ids: list[int] = field(default=None)  # type: ignore[arg-type]
    index_source_layer_ids: list[int] = field(default=None)  # type: ignore[arg-type]
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    index_key: str = "compressor"
    index_hadamard: bool = True
    candidate_source_layer_id: int | None = None
    candidate_topk_blocks: int = 2048
    candidate_block_size: int = 8

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    hc_single_pass: bool = False

    engram_layer_ids: list[int] = field(default_factory=list)
    engram_num_embeddings: list[int] = field(default_factory=list)
    engram_max_ngram_size: int = 4
    engram_vocab_size: int = 16000000
    engram_n_heads: int = 8
    engram_head_dim: int = 256
    engram_pad_token_id: int = 2
    engram_compressed_vocab_size: int = 99092

    draft_kind: str | None = None
    num_draft_layers: int = 0
    dspark_block_size: int | None = None
    dspark_markov_rank: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: list[int] | None = None
    dspark_reads_outputs: bool = None  # type: ignore[assignment]
    dspark_n_routed_experts: int | None = None
    dspark_num_experts_per_tok: int | None = None

    vision_config: dict[str, Any] | None = None
    carries_vision: bool = False
    image_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None
    official_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unknown(kwargs)
        # `quantization_config = None` would make transformers believe the weights are quantized.
        if kwargs.get("quantization_config", 0) is None:
            del kwargs["quantization_config"]
        # The class says its model type; as an instance attribute it would go stale.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        self._fill_defaults()
        check_config(self)
        self._fix_engram_rows()

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = sorted(set(kwargs) - _known_beside_fields())
        if unknown:
            raise ValueError(
                f"unknown configuration fields {unknown}: {type(self).__name__} knows "
                f"{sorted(f.name for f in fields(self))}. A release's own config.json is "
                "translated by Dsv4Config.from_pretrained(directory)."
            )

    def _fill_defaults(self) -> None:
        given = vars(self)
        if given["compress_ratios"] is None:
            pattern = [0, 0] + [4 if i % 2 == 0 else 128 for i in range(2, self.num_hidden_layers)]
            self.compress_ratios = pattern[: self.num_hidden_layers]
            self.num_hash_layers = min(self.num_hash_layers, self.num_hidden_layers)
        if given["dspark_reads_outputs"] is None:
            self.dspark_reads_outputs = not self.hc_single_pass
        compressed = [i for i, ratio in enumerate(self.compress_ratios) if ratio]
        if given["kv_source_layer_ids"] is None:
            self.kv_source_layer_ids = compressed
        if given["index_source_layer_ids"] is None:
            if self.index_key == "latent":
                self.index_source_layer_ids = list(self.kv_source_layer_ids)
            else:
                overlap = self.compressor_overlap_ratio
                ratios = self.compress_ratios
                self.index_source_layer_ids = [i for i in compressed if ratios[i] == overlap]

    def _fix_engram_rows(self) -> None:
        if not self.engram_layer_ids:
            return
        tables = {"layers.*.engram.embed": "embedding_rowwise"}
        self.base_model_tp_plan = {**type(self).base_model_tp_plan, **tables}
        # Imported here: only configurations with Engram pay for it.
        from .engram_hash import table_primes

        primes = table_primes(
            self.engram_layer_ids,
            self.engram_vocab_size,
            self.engram_max_ngram_size,
            self.engram_n_heads,
        )
        self.engram_num_embeddings = [int(rows) for rows in primes.flatten(1).sum(1)]

    def kv_source(self, layer_idx: int) -> int | None:
        """Return the layer whose compressed KV this layer reads, None for window-only layers."""
        if not self.compress_ratios[layer_idx]:
            return None
        return self.kv_source_layer_ids[bisect_right(self.kv_source_layer_ids, layer_idx) - 1]

    def index_source(self, layer_idx: int) -> int | None:
        """Return the layer whose selection this layer uses, None if it attends to every entry."""
        source = self.kv_source(layer_idx)
        below = bisect_right(self.index_source_layer_ids, layer_idx)
        if source is None or below == 0 or self.index_source_layer_ids[below - 1] < source:
            return None
        return self.index_source_layer_ids[below - 1]

    def set_draft_layers(self, count: int) -> None:
        """Say how many draft stages the weights hold, whatever the configuration file claimed."""
        self.num_draft_layers = count
        dspark = self.dspark_block_size is not None
        self.draft_kind = ("dspark" if dspark else "mtp") if count else None
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; the subclasses for foreign types say "dsv4" as well.

        Attributes that others hung on the object are left out: reading refuses unknown fields, and
        what is written must load.
        """
        known = {f.name for f in fields(self)} | _known_beside_fields()
        kept = {name: value for name, value in super().to_dict().items() if name in known}
        return {**kept, "model_type": Dsv4Config.model_type}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json, translated if it is a release's, under this class's model type."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        return _own_fields(config, cls.model_type), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a dictionary of own or of a release's fields."""
        return super().from_dict(_own_fields(config_dict, cls.model_type), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> "Dsv4Config":
        """Build from a config.json of own or of a release's fields."""
        return cls(**_own_fields(cls._dict_from_json_file(json_file), cls.model_type))


def _known_beside_fields() -> set[str]:
    return {*_COMMON_KEYS, *GenerationConfig._get_default_generation_params()}


def _own_fields(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    if is_foreign_config(config):
        config = translate_config(config)
    if config.get("model_type", model_type) in {"dsv4", "deepseek_v4", "deepseek_v41"}:
        config = {**config, "model_type": model_type}
    return config


class DeepseekV41Config(Dsv4Config):
    """`Dsv4Config` under the model type of DeepSeek-V4.1's config.json, for the Auto classes."""

    model_type = "deepseek_v41"


class DeepseekV4Config(Dsv4Config):
    """`Dsv4Config` under the model type of DeepSeek-V4's config.json, for the Auto classes."""

    model_type = "deepseek_v4"


__all__ = ["DeepseekV4Config", "DeepseekV41Config", "Dsv4Config", "translate_config"]
