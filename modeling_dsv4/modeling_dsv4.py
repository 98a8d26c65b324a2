# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 and V4.1 as one transformers model: read this file first.

```
ids ── embed ── repeat to N streams ─┐
   ┌─────────────────────────────────┘
   │  per layer:  [engram] ── mHC( attention ) ── mHC( experts )
   └─> collapse (V4: hc_head; V4.1: the last handed `pre`) ── norm ── lm_head (float32)
```

Which mechanisms a model has is written in its config; there is one set of classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from . import hyper_ops, ops
from .blocks import Dsv4DecoderLayer, Dsv4DraftStage, Pass
from .cache import Dsv4Cache
from .configuration_dsv4 import Dsv4Config
from .engram import lookup_rows
from .engram_hash import EngramHash
from .hyper_connection import HyperHead, first_pre
from .initialization import init_weights
from .layers import RMSNorm
from .loading import PretrainedLoading
from .precision import FLOAT32_NAMES
from .rotary import rotation
from .segments import RowState, Segments, find_segments, find_step
from .simulation import set_simulation
from .storage import OpaqueWeights

# Tokens that pass the layers at once where nothing needs all of them (no gradients).
_CHUNK_TOKENS = 8192


class Dsv4PreTrainedModel(PretrainedLoading, PreTrainedModel):
    """Loading, saving and initialisation shared by the Dsv4 classes."""

    config_class = Dsv4Config
    config: Dsv4Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Dsv4DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = set(FLOAT32_NAMES)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)

    def set_engram_token_map(self, token_map: torch.Tensor) -> None:
        """Give the Engram token map: [vocab_size] int64, token id -> compressed id.

        Needed where no tokenizer came with the weights; saved with the model afterwards.
        """
        hashes = [m for m in self.modules() if isinstance(m, EngramHash)]
        if not hashes:
            raise ValueError("set_engram_token_map: this model has no Engram layers")
        for module in hashes:
            module.set_token_map(token_map)


    def set_simulation(self, mode: str) -> None:
        """Round activations and caches as the release does ("official"), or not ("off").

        A run-time switch, not saved; see `simulation.py`.
        """
        set_simulation(self, self.config, mode)

    def set_kernels(self, kernels: str) -> None:
        """Choose what computes: "torch", or "auto", which in this version is the same.

        Raises:
            ValueError: "triton", whose kernels this version does not have, or an unknown name.
        """
        if kernels not in ("auto", "torch"):
            raise ValueError(
                f"kernels: wanted auto or torch, got {kernels!r}; this version has no other"
            )


