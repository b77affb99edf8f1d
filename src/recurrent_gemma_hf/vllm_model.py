"""RecurrentGemma, Griffin and Hawk on vLLM.

The same parameters and the same computation as modeling_recurrent_gemma.py, split over tensor-parallel ranks and
pipeline stages, with states in vLLM's block pool.

Shapes: N tokens of all requests of a step (vLLM orders them: first requests that decode, one token each, then prompts),
S sequences, P blocks of the state pool, E hidden_size, D lru_width, K conv1d_width, H heads, h head_dim; D and H are
those of one tensor-parallel rank.

What depends on a request's state are two custom operators, the convolution and the recurrence; everything between them
(gates, projections) is plain torch that vLLM compiles. Both read the step's metadata from vLLM's forward context.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import unwrap
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from .attention import rotate
from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .rg_lru import RgLruCoefficients
from .scan import linear_recurrence_varlen
from .vllm_plugin import padded_head_dim

# --- The two operators that touch a request's state ----------------------------------------------------------------


class StepPools:
    """One layer's view of a step: which rows of the pools its tokens read and write."""

    def __init__(self, layer: RecurrentBlock, metadata: BaseMambaAttentionMetadata) -> None:
        self.decodes, self.prompt_tokens = metadata.num_decode_tokens, metadata.num_prefill_tokens
        self.tokens = self.decodes + self.prompt_tokens
        conv, self.state_PD = layer.kv_cache
        self.conv_PKD = conv.transpose(1, 2) if is_conv_state_dim_first() else conv
        if self.decodes:
            self.decode_rows = metadata.state_indices_tensor_d[: self.decodes, 0].long()
        if self.prompt_tokens:
            self.rows, self.cu_seqlens = metadata.state_indices_tensor_p.long(), metadata.query_start_loc_p
            self.has_state = metadata.has_initial_states_p


def _pools(layer_name: str) -> tuple[RecurrentBlock, StepPools | None]:
    """The layer, and its states in this step; None while vLLM measures memory or warms up, when there are none."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:
        return layer, None
    return layer, StepPools(layer, context.attn_metadata[layer_name])


def conv1d_decode(
    x_ND: torch.Tensor, weight_KD: torch.Tensor, bias_D: torch.Tensor, pool_PKD: torch.Tensor, rows_N: torch.Tensor
) -> torch.Tensor:
    """The convolution for one more token of each of N sequences; `pool` holds the K - 1 inputs before it."""
    context = weight_KD.shape[0] - 1
    window_NKD = torch.cat([pool_PKD[rows_N, :context], x_ND[:, None]], dim=1)
    if context:
        pool_PKD[rows_N, :context] = window_NKD[:, 1:].to(pool_PKD.dtype)
    return (window_NKD * weight_KD).sum(1) + bias_D


def conv1d_varlen(
    x_ND: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_D: torch.Tensor,
    pool_PKD: torch.Tensor,
    rows_S: torch.Tensor,
    cu_seqlens: torch.Tensor,
    has_state_S: torch.Tensor,
) -> torch.Tensor:
    """The causal depthwise convolution of S sequences one behind the other; `pool` holds the K - 1 inputs before each
    of them and takes their last K - 1. A sequence without a state has zeros before it. No value is read back."""
    (N, D), context = x_ND.shape, weight_KD.shape[0] - 1
    before_SKD = pool_PKD[rows_S, :context].masked_fill(~has_state_S[:, None, None], 0.0)
    source = torch.cat([x_ND, before_SKD.flatten(0, 1).to(x_ND.dtype)])  # where a tap reads: a token, or the past
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    token = torch.arange(N, device=x_ND.device)
    sequence = torch.searchsorted(stops, token, right=True).clamp_(max=len(rows_S) - 1)
    offset = token - starts[sequence]

    def index(sequence: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        past = N + sequence * context + (context + offset)
        return torch.where(offset >= 0, starts[sequence] + offset, past)

    out_ND = bias_D.expand(N, D).clone()
    for tap in range(context + 1):
        out_ND.addcmul_(source[index(sequence, offset - (context - tap))], weight_KD[tap])
    if context:
        last = (stops - starts)[:, None] + torch.arange(-context, 0, device=x_ND.device)
        which = torch.arange(len(rows_S), device=x_ND.device)[:, None].expand_as(last)
        pool_PKD[rows_S, :context] = source[index(which, last)].to(pool_PKD.dtype)
    return out_ND


@eager_break_during_capture
def _conv1d(x_ND: torch.Tensor, out_ND: torch.Tensor, layer_name: str) -> None:
    """out = conv1d(x) for all tokens of a step, after their own requests' earlier tokens."""
    layer, pools = _pools(layer_name)
    if pools is None:
        out_ND.zero_()
        return
    weight_KD = layer.conv_1d.weight[:, 0].t().contiguous()
    bias_D = layer.conv_1d.bias
    decodes, tokens = pools.decodes, pools.tokens
    if decodes:
        out_ND[:decodes] = conv1d_decode(x_ND[:decodes], weight_KD, bias_D, pools.conv_PKD, pools.decode_rows)
    if pools.prompt_tokens:
        out_ND[decodes:tokens] = conv1d_varlen(
            x_ND[decodes:tokens], weight_KD, bias_D, pools.conv_PKD, pools.rows, pools.cu_seqlens, pools.has_state
        )
    out_ND[tokens:].zero_()  # padding of a captured batch


