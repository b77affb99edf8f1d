"""The only file that depends on undocumented parts of Transformers.

It lists the tested releases, their differences, and the names that we override or that the documentation does not
promise. Other files import from the top level of `transformers`, and everything else from here;
tests/test_transformers_compat.py checks this, and the lists below. One exception: `_modules` of the Auto mappings, in
auto_classes.py, which must not import Transformers. This file is part of the code that a checkpoint carries to the Hub.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from transformers.utils import find_adapter_config_file
from transformers.utils.generic import can_return_tuple

logger = logging.get_logger(__name__)

# --- Names ------------------------------------------------------------------------------------------------------------

# The names that our classes override, by class of Transformers; compared in the sources of 5.17.0, 5.19.0, 5.23.0 and
# 5.24.0, whose differences the sections below handle.
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
        + (" max_cache_len" if hasattr(Cache, "max_cache_len") else "")  # a property of Cache in 5.17
    ),
    "CacheLayerMixin": (
        "get_mask_sizes get_seq_length is_compileable is_croppable lazy_initialization reset supports_early_init update"
    ),
    "LinearAttentionCacheLayerMixin": (
        "is_compileable is_croppable lazy_initialization reset update_conv_state update_recurrent_state"
    ),
    "TensorParallelLayer": "shard_param should_use_local_tensors transform_output_post_forward",
}
# The private or undocumented attributes that they read. generate() also calls `create_masks_for_generate` of a model
# that defines it (5.17 to 5.24).
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

# From the first, up to and excluding the second, as `dependencies` in pyproject.toml. The whole test suite runs on the
# first and the last release of this range; CHANGELOG.md states what ran on those between.
SUPPORTED_RELEASES = ("5.17", "5.25")


def _release(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def release_problem(version: str) -> str | None:
    """Return the warning for a release outside `SUPPORTED_RELEASES`; None for one inside."""
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

# Before 5.21, chunked prefill in generate() ignores that a cache may hold the beginning of the text.
CONTINUES_IN_CHUNKS = _release(transformers.__version__) >= (5, 21)

# --- The name of the cache ----------------------------------------------------------------------------------------

# From 5.24 the cache is called `cache` in forward(), generate(), their hooks and outputs; before, `past_key_values`,
# which 5.24 still accepts, with a warning, until 5.40 (generate() until 6.0). Our classes and their outputs accept both
# names on every release, without a warning. CACHE_NAME is the one that the installed release uses.
_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME, _OTHER_CACHE_NAME = (
    ("cache", "past_key_values") if "cache" in _OUTPUT_FIELDS else ("past_key_values", "cache")
)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that a caller passed under either of its names.

    Raises:
        ValueError: two different caches, or an object that is not a Cache (a tuple of tensors, as in Transformers 4).
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument, but are different caches; give one")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, Cache):
        raise ValueError(f"{name} is a {type(given).__name__}; it must be a Cache, best a RecurrentGemmaCache")
    return given


class _BothCacheNames:
    """Mixin for outputs with the cache under both names, as argument, attribute and key, in get() and `in`."""

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
        """Do as dict.get; None is not stored, as in all outputs of Transformers."""
        return super().get(CACHE_NAME if key == _OTHER_CACHE_NAME else key, default)  # type: ignore[misc]


setattr(_BothCacheNames, _OTHER_CACHE_NAME, property(lambda output: getattr(output, CACHE_NAME)))


@dataclasses.dataclass(init=False)
class RecurrentGemmaModelOutput(_BothCacheNames, BaseModelOutputWithPast):
    """BaseModelOutputWithPast with both names of the cache."""


@dataclasses.dataclass(init=False)
class RecurrentGemmaCausalLMOutput(_BothCacheNames, CausalLMOutputWithPast):
    """CausalLMOutputWithPast with both names of the cache."""


_LossFields = dataclasses.make_dataclass(
    "_LossFields",
    [(name, Any, None) for name in ("loss", CACHE_NAME, "hidden_states", "attentions")],
    bases=(ModelOutput,),
)


@dataclasses.dataclass(init=False)
class RecurrentGemmaLossOutput(_BothCacheNames, _LossFields):  # type: ignore[misc, valid-type]
    """CausalLMOutputWithPast without logits; reading them raises an error that names the switch."""

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise AttributeError(_NO_LOGITS)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise KeyError(_NO_LOGITS)
        return super().__getitem__(key)


_NO_LOGITS = (
    "while training with labels the loss is computed without the logits, which take most of the memory with a "
    "vocabulary of 256,000; to have them, set model.config.fuse_linear_cross_entropy = False or load with "
    "from_pretrained(..., fuse_linear_cross_entropy=False)"
)


@dataclasses.dataclass(init=False)
class RecurrentGemmaSequenceClassifierOutput(_BothCacheNames, SequenceClassifierOutputWithPast):
    """SequenceClassifierOutputWithPast with both names of the cache."""


@dataclasses.dataclass(init=False)
class _GenerateOutput(_BothCacheNames, GenerateDecoderOnlyOutput):
    pass


@dataclasses.dataclass(init=False)
class _GenerateBeamOutput(_BothCacheNames, GenerateBeamDecoderOnlyOutput):
    pass


def unread_columns(cache: Cache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> int | None:
    """Return the number of columns that the cache has not read, if generate() passes the whole text again.

    Assisted decoding continues from a cache without `next_sequence_length` (5.17 to 5.24). Return None if `input_ids`
    (B, T) are only the new columns or the cache is empty.
    """
    seen = cache.get_seq_length()
    is_whole = attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1] > seen > 0
    return input_ids.shape[1] - seen if is_whole else None


def with_both_cache_names(generated: Any) -> Any:
    """Return the result of generate(), with both names of the cache if it is an output and not a tensor."""
    kinds = {GenerateDecoderOnlyOutput: _GenerateOutput, GenerateBeamDecoderOnlyOutput: _GenerateBeamOutput}
    kind = kinds.get(type(generated))
    return generated if kind is None else kind(**generated)


# --- The command line ---------------------------------------------------------------------------------------------


def transformers_command() -> Any:
    """Return the `transformers` command as a typer app.

    Raises:
        ModuleNotFoundError: `transformers serve` lacks packages; the message names the remedy.
    """
    from transformers.cli.transformers import app
    from transformers.utils import import_utils

    if not import_utils.is_serve_available():
        raise ModuleNotFoundError('`transformers serve` lacks packages; run: pip install "transformers[serving]"')
    return app


def wrap_server(wrap: Callable[[Any], None]) -> None:
    """Have `wrap` called with the application that `transformers serve` builds, before it listens."""
    from transformers.cli.serving import server

    build = server.build_server

    @functools.wraps(build)
    def build_and_wrap(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        wrap(app)
        return app

    server.build_server = build_and_wrap


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
    "find_adapter_config_file",
    "one_cache",
    "release_problem",
    "transformers_command",
    "unread_columns",
    "with_both_cache_names",
    "wrap_server",
]
