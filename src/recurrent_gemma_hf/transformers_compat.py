"""All that this package knows of Transformers beyond its documentation, and the only file that does.

It holds the releases that are tested, how they differ, and the names that we override or that no page of the
documentation promises. Other files import from the top level of `transformers` and the rest from here;
tests/test_transformers_compat.py holds them to it, and the lists below to the code. One name is elsewhere: `_modules`
of the Auto mappings, in auto_classes.py, which must not import Transformers. A checkpoint carries this file to the Hub
with the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache, logging
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

logger = logging.get_logger(__name__)

# --- Names ------------------------------------------------------------------------------------------------------------

# What our classes override, by the class of Transformers that it comes from. All of it was read in 5.17.0, 5.19.0,
# 5.23.0 and 5.24.0; where these differ, the sections below say how.
OVERRIDDEN = {
    "PreTrainedModel": (
        "_can_compile_fullgraph _init_weights _keep_in_fp32_modules _no_split_modules _skip_keys_device_placement "
        "_supports_attention_backend _supports_flash_attn _supports_flex_attn _supports_sdpa _tied_weights_keys "
        "_from_config _tp_plan base_model_prefix config_class from_pretrained maybe_distribute_model "
        "supports_gradient_checkpointing"
    ),
    "GenerationMixin": (
        "_prepare_attention_mask_for_generation _prepare_cache_for_generation _prepare_position_ids_for_generation "
        "generate prepare_inputs_for_generation"
    ),
    "PreTrainedConfig": (
        "base_model_fsdp_plan base_model_pp_plan base_model_tp_plan from_dict model_type validate_architecture"
    ),
    "Cache": (
        "activate_past_recording batch_repeat_interleave batch_select_indices batch_size crop get_mask_sizes "
        "get_seq_length is_compileable is_initialized is_linear reorder_cache reset"
    ),
    "CacheLayerMixin": (
        "get_mask_sizes get_seq_length is_compileable is_croppable lazy_initialization reset supports_early_init update"
    ),
    "LinearAttentionCacheLayerMixin": (
        "is_compileable is_croppable lazy_initialization reset update_conv_state update_recurrent_state"
    ),
    "TensorParallelLayer": "shard_param should_use_local_tensors transform_output_post_forward",
}
# What they read that is private by its name, or that is documented nowhere. generate() also looks for a function
# `create_masks_for_generate` on the model, which has none by itself (5.17 to 5.24).
READ = {
    "PreTrainedModel": "hf_quantizer loss_function tp_size",
    "PreTrainedConfig": "_attn_implementation",
    "CacheLayerMixin": "device dtype is_initialized keys values",
    "LinearAttentionCacheLayerMixin": (
        "conv_kernel_size conv_states device dtype has_previous_state is_conv_states_initialized "
        "is_recurrent_states_initialized record_past recurrent_states"
    ),
}

# --- Releases -----------------------------------------------------------------------------------------------------

# From the first up to but without the second: `dependencies` in pyproject.toml says the same. The whole test suite runs
# on the first and the last release in it; CHANGELOG.md says what ran on those between.
SUPPORTED_RELEASES = ("5.17", "5.25")


def _release(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def release_problem(version: str) -> str | None:
    """Return what to tell the user of a release outside `SUPPORTED_RELEASES`; None for one inside."""
    low, high = map(_release, SUPPORTED_RELEASES)
    if low <= _release(version) < high:
        return None
    supported = f">={SUPPORTED_RELEASES[0]},<{SUPPORTED_RELEASES[1]}"
    return (
        f"transformers {version} is installed; this release of recurrent-gemma-hf is tested with {supported}. If "
        f'something breaks: pip install "transformers{supported}", or upgrade recurrent-gemma-hf'
    )


if (_problem := release_problem(transformers.__version__)) is not None:
    logger.warning_once(_problem)

# Before 5.21 generate() cuts a prompt into chunks as if no cache had read its beginning.
CONTINUES_IN_CHUNKS = _release(transformers.__version__) >= (5, 21)

# --- The name of the cache ----------------------------------------------------------------------------------------

# From 5.24 on the cache is `cache` in forward(), generate(), their hooks and outputs; before it was `past_key_values`,
# which 5.24 still takes, with a warning, until 5.40 (generate() until 6.0). Our classes take both names on every
# release, their outputs answer to both, and neither warns. This is the one that the installed release looks for.
_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME, _OTHER_CACHE_NAME = (
    ("cache", "past_key_values") if "cache" in _OUTPUT_FIELDS else ("past_key_values", "cache")
)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that a caller gave under either of its names.

    Raises:
        ValueError: for two different ones, and for what is no Cache (a tuple of tensors, as Transformers 4 had it).
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument, and two caches came; give one")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, Cache):
        raise ValueError(f"{name} is a {type(given).__name__}; it must be a Cache, best a RecurrentGemmaCache")
    return given


class _BothCacheNames:
    """Makes an output answer to both names of the cache: as an argument, an attribute, a key, in get() and in `in`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _OTHER_CACHE_NAME in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop(_OTHER_CACHE_NAME)
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(CACHE_NAME if name == _OTHER_CACHE_NAME else name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(CACHE_NAME if key == _OTHER_CACHE_NAME else key, value)  # type: ignore[misc]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(CACHE_NAME if key == _OTHER_CACHE_NAME else key)  # type: ignore[misc]

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(CACHE_NAME if key == _OTHER_CACHE_NAME else key)  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's; None is not stored, as everywhere in Transformers' outputs."""
        return super().get(CACHE_NAME if key == _OTHER_CACHE_NAME else key, default)  # type: ignore[misc]


setattr(_BothCacheNames, _OTHER_CACHE_NAME, property(lambda output: getattr(output, CACHE_NAME)))


@dataclasses.dataclass(init=False)
class RecurrentGemmaModelOutput(_BothCacheNames, BaseModelOutputWithPast):
    """BaseModelOutputWithPast whose cache answers to both names."""


@dataclasses.dataclass(init=False)
class RecurrentGemmaCausalLMOutput(_BothCacheNames, CausalLMOutputWithPast):
    """CausalLMOutputWithPast whose cache answers to both names."""


_LossFields = dataclasses.make_dataclass(
    "_LossFields",
    [(name, Any, None) for name in ("loss", CACHE_NAME, "hidden_states", "attentions")],
    bases=(ModelOutput,),
)


@dataclasses.dataclass(init=False)
class RecurrentGemmaLossOutput(_BothCacheNames, _LossFields):  # type: ignore[misc, valid-type]
    """What CausalLMOutputWithPast has, but for the logits: asking for them is an error that says how to get them."""

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise AttributeError(_NO_LOGITS)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise KeyError(_NO_LOGITS)
        return super().__getitem__(key)


_NO_LOGITS = (
    "while training with labels the loss is computed without the logits, which at 256,000 words take most of the "
    "memory; to have them, set model.config.fuse_linear_cross_entropy = False or load with "
    "from_pretrained(..., fuse_linear_cross_entropy=False)"
)


@dataclasses.dataclass(init=False)
class RecurrentGemmaSequenceClassifierOutput(_BothCacheNames, SequenceClassifierOutputWithPast):
    """SequenceClassifierOutputWithPast whose cache answers to both names."""


@dataclasses.dataclass(init=False)
class _GenerateOutput(_BothCacheNames, GenerateDecoderOnlyOutput):
    pass


@dataclasses.dataclass(init=False)
class _GenerateBeamOutput(_BothCacheNames, GenerateBeamDecoderOnlyOutput):
    pass


def unread_columns(cache: Cache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> int | None:
    """Return how many columns of the text the cache has not read, where generate() hands over the whole text again.

    It does so without saying how much is new (`next_sequence_length`) when assisted decoding goes on from a cache, in
    5.17 to 5.24. None: `input_ids` (B, T) are the new columns alone, or nothing was read yet.
    """
    seen = cache.get_seq_length()
    is_whole = attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1] > seen > 0
    return input_ids.shape[1] - seen if is_whole else None


def with_both_cache_names(generated: Any) -> Any:
    """Return what generate() returned, its cache answering to both names where it is an output and not a tensor."""
    kinds = {GenerateDecoderOnlyOutput: _GenerateOutput, GenerateBeamDecoderOnlyOutput: _GenerateBeamOutput}
    kind = kinds.get(type(generated))
    return generated if kind is None else kind(**generated)


# --- The command line ---------------------------------------------------------------------------------------------


def transformers_command() -> Any:
    """Return the `transformers` command as a typer app, able to serve.

    Raises:
        ModuleNotFoundError: with what to install, where Transformers' server cannot run.
    """
    from transformers.cli.transformers import app
    from transformers.utils import import_utils

    if not import_utils.is_serve_available():
        raise ModuleNotFoundError(
            'what `transformers serve` needs is not installed; run: pip install "transformers[serving]"'
        )
    return app


__all__ = [
    "ACT2FN",
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_PARALLEL_STYLES",
    "CACHE_NAME",
    "CONTINUES_IN_CHUNKS",
    "OVERRIDDEN",
    "READ",
    "SUPPORTED_RELEASES",
    "ForCausalLMLoss",
    "GenerationMode",
    "LinearAttentionCacheLayerMixin",
    "QuestionAnsweringModelOutput",
    "RecurrentGemmaCausalLMOutput",
    "RecurrentGemmaLossOutput",
    "RecurrentGemmaModelOutput",
    "RecurrentGemmaSequenceClassifierOutput",
    "TensorParallelLayer",
    "TokenClassifierOutput",
    "can_return_tuple",
    "one_cache",
    "release_problem",
    "transformers_command",
    "unread_columns",
    "with_both_cache_names",
]
