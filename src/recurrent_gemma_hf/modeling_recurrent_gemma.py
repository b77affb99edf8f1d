"""RecurrentGemma, Griffin and Hawk: layers, model, language-model head; read from top to bottom.

Shapes: B batch, T tokens, E hidden_size, D lru_width, H heads (of attention and of the gates), G key/value heads,
h head_dim, K keys, W attention_window_size, V vocabulary. Equations are those of the Griffin paper (arXiv 2402.19427).

Two ideas carry the file:
- A token has an *index* among the tokens of its row. Padding has none: no token attends to it and it leaves every state
  as it was. Layers see the caller's columns (inputs.py names the exception).
- A document begins at *position* 0. Attention, convolution and recurrence look at most p tokens back from position p,
  so packed documents never mix.
State lives only in the cache, a RecurrentGemmaCache; an empty cache of Transformers is converted to one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel, logging
from transformers import initialization as init

from .attention import (
    LOCAL_IMPLEMENTATIONS,
    AttentionMask,
    attend_locally,
    check_attention,
    check_flash,
    eager_attention,
    rotary_angles,
    rotate,
    with_backend_mask,
)
from .backend import is_transformed, use_triton
from .cache_recurrent_gemma import RecurrentGemmaCache
from .causal_conv1d import causal_conv1d
from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .cpu_linear import fast_linear, is_cpu_without_bfloat16, linear
from .cross_entropy import IGNORE_INDEX, check_labels, linear_cross_entropy, next_token_loss, soft_capped
from .generation import RecurrentGemmaGenerationMixin
from .inputs import (
    Columns,
    InputMask,
    check_input,
    check_positions,
    document_positions,
    first_tokens,
    may_look_at,
    reorder,
    reorder_attention,
    select_columns,
    selected,
    token_columns,
)
from .rg_lru import RgLruParameters, rg_lru, rg_lru_step
from .scan import linear_recurrence
from .tensor_parallel import check_tensor_parallel
from .transformers_compat import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    ForCausalLMLoss,
    RecurrentGemmaCausalLMOutput,
    RecurrentGemmaLossOutput,
    RecurrentGemmaModelOutput,
    can_return_tuple,
    one_cache,
)

logger = logging.get_logger(__name__)


class LayerInputs(NamedTuple):
    """What every layer reads about one forward, computed once. A tuple, because accelerate can move those."""

    cos_BTr: torch.Tensor  # (B or 1, T, rotary_dim / 2), dtype of the activations
    sin_BTr: torch.Tensor
    reset_BT: torch.Tensor  # (B or 1, T) bool: a document begins
    is_padding_BT: torch.Tensor | None  # bool; None if no padding can affect a state that is kept
    conv_tap_mask_BTK: torch.Tensor | None  # (B or 1, T, K) bool: conv taps inside the document; None: all are
    attention: AttentionMask | None  # None in a model without attention
    shard: Any = None  # a SequenceShard (context_parallel.py) where the sequence lies on several ranks


# --- Layers -------------------------------------------------------------------------------------------------------


class RecurrentGemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 (float64 for float64)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        x = x_BTE if x_BTE.dtype == torch.float64 else x_BTE.float()
        # Written out, because F.rms_norm takes nearly twice as long on a CPU.
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(x, x, self.weight.to(x.dtype)).to(x_BTE.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def new_linear(inputs: int, outputs: int, *, bias: bool, variance_scale: float = 1.0) -> nn.Linear:
    """Make a linear layer that remembers its official initialisation, std = sqrt(variance_scale / inputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.init_std = math.sqrt(variance_scale / inputs)  # type: ignore[assignment]  # read by _init_weights
    return layer


class RecurrentGemmaMLP(nn.Module):
    """Gated MLP (section 2.2): down(act(gate(x)) * up(x)); config.intermediate_size counts both branches."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.gate_proj = new_linear(config.hidden_size, width, bias=True)
        self.up_proj = new_linear(config.hidden_size, width, bias=True)
        self.down_proj = new_linear(
            width, config.hidden_size, bias=True, variance_scale=config.final_w_init_variance_scale
        )
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(linear(self.gate_proj, x_BTE)) * linear(self.up_proj, x_BTE)
        return linear(self.down_proj, hidden)


# --- Local attention ----------------------------------------------------------------------------------------------


class RecurrentGemmaAttention(nn.Module):
    """Local multi-query attention (section 2.3): a query sees itself and the `attention_window_size` keys before it."""

    def __init__(self, config: RecurrentGemmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = new_linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = new_linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = new_linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = new_linear(
            config.hidden_size,
            config.hidden_size,
            bias=True,
            variance_scale=config.final_w_init_variance_scale,
        )

    def forward(
        self, x_BTE: torch.Tensor, inputs: LayerInputs, cache: Cache | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*x_BTE.shape[:2], -1, self.head_dim)
        q = rotate(linear(self.q_proj, x_BTE).view(shape).transpose(1, 2), inputs.cos_BTr, inputs.sin_BTr)
        k = rotate(linear(self.k_proj, x_BTE).view(shape).transpose(1, 2), inputs.cos_BTr, inputs.sin_BTr)
        v = linear(self.v_proj, x_BTE).view(shape).transpose(1, 2)
        if inputs.shard is not None:
            k, v = inputs.shard.with_left(k, v, size=self.config.attention_window_size, dim=2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, in_sequence_order=inputs.attention.in_sequence_order)
            k, v = k.to(q.dtype), v.to(q.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if inputs.attention.has_documents:
            q, k, v, is_broken = inputs.attention.without_broken(q, k, v)
        if implementation in LOCAL_IMPLEMENTATIONS:
            out, weights = attend_locally(implementation, q, k, v, inputs.attention, dropout)
        else:
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)(
                self, q, k, v, inputs.attention.backend_mask, dropout=dropout, scaling=self.scaling,
                sliding_window=self.config.sliding_window, is_causal=True, **kwargs,
            )  # fmt: skip
        if inputs.attention.has_documents:
            out = out.masked_fill(is_broken.transpose(1, 2), torch.nan)
        return linear(self.o_proj, out.reshape(*x_BTE.shape[:2], -1)), weights


# --- The recurrent block ------------------------------------------------------------------------------------------


class RecurrentGemmaRglru(nn.Module):
    """The Real-Gated Linear Recurrent Unit (section 2.4); its gates are block-diagonal with one block per head."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        block = config.lru_width // config.num_attention_heads
        self.recurrent_param = nn.Parameter(torch.empty(config.lru_width))
        self.input_gate_weight = nn.Parameter(torch.empty(config.num_attention_heads, block, block))
        self.input_gate_bias = nn.Parameter(torch.empty(config.num_attention_heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(config.num_attention_heads, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(config.num_attention_heads, block))
        self.act_fn = ACT2FN[config.hidden_activation]
        self.is_gelu_tanh = config.hidden_activation == "gelu_pytorch_tanh"

    def forward(
        self,
        x_BTD: torch.Tensor,
        y_BTD: torch.Tensor,
        inputs: LayerInputs,
        h0_BD: torch.Tensor | None,
        return_states: bool = False,
        conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return act(y) * RG-LRU(x), the last state and, if `return_states`, all states: see `rg_lru`.

        With `conv` (weight, bias and state of the convolution), x is one token before the convolution, and kernels
        update both states in place.
        """
        parameters = RgLruParameters(
            self.recurrent_gate_weight,
            self.recurrent_gate_bias,
            self.input_gate_weight,
            self.input_gate_bias,
            self.recurrent_param,
        )
        if conv is not None:
            weight, bias, conv_state = conv
            flags = (inputs.reset_BT, inputs.is_padding_BT, inputs.conv_tap_mask_BTK)
            reset, is_padding, conv_tap_mask = (None if flag is None else flag[:, 0] for flag in flags)
            out = rg_lru_step(
                x_BTD[:, 0], y_BTD[:, 0], weight, bias, parameters, conv_state, h0_BD,
                reset_B=reset, is_padding_B=is_padding, conv_tap_mask_BK=conv_tap_mask,
            )  # fmt: skip
            return out[:, None], h0_BD, None
        return rg_lru(
            x_BTD, y_BTD, parameters, h0_BD, inputs.reset_BT, inputs.is_padding_BT, self.act_fn,
            is_gelu_tanh=self.is_gelu_tanh,
            scan=linear_recurrence if inputs.shard is None else inputs.shard.linear_recurrence,
            return_states=return_states,
        )  # fmt: skip


class RecurrentGemmaConv1d(nn.Conv1d):
    """The convolution in front of the RG-LRU. A call without input returns its parameters, since accelerate's
    offloading and ZeRO-3 fetch parameters when the module that owns them is called."""

    def forward(
        self, input: torch.Tensor | None = None, past: int = 0, conv_tap_mask: torch.Tensor | None = None
    ) -> Any:
        """Compute `causal_conv1d`, or return (weight, bias)."""
        if input is None:
            return self.weight.view_as(self.weight), self.bias.view_as(self.bias)
        return causal_conv1d(input, self.weight, self.bias, conv_tap_mask, past=past)


class RecurrentGemmaRecurrentBlock(nn.Module):
    """linear_out(act(linear_y(x)) * RG-LRU(conv1d(linear_x(x)))) (section 2.3), `lru_width` wide inside."""

    def __init__(self, config: RecurrentGemmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        E, D = config.hidden_size, config.lru_width
        self.linear_y = new_linear(E, D, bias=True)
        self.linear_x = new_linear(E, D, bias=True)
        self.linear_out = new_linear(D, E, bias=True, variance_scale=config.final_w_init_variance_scale)
        self.conv_1d = RecurrentGemmaConv1d(D, D, kernel_size=config.conv1d_width, groups=D)
        self.conv_1d.init_std = math.sqrt(config.w_init_variance_scale / config.conv1d_width)  # type: ignore[assignment]
        self.rg_lru = RecurrentGemmaRglru(config)

    def forward(
        self, x_BTE: torch.Tensor, inputs: LayerInputs, cache: Cache | None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        u, y = linear(self.linear_x, x_BTE), linear(self.linear_y, x_BTE)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if layer is not None and self._can_step(u, layer):
            conv = (*self.conv_1d(), layer.conv_states[0])
            out, _, _ = self.rg_lru(u, y, inputs, layer.recurrent_states[0], conv=conv)
            layer.has_previous_state[0] = True
        else:
            if inputs.is_padding_BT is not None and u.shape[1] > 1:  # the convolution reads zeros before a document
                u = u.masked_fill(inputs.is_padding_BT[..., None], 0.0)
            u, past = self._behind_past(u, inputs, cache)
            x = self.conv_1d(u, past, inputs.conv_tap_mask_BTK)
            records = layer is not None and layer.record_past
            out, last, states = self.rg_lru(x, y, inputs, self._initial_state(layer), return_states=records)
            if layer is not None:
                cache.update_recurrent_state(last, self.layer_idx, history=states)
        return linear(self.linear_out, out), None

    def _can_step(self, u: torch.Tensor, layer: Any) -> bool:
        """Tell whether the one-token kernels do all between the linear layers and update the cache in place."""
        is_step = u.shape[1] == 1 and layer.is_recurrent_states_initialized[0] and not layer.record_past
        is_step = is_step and not torch.is_grad_enabled() and self.conv_1d.kernel_size[0] > 1
        # In float32 the kernel's gate matmul has no tensor cores and spills registers.
        is_step = is_step and u.dtype in (torch.bfloat16, torch.float16)
        return is_step and self.rg_lru.is_gelu_tanh and use_triton(u.device, u.dtype)

    def _behind_past(self, u: torch.Tensor, inputs: LayerInputs, cache: Cache | None) -> tuple[torch.Tensor, int]:
        """Return u with the inputs before it in front, (B, T or K - 1 + T, D), and how many those are; the cache keeps
        the last inputs for the next call."""
        context = self.conv_1d.kernel_size[0] - 1
        if inputs.shard is not None and context:
            (full,) = inputs.shard.with_left(u, size=context, dim=1)
        elif cache is not None:
            full = cache.update_conv_state(u.transpose(1, 2), self.layer_idx).transpose(1, 2).to(u.dtype)
        else:
            full = u
        return full, full.shape[1] - u.shape[1]

    def _initial_state(self, layer: Any) -> torch.Tensor | None:
        if layer is None or not layer.is_recurrent_states_initialized[0]:
            return None
        h0 = layer.recurrent_states[0]
        # A copy, because the backward pass reads it after the cache has overwritten its own.
        return h0.clone() if torch.is_grad_enabled() else h0


class RecurrentGemmaDecoderLayer(GradientCheckpointingLayer):
    """Residual block (figure 2): x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: RecurrentGemmaConfig, layer_idx: int) -> None:
        super().__init__()
        is_recurrent = config.layers_block_type[layer_idx] == "recurrent"
        block = RecurrentGemmaRecurrentBlock if is_recurrent else RecurrentGemmaAttention
        self.temporal_pre_norm = RecurrentGemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = block(config, layer_idx)
        self.channel_pre_norm = RecurrentGemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = RecurrentGemmaMLP(config)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Without gradients there is nothing to checkpoint; checkpointing would drop the cache that generation needs.
        return (
            super().__call__(*args, **kwargs) if torch.is_grad_enabled() else nn.Module.__call__(self, *args, **kwargs)
        )

    def forward(
        self, x_BTE: torch.Tensor, inputs: LayerInputs, cache: Cache | None = None, **kwargs: Any
    ) -> torch.Tensor:
        x_BTE = x_BTE + self.temporal_block(self.temporal_pre_norm(x_BTE), inputs, cache, **kwargs)[0]
        return x_BTE + self.mlp_block(self.channel_pre_norm(x_BTE))


# --- The model ----------------------------------------------------------------------------------------------------


class RecurrentGemmaPreTrainedModel(PreTrainedModel):
    """Loading, saving and the official initialisation of every parameter."""

    config: RecurrentGemmaConfig
    config_class = RecurrentGemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentGemmaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Small, and the recurrence amplifies their errors: quantizers skip them, and loading in float16 keeps them in
    # float32. Loading in bfloat16 leaves them in bfloat16, as the published checkpoints have them.
    _keep_in_fp32_modules = ["rg_lru", "conv_1d", "temporal_pre_norm", "channel_pre_norm", "final_norm"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: RecurrentGemmaConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, RecurrentGemmaConfig):
            raise ValueError(
                f"this model takes a {RecurrentGemmaConfig.__module__}.RecurrentGemmaConfig, not a "
                f"{type(config).__module__}.{type(config).__name__}: convert it with RecurrentGemmaConfig.adopt(config)"
            )
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_post_hook(_refuse_foreign_adapter)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module as the official code does. A block cannot initialise its children: Transformers calls
        this on a module of another package only if the module itself owns parameters."""
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            std = getattr(module, "init_std", module.weight.shape[-1] ** -0.5)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
        elif isinstance(module, RecurrentGemmaRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, RecurrentGemmaRglru):
            for weight in (module.input_gate_weight, module.recurrent_gate_weight):
                init.normal_(weight, mean=0.0, std=weight.shape[1] ** -0.5)
            init.zeros_(module.input_gate_bias)
            init.zeros_(module.recurrent_gate_bias)
            # a = exp(-softplus(Lambda)) is drawn uniformly by area from the ring 0.9 to 0.999 (section 2.4).
            square = torch.empty_like(module.recurrent_param, dtype=torch.float32).uniform_(0.9**2, 0.999**2)
            init.copy_(module.recurrent_param, torch.expm1(-0.5 * square.log()).log())

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Do as Transformers, and also take its own config of this model, which the Auto classes may pass."""
        return super()._from_config(RecurrentGemmaConfig.adopt(config), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Transformers does, but raise ValueError with their names for missing or unexpected weights of the
        stack, unless `output_loading_info=True` asks for them.

        Heads may be missing or unexpected. On a CPU without bfloat16 instructions the default dtype is float32, because
        bfloat16 is emulated there, ten times slower.
        """
        want_info = kwargs.pop("output_loading_info", False)
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = RecurrentGemmaConfig.adopt(kwargs["config"])
        no_dtype_asked_for = kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto")  # pipeline says "auto"
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        stack = ("embed_tokens.", "layers.", "final_norm.")
        for kind in ("missing", "unexpected"):
            names = sorted(name for name in info[f"{kind}_keys"] if name.removeprefix("model.").startswith(stack))
            if names and not want_info:
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                raise ValueError(
                    f"{len(names)} weights of {pretrained_model_name_or_path} are {kind}: {shown}. Is this a "
                    "RecurrentGemma checkpoint, and does its config.json describe it?"
                )
        if no_dtype_asked_for:
            model._leave_slow_bfloat16()
        return (model, info) if want_info else model

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as Transformers, but first raise ValueError for sizes that the ranks cannot split evenly."""
        if distributed_config is not None and (distributed_config.tp_size or 1) > 1:
            check_tensor_parallel(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _leave_slow_bfloat16(self) -> None:
        """Convert the loaded model to float32 where bfloat16 would be emulated, unless it is offloaded or quantized."""
        devices = {parameter.device.type for parameter in self.parameters()}
        is_quantized = getattr(self, "hf_quantizer", None) is not None
        if self.dtype != torch.bfloat16 or devices != {"cpu"} or is_quantized or not is_cpu_without_bfloat16("cpu"):
            return
        logger.warning_once(
            "This CPU has no bfloat16 instructions: loading in float32, which is several times faster here and takes "
            "twice the memory. Pass dtype=torch.bfloat16 to keep bfloat16."
        )
        self.float()
        self.config.dtype = torch.float32


def _refuse_foreign_adapter(model: nn.Module, keys: Any) -> None:
    """Raise ValueError for adapter weights that have no place here. PEFT drops them without a word: the adapter of a
    deeper model would lose its upper half."""
    names = sorted(name for name in keys.unexpected_keys if name.startswith("base_model.model.") and ".lora_" in name)
    if names:
        raise ValueError(
            f"the adapter has weights for {len(names)} places that this model does not have: {', '.join(names[:3])}, "
            "...; it was trained on some other base model (see base_model_name_or_path in its adapter_config.json)"
        )


class RecurrentGemmaModel(RecurrentGemmaPreTrainedModel):
    """The stack of residual blocks, without a head."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        # No padding_idx: the padding token's row is an ordinary one, and nothing reads it.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RecurrentGemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = RecurrentGemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Rounded to bfloat16 for every dtype, as in the training of the published models.
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu").item()
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "layers":  # who repeats or drops layers (PEFT's layer_replication) sets num_hidden_layers alone
            are_attention = [isinstance(layer.temporal_block, RecurrentGemmaAttention) for layer in value]
            kinds = ["attention" if is_attention else "recurrent" for is_attention in are_attention]
            pattern = self.config.block_types
            if kinds != [pattern[i % len(pattern)] for i in range(len(kinds))]:
                self.config.block_types = kinds
            self.has_attention = "attention" in kinds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        sequence_shard: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaModelOutput:
        """Run the stack.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, columns so far + T), 1 at tokens and 0 at padding, on any side; or (B or 1, H or 1,
                T, K), bool or additive, which replaces the window of the attention layers (recurrent layers do not
                see it).
            position_ids: (B or 1, T) int64 positions in the document; a 0 begins a new document. What
                DataCollatorWithFlattening gives besides (`cu_seq_lens_q`, `seq_idx`) stands in where they are missing.
            cache: RecurrentGemmaCache with what came before; an empty cache of Transformers is converted to one. Made
                here if `use_cache` asks for one.
            inputs_embeds: (B, T, E) rows of the embedding, instead of ids (the model scales them as it does its own).
            use_cache: config.use_cache by default, and never by default while training.
            sequence_shard: which chunk of a longer sequence this is; made by `context_parallel.shard_sequence`.
            past_key_values: the other name of `cache`.

        Returns:
            last_hidden_state (B, T, E), the cache, and on request all hidden states and attention probabilities.
        """
        x = self._embed(input_ids, inputs_embeds)
        B, T = x.shape[:2]
        cache = one_cache(cache, past_key_values)
        cache = self._cache(cache, bool(use_cache) if sequence_shard is not None else use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or False
        output_attentions = self.config.output_attentions if output_attentions is None else bool(output_attentions)
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation={self.config._attn_implementation!r} computes no attention probabilities: "
                "attentions will be empty; model.set_attn_implementation('eager') gives them"
            )
            output_attentions = False
        # Every check comes before the cache changes, so that an error leaves it as it was.
        mask = InputMask.read(attention_mask, cache, B, T)
        position_ids = document_positions(position_ids, kwargs, mask.is_token, (B, T), cache)
        if sequence_shard is not None:
            sequence_shard.check(self.config, T, attention_mask, cache, output_attentions)
            mask = mask._replace(seen=sequence_shard.offset)
        if position_ids is not None:
            check_positions(position_ids, mask.is_token, (B, T))
        check_attention(self.config, mask, T, cache is not None)
        start: torch.Tensor | int = mask.seen
        if cache is not None:
            cache.check(self, B)
            start = cache.token_counts(x.device)
        x, columns = Columns.locate(x, mask.is_token, position_ids, start, keeps_state=cache is not None)
        is_flash = "flash" in self.config._attn_implementation
        if is_flash and self.has_attention:
            check_flash(columns, self.config.attention_window_size, cache is not None)
        inputs = self._layer_inputs(x, columns, mask, cache, output_attentions, sequence_shard)
        if is_flash and cache is None and not columns.is_one_document:
            kwargs["position_ids"] = columns.position  # how Transformers' flash attention learns of packed documents
        return self._run_layers(x, inputs, cache, columns.restore, output_hidden_states, output_attentions, **kwargs)

    def _run_layers(
        self,
        x: torch.Tensor,
        inputs: LayerInputs,
        cache: Cache | None,
        restore: torch.Tensor | None,
        output_hidden_states: bool | int | list[int],
        output_attentions: bool,
        **kwargs: Any,
    ) -> RecurrentGemmaModelOutput:
        layers = self.layers[: self.config.num_hidden_layers]  # fewer while drafts leave early (LayerSkip)
        count = len(layers) + 1
        wanted = selected(output_hidden_states, count)
        hidden_states: list[torch.Tensor | None] = []
        attentions: list[torch.Tensor] = []
        blocks: list[Any] = [layer.temporal_block for layer in layers if output_attentions]
        hooks = [block.register_forward_hook(lambda module, args, out: attentions.append(out[1])) for block in blocks]
        try:
            for i, layer in enumerate(layers):
                hidden_states.append(reorder(x, restore) if i in wanted else None)
                x = layer(x, inputs, cache=cache, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        attentions = [reorder_attention(weights, restore) for weights in attentions if weights is not None]
        x = reorder(self.final_norm(x), restore)
        hidden_states.append(x if count - 1 in wanted else None)
        return RecurrentGemmaModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
            cache=cache,
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        check_input(input_ids, inputs_embeds, self.config.vocab_size, self.config.hidden_size)
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
        return inputs_embeds * self.embedding_scale if self.config.embeddings_scale_by_sqrt_dim else inputs_embeds

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("gradient checkpointing would run the cache twice; train without past_key_values")
            return None
        if cache is not None:
            return RecurrentGemmaCache.adopt(cache, self.config)
        if use_cache is None:  # what a transform of torch.func writes into a cache is dead outside of it
            use_cache = self.config.use_cache and not self.training and not is_transformed()
        return RecurrentGemmaCache(self.config) if use_cache else None

    def _layer_inputs(
        self,
        x: torch.Tensor,
        columns: Columns,
        mask: InputMask,
        cache: RecurrentGemmaCache | None,
        output_attentions: bool,
        shard: Any,
    ) -> LayerInputs:
        """Count the forward in the cache, and compute what every layer reads."""
        (B, T), W, implementation = x.shape[:2], self.config.attention_window_size, self.config._attn_implementation
        in_order = cache is None or T > 1 or output_attentions or mask.mask_4d is not None or torch.is_grad_enabled()
        in_order = in_order or "flash" in implementation
        seen, past_lengths = mask.seen, None
        if cache is not None:
            if in_order and T == 1:
                seen = cache.get_seq_length()
            cache.begin_forward(B, T, x.device, columns.is_token, mask.is_token)
            past_lengths = cache.progress.past_lengths
        angle = rotary_angles(columns.position, self.config.rotary_dim, self.config.rope_theta)
        attention = None
        if self.has_attention:
            if in_order:
                attention = AttentionMask.local(columns, seen, W)
            else:
                attention = AttentionMask.of_ring(columns, cache.slot_token_indices(), W)
            attention = with_backend_mask(
                attention, columns, past_lengths, mask.mask_4d, implementation, B, output_attentions
            )
        conv_tap_mask = None
        if not columns.is_one_document:
            back = torch.arange(self.config.conv1d_width - 1, -1, -1, device=x.device)
            conv_tap_mask = columns.position[..., None] >= back
        is_padding = None if columns.is_token is None else ~columns.is_token
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return LayerInputs(cos, sin, columns.position == 0, is_padding, conv_tap_mask, attention, shard)


# --- Heads --------------------------------------------------------------------------------------------------------


class RecurrentGemmaLMHead(nn.Linear):
    """The head: logits, or with labels the loss of each token without logits. Both are computed in its forward, because
    sharding (FSDP, ZeRO-3) and offloading fetch the weight of the module that is called."""

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None, **loss_kwargs: Any) -> torch.Tensor:
        if labels is None:
            out = fast_linear(input, self.weight, self.bias)
            return F.linear(input, self.weight, self.bias) if out is None else out
        return linear_cross_entropy(input, self.weight, labels, **loss_kwargs)


class RecurrentGemmaForCausalLM(RecurrentGemmaPreTrainedModel, RecurrentGemmaGenerationMixin):
    """The language model: next-token logits, soft-capped as c tanh(logits / c)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.model = RecurrentGemmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = RecurrentGemmaLMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaCausalLMOutput | RecurrentGemmaLossOutput:
        """Run the model as `RecurrentGemmaModel.forward` and compute logits or the loss.

        Args:
            labels: (B, T) int64 next-token targets, not shifted (position t is predicted from t - 1), -100 ignored.
            logits_to_keep: the last n positions (0: all), or their indices, (n,) or one set per row (B, n).
            kwargs: `num_items_in_batch` (the loss is the sum over the targets divided by it), `ignore_index`,
                `shift_labels` (B, T) (targets of the positions themselves, instead of labels) and `label_smoothing`
                concern the loss.

        Returns:
            loss (mean over the targets) where labels are given, logits (B, n, V), the cache. While training with
            labels there are no logits: the loss is computed without them (`linear_cross_entropy`), unless
            `logits_to_keep` asks for some, config.fuse_linear_cross_entropy is False, or `loss_function` is your own.

        Raises:
            ValueError: for labels that are no token ids, and all that the model refuses.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        x, loss = outputs.last_hidden_state, None
        if labels is not None:
            labels, kwargs = self._targets(labels, attention_mask, position_ids, kwargs)
        wants_some = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        skips_logits = labels is not None and self.training and self.config.fuse_linear_cross_entropy and not wants_some
        # Transformers' own loss needs the logits of every position, and does not smooth.
        needs_fused = skips_logits or wants_some or bool(kwargs.get("label_smoothing"))
        if labels is not None and needs_fused and self.loss_function is ForCausalLMLoss:
            is_weight = type(self.lm_head) is RecurrentGemmaLMHead and self.lm_head.bias is None
            is_weight = is_weight and self.tp_size in (None, 1)  # else only the head knows its logits
            loss = next_token_loss(
                self.lm_head, x, labels, self.config.vocab_size, is_weight, self.config.logits_soft_cap, **kwargs
            )
        logits = None
        if loss is None or not skips_logits:
            logits = soft_capped(self.lm_head(select_columns(x, logits_to_keep)), self.config.logits_soft_cap)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if loss is not None and kwargs.get("sequence_shard") is not None:
            loss = kwargs["sequence_shard"].total(loss)
        rest = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions, "cache": outputs.cache}
        if logits is None:
            return RecurrentGemmaLossOutput(loss=loss, **rest)
        return RecurrentGemmaCausalLMOutput(loss=loss, logits=logits, **rest)

    def _targets(
        self, labels_BT: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Check labels and `shift_labels`, and mask the first token of each document in both."""
        B, T = labels_BT.shape
        is_token = token_columns(attention_mask, T)
        positions = document_positions(position_ids, kwargs, is_token, (B, T))
        first_BT = first_tokens(labels_BT, is_token, positions)
        ignore_index, shifted = kwargs.get("ignore_index", IGNORE_INDEX), kwargs.get("shift_labels")
        if may_look_at(labels_BT):
            check_labels(labels_BT if shifted is None else shifted, self.config.vocab_size, ignore_index)
        if shifted is not None:
            next_is_first = F.pad(first_BT[:, 1:], (0, 1)).to(shifted.device)
            kwargs = {**kwargs, "shift_labels": shifted.masked_fill(next_is_first, ignore_index)}
        return labels_BT.masked_fill(first_BT, ignore_index), kwargs


__all__ = ["RecurrentGemmaForCausalLM", "RecurrentGemmaModel", "RecurrentGemmaPreTrainedModel"]