@eager_break_during_capture
def _rg_lru(x_ND: torch.Tensor, a_ND: torch.Tensor, out_ND: torch.Tensor, layer_name: str) -> None:
    """out_t = a_t * out_{t-1} + x_t for all tokens of a step, from their own requests' states, in float32."""
    _, pools = _pools(layer_name)
    if pools is None:
        out_ND.zero_()
        return
    decodes, tokens = pools.decodes, pools.tokens
    if decodes:
        rows = pools.decode_rows
        h_ND = torch.addcmul(x_ND[:decodes], a_ND[:decodes], pools.state_PD[rows])
        pools.state_PD[rows] = h_ND
        out_ND[:decodes] = h_ND
    if pools.prompt_tokens:
        out_ND[decodes:tokens] = linear_recurrence_varlen(
            x_ND[decodes:tokens], a_ND[decodes:tokens], pools.state_PD, pools.rows, pools.cu_seqlens, pools.has_state
        )
    out_ND[tokens:].zero_()


_LIBRARY = torch.library.Library("recurrent_gemma_vllm", "FRAGMENT")
# As types: the operators' schemas cannot be read from the strings of `from __future__ import annotations`. On the
# functions themselves, which the decorator leaves as they are in vLLM 0.32 and always wraps in 0.33.
_types = {"x_ND": torch.Tensor, "out_ND": torch.Tensor, "layer_name": str, "return": None}
unwrap(_conv1d).__annotations__ = _types
unwrap(_rg_lru).__annotations__ = {"a_ND": torch.Tensor, **_types}
for _name, _function in (("conv1d", _conv1d), ("rg_lru", _rg_lru)):
    direct_register_custom_op(_name, _function, mutates_args=["out_ND"], fake_impl=lambda *_: None, target_lib=_LIBRARY)


class Step(NamedTuple):
    """What every layer needs to know about the tokens of a step; computed once, as in modeling_recurrent_gemma.py."""

    cos_N1r: torch.Tensor  # (N, 1, rotary_dim / 2), dtype of the activations
    sin_N1r: torch.Tensor
    reset_N1: torch.Tensor  # bool: position 0, a text begins

    @staticmethod
    def at(positions_N: torch.Tensor, config: RecurrentGemmaConfig, dtype: torch.dtype) -> Step:
        """Without a table, which would have to be as long as the longest text."""
        r = config.rotary_dim // 2
        exponent = torch.arange(r, device=positions_N.device, dtype=torch.float32) / max(r, 1)
        angle = positions_N[:, None, None].float() * (1.0 / config.rope_theta**exponent)
        return Step(angle.cos().to(dtype), angle.sin().to(dtype), (positions_N == 0)[:, None])


# --- Layers --------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)); the ranks split its width."""

    def __init__(self, config: RecurrentGemmaConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=True, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, config.hidden_size, bias=True, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_fn(config.hidden_activation)

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """(N, E) to (N, E)."""
        gate, up = self.gate_up_proj(x_NE)[0].chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)[0]


