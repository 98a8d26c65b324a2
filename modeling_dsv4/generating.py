# SPDX-License-Identifier: Apache-2.0
"""What `generate` asks of a model besides its forward pass: inputs of each step, and a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.generation import GenerationConfig, GenerationMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .cache import Dsv4Cache
from .configuration_dsv4 import Dsv4Config
from .drafting import check_settings, decode_with_drafts
from .moe import Dsv4Experts, ExpertsBase
from .step import OneColumn, make_step

if TYPE_CHECKING:
    from .modeling_dsv4 import Dsv4ForCausalLM

# Keywords that number the documents of a packed prompt.
_NUMBERS = ("seq_idx", "cu_seq_lens_q")


class Dsv4Generation(GenerationMixin):
    """transformers' generation with this model's cache."""

    config: Dsv4Config
    model: nn.Module
    lm_head: nn.Module
    _step: OneColumn | None = None

    def set_step(self, mode: str) -> None:
        """Choose how a token into a static cache is computed: "eager", "compiled", "captured".

        "compiled" hands the step to torch.compile, which takes a minute or two for the first and
        the second token and again for a cache of another length; "captured" records it in a CUDA
        graph, in seconds. Both want `Dsv4Cache(config, max_length=...)` or `generate(...,
        cache_implementation="static")`; all other passes run eagerly. A run-time switch, not saved.

        Raises:
            ValueError: an unknown mode, "captured" without a CUDA device, layers on several
                devices, or experts that are packed, on disk or adapted: which of them a token hits
                must be known on the host.
        """
        places = sorted({str(p.device) for p in self.parameters()})
        if mode != "eager" and len(places) > 1:
            raise ValueError(
                f"set_step: {mode!r} wants all layers on one device, got {', '.join(places)}; load "
                'the model onto one of them, or stay with "eager"'
            )
        others = {type(m).__name__ for m in self.modules() if isinstance(m, ExpertsBase)}
        others -= {Dsv4Experts.__name__}
        if mode != "eager" and others:
            raise ValueError(
                f"set_step: {mode!r} wants plain experts, got {', '.join(sorted(others))}; load "
                'the model with dequantize=True where that fits, or stay with "eager"'
            )
        self._step = make_step(mode, self._one_column)

    def _one_column(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Dsv4Cache,
    ) -> torch.Tensor:
        outputs = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        return self.lm_head(outputs.last_hidden_state)

    def _repeat_step(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Dsv4Cache,
    ) -> MoeCausalLMOutputWithPast:
        """One column into a static cache, by what `set_step` chose."""
        assert self._step is not None
        mask, positions = (None if x is None else x[:, -1:] for x in (mask, positions))
        logits = self._step(ids, mask, positions, cache)
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def generate(
        self,
        *args: Any,
        draft: int | str | None = None,
        kv_offload: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`, and with the model's own draft head if asked.

        Args:
            args: as there.
            draft: None decodes a token a pass. "auto" lets the draft head guess, and checks as
                many guesses as are worth their cost, none where drafting does not pay, or where
                the model has no head; when sampling, how many follows from earlier passes alone. A
                number checks that many in every pass. The text is the backbone's in any case; see
                `drafting.py`.
            kv_offload: where the cache's compressed entries lie, "cpu" or a directory; see
                `Dsv4Cache`, whose `offload` it is. The text does not change.
            kwargs: as there.

        Raises:
            ValueError: a number without a draft head, or more than it can guess; `kv_offload`
                without a cache of one's own making that grows.
            NotImplementedError: beams, another helper, or outputs of every step.
        """
        if kv_offload is not None:
            kwargs["kv_offload"] = kv_offload
        # Zero of them is decoding as usual.
        if draft is None or draft == 0 or (draft == "auto" and self.config.draft_kind is None):
            return super().generate(*args, **kwargs)
        if self.config.draft_kind is None:
            raise ValueError(f"draft: wanted a model with a draft head, got none; draft={draft!r}")
        if kwargs.get("assistant_model") is not None:
            raise NotImplementedError("draft together with assistant_model: pass one of the two")
        return super().generate(*args, draft=draft, **kwargs)

    def _sample(
        self, input_ids: torch.Tensor, draft: int | str | None = None, **kwargs: Any
    ) -> Any:
        """The loop of greedy decoding and sampling, with or without a draft head."""
        if draft is None:
            return super()._sample(input_ids, **kwargs)
        return decode_with_drafts(cast("Dsv4ForCausalLM", self), input_ids, draft, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        draft: int | str | None = None,
        kv_offload: str | Path | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does it; embeddings keep their ids, and what is written is text.

        `draft` and `kv_offload` are no inputs: they stand here so that transformers hands them on,
        to `_sample` and to where the cache is made.

        Embeddings are those of the prompt: the first pass reads them, later passes read the ids
        that were chosen. `token_types` grow with the text.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if any(kwargs.get(name) is not None for name in _NUMBERS):
            # Numbers of the prompt's documents; what is written goes on with the last of them.
            if inputs.get("past_key_values") is None:
                raise ValueError(
                    f"generate: {' and '.join(_NUMBERS)} number the prompt's tokens, and without a "
                    "cache each pass reads more than the prompt; leave use_cache on"
                )
            if inputs["past_key_values"].get_seq_length():
                inputs |= dict.fromkeys(_NUMBERS)
        fed = inputs.get("inputs_embeds")
        if inputs_embeds is not None and fed is not None and input_ids.shape[1]:
            if input_ids.shape[1] != inputs_embeds.shape[1]:
                raise ValueError(
                    "generate: wanted one id per embedding, or embeddings alone, got "
                    f"{input_ids.shape[1]} ids for {inputs_embeds.shape[1]} embeddings"
                )
            inputs["input_ids"] = input_ids[:, -fed.shape[1] :]
        if token_types is not None:
            length, now = input_ids.shape[1], inputs["input_ids"] if fed is None else fed
            cache = inputs.get("past_key_values")
            if inputs_embeds is not None and cache is not None:
                # The prompt may have no ids; the cache has seen it.
                length = cache.get_seq_length() + now.shape[1]
            types = F.pad(token_types, (0, length - token_types.shape[1]), value=-1)
            inputs["token_types"] = types[:, -now.shape[1] :]
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
        if model_kwargs.get("draft") is not None:
            check_settings(generation_config)
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: this model has its own cache; wanted dynamic (the "
                "default) or static, or past_key_values=Dsv4Cache(config)"
            )
        given, offload = model_kwargs.get("past_key_values"), model_kwargs.pop("kv_offload", None)
        if offload is not None and (given is not None or not generation_config.use_cache):
            raise ValueError(
                "kv_offload: wanted a cache to be made by generate, got "
                + ("past_key_values" if given is not None else "use_cache=False")
                + "; pass past_key_values=Dsv4Cache(config, offload=...), or kv_offload alone"
            )
        if offload is not None and kind == "static":
            raise ValueError(
                "got kv_offload and cache_implementation='static': entries that lie elsewhere have "
                "no fixed place; wanted one of the two"
            )
        if given is not None and kind == "static":
            raise ValueError(
                "got cache_implementation='static' and past_key_values; pass one of the two, such "
                "as past_key_values=Dsv4Cache(config, max_length=...)"
            )
        if given is None and generation_config.use_cache:
            # A draft that was looked up in the prompt may be taken back as a whole.
            drafted = generation_config.prompt_lookup_num_tokens or 0
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs["past_key_values"] = Dsv4Cache(
                self.config,
                max(64, drafted),
                max_length=length if kind == "static" else None,
                offload=offload,
            )
