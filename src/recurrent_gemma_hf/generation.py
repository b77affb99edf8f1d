"""Transformers' generate() with this model's cache, prompts padded on the right, and checks of the input.

Shapes: B batch, T tokens of this forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Cache, GenerationMixin, logging

from .cache_recurrent_gemma import RecurrentGemmaCache
from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .inputs import last_true
from .transformers_compat import (
    CACHE_NAME,
    CONTINUES_IN_CHUNKS,
    GenerationMode,
    one_cache,
    unread_columns,
    with_both_cache_names,
)

logger = logging.get_logger(__name__)


class RecurrentGemmaGenerationMixin(GenerationMixin):
    """Transformers' generate(), with the cache of this model under either of its names."""

    config: RecurrentGemmaConfig

    def generate(
        self, *args: Any, cache: Cache | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Any:
        """Generate as Transformers does, with the cache under either of its names."""
        given = one_cache(cache, past_key_values)
        if given is not None:
            kwargs[CACHE_NAME] = RecurrentGemmaCache.adopt(given, self.config)
        return with_both_cache_names(super().generate(*args, **kwargs))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: Any
    ) -> None:
        """Make a RecurrentGemmaCache, whatever `cache_implementation` is; "static" only makes Transformers compile."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._check_speculation(model_kwargs)
        self._check_prefill(generation_config, model_kwargs)
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        kind = generation_config.cache_implementation or "dynamic"
        if "offloaded" in kind or kind == "quantized":
            logger.warning_once(
                f"cache_implementation={kind!r} has no effect: the cache of this model has a constant size and stays "
                "on the device in full precision."
            )
        cache = RecurrentGemmaCache(self.config, static="static" in kind)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache
        return None

    @staticmethod
    def _check_prefill(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Raise ValueError for rows with only padding in the last forward of the prefill: it would give them the logits
        of padding. Turn chunks off if the cache has tokens and this Transformers cannot continue from it in chunks."""
        size, mask = generation_config.prefill_chunk_size, model_kwargs.get("attention_mask")
        cache = model_kwargs.get(CACHE_NAME)
        seen = 0 if cache is None else cache.get_seq_length()
        if size is not None and seen and not CONTINUES_IN_CHUNKS:
            if mask is None or mask.shape[1] - seen > size:
                logger.warning_once(
                    f"prefill_chunk_size={size}: this Transformers prefills in chunks only without a cache; with one "
                    "it prefills in one forward, which gives the same text and needs more memory. To continue from a "
                    "cache in chunks, upgrade to Transformers 5.21 or newer."
                )
            size = generation_config.prefill_chunk_size = None
        if mask is None or mask.ndim != 2 or mask.shape[1] <= seen:
            return
        new = mask.shape[1] - seen
        last = new if size is None else (new - 1) % size + 1
        ended = mask.any(1) & ~mask[:, -last:].any(1)
        if ended.any():
            chunks = "" if size is None else f", those of its last chunk (prefill_chunk_size={size})"
            raise ValueError(
                f"row {ended.nonzero()[0].item()} of the prompts has only padding in the last {last} columns{chunks}; "
                "pad prompts on the left"
            )

    def _check_speculation(self, model_kwargs: dict[str, Any]) -> None:
        """Raise ValueError for padding on the right, since a draft must follow the text directly."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError(
                "padding on the right cannot be used with assisted and prompt-lookup decoding, whose drafts follow the "
                "last column; leave the padding out, or pad on the left; if these pad tokens are text, pass an "
                "attention_mask of ones"
            )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Infer the mask from pad tokens as Transformers does, except in a draft model: there a missing mask means that
        the text has no padding, because generate() drops masks of ones, and pad tokens in it were generated."""
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Count tokens from 0; padding on the right repeats the last position, and the next token continues from it."""
        mask = model_kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return (mask.long().cumsum(1) - 1).clamp(min=0)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Do as Transformers; for prompts padded on the right, keep the logits of each row's last token."""
        # Not adopted here: it may be another library's cache around ours (PEFT's ShadowCache). The forward pass does.
        mask, given = attention_mask, one_cache(cache, past_key_values)
        if given is not None and next_sequence_length is None:
            next_sequence_length = unread_columns(given, input_ids, mask)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: given},
            **kwargs,
        )
        if given is not None:
            # Only under the old name, on every release: PEFT's prompt tuning, prefix tuning and ShadowPEFT read and
            # replace that argument.
            model_inputs["past_key_values"] = model_inputs.pop(CACHE_NAME)
        new = model_inputs["input_ids"] if model_inputs.get("input_ids") is not None else model_inputs["inputs_embeds"]
        T = new.shape[1]
        if mask is not None and mask.ndim == 2 and T > 1 and not mask[:, -1].all():
            model_inputs["logits_to_keep"] = last_true(mask[:, -T:].bool()).to(new.device)
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: RecurrentGemmaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | None:
        """Return the mask of a compiled forward: only the new columns of the growing 2D mask, so that shapes stay."""
        if attention_mask is None:
            return None
        return {"is_token": attention_mask[:, -inputs_embeds.shape[1] :].bool()}


# For tools that inspect the signature, and for help().
functools.update_wrapper(RecurrentGemmaGenerationMixin.generate, GenerationMixin.generate)
