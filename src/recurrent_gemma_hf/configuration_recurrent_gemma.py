"""Configuration of RecurrentGemma, Griffin and Hawk (arXiv 2402.19427, 2404.07839)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, PreTrainedConfig, logging

from .transformers_compat import ACT2FN

logger = logging.get_logger(__name__)

BLOCK_TYPES = ("recurrent", "attention")
# The names that Transformers' caches and vLLM read.
_LAYER_TYPES = {"recurrent": "linear_attention", "attention": "sliding_attention"}
GRIFFIN_PATTERN = ("recurrent", "recurrent", "attention")

# The presets of `recurrentgemma.common.Preset`, under the field names of the published config.json files
# (intermediate_size is twice the width of each MLP branch).
PRESETS: dict[str, dict[str, Any]] = {
    "recurrentgemma-2b": {},
    "recurrentgemma-9b": {
        "hidden_size": 4096,
        "intermediate_size": 2 * 3 * 4096,
        "num_hidden_layers": 38,
        "num_attention_heads": 16,
        "lru_width": 4096,
    },
    "griffin-paper-7b": {
        "hidden_size": 4096,
        "intermediate_size": 2 * 3 * 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "lru_width": 5632,
        "attention_window_size": 1024,
        "embeddings_scale_by_sqrt_dim": False,
        "logits_soft_cap": 0.0,
    },
}
PRESETS["hawk-paper-7b"] = {**PRESETS["griffin-paper-7b"], "block_types": ("recurrent",)}

# Keys of config.json files and of Transformers that do not describe the architecture. A keyword argument that is
# neither one of these nor a field is most likely a misspelled field.
_BOOKKEEPING_KEYS = frozenset(
    ("add_cross_attention", "attn_implementation", "auto_map", "cross_attention_hidden_size",
     "experts_implementation", "finetuning_task", "is_decoder", "model_type", "name_or_path", "num_labels",
     "output_attentions", "prefix", "pruned_heads", "quantization_config", "task_specific_params", "tf_legacy_loss",
     "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "use_bfloat16")
)  # fmt: skip

# The least and the largest value of each field, so that a slip ends in one sentence, not in a lack of memory or in a
# loop without end. A window counts int32 positions, with one more for the query.
_SIZES = {
    "vocab_size": 2**31 - 1, "hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**20, "lru_width": 2**20,
    "attention_window_size": 2**31 - 2, "conv1d_width": 256,
}  # fmt: skip
_NUMBERS = {
    "logits_soft_cap": (0.0, 1e6), "attention_dropout": (0.0, 1.0), "partial_rotary_factor": (0.0, 1.0),
    "rope_theta": (1.0, 1e12), "rms_norm_eps": (0.0, 1.0), "w_init_variance_scale": (0.0, 1e6),
    "final_w_init_variance_scale": (0.0, 1e6),
}  # fmt: skip
_FLAGS = (
    "embeddings_scale_by_sqrt_dim", "attention_bias", "tie_word_embeddings", "use_cache", "fuse_linear_cross_entropy",
)  # fmt: skip
_MAX_LABELS = 10**6
# Fields that every config of Transformers has, which does not check them.
_INHERITED: dict[str, tuple[type, ...]] = {
    "architectures": (list,), "id2label": (dict,), "label2id": (dict,), "auto_map": (dict,), "num_labels": (int,),
    "chunk_size_feed_forward": (int,), "problem_type": (str,), "return_dict": (bool,), "output_attentions": (bool,),
    "output_hidden_states": (bool, int, list), "attn_implementation": (str, dict), "tokenizer_class": (str,),
}  # fmt: skip

# Other spellings of fields, which `__post_init__` reads.
_READ_BY_HAND = {"layer_types", "layers_block_type", "rope_parameters", "rope_scaling"}

# The fields that determine the shapes in a cache and the meaning of its values.
_CACHE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "lru_width", "attention_window_size", "conv1d_width",
    "embeddings_scale_by_sqrt_dim", "rope_theta", "partial_rotary_factor", "rms_norm_eps", "hidden_activation",
    "attention_bias", "layers_block_type",
)  # fmt: skip


def _shown(value: Any) -> str:
    """Return the repr of a value, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_json(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


class RecurrentGemmaConfig(PreTrainedConfig):
    r"""
    Configuration of a RecurrentGemma, Griffin or Hawk model. The defaults are RecurrentGemma-2B.

    Reads the published 2B and 9B `config.json` files unchanged. Impossible values, contradictions and unknown arguments
    raise `ValueError` naming the field; unknown keys of a file are kept, with a warning.

    Args:
        vocab_size (`int`): number of token ids.
        hidden_size (`int`): width E of the residual stream.
        intermediate_size (`int`): twice the width of each of the two MLP branches, so 6 E in the papers.
        num_hidden_layers (`int`): number of residual blocks (temporal mixing + MLP).
        num_attention_heads (`int`): query heads, and blocks of the block-diagonal RG-LRU gates.
        num_key_value_heads (`int`): key and value heads; 1 (multi-query attention) in every published model.
        head_dim (`int`, *optional*): width of a head; must be `hidden_size / num_attention_heads` (the default).
        lru_width (`int`, *optional*): width D of the recurrence, `hidden_size` by default.
        block_types (`tuple[str]`): pattern of "recurrent" and "attention", repeated and cut to `num_hidden_layers`.
            `("recurrent",)` is Hawk.
        attention_window_size (`int`): how many earlier tokens a query attends to. It attends to itself too, so
            Transformers' inclusive window (`sliding_window`) is one larger.
        conv1d_width (`int`): taps of the causal depthwise convolution.
        logits_soft_cap (`float`): c in c tanh(logits / c); 0 means no cap.
        embeddings_scale_by_sqrt_dim (`bool`): multiply embeddings by sqrt(hidden_size) rounded to bfloat16
            (RecurrentGemma) or not (the Griffin paper's models).
        rope_theta (`float`): base of the rotary position embedding.
        partial_rotary_factor (`float`): leading share of `head_dim` that is rotated.
        rms_norm_eps (`float`): added to the mean square in RMSNorm.
        hidden_activation (`str`): activation of both gates (MLP and recurrent block).
        attention_dropout (`float`): dropout on attention probabilities while training.
        attention_bias (`bool`): biases in the q, k and v projections (the output projection always has one).
        w_init_variance_scale (`float`): variance scale of the convolution's initialisation.
        final_w_init_variance_scale (`float`, *optional*): variance scale of the initialisation of the layers that
            write to the residual stream, 2 / `num_hidden_layers` by default.
        tie_word_embeddings (`bool`): share the embedding with the language model head.
        fuse_linear_cross_entropy (`bool`): compute the training loss without the logits. False: outputs in training
            include logits, and the loss is Transformers' own.

    Example:
        >>> from recurrent_gemma_hf import RecurrentGemmaConfig
        >>> RecurrentGemmaConfig.from_preset("hawk-paper-7b", num_hidden_layers=2).layers_block_type
        ['recurrent', 'recurrent']
    """

    model_type = "recurrent_gemma"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["x_BTE", "inputs"], ["x_BTE"]),
        "final_norm": (["x_BTE"], ["x_BTE"]),
    }
    # Each rank computes some of the heads. tensor_parallel.py defines the styles that Transformers does not have.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.temporal_block.q_proj": "colwise",
        "layers.*.temporal_block.k_proj": "recurrent_gemma_shared_head",
        "layers.*.temporal_block.v_proj": "recurrent_gemma_shared_head",
        "layers.*.temporal_block.o_proj": "rowwise",
        "layers.*.temporal_block.linear_x": "colwise",
        "layers.*.temporal_block.linear_y": "colwise",
        "layers.*.temporal_block.conv_1d": "recurrent_gemma_channels",
        "layers.*.temporal_block.rg_lru": "recurrent_gemma_channels",
        "layers.*.temporal_block.linear_out": "rowwise",
        "layers.*.mlp_block.gate_proj": "colwise",
        "layers.*.mlp_block.up_proj": "colwise",
        "layers.*.mlp_block.down_proj": "rowwise",
        "layers.*.temporal_pre_norm": "recurrent_gemma_whole",
        "layers.*.channel_pre_norm": "recurrent_gemma_whole",
        "final_norm": "recurrent_gemma_whole",
    }

    vocab_size: int = 256_000
    hidden_size: int = 2560
    intermediate_size: int = 2 * 3 * 2560
    num_hidden_layers: int = 26
    num_attention_heads: int = 10
    num_key_value_heads: int = 1
    # `__post_init__` replaces None, so the type is int for readers.
    head_dim: int = None  # type: ignore[assignment]
    lru_width: int = None  # type: ignore[assignment]
    block_types: list[str] | tuple[str, ...] = GRIFFIN_PATTERN
    attention_window_size: int = 2048
    conv1d_width: int = 4
    logits_soft_cap: float = 30.0
    embeddings_scale_by_sqrt_dim: bool = True
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_dropout: float = 0.0
    attention_bias: bool = False
    w_init_variance_scale: float = 0.01
    final_w_init_variance_scale: float = None  # type: ignore[assignment]
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    fuse_linear_cross_entropy: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_private_block_types(kwargs)
        self._read_rope_parameters(kwargs)
        layer_types = kwargs.pop("layer_types", None)
        layers_block_type = kwargs.pop("layers_block_type", None)
        self._refuse_unknown(kwargs)
        self._validate_inherited(kwargs)
        self._validate_sizes("hidden_size", "num_hidden_layers", "num_attention_heads")  # the defaults below need them
        if getattr(self, "head_dim", None) is None and self.hidden_size < self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be at least num_attention_heads={self.num_attention_heads}"
            )
        for name, default in (
            ("head_dim", self.hidden_size // self.num_attention_heads),
            ("lru_width", self.hidden_size),
            ("final_w_init_variance_scale", 2.0 / self.num_hidden_layers),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.validate_architecture()
        self.block_types = list(self.block_types)
        for name, given in (("layer_types", layer_types), ("layers_block_type", layers_block_type)):
            derived = [self.layer_types, self.layers_block_type]
            if given is not None and (not isinstance(given, (list, tuple)) or list(given) not in derived):
                raise ValueError(
                    f"{name}={_shown(given)} contradicts block_types={_shown(self.block_types)}; set block_types alone"
                )
        super().__post_init__(**kwargs)

    def _read_private_block_types(self, kwargs: dict[str, Any]) -> None:
        """Read the pattern from `_block_types`, as the published files spell it."""
        private = kwargs.pop("_block_types", None)
        if private is None:
            return
        if not isinstance(private, (list, tuple)):
            raise ValueError(f"block_types={_shown(private)} must be a non-empty list of {BLOCK_TYPES}")
        if self.block_types not in (private, GRIFFIN_PATTERN, list(GRIFFIN_PATTERN)):
            raise ValueError(
                f"_block_types={_shown(private)} contradicts block_types={_shown(self.block_types)}; give only one"
            )
        self.block_types = private

    def _read_rope_parameters(self, kwargs: dict[str, Any]) -> None:
        """Read the rotary settings from one dict, as Transformers 5 saves them."""
        given = {name: kwargs.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
        rope = given["rope_parameters"] or given["rope_scaling"]
        if rope is None:
            return
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters={_shown(rope)} must be a dict of rope_theta and partial_rotary_factor")
        known = {"rope_type": "default", "type": "default"}
        for key, value in rope.items():
            if key in known and value != known[key]:
                raise ValueError(
                    f"rope_parameters (rope_scaling)[{key!r}]={_shown(value)}: RecurrentGemma has only the default RoPE"
                )
            if key in ("rope_theta", "partial_rotary_factor"):
                if getattr(self, key) not in (value, getattr(type(self), key)):
                    raise ValueError(
                        f"rope_parameters[{key!r}]={_shown(value)} contradicts {key}={getattr(self, key)!r}"
                    )
                setattr(self, key, value)
            elif key not in known:
                raise ValueError(f"rope_parameters[{key!r}]={_shown(value)} is unknown; it may hold rope_theta and "
                                 "partial_rotary_factor")  # fmt: skip

    @classmethod
    def _unknown(cls, keys: Iterable[str]) -> list[str]:
        known = {*GenerationConfig().to_dict(), *_BOOKKEEPING_KEYS}
        return sorted(key for key in keys if key[0] != "_" and key not in known)

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = self._unknown(kwargs)
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type={_shown(kwargs['model_type'])}: this is the config of {self.model_type!r} models"
            )
        if unknown:
            raise ValueError(
                f"RecurrentGemmaConfig has no field {', '.join(map(repr, unknown))}; its fields are "
                f"{', '.join(sorted(field.name for field in dataclasses.fields(self)))}"
            )

    def validate_architecture(self) -> None:
        """Raise ValueError, naming the field, for values that describe no possible model."""
        self._validate_sizes(*_SIZES)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={_shown(getattr(self, name))} must be true or false")
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                raise ValueError(f"{name}={_shown(value)} must be a finite number from {low} to {high}")
        if not isinstance(self.hidden_activation, str) or self.hidden_activation not in ACT2FN:
            raise ValueError(
                f"hidden_activation={_shown(self.hidden_activation)} must be one of {', '.join(sorted(ACT2FN))}"
            )
        self._validate_token_ids()
        self._validate_inherited({})
        if self.is_encoder_decoder:  # every config of Transformers has this field
            raise ValueError("is_encoder_decoder=True: this model is a decoder; leave it out")
        self._validate_shapes()

    def _validate_sizes(self, *names: str) -> None:
        for name in names:
            value, high = getattr(self, name), _SIZES[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ValueError(f"{name}={_shown(value)} must be a whole number from 1 to {high}")

    def _validate_inherited(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for fields of every config of Transformers that have a wrong type, where Transformers would
        fail later, or never end (`num_labels=2**31`)."""
        for name, kinds in _INHERITED.items():
            value = kwargs.get(name, getattr(self, name, None))
            # True is an int, but no number.
            is_right = bool in kinds if isinstance(value, bool) else isinstance(value, kinds)
            if value is not None and not is_right:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name}={_shown(value)} must be of type {names}")
        dtype = kwargs.get("torch_dtype") if self.dtype is None else self.dtype
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise ValueError(f"dtype={_shown(dtype)} is not a floating-point dtype of torch")
        labels = kwargs.get("num_labels")
        if "num_labels" in kwargs and (labels is None or not 0 <= labels <= _MAX_LABELS):
            raise ValueError(f"num_labels={_shown(labels)} must be a whole number from 0 to {_MAX_LABELS}")
        if not all(str(key).isdecimal() and isinstance(label, str) for key, label in (self.id2label or {}).items()):
            raise ValueError(f"id2label={_shown(self.id2label)} must map numbers to names")
        for name, value in (("architectures", self.architectures), *kwargs.items()):
            if name not in ("quantization_config", "name_or_path") and not _is_json(value):
                raise ValueError(f"{name}={_shown(value)} cannot be written to a config.json")
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
            raise ValueError(f"quantization_config={_shown(quantization)} must be a dict or a config of a quantizer")

    def _validate_token_ids(self) -> None:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            for token in ids if value is not None else ():
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name}={_shown(value)} must be None or a token id from 0 to vocab_size - 1 = "
                        f"{self.vocab_size - 1}"
                    )

    def _validate_shapes(self) -> None:
        if not isinstance(self.block_types, (list, tuple)) or not self.block_types:
            raise ValueError(f"block_types={_shown(self.block_types)} must be a non-empty list of {BLOCK_TYPES}")
        unknown = [block for block in self.block_types if block not in BLOCK_TYPES]
        if unknown:
            raise ValueError(f"block_types={_shown(self.block_types)}: {_shown(unknown[0])} is none of {BLOCK_TYPES}")
        heads = self.num_attention_heads
        if self.intermediate_size % 2:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} must be even: it counts both branches of the MLP"
            )
        if "recurrent" in self.layers_block_type and self.lru_width % heads:
            raise ValueError(
                f"lru_width={self.lru_width} must be a multiple of num_attention_heads={heads}: the gates of the "
                "RG-LRU are block-diagonal with one block per head"
            )
        if "attention" not in self.layers_block_type:
            return
        if self.head_dim * heads != self.hidden_size:
            raise ValueError(
                f"head_dim={self.head_dim} times num_attention_heads={heads} must be hidden_size={self.hidden_size}"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={heads}")
        if self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} rotates "
                f"{self.rotary_dim} dimensions, which must be even"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Do as Transformers, but keep unknown keys with a warning: training tools add their own, and such a checkpoint
        must load again. Raise ValueError for a derived field that contradicts the others."""
        fields = {field.name for field in dataclasses.fields(cls)} | _READ_BY_HAND
        unknown = cls._unknown(key for key in config_dict if key not in fields)
        config = super().from_dict({k: v for k, v in config_dict.items() if k not in unknown}, **kwargs)
        own = config[0] if isinstance(config, tuple) else config
        for key in unknown:
            if isinstance(getattr(cls, key, None), property):
                if getattr(own, key) != config_dict[key]:
                    raise ValueError(f"{key}={_shown(config_dict[key])} contradicts the rest, of which follows "
                                     f"{getattr(own, key)!r}; leave it out")  # fmt: skip
            else:
                setattr(own, key, config_dict[key])
        if strangers := [key for key in unknown if not hasattr(cls, key)]:
            logger.warning_once(
                f"this config has keys that RecurrentGemma does not know; they are kept and mean nothing to the model: "
                f"{', '.join(strangers)}"
            )
        return config

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> RecurrentGemmaConfig:
        """Make the config of a published architecture (a key of `PRESETS`), with any field overridden."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def adopt(cls, config: PreTrainedConfig) -> RecurrentGemmaConfig:
        """Return `config`, converted if it is of Transformers' own class (read before this package was imported).

        Raises:
            ValueError: the config is of another model.
        """
        if isinstance(config, cls):
            return config
        own = cls.from_dict(config.to_dict())
        own._attn_implementation = config._attn_implementation
        return own

    # Tools set these properties on any config; a setter changes the field that the property is derived from.

    @property
    def layers_block_type(self) -> list[str]:
        """Return "recurrent" or "attention" for each layer: the pattern, repeated and cut to the number of layers."""
        return [self.block_types[i % len(self.block_types)] for i in range(self.num_hidden_layers)]

    @layers_block_type.setter
    def layers_block_type(self, blocks: list[str]) -> None:
        if not isinstance(blocks, (list, tuple)) or not blocks or any(block not in BLOCK_TYPES for block in blocks):
            raise ValueError(f"layers_block_type={_shown(blocks)} must be a list of {BLOCK_TYPES}, one for each layer")
        self.block_types = list(blocks)

    @property
    def layer_types(self) -> list[str]:
        """Return `layers_block_type` under the names that Transformers' caches and vLLM read."""
        return [_LAYER_TYPES[block] for block in self.layers_block_type]

    @layer_types.setter
    def layer_types(self, types: list[str]) -> None:
        blocks = {layer_type: block for block, layer_type in _LAYER_TYPES.items()}
        if not isinstance(types, (list, tuple)) or any(kind not in list(blocks) for kind in types):
            raise ValueError(f"layer_types={_shown(types)} must be a list of {tuple(blocks)}, one for each layer")
        self.layers_block_type = [blocks[layer_type] for layer_type in types]

    @property
    def sliding_window(self) -> int:
        """Return the attention window as Transformers counts it, the query included."""
        return self.attention_window_size + 1

    @sliding_window.setter
    def sliding_window(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(
                f"sliding_window={_shown(size)} must be a whole number from 2 on: the query and those before it"
            )
        self.attention_window_size = size - 1

    @property
    def final_logit_softcapping(self) -> float | None:
        """Return the soft cap, None if there is none, under the name that libraries with their own loss (TRL) read."""
        return self.logits_soft_cap or None

    @final_logit_softcapping.setter
    def final_logit_softcapping(self, soft_cap: float | None) -> None:
        self.logits_soft_cap = soft_cap or 0.0

    @property
    def rotary_dim(self) -> int:
        """Return how many leading dimensions of a head RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def cache_fields(self) -> dict[str, Any]:
        """Return the fields that a cache must share with its model."""
        return {name: getattr(self, name) for name in _CACHE_FIELDS}

    def fingerprint(self) -> str:
        """Return the SHA-256 of `cache_fields`, as saved caches store it."""
        return fingerprint_of(self.cache_fields())


def fingerprint_of(fields: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, of the result of `RecurrentGemmaConfig.cache_fields`."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


__all__ = ["BLOCK_TYPES", "PRESETS", "RecurrentGemmaConfig", "fingerprint_of"]
