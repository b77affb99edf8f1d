"""RecurrentGemma, Griffin and Hawk: layers, model, heads; read from top to bottom.

Shapes: B batch, T tokens, E hidden_size, D lru_width, H heads (of attention and of the gates), G key/value heads,
h head_dim, K keys, W attention_window_size, V vocabulary. Equations are those of the Griffin paper (arXiv 2402.19427).

Two ideas carry the file:
- A token has an *index* among the tokens of its row; padding has none. Before the layers run, a padded batch is
  compacted (the tokens of each row in front, its padding behind, where the causal mask hides it); outputs are restored
  to the caller's order at the end.
- A document begins at *position* 0. Attention, convolution and recurrence of a token at position p look at most p
  tokens back, so packed documents never meet.
State lives in the cache alone (RecurrentGemmaCache, which Transformers' own empty caches become).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, GradientCheckpointingLayer, PreTrainedModel, logging
from transformers import initialization as init

from .attention import (
    LOCAL_IMPLEMENTATIONS,
    AttentionMask,
    attend_in_blocks,
    eager_attention,
    rotate,
    with_backend_mask,
)
from .backend import use_triton
from .cache_recurrent_gemma import RecurrentGemmaCache
from .causal_conv1d import causal_conv1d
from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .cpu_linear import fast_linear, is_cpu_without_bfloat16, linear
from .cross_entropy import IGNORE_INDEX, check_labels, chunked_cross_entropy, linear_cross_entropy
from .generation import RecurrentGemmaGenerationMixin
from .inputs import (
    InputMask,
    check_positions,
    document_positions,
    first_tokens,
    is_counted,
    last_true,
    may_look_at,
    reorder,
    reorder_attention,
    shows_any,
)
from .rg_lru import RgLruParameters, rg_lru, rg_lru_step
from .scan import linear_recurrence
from .tensor_parallel import check_tensor_parallel
from .transformers_compat import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    ForCausalLMLoss,
    QuestionAnsweringModelOutput,
    RecurrentGemmaCausalLMOutput,
    RecurrentGemmaModelOutput,
    RecurrentGemmaSequenceClassifierOutput,
    TokenClassifierOutput,
    can_return_tuple,
    one_cache,
)

logger = logging.get_logger(__name__)


class Step(NamedTuple):
    """What every layer needs to know about one forward; computed once. A tuple, so accelerate can move it."""

    cos_BTr: torch.Tensor  # (B or 1, T, rotary_dim / 2), dtype of the activations
    sin_BTr: torch.Tensor
    reset_BT: torch.Tensor  # (B or 1, T) bool: a document begins
    # bool, True at padding: states are carried over unchanged; None if no padding can affect a state that is kept
    is_padding_BT: torch.Tensor | None
    conv_tap_mask_BTK: torch.Tensor | None  # (B or 1, T, K) 0 or 1: conv taps that stay in the document; None: all do
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
        # By hand: on a CPU F.rms_norm takes nearly twice as long.
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(x, x, self.weight.to(x.dtype)).to(x_BTE.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def _new_linear(inputs: int, outputs: int, *, bias: bool, variance_scale: float = 1.0) -> nn.Linear:
    """A linear layer that remembers its official initialisation, std = sqrt(variance_scale / inputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.init_std = math.sqrt(variance_scale / inputs)  # type: ignore[assignment]  # read by _init_weights
    return layer


class RecurrentGemmaMLP(nn.Module):
    """Gated MLP (section 2.2): down(act(gate(x)) * up(x)); config.intermediate_size counts both branches."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.gate_proj = _new_linear(config.hidden_size, width, bias=True)
        self.up_proj = _new_linear(config.hidden_size, width, bias=True)
        self.down_proj = _new_linear(
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
        self.q_proj = _new_linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = _new_linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = _new_linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = _new_linear(
            config.hidden_size,
            config.hidden_size,
            bias=True,
            variance_scale=config.final_w_init_variance_scale,
        )

    def forward(
        self, x_BTE: torch.Tensor, step: Step, cache: Cache | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*x_BTE.shape[:2], -1, self.head_dim)
        q = rotate(linear(self.q_proj, x_BTE).view(shape).transpose(1, 2), step.cos_BTr, step.sin_BTr)
        k = rotate(linear(self.k_proj, x_BTE).view(shape).transpose(1, 2), step.cos_BTr, step.sin_BTr)
        v = linear(self.v_proj, x_BTE).view(shape).transpose(1, 2)
        if step.shard is not None:
            k, v = step.shard.with_left(k, v, size=self.config.attention_window_size, dim=2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, in_sequence_order=step.attention.in_sequence_order)
            k, v = k.to(q.dtype), v.to(q.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if implementation in LOCAL_IMPLEMENTATIONS:
            attend = LOCAL_IMPLEMENTATIONS[implementation]
            out, weights = self._attend(attend, q, k, v, step.attention, dropout)
            out = out.transpose(1, 2)
        else:
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)(
                self, q, k, v, step.attention.backend_mask, dropout=dropout, scaling=self.scaling,
                sliding_window=self.config.sliding_window, is_causal=True, **kwargs,
            )  # fmt: skip
        return linear(self.o_proj, out.reshape(*x_BTE.shape[:2], -1)), weights

    @staticmethod
    def _attend(
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: AttentionMask,
        dropout: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if mask.in_blocks:
            return attend_in_blocks(attend, q, k, v, mask, dropout), None
        return attend(q, k, v, mask.backend_mask, dropout)


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
        step: Step,
        h0_BD: torch.Tensor | None,
        return_states: bool = False,
        conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """act(y) * RG-LRU(x), the last state and, where wanted, all states: see `rg_lru`.

        With `conv`, weight, bias and state of the convolution, x is its input: one token by kernels that update both
        states in place.
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
            flags = (step.reset_BT, step.is_padding_BT, step.conv_tap_mask_BTK)
            reset, is_padding, conv_tap_mask = (None if flag is None else flag[:, 0] for flag in flags)
            out = rg_lru_step(
                x_BTD[:, 0], y_BTD[:, 0], weight, bias, parameters, conv_state, h0_BD,
                reset_B=reset, is_padding_B=is_padding, conv_tap_mask_BK=conv_tap_mask,
            )  # fmt: skip
            return out[:, None], h0_BD, None
        return rg_lru(
            x_BTD, y_BTD, parameters, h0_BD, step.reset_BT, step.is_padding_BT, self.act_fn,
            is_gelu_tanh=self.is_gelu_tanh,
            scan=linear_recurrence if step.shard is None else step.shard.linear_recurrence,
            return_states=return_states,
        )  # fmt: skip


class RecurrentGemmaConv1d(nn.Conv1d):
    """The convolution in front of the RG-LRU. Called without an input it returns its parameters: accelerate's
    offloading and ZeRO-3 fetch them when the module that owns them is called."""

    def forward(
        self, input: torch.Tensor | None = None, past: int = 0, conv_tap_mask: torch.Tensor | None = None
    ) -> Any:
        """See `causal_conv1d`."""
        if input is None:
            return self.weight.view_as(self.weight), self.bias.view_as(self.bias)
        return causal_conv1d(input, self.weight, self.bias, conv_tap_mask, past=past)


class RecurrentGemmaRecurrentBlock(nn.Module):
    """linear_out(act(linear_y(x)) * RG-LRU(conv1d(linear_x(x)))) (section 2.3), `lru_width` wide inside."""

    def __init__(self, config: RecurrentGemmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        E, D = config.hidden_size, config.lru_width
        self.linear_y = _new_linear(E, D, bias=True)
        self.linear_x = _new_linear(E, D, bias=True)
        self.linear_out = _new_linear(D, E, bias=True, variance_scale=config.final_w_init_variance_scale)
        self.conv_1d = RecurrentGemmaConv1d(D, D, kernel_size=config.conv1d_width, groups=D)
        self.conv_1d.init_std = math.sqrt(config.w_init_variance_scale / config.conv1d_width)  # type: ignore[assignment]
        self.rg_lru = RecurrentGemmaRglru(config)

    def forward(self, x_BTE: torch.Tensor, step: Step, cache: Cache | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        u, y = linear(self.linear_x, x_BTE), linear(self.linear_y, x_BTE)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if layer is not None and self._can_step(u, layer):
            conv = (*self.conv_1d(), layer.conv_states[0])
            out, _, _ = self.rg_lru(u, y, step, layer.recurrent_states[0], conv=conv)
            layer.has_previous_state[0] = True
        else:
            u, past = self._behind_past(u, step, cache)
            x = self.conv_1d(u, past, step.conv_tap_mask_BTK)
            records = layer is not None and layer.record_past
            out, last, states = self.rg_lru(x, y, step, self._initial_state(layer), return_states=records)
            if layer is not None:
                cache.update_recurrent_state(last, self.layer_idx, history=states)
        return linear(self.linear_out, out), None

    def _can_step(self, u: torch.Tensor, layer: Any) -> bool:
        """Whether kernels of one token do all that lies between the linear layers, and update the cache in place."""
        is_step = u.shape[1] == 1 and layer.is_recurrent_states_initialized[0] and not layer.record_past
        is_step = is_step and not torch.is_grad_enabled() and self.conv_1d.kernel_size[0] > 1
        # In float32 the gates' matmul would run without tensor cores, and spill its registers.
        is_step = is_step and u.dtype in (torch.bfloat16, torch.float16)
        return is_step and self.rg_lru.is_gelu_tanh and use_triton(u.device, u.dtype)

    def _behind_past(self, u: torch.Tensor, step: Step, cache: Cache | None) -> tuple[torch.Tensor, int]:
        """(B, T or K - 1 + T, D): u behind what came before it, and how many; the cache keeps what comes before the
        next."""
        context = self.conv_1d.kernel_size[0] - 1
        if step.shard is not None and context:
            (full,) = step.shard.with_left(u, size=context, dim=1)
        elif cache is not None:
            full = cache.update_conv_state(u.transpose(1, 2), self.layer_idx).transpose(1, 2).to(u.dtype)
        else:
            full = u
        return full, full.shape[1] - u.shape[1]

    def _initial_state(self, layer: Any) -> torch.Tensor | None:
        if layer is None or not layer.is_recurrent_states_initialized[0]:
            return None
        h0 = layer.recurrent_states[0]
        # The backward pass reads it, after the cache has overwritten its own.
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

    def forward(
        self, x_BTE: torch.Tensor, step: Step, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixed, weights = self.temporal_block(self.temporal_pre_norm(x_BTE), step, cache, **kwargs)
        x_BTE = x_BTE + mixed
        return x_BTE + self.mlp_block(self.channel_pre_norm(x_BTE)), weights


# --- The model ----------------------------------------------------------------------------------------------------


class RecurrentGemmaPreTrainedModel(PreTrainedModel):
    """Loading, saving and the official initialisation of every parameter."""

    config: RecurrentGemmaConfig
    config_class = RecurrentGemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentGemmaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Small, and what errors of the recurrence grow from: quantizers leave these alone, and loading in float16 keeps
    # them in float32. Loaded in bfloat16 they stay as the published checkpoints have them.
    _keep_in_fp32_modules = ["rg_lru", "conv_1d", "temporal_pre_norm", "channel_pre_norm", "final_norm"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_refuse_foreign_adapter)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The official initialisation. One module, one rule: Transformers visits a module of another package only if
        it owns parameters, so a block cannot initialise its children."""
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
            # Lambda such that a = exp(-softplus(Lambda)) is uniform by area in the ring 0.9 to 0.999 (section 2.4).
            square = torch.empty_like(module.recurrent_param, dtype=torch.float32).uniform_(0.9**2, 0.999**2)
            init.copy_(module.recurrent_param, torch.expm1(-0.5 * square.log()).log())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but strict: missing or unexpected weights raise ValueError with their names.

        Only the heads of other tasks may be missing or left over. On a CPU without bfloat16 instructions the default
        dtype is float32: bfloat16 is emulated there, ten times slower.
        """
        want_info = kwargs.pop("output_loading_info", False)
        no_dtype_asked_for = kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto")  # pipeline says "auto"
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        heads = ("lm_head.", "score.", "qa_outputs.")
        for kind in ("missing", "unexpected"):
            names = sorted(name for name in info[f"{kind}_keys"] if not name.startswith(heads))
            if names:
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
        """As in Transformers, but what cannot be split over the ranks is refused by name before anything is."""
        if distributed_config is not None and (distributed_config.tp_size or 1) > 1:
            check_tensor_parallel(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _leave_slow_bfloat16(self) -> None:
        """Converts to float32, once loaded, where bfloat16 would be emulated; leaves what is offloaded or quantized."""
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
    """PEFT loads what fits of an adapter and drops the rest in silence; a deeper model's would lose its upper half."""
    names = sorted(name for name in keys.unexpected_keys if name.startswith("base_model.model.") and ".lora_" in name)
    if names:
        raise ValueError(
            f"the adapter has weights for {len(names)} places that this model does not have: {', '.join(names[:3])}, "
            "...; it was trained on some other base model (see base_model_name_or_path in its adapter_config.json)"
        )


def _default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


class RecurrentGemmaModel(RecurrentGemmaPreTrainedModel):
    """The stack of residual blocks, without a head."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        config.validate_architecture()
        # No padding_idx: the row of the padding token is as good as any other, and is never looked at.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RecurrentGemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = RecurrentGemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Rounded to bfloat16 whatever the dtype, as when the published models were trained.
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu").item()
        blocks = config.layers_block_type
        self.first_attention = blocks.index("attention") if "attention" in blocks else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        sequence_shard: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaModelOutput:
        """Runs the stack.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, columns so far + T), 1 at tokens and 0 at padding, on any side; or (B or 1, H or 1,
                T, K), bool or additive, which replaces the window of the attention layers (recurrent layers do not
                see it).
            position_ids: (B or 1, T) int64 positions in the document; a 0 begins a new document. What
                DataCollatorWithFlattening gives besides (`cu_seq_lens_q`, `seq_idx`) stands in where they are missing.
            cache: what came before, a RecurrentGemmaCache; an empty one of Transformers becomes one. Made here if
                `use_cache` asks for one.
            inputs_embeds: (B, T, E) rows of the embedding, instead of ids (the model scales them as it does its own).
            use_cache: config.use_cache by default, and never by default while training.
            sequence_shard: which chunk of a longer sequence this is; made by `context_parallel.shard_sequence`.
            past_key_values: the other name of `cache`.

        Returns:
            last_hidden_state (B, T, E), the cache, and on request all hidden states and attention probabilities.
        """
        x = self._embed(input_ids, inputs_embeds)
        B, T = x.shape[:2]
        position_ids = document_positions(position_ids, kwargs, B, T)
        cache = one_cache(cache, past_key_values)
        cache = self._cache(cache, bool(use_cache) if sequence_shard is not None else use_cache)
        output_hidden_states = bool(_default(output_hidden_states, self.config.output_hidden_states))
        output_attentions = bool(_default(output_attentions, self.config.output_attentions))
        mask = InputMask.read(attention_mask, cache, B, T)
        if sequence_shard is not None:
            sequence_shard.check(self.config, T, attention_mask, cache, output_attentions)
            mask = mask._replace(seen=sequence_shard.offset)
        # Everything that can be wrong is found before the cache moves on.
        self._check(mask, position_ids, cache, output_attentions, (B, T))
        order = None
        if mask.tokens is not None and T > 1:
            order = (~mask.tokens).to(torch.int8).argsort(dim=1, stable=True)  # tokens first, then padding
            x = reorder(x, order)
            position_ids = None if position_ids is None else reorder(position_ids.expand(B, T), order)
        if position_ids is not None and mask.seen == 0 and is_counted(position_ids):
            position_ids = None
        if cache is not None:
            cache.begin_forward(B, T, x.device, mask.tokens)
        step = self._step(x, mask, position_ids, cache, order is not None, output_attentions)
        step = step._replace(shard=sequence_shard)
        restore = None if order is None else order.argsort(dim=1)
        if "flash" in self.config._attn_implementation and cache is None and position_ids is not None:
            kwargs["position_ids"] = position_ids  # how Transformers' flash attention learns of packed documents
        return self._run_layers(x, step, cache, restore, output_hidden_states, output_attentions, **kwargs)

    def _run_layers(
        self,
        x: torch.Tensor,
        step: Step,
        cache: Cache | None,
        restore: torch.Tensor | None,
        output_hidden_states: bool,
        output_attentions: bool,
        **kwargs: Any,
    ) -> RecurrentGemmaModelOutput:
        hidden_states: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(reorder(x, restore))
            x, weights = layer(x, step, cache=cache, **kwargs)
            if output_attentions and weights is not None:
                attentions.append(reorder_attention(weights, restore))
        x = reorder(self.final_norm(x), restore)
        return RecurrentGemmaModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cache=cache,
        )

    def _check(
        self,
        mask: InputMask,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
        shape: tuple[int, int],
    ) -> None:
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager', this model has {implementation!r}; call "
                "model.set_attn_implementation('eager')"
            )
        B, T = shape
        if position_ids is not None and position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} must be ({B} or 1, {T})")
        if position_ids is not None and may_look_at(position_ids):
            check_positions(position_ids.expand(B, T), mask.tokens)
        if cache is not None:
            cache.check_config(self.config)
        if mask.mask_4d is None or self.first_attention is None:
            return
        if implementation not in LOCAL_IMPLEMENTATIONS:
            raise ValueError(f"a 4D attention_mask needs attn_implementation 'eager' or 'sdpa', not {implementation!r}")
        K = T
        if cache is not None:
            K += min(self.config.attention_window_size, mask.seen)
        if mask.mask_4d.shape[2] != T or not K <= mask.mask_4d.shape[3] <= max(K, mask.seen + T):
            raise ValueError(
                f"a 4D attention_mask of shape {tuple(mask.mask_4d.shape)} must be (batch or 1, heads or 1, {T}, {K})"
            )
        if mask.mask_4d.shape[3] > K and shows_any(mask.mask_4d[..., : mask.mask_4d.shape[3] - K]):
            raise ValueError(
                f"the 4D attention_mask shows keys that the cache no longer holds: it keeps the last {K - T} "
                "(attention_window_size); hide the earlier ones"
            )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = inputs_embeds if input_ids is None else input_ids
        if given.ndim != (3 if input_ids is None else 2) or 0 in given.shape[:2]:
            raise ValueError(
                f"the input has shape {tuple(given.shape)}; it must be (batch, tokens) ids or (batch, tokens, width) "
                "embeddings with at least one token (an empty prompt needs at least its BOS token)"
            )
        if input_ids is not None:
            # On a GPU this would wait for the device; there the embedding's own assertion has to do.
            if may_look_at(input_ids):
                low, high = input_ids.aminmax()
                if low < 0 or high >= self.config.vocab_size:
                    raise ValueError(
                        f"token ids from {low.item()} to {high.item()} do not fit vocab_size={self.config.vocab_size}; "
                        "is this the tokenizer of this model?"
                    )
            inputs_embeds = self.embed_tokens(input_ids)
        return inputs_embeds * self.embedding_scale if self.config.embeddings_scale_by_sqrt_dim else inputs_embeds

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("gradient checkpointing would run the cache twice; train without past_key_values")
            return None
        if cache is not None:
            return RecurrentGemmaCache.adopt(cache, self.config)
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return RecurrentGemmaCache(self.config) if wanted else None

    def _step(
        self,
        x: torch.Tensor,
        mask: InputMask,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        is_compacted: bool,
        output_attentions: bool,
    ) -> Step:
        B, T = x.shape[:2]
        columns = torch.arange(T, device=x.device)[None]
        is_token = mask.tokens
        if is_compacted:  # tokens first; without a cache nothing ever looks at what stands behind them
            is_token = None if cache is None else columns < mask.tokens.sum(1, keepdim=True)
        position = position_ids
        if position is None:
            position = mask.seen + columns
            if cache is not None:
                position = cache.progress.past_lengths.to(x.device)[:, None] + columns
        r = self.config.rotary_dim // 2
        exponent = torch.arange(r, device=x.device, dtype=torch.float32) / r
        # Times the reciprocal, as the official code: divided by, angles far into a text differ in their last bits.
        angle = position[..., None].float() * (1.0 / self.config.rope_theta**exponent)
        attention = None
        if self.first_attention is not None:
            attention = self._attention_mask(mask, position, is_token, cache, output_attentions)
            is_single_causal_block = attention.is_single_causal_block and position_ids is None
            attention = attention._replace(is_single_causal_block=is_single_causal_block)
            attention = with_backend_mask(attention, mask, self.config._attn_implementation, B, output_attentions)
        conv_tap_mask = None
        if position_ids is not None:  # else there is one document
            back = torch.arange(self.config.conv1d_width - 1, -1, -1, device=x.device)
            conv_tap_mask = (position[..., None] >= back).to(x.dtype)
        is_padding = None if is_token is None else ~is_token
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return Step(cos, sin, position == 0, is_padding, conv_tap_mask, attention)

    def _attention_mask(
        self,
        mask: InputMask,
        position: torch.Tensor,
        is_token: torch.Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> AttentionMask:
        T, W = position.shape[1], self.config.attention_window_size
        columns = torch.arange(T, device=position.device)[None]
        max_lookback = position.clamp(max=W)
        if cache is None:
            before = min(W, mask.seen)  # keys of other ranks
            key = torch.arange(mask.seen - before, mask.seen + T, device=position.device)[None]
            query, is_single_causal_block = mask.seen + columns, mask.seen == 0
            return AttentionMask(
                query,
                key,
                max_lookback,
                None,
                W,
                before,
                is_single_causal_block=is_single_causal_block,
                in_sequence_order=False,
            )
        past = cache.progress.past_lengths.to(position.device)[:, None]
        in_order = T > 1 or output_attentions or mask.mask_4d is not None or torch.is_grad_enabled()
        in_order = in_order or "flash" in self.config._attn_implementation
        if in_order:
            query_offset = min(W, cache.progress.columns - T)
            key = past - query_offset + torch.arange(query_offset + T, device=position.device)
        else:
            query_offset, key = None, cache.slot_token_indices().to(position.device)
        query_is_token = is_token if T == 1 else None
        # With nothing before it, every row counts from 0 and padding stands behind, where causality hides it.
        is_single_causal_block = T > 1 and cache.progress.columns == T
        return AttentionMask(
            past + columns,
            key,
            max_lookback,
            query_is_token,
            W,
            query_offset,
            is_single_causal_block=is_single_causal_block,
            in_sequence_order=in_order,
        )


# --- Heads --------------------------------------------------------------------------------------------------------


def _kept(x_BTE: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions whose logits are wanted: the last n, an index (n,) for all rows, or one per row (B, n)."""
    if isinstance(logits_to_keep, int):
        return x_BTE[:, -logits_to_keep:] if logits_to_keep else x_BTE
    if logits_to_keep.ndim == 2:
        return reorder(x_BTE, logits_to_keep)
    return x_BTE[:, logits_to_keep]


class RecurrentGemmaLMHead(nn.Linear):
    """The head: logits of hidden states, or with labels the losses of the tokens, without the logits. Both in its
    forward, because sharding (FSDP, ZeRO-3) and offloading fetch the weight of a module that is called."""

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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaCausalLMOutput:
        """As `RecurrentGemmaModel.forward`, and:

        Args:
            labels: (B, T) int64 next-token targets, not shifted (position t is predicted from t - 1), -100 ignored.
            logits_to_keep: the last n positions (0: all), or their indices, (n,) or one set per row (B, n).
            kwargs: `num_items_in_batch` (the loss is the sum over the targets divided by it), `ignore_index`,
                `shift_labels` (B, T) (targets of the positions themselves, instead of labels) and `label_smoothing`
                concern the loss.

        Returns:
            loss (mean over the targets) where labels are given, logits (B, n, V), the cache. While training with
            labels the logits are None unless logits_to_keep asks for some: the loss is computed without them
            (`linear_cross_entropy`). A `loss_function` of your own, set on the model, gets all logits.

        Raises:
            ValueError: for labels that are no token ids, and all that the model refuses.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        x, loss = outputs.last_hidden_state, None
        if labels is not None:
            positions = document_positions(position_ids, kwargs, *x.shape[:2])
            labels, kwargs = self._targets(labels, first_tokens(labels, attention_mask, positions), kwargs)
        wants_some = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        if labels is not None and self._can_do_without_logits(wants_some, kwargs):
            loss = self._loss_without_logits(x, labels, **kwargs)
        logits = None
        if loss is None or wants_some or not self.training:
            logits = self.lm_head(_kept(x, logits_to_keep))
            if self.config.logits_soft_cap:
                logits = torch.tanh(logits / self.config.logits_soft_cap) * self.config.logits_soft_cap
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if loss is not None and kwargs.get("sequence_shard") is not None:
            loss = kwargs["sequence_shard"].total(loss)
        return RecurrentGemmaCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cache=outputs.cache,
        )

    def _targets(
        self, labels_BT: torch.Tensor, first_BT: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """labels and `shift_labels`, checked and without the first tokens of documents."""
        ignore_index, shifted = kwargs.get("ignore_index", IGNORE_INDEX), kwargs.get("shift_labels")
        if may_look_at(labels_BT):
            check_labels(labels_BT if shifted is None else shifted, self.config.vocab_size, ignore_index)
        if shifted is not None:
            next_is_first = F.pad(first_BT[:, 1:], (0, 1)).to(shifted.device)
            kwargs = {**kwargs, "shift_labels": shifted.masked_fill(next_is_first, ignore_index)}
        return labels_BT.masked_fill(first_BT, ignore_index), kwargs

    def _can_do_without_logits(self, wants_some: bool, kwargs: dict[str, Any]) -> bool:
        """In training; and wherever Transformers' own loss of all logits is not what is asked for."""
        is_special = wants_some or bool(kwargs.get("label_smoothing"))
        return (self.training or is_special) and self.loss_function is ForCausalLMLoss

    def _loss_without_logits(
        self,
        x_BTE: torch.Tensor,
        labels_BT: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What `ForCausalLMLoss` computes, from the hidden states."""
        targets = F.pad(labels_BT[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        x_NE, targets_N = x_BTE.flatten(0, 1), targets.flatten()
        how: dict[str, Any] = {
            "soft_cap": self.config.logits_soft_cap,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
        }
        if type(self.lm_head) is RecurrentGemmaLMHead and self.lm_head.bias is None and self.tp_size in (None, 1):
            losses_N = self.lm_head(x_NE, targets_N, **how)
        else:  # an adapter on it, a sharded or a resized one: only it knows its logits
            losses_N = chunked_cross_entropy(self.lm_head, x_NE, targets_N, self.config.vocab_size, **how)
        if num_items_in_batch is None:
            return losses_N.sum() / (targets_N != ignore_index).sum().to(losses_N.device)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(losses_N.device)
        return losses_N.sum() / num_items_in_batch


def _last_token(
    config: RecurrentGemmaConfig, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, B: int, T: int
) -> torch.Tensor | None:
    """(B, 1) column of the last token of each row; None where nothing tells padding apart."""
    if attention_mask is not None and attention_mask.ndim == 2:
        tokens = attention_mask[:, -T:].bool()
    elif input_ids is not None and config.pad_token_id is not None:
        tokens = input_ids != config.pad_token_id
    elif B == 1:
        return None
    else:
        raise ValueError(
            "which token is the last of each row? give an attention_mask, or set config.pad_token_id for input_ids"
        )
    return last_true(tokens)


def _refuse_shard(kwargs: dict[str, Any]) -> None:
    if kwargs.get("sequence_shard") is not None:
        raise ValueError("only the language model works on a chunk of a sequence; give this one whole sequences")


class RecurrentGemmaForSequenceClassification(RecurrentGemmaPreTrainedModel):
    """One label (or `num_labels` values) per sequence, read from its last token."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentGemmaModel(config)
        self.score = _new_linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaSequenceClassifierOutput:
        """logits (B, num_labels). labels (B,) int64, or float for regression and multi-label problems; padding is
        told by the attention_mask, else by config.pad_token_id. Other arguments as in `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        x = outputs.last_hidden_state
        last = _last_token(self.config, input_ids, attention_mask, *x.shape[:2])
        logits = self.score(_kept(x, 1 if last is None else last))[:, 0]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return RecurrentGemmaSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cache=outputs.cache,
        )


class RecurrentGemmaForTokenClassification(RecurrentGemmaPreTrainedModel):
    """One label per token."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentGemmaModel(config)
        self.score = _new_linear(config.hidden_size, config.num_labels, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: torch.LongTensor | None = None, labels: torch.LongTensor | None = None, **kwargs: Any
    ) -> TokenClassifierOutput:
        """logits (B, T, num_labels). labels (B, T) int64, -100 ignored. Other arguments as in `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(input_ids=input_ids, return_dict=True, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RecurrentGemmaForQuestionAnswering(RecurrentGemmaPreTrainedModel):
    """Start and end of an answer in the text."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.model = RecurrentGemmaModel(config)
        self.qa_outputs = _new_linear(config.hidden_size, 2, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_logits and end_logits (B, T); positions (B,) int64. Other arguments as in `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(input_ids=input_ids, return_dict=True, **kwargs)
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaForQuestionAnswering",
    "RecurrentGemmaForSequenceClassification",
    "RecurrentGemmaForTokenClassification",
    "RecurrentGemmaModel",
    "RecurrentGemmaPreTrainedModel",
]