class LocalAttention(nn.Module):
    """Attention to the query itself and the `attention_window_size` tokens before it; the ranks split the heads, and
    each holds the key/value head that it needs."""

    def __init__(
        self,
        config: RecurrentGemmaConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // ranks
        self.kv_heads = max(1, config.num_key_value_heads // ranks)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, bias=True, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        # vLLM's window counts the query, as Transformers' does.
        self.padding = padded_head_dim(config.head_dim) - config.head_dim
        self.attn = Attention(
            self.heads,
            config.head_dim + self.padding,
            config.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Fills each head with zeros up to a size that the attention can do: they change no product."""
        return F.pad(x.unflatten(-1, (-1, self.head_dim)), (0, self.padding)).flatten(-2)

    def _rotate(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return rotate(x.view(len(x), -1, 1, self.head_dim), step.cos_N1r, step.sin_N1r).flatten(1)

    def forward(self, x_NE: torch.Tensor, step: Step) -> torch.Tensor:
        """(N, E) to (N, E)."""
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x_NE)[0].split([self.heads * self.head_dim, kv_width, kv_width], dim=-1)
        q, k = self._rotate(q, step), self._rotate(k, step)
        if self.padding:
            q, k, v = self._pad(q), self._pad(k), self._pad(v)
        out = self.attn(q, k, v)
        if self.padding:
            out = out.unflatten(-1, (self.heads, -1))[..., : self.head_dim].flatten(-2)
        return self.o_proj(out)[0]


class Conv1d(nn.Module):
    """The convolution's parameters under their published names; the ranks split the channels."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width = config.lru_width // get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.empty(width, 1, config.conv1d_width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})


class RgLru(nn.Module):
    """The gates of the RG-LRU: block-diagonal with one block per head, which is how the ranks split them."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        block = config.lru_width // config.num_attention_heads
        self.recurrent_param = nn.Parameter(torch.empty(self.heads * block), requires_grad=False)
        self.input_gate_weight = nn.Parameter(torch.empty(self.heads, block, block), requires_grad=False)
        self.input_gate_bias = nn.Parameter(torch.empty(self.heads, block), requires_grad=False)
        self.recurrent_gate_weight = nn.Parameter(torch.empty(self.heads, block, block), requires_grad=False)
        self.recurrent_gate_bias = nn.Parameter(torch.empty(self.heads, block), requires_grad=False)
        for parameter in self.parameters():
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

    def _gate(self, x_ND: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        blocks = x_ND.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return torch.baddbmm(bias[:, None], blocks, weight).transpose(0, 1).flatten(1)

    def forward(self, x_ND: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """What the recurrence adds, and its coefficients, in float32."""
        r_pre = self._gate(x_ND, self.recurrent_gate_weight, self.recurrent_gate_bias)
        i_pre = self._gate(x_ND, self.input_gate_weight, self.input_gate_bias)
        softplus_D = F.softplus(self.recurrent_param.float())
        a_ND, gated_ND = RgLruCoefficients.compute(r_pre, i_pre, x_ND, softplus_D, step.reset_N1, None)
        return gated_ND, a_ND


class RecurrentBlock(nn.Module, MambaBase):
    """linear_out(act(linear_y(x)) * RG-LRU(conv1d(linear_x(x)))); the ranks split its width."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        E, D = config.hidden_size, config.lru_width
        self.vllm_config, self.layer_name = vllm_config, prefix
        self.linear_yx = MergedColumnParallelLinear(
            E, [D, D], bias=True, quant_config=quant_config, prefix=f"{prefix}.linear_yx"
        )
        self.linear_out = RowParallelLinear(D, E, bias=True, quant_config=quant_config, prefix=f"{prefix}.linear_out")
        self.conv_1d = Conv1d(config)
        self.rg_lru = RgLru(config)
        self.act_fn = get_act_fn(config.hidden_activation)
        self.kv_cache = (torch.tensor([]), torch.tensor([]))  # vLLM binds the pools: convolution, RG-LRU
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self  # where the operators find it

    def forward(self, x_NE: torch.Tensor, step: Step) -> torch.Tensor:
        """(N, E) to (N, E)."""
        y_ND, x_ND = self.linear_yx(x_NE)[0].chunk(2, dim=-1)
        conv_ND = torch.empty_like(x_ND)
        torch.ops.recurrent_gemma_vllm.conv1d(x_ND, conv_ND, self.layer_name)
        gated_ND, a_ND = self.rg_lru(conv_ND, step)
        h_ND = torch.empty_like(gated_ND)
        torch.ops.recurrent_gemma_vllm.rg_lru(gated_ND, a_ND, h_ND, self.layer_name)
        return self.linear_out((h_ND * self.act_fn(y_ND)).to(x_NE.dtype))[0]

    # --- What vLLM asks of a layer with a state ---

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of metadata the layer reads: rows of the state pools, for decoding requests and for prompts."""
        return MambaAttentionBackendEnum.MAMBA1

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of one request's states on this rank: convolution, RG-LRU."""
        return state_shapes(self.vllm_config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return state_dtypes(self.vllm_config)


def state_shapes(vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
    """((K - 1, D), (D,)) of one rank, the first transposed where vLLM wants it so (VLLM_SSM_CONV_STATE_LAYOUT)."""
    config = vllm_config.model_config.hf_config
    D = config.lru_width // vllm_config.parallel_config.tensor_parallel_size
    context = max(config.conv1d_width - 1, 1)  # a pool cannot be empty
    return (D, context) if is_conv_state_dim_first() else (context, D), (D,)


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """(that of the activations, float32)."""
    return MambaStateDtypeCalculator.mamba1_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype, "float32"
    )


class DecoderLayer(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        cache_config, quant_config = vllm_config.cache_config, vllm_config.quant_config
        is_recurrent = config.layers_block_type[int(prefix.rsplit(".", 1)[1])] == "recurrent"
        self.temporal_pre_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.temporal_block = (
            RecurrentBlock(vllm_config, f"{prefix}.temporal_block")
            if is_recurrent
            else LocalAttention(config, cache_config, quant_config, f"{prefix}.temporal_block")
        )
        self.channel_pre_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_block = MLP(config, quant_config, f"{prefix}.mlp_block")

    def forward(self, x_NE: torch.Tensor, step: Step) -> torch.Tensor:
        """(N, E) to (N, E)."""
        x_NE = x_NE + self.temporal_block(self.temporal_pre_norm(x_NE), step)
        return x_NE + self.mlp_block(self.channel_pre_norm(x_NE))


# --- The model -----------------------------------------------------------------------------------------------------


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class RecurrentGemmaModel(nn.Module):
    """The stack of residual blocks of one pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        self.config = config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens = PPMissingLayer()
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: DecoderLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.final_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else PPMissingLayer()
        # Rounded to bfloat16 whatever the dtype, as when the published models were trained.
        self.scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16).item()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(N, E) embeddings, scaled."""
        x_NE = self.embed_tokens(input_ids)
        return x_NE * self.scale if self.config.embeddings_scale_by_sqrt_dim else x_NE

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """(N, E) of the last stage after the final norm, or what the next stage begins with."""
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            x_NE = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            x_NE = inputs_embeds
        else:
            assert input_ids is not None
            x_NE = self.embed_input_ids(input_ids)
        step = Step.at(positions, self.config, x_NE.dtype)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_NE = layer(x_NE, step)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_NE})
        return self.final_norm(x_NE)


class RecurrentGemmaForCausalLM(
    nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsMambaPrefixCaching, SupportsPP, SupportsQuant
):
    """The language model, as vLLM calls it."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "linear_yx": ["linear_y", "linear_x"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
            ".linear_y": (".linear_yx", 0),
            ".linear_x": (".linear_yx", 1),
        }
    )
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of one request's states on one rank: convolution, RG-LRU."""
        return state_shapes(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How vLLM copies them into the blocks of its prefix cache."""
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = RecurrentGemmaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.logits_soft_cap or None)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(N, E) embeddings, scaled."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """As `RecurrentGemmaModel.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(n, V) soft-capped logits of the rows that vLLM samples from."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint of `RecurrentGemmaForCausalLM`; vLLM refuses one that lacks weights."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