class Dsv4Model(Dsv4PreTrainedModel):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.engram_hash = EngramHash(config) if config.engram_layer_ids else None
        self.layers = nn.ModuleList(
            Dsv4DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.hc_head = None if config.hc_single_pass else HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Dsv4Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: object,
    ) -> MoeModelOutputWithPast:
        """Run the backbone.

        Args:
            input_ids: [B, S]. Wanted beside `inputs_embeds` too, where layers route or look up by
                token id.
            attention_mask: [B, past + S], 0 on pads, on either side.
            position_ids: [B, S]; a restart begins a new document in the row.
            past_key_values: a `Dsv4Cache`.
            inputs_embeds: [B, S, D].
            token_types: [B, S], -1 on text, >= 0 on image spans.
            use_cache: return a cache (default: the config's, off in training).
            output_hidden_states: also return the streams [B, S, N, D] entering each layer, and
                those leaving the last.
            output_router_logits: also return [B * S, E] per layer.
            seq_idx: [B, S] document numbers of packed rows.
            cu_seq_lens_q: [documents + 1] borders of one packed row.
            kwargs: other keys of transformers' collators; ignored.

        Raises:
            ValueError: no ids and no embeddings, images, masks of four dimensions.
        """
        _refuse_images(kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        x = inputs_embeds if inputs_embeds is not None else input_ids
        if x is None:
            raise ValueError("wanted input_ids or inputs_embeds, got neither")
        cache = self._open_cache(past_key_values, use_cache)
        batch, columns = x.shape[:2]
        state = cache.begin(batch, x.device, columns) if cache else RowState.empty(batch, x.device)
        if cache and cache.is_static and columns == 1:
            # Numbers of documents have nothing to say about one column.
            segments = find_step(state, attention_mask, position_ids)
        else:
            segments = find_segments(
                (batch, columns),
                state,
                attention_mask=attention_mask,
                position_ids=position_ids,
                seq_idx=seq_idx,
                cu_seq_lens=cu_seq_lens_q,
            )
        keeps_all = output_hidden_states or output_router_logits or torch.is_grad_enabled()
        step = max(_CHUNK_TOKENS // batch, 1)
        if columns > step and not keeps_all:
            hidden = self._forward_in_chunks(
                step, segments, cache, (input_ids, inputs_embeds, token_types, attention_mask)
            )
            return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        ids = None if input_ids is None else segments.pick(input_ids)
        types = None if token_types is None else segments.pick(token_types)
        embeds = self.embed_tokens(ids) if inputs_embeds is None else segments.pick(inputs_embeds)
        told = self._tell(segments, ids, types, cache)
        if cache:
            cache.open()
        hidden, states, routers = self._run(
            embeds, told, cache, bool(output_hidden_states), bool(output_router_logits)
        )
        if cache:
            cache.advance(segments, columns)
        return MoeModelOutputWithPast(
            last_hidden_state=segments.restore(hidden, columns),
            past_key_values=cache,
            hidden_states=tuple(segments.restore(h, columns) for h in states) or None,
            router_logits=tuple(
                segments.restore(r.unflatten(0, hidden.shape[:2]), columns).flatten(0, 1)
                for r in routers
            )
            or None,
        )

    def _forward_in_chunks(
        self,
        step: int,
        segments: Segments,
        cache: Dsv4Cache | None,
        inputs: tuple[torch.Tensor | None, ...],
    ) -> torch.Tensor:
        """Long inputs without gradients, `step` columns at a time: the same result [B, S, D].

        What a layer holds while it works is then bounded by the chunk, not by the context.
        """
        ids, embeds, types, mask = inputs
        columns = next(x.shape[1] for x in (ids, embeds) if x is not None)
        cache = cache or Dsv4Cache(self.config)
        cache.begin(segments.row.shape[0], segments.row.device)
        # Documents of the whole input as restarts at 0, which a chunk's border cannot hide.
        continues = segments.start == segments.state.start[:, None]
        places = torch.where(continues, segments.position, segments.local)
        places = segments.restore(places, columns)
        mask = None if mask is None else mask[:, -columns:]
        hidden = []
        for at in range(0, columns, step):
            part = slice(at, at + step)
            out = self(
                input_ids=None if ids is None else ids[:, part],
                inputs_embeds=None if embeds is None else embeds[:, part],
                token_types=None if types is None else types[:, part],
                attention_mask=None if mask is None else mask[:, part],
                position_ids=places[:, part],
                past_key_values=cache,
                use_cache=True,
            )
            hidden.append(out.last_hidden_state)
        return torch.cat(hidden, dim=1)

    def _open_cache(
        self, past_key_values: Dsv4Cache | None, use_cache: bool | None
    ) -> Dsv4Cache | None:
        # Recomputing a layer would write its cache twice.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None:
            return Dsv4Cache(self.config) if use_cache else None
        if not isinstance(past_key_values, Dsv4Cache):
            raise ValueError(
                f"past_key_values: wanted a Dsv4Cache, got {type(past_key_values).__name__}; make "
                "one with Dsv4Cache(model.config), or leave it out"
            )
        return past_key_values

    def _tell(
        self,
        segments: Segments,
        ids: torch.Tensor | None,
        types: torch.Tensor | None,
        cache: Dsv4Cache | None,
    ) -> Pass:
        """Gather what all layers share: rotations, and the Engram rows of every token."""
        turns = {kind: rotation(segments.position, self.config, kind) for kind in (False, True)}
        told = Pass(segments, turns, ids, types)
        if self.engram_hash is not None:
            if ids is None:
                raise ValueError(
                    "Engram looks memory up by token id: wanted `input_ids` beside "
                    "`inputs_embeds`, got none; pass both"
                )
            told.live = None if types is None else types < 0
            ring = None if cache is None else cache.ngrams
            told.engram_rows = lookup_rows(self.engram_hash, ids, told.live, segments, ring)
        return told

    def _run(
        self,
        embeds: torch.Tensor,
        told: Pass,
        cache: Dsv4Cache | None,
        keep_states: bool,
        keep_routers: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        streams = embeds[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        pre = first_pre(streams)  # two-pass layers do not look at it
        shared: tuple[torch.Tensor | None, ...] = (None,) * 4
        states, routers = [], []
        for i, layer in enumerate(self.layers):
            if keep_states:
                states.append(streams)
            store = None if cache is None else cache.layers[i]
            streams, pre, *shared, logits = layer(streams, pre, *shared, told, store)
            if keep_routers:
                routers.append(logits)
        if keep_states:
            states.append(streams)
        hidden = self.hc_head(streams) if self.hc_head else hyper_ops.collapse(streams, pre)
        return self.norm(hidden), states, routers


class Float32Head(nn.Linear):
    """`lm_head`: input and weight in float32, whatever the model's dtype; logits are float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return F.linear(x.to(self.weight.dtype), self.weight)
        x = ops.fp32(x)
        # In blocks of rows: a float32 copy of the whole head would take 2 GB at 129,280 x 4,096.
        return torch.cat([F.linear(x, rows.float()) for rows in self.weight.split(16384)], dim=-1)


class Dsv4ForCausalLM(Dsv4PreTrainedModel, GenerationMixin):
    """The backbone with its language-model head, and the weights of draft heads and vision."""

    def __init__(self, config: Dsv4Config) -> None:
        super().__init__(config)
        self.model = Dsv4Model(config)
        self.lm_head = Float32Head(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(Dsv4DraftStage(config, i) for i in range(config.num_draft_layers))
        self.vision = OpaqueWeights.for_config(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Dsv4Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: object,
    ) -> MoeCausalLMOutputWithPast:
        """Predict the next token; arguments as `Dsv4Model.forward`.

        Args:
            labels: [B, S], -100 where nothing is to be learned; shifted inside.
            logits_to_keep: only the last so many positions (0 = all), or these indices.

        Returns:
            logits [B, kept, V] float32, the loss where labels are given, the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_types=token_types,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            more = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        token_types: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does it; `token_types` grow with the text, all of which is text."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if token_types is not None:
            written = input_ids.shape[1] - token_types.shape[1]
            fed = inputs.get("inputs_embeds", inputs["input_ids"])
            types = F.pad(token_types, (0, written), value=-1)
            inputs["token_types"] = types[:, -fed.shape[1] :]
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make the model's own cache where `generate` would make a transformers one."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: this model has its own cache; wanted dynamic (the "
                "default) or static, or past_key_values=Dsv4Cache(config)"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None and kind == "static":
            raise ValueError(
                "got cache_implementation='static' and past_key_values; pass one of the two, such "
                "as past_key_values=Dsv4Cache(config, max_length=...)"
            )
        if given is None and generation_config.use_cache:
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs["past_key_values"] = Dsv4Cache(
                self.config, max_length=length if kind == "static" else None
            )


def _refuse_images(kwargs: dict[str, object]) -> None:
    names = ("pixel_values", "images", "image_grid_thw")
    images = [name for name in names if kwargs.get(name) is not None]
    if images:
        raise ValueError(
            f"got {', '.join(images)}: the vision tower is carried as weights but not run; give "
            "`forward` image spans as `inputs_embeds` with `input_ids` and `token_types`"
        )
