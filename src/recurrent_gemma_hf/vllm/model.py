"""RecurrentGemma, Griffin and Hawk on vLLM.

The same parameters and the same computation as modeling_recurrent_gemma.py, split over tensor-parallel ranks and
pipeline stages, with states in vLLM's block pool.

Shapes: N tokens of all requests of a step (vLLM puts the B requests that decode first, one token each, then S prompts),
P blocks of the state pool, E hidden_size, D lru_width, K conv1d_width, C = K - 1, F = N + S C, r half of rotary_dim,
V vocab_size; D is that of one tensor-parallel rank.

Computations on the requests' states are custom operators, which vLLM neither compiles nor captures in its piecewise
CUDA graphs: the whole inside of a recurrent block if a kernel computes its decoding step; else the convolution and the
recurrence, so that vLLM compiles the gates between them. They read the step's metadata from the forward context.
"""

# Without `from __future__ import annotations`: vLLM reads the operators' schemas from their annotations.
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models import interfaces, utils
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..attention import rotary_angles, rotate
from ..backend import use_triton
from ..causal_conv1d import causal_conv1d
from ..configuration_recurrent_gemma import RecurrentGemmaConfig
from ..rg_lru import RgLruParameters, rg_lru, rg_lru_step
from ..scan import linear_recurrence_varlen
from .plugin import OPERATORS, padded_head_dim

# --- The requests of a step ----------------------------------------------------------------------------------------


class Decodes(NamedTuple):
    """Rows of the pools, one for each decoding request."""

    indices_B: Tensor  # int32, -1 for padding
    rows_B: Tensor  # int64, 0 for padding

    @staticmethod
    def of(metadata: BaseMambaAttentionMetadata) -> "Decodes":
        """Read the rows. Padding of a captured batch has row 0, vLLM's null block, which belongs to no request."""
        rows_B = metadata.state_indices_tensor_d[: metadata.num_decode_tokens, 0].clamp(min=0)
        return Decodes(rows_B.masked_fill(rows_B == 0, -1), rows_B.long())


class Prompts(NamedTuple):
    """Rows of the pools, one for each prompt, and indices of the prompts' tokens.

    The convolution takes the prompts concatenated, each with its C earlier inputs in front.
    """

    rows_S: Tensor  # int64
    has_state_S: Tensor  # bool
    cu_seqlens: Tensor  # int64
    output_N: Tensor  # index of the convolution's output for each token; its input is C later
    before_SC: Tensor  # indices of the C inputs before each prompt
    last_SC: Tensor  # indices of each prompt's last C inputs, which may be among those before it

    @staticmethod
    def of(metadata: BaseMambaAttentionMetadata, context: int) -> "Prompts":
        """Compute the indices for C = `context`, without reading anything back from the device."""
        cu_seqlens = metadata.query_start_loc_p.long()
        starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
        token, prompt, tap = (
            torch.arange(count, device=stops.device) for count in (metadata.num_prefill_tokens, len(stops), context)
        )
        prompt_N = torch.searchsorted(stops, token, right=True).clamp_(max=len(stops) - 1)
        shifted = [(edge + context * prompt)[:, None] + tap for edge in (starts, stops)]
        rows_S = metadata.state_indices_tensor_p.long()
        return Prompts(rows_S, metadata.has_initial_states_p, cu_seqlens, token + context * prompt_N, *shifted)


class Requests(NamedTuple):
    """The requests of a step, shared by the layers of one block table."""

    reader: tuple[str, str]  # the layer and the operator that made it
    tokens: int
    decodes: Decodes | None
    prompts: Prompts | None

    @staticmethod
    def of(metadata: BaseMambaAttentionMetadata, reader: tuple[str, str], context: int) -> "Requests":
        """Return the `Requests` that an earlier layer stored on the metadata object, or make and store them.

        A reader that finds its own makes them again: they are from an earlier pass with the same metadata, the warm-up
        for a CUDA graph, and the graph must contain the computation.
        """
        found = getattr(metadata, "recurrent_gemma_requests", None)
        if found is None or found.reader == reader:
            decodes = Decodes.of(metadata) if metadata.num_decode_tokens else None
            prompts = Prompts.of(metadata, context) if metadata.num_prefill_tokens else None
            found = Requests(reader, metadata.num_decode_tokens + metadata.num_prefill_tokens, decodes, prompts)
            metadata.recurrent_gemma_requests = found
        return found


# --- The operators -------------------------------------------------------------------------------------------------
#
# vLLM's causal_conv1d_fn and causal_conv1d_update (0.32 and 0.33) are not used. For K = 1 they fail or give wrong
# results without an error; by its code, so does the first on a GPU for K > 4. On a CPU the first reads the prompts'
# boundaries in Python: 64 prompts of 8 tokens, D = 512, take 8 ms a layer, and 0.9 ms here. The second would save 30 to
# 310 microseconds a layer there (1 to 63 requests); on a GPU `rg_lru_step` contains the convolution.


def _run(name: str, layer_name: str, out_ND: Tensor, *inputs_ND: Tensor) -> None:
    """Call the layer's methods `decode_<name>` and `prefill_<name>` for the tokens of a step; write 0 at padding."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:  # vLLM measures memory or warms up: there are no states
        out_ND.zero_()
        return
    requests = Requests.of(context.attn_metadata[layer_name], (layer_name, name), layer.context)
    B, N = 0 if requests.decodes is None else len(requests.decodes.rows_B), requests.tokens
    if requests.decodes is not None:
        out_ND[:B] = getattr(layer, f"decode_{name}")(*(x[:B] for x in inputs_ND), requests.decodes)
    if requests.prompts is not None:
        out_ND[B:N] = getattr(layer, f"prefill_{name}")(*(x[B:N] for x in inputs_ND), requests.prompts)
    out_ND[N:].zero_()


@eager_break_during_capture
def _conv1d(u_ND: Tensor, out_ND: Tensor, layer_name: str) -> None:
    """Compute conv1d(u) for all tokens of a step, from the states of their requests."""
    _run("conv1d", layer_name, out_ND, u_ND)


@eager_break_during_capture
def _scan(x_ND: Tensor, a_ND: Tensor, out_ND: Tensor, layer_name: str) -> None:
    """Compute h_t = a_t h_{t-1} + x_t for all tokens of a step, in float32, from the states of their requests."""
    _run("scan", layer_name, out_ND, x_ND, a_ND)


@eager_break_during_capture
def _block(u_ND: Tensor, y_ND: Tensor, is_first_N: Tensor, out_ND: Tensor, layer_name: str) -> None:
    """Compute act(y) * RG-LRU(conv1d(u)) for all tokens of a step, from the states of their requests."""
    _run("block", layer_name, out_ND, u_ND, y_ND, is_first_N)


_LIBRARY = torch.library.Library(OPERATORS[0].split("::")[0], "FRAGMENT")
for _operator, _function in zip(OPERATORS, (_conv1d, _scan, _block), strict=True):
    direct_register_custom_op(
        _operator.split("::")[1], _function, mutates_args=["out_ND"], fake_impl=lambda *_: None, target_lib=_LIBRARY
    )


class Positions(NamedTuple):
    """Rotary angles and document starts from the tokens' positions."""

    cos_N1r: Tensor  # in the dtype of the activations
    sin_N1r: Tensor
    is_first_N: Tensor  # bool: position 0, the start of a text

    @staticmethod
    def of(positions_N: Tensor, config: RecurrentGemmaConfig, dtype: torch.dtype) -> "Positions":
        """Compute cos, sin and is_first from positions (N,)."""
        angle = rotary_angles(positions_N[:, None], config.rotary_dim, config.rope_theta)
        return Positions(angle.cos().to(dtype), angle.sin().to(dtype), positions_N == 0)


# --- Layers --------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)); the ranks split its width."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        quant_config, E, width = vllm_config.quant_config, config.hidden_size, config.intermediate_size // 2
        self.gate_up_proj = MergedColumnParallelLinear(
            E, [width] * 2, bias=True, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(width, E, bias=True, quant_config=quant_config, prefix=f"{prefix}.down_proj")
        self.act_fn = get_act_fn(config.hidden_activation)

    def forward(self, x_NE: Tensor) -> Tensor:
        """Map (N, E) to (N, E)."""
        gate, up = self.gate_up_proj(x_NE)[0].chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)[0]


class LocalAttention(nn.Module):
    """Attention to the query itself and the `attention_window_size` tokens before it; the ranks split the heads, and
    each holds the key/value head that it needs."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        quant_config, E, ranks = vllm_config.quant_config, config.hidden_size, get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // ranks
        self.kv_heads = max(1, config.num_key_value_heads // ranks)
        self.qkv_proj = QKVParallelLinear(
            E, config.head_dim, config.num_attention_heads, config.num_key_value_heads, bias=config.attention_bias,
            quant_config=quant_config, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(E, E, bias=True, quant_config=quant_config, prefix=f"{prefix}.o_proj")
        self.padding = padded_head_dim(config.head_dim) - config.head_dim
        # vLLM's window counts the query, as Transformers' does.
        self.attn = Attention(
            self.heads, config.head_dim + self.padding, config.head_dim**-0.5, num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config, quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def _pad(self, x: Tensor) -> Tensor:
        """Pad each head with zeros to a size that the attention supports; zeros change no result."""
        return F.pad(x.unflatten(-1, (-1, self.head_dim)), (0, self.padding)).flatten(-2)

    def forward(self, x_NE: Tensor, positions: Positions) -> Tensor:
        """Map (N, E) to (N, E)."""
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x_NE)[0].split([self.heads * self.head_dim, kv_width, kv_width], dim=-1)
        q, k = (rotate(x.view(len(x), -1, 1, self.head_dim), *positions[:2]).flatten(1) for x in (q, k))
        if self.padding:
            q, k, v = self._pad(q), self._pad(k), self._pad(v)
        out = self.attn(q, k, v)
        if self.padding:
            out = out.unflatten(-1, (self.heads, -1))[..., : self.head_dim].flatten(-2)
        return self.o_proj(out)[0]


def sharded_parameter(*shape: int) -> nn.Parameter:
    """Make a parameter whose first dimension is split over the ranks: each loads its part."""
    parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
    return parameter


class Conv1d(nn.Module):
    """The convolution's parameters under their published names; the ranks split the channels."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width = config.lru_width // get_tensor_model_parallel_world_size()
        self.weight = sharded_parameter(width, 1, config.conv1d_width)
        self.bias = sharded_parameter(width)


class RgLru(nn.Module):
    """The RG-LRU's parameters under their published names; the ranks split the heads."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        block = config.lru_width // config.num_attention_heads
        self.recurrent_param = sharded_parameter(heads * block)
        self.input_gate_weight = sharded_parameter(heads, block, block)
        self.input_gate_bias = sharded_parameter(heads, block)
        self.recurrent_gate_weight = sharded_parameter(heads, block, block)
        self.recurrent_gate_bias = sharded_parameter(heads, block)

    def learned(self) -> RgLruParameters:
        """Return the parameters as `rg_lru` takes them."""
        return RgLruParameters(**{name: getattr(self, name.rsplit("_", 1)[0]) for name in RgLruParameters._fields})


class RecurrentBlock(nn.Module, MambaBase):
    """linear_out(act(linear_y(x)) * RG-LRU(conv1d(linear_x(x)))); the ranks split its width."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        E, D = config.hidden_size, config.lru_width
        self.vllm_config, self.layer_name, self.context = vllm_config, prefix, config.conv1d_width - 1
        self.linear_yx = MergedColumnParallelLinear(
            E, [D, D], bias=True, quant_config=quant_config, prefix=f"{prefix}.linear_yx"
        )
        self.linear_out = RowParallelLinear(D, E, bias=True, quant_config=quant_config, prefix=f"{prefix}.linear_out")
        self.conv_1d = Conv1d(config)
        self.rg_lru = RgLru(config)
        self.act_fn = get_act_fn(config.hidden_activation)
        self.is_gelu_tanh = config.hidden_activation == "gelu_pytorch_tanh"
        self.kv_cache = (torch.tensor([]), torch.tensor([]))  # vLLM binds the pools: convolution, RG-LRU
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self  # where the operators find it

    def forward(self, x_NE: Tensor, positions: Positions) -> Tensor:
        """Map (N, E) to (N, E)."""
        operators, name = torch.ops.recurrent_gemma_vllm, self.layer_name
        y_ND, u_ND = self.linear_yx(x_NE)[0].chunk(2, dim=-1)
        out_ND = torch.empty_like(u_ND)
        # As in modeling_recurrent_gemma.py: in float32 the kernel's gate matmul has no tensor cores.
        has_kernel = self.is_gelu_tanh and self.context > 0 and u_ND.dtype in (torch.bfloat16, torch.float16)
        if has_kernel and use_triton(u_ND.device, u_ND.dtype):
            operators.block(u_ND, y_ND, positions.is_first_N, out_ND, name)
            return self.linear_out(out_ND)[0]
        operators.conv1d(u_ND, out_ND, name)

        def scan(x_ND: Tensor, a_ND: Tensor) -> Tensor:
            h_ND = torch.empty_like(x_ND)
            operators.scan(x_ND, a_ND, h_ND, name)
            return h_ND

        return self.linear_out(self._rg_lru(out_ND, y_ND, positions.is_first_N, scan))[0]

    def _rg_lru(
        self, x_ND: Tensor, y_ND: Tensor, is_first_N: Tensor, scan: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Compute act(y) * RG-LRU(x), with the recurrence computed by `scan`."""
        out_1ND, _, _ = rg_lru(
            x_ND[None], y_ND[None], self.rg_lru.learned(), None, is_first_N[None], None, self.act_fn,
            is_gelu_tanh=self.is_gelu_tanh, scan=lambda x_1ND, a_1ND: (scan(x_1ND[0], a_1ND[0])[None], x_1ND[:, -1]),
        )  # fmt: skip
        return out_1ND[0]

    # --- Methods that the operators call; each updates the requests' rows of the pools ---

    @property
    def conv_PCD(self) -> Tensor:
        """Return the pool of the convolution's last inputs, (P, C, D)."""
        conv = self.kv_cache[0]
        return (conv.transpose(1, 2) if is_conv_state_dim_first() else conv)[:, : self.context]

    def decode_conv1d(self, u_BD: Tensor, decodes: Decodes) -> Tensor:
        """Compute the convolution of one token of each decoding request."""
        conv_PCD, rows_B = self.conv_PCD, decodes.rows_B
        conv_PCD[0] = 0.0  # the null block, which padding reads, must stay finite
        full_BKD = torch.cat([conv_PCD[rows_B].to(u_BD.dtype), u_BD[:, None]], dim=1)
        conv_PCD[rows_B] = full_BKD[:, 1:].to(conv_PCD.dtype)
        # On a CPU multiplying by a strided weight takes more than twice as long.
        return (full_BKD * self.conv_1d.weight[:, 0].t().contiguous()).sum(1) + self.conv_1d.bias

    def prefill_conv1d(self, u_ND: Tensor, prompts: Prompts) -> Tensor:
        """Compute the convolution of the prompts."""
        conv_PCD = self.conv_PCD
        past_SCD = conv_PCD[prompts.rows_S].masked_fill_(~prompts.has_state_S[:, None, None], 0.0)
        full_FD = u_ND.new_empty(len(u_ND) + prompts.before_SC.numel(), u_ND.shape[1])
        full_FD[prompts.before_SC] = past_SCD.to(u_ND.dtype)
        full_FD[self.context :].index_copy_(0, prompts.output_N, u_ND)
        conv_PCD[prompts.rows_S] = full_FD[prompts.last_SC].to(conv_PCD.dtype)
        x_1FD = causal_conv1d(full_FD[None], self.conv_1d.weight, self.conv_1d.bias, past=self.context)
        return x_1FD[0, prompts.output_N]

    def decode_scan(self, x_BD: Tensor, a_BD: Tensor, decodes: Decodes) -> Tensor:
        """Compute one step of the recurrence for each decoding request."""
        state_PD = self.kv_cache[1]
        state_PD[0] = 0.0  # as in decode_conv1d
        state_PD[decodes.rows_B] = h_BD = torch.addcmul(x_BD, a_BD, state_PD[decodes.rows_B])
        return h_BD

    def prefill_scan(self, x_ND: Tensor, a_ND: Tensor, prompts: Prompts) -> Tensor:
        """Compute the recurrence of the prompts."""
        return linear_recurrence_varlen(
            x_ND, a_ND, self.kv_cache[1], prompts.rows_S, prompts.cu_seqlens, prompts.has_state_S
        )

    def decode_block(self, u_BD: Tensor, y_BD: Tensor, _: Tensor, decodes: Decodes) -> Tensor:
        """Compute the inside of the block for one token of each decoding request."""
        return rg_lru_step(
            u_BD, y_BD, self.conv_1d.weight, self.conv_1d.bias, self.rg_lru.learned(), self.conv_PCD.transpose(1, 2),
            self.kv_cache[1], state_indices_B=decodes.indices_B,
        )  # fmt: skip

    def prefill_block(self, u_ND: Tensor, y_ND: Tensor, is_first_N: Tensor, prompts: Prompts) -> Tensor:
        """Compute the inside of the block for the prompts."""
        x_ND, rows = self.prefill_conv1d(u_ND, prompts), prompts.rows_S
        if len(rows) > 1:
            return self._rg_lru(x_ND, y_ND, is_first_N, partial(self.prefill_scan, prompts=prompts))
        # The fused kernel takes a single prompt, which has no boundaries inside.
        h0_1D = self.kv_cache[1][rows].masked_fill_(~prompts.has_state_S[:, None], 0.0)
        out_1ND, self.kv_cache[1][rows], _ = rg_lru(
            x_ND[None], y_ND[None], self.rg_lru.learned(), h0_1D, is_first_N[None], None, self.act_fn, is_gelu_tanh=True
        )
        return out_1ND[0]

    # --- vLLM's interface of a layer with a state ---

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Return the kind of metadata that vLLM passes to the layer: rows of the pools, and prompts' boundaries."""
        return MambaAttentionBackendEnum.MAMBA1

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of one request's states on this rank: convolution, RG-LRU."""
        return state_shapes(self.vllm_config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the same states."""
        return state_dtypes(self.vllm_config)


def state_shapes(vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
    """Return ((K - 1, D), (D,)) of one rank, the first transposed if VLLM_SSM_CONV_STATE_LAYOUT puts D first."""
    config = vllm_config.model_config.hf_config
    D = config.lru_width // vllm_config.parallel_config.tensor_parallel_size
    context = max(config.conv1d_width - 1, 1)  # a pool cannot be empty
    return (D, context) if is_conv_state_dim_first() else (context, D), (D,)


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the convolution's state (by default the activations') and of the RG-LRU's (float32)."""
    return MambaStateDtypeCalculator.mamba1_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype, "float32"
    )


class DecoderLayer(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        is_recurrent = config.layers_block_type[int(prefix.rsplit(".", 1)[1])] == "recurrent"
        block = RecurrentBlock if is_recurrent else LocalAttention
        self.temporal_pre_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.temporal_block = block(vllm_config, f"{prefix}.temporal_block")
        self.channel_pre_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_block = MLP(vllm_config, f"{prefix}.mlp_block")

    def forward(self, x_NE: Tensor, positions: Positions) -> Tensor:
        """Map (N, E) to (N, E)."""
        x_NE = x_NE + self.temporal_block(self.temporal_pre_norm(x_NE), positions)
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
        self.embed_tokens = utils.PPMissingLayer()
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )  # fmt: skip
        self.start_layer, self.end_layer, self.layers = utils.make_layers(
            config.num_hidden_layers, lambda prefix: DecoderLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.final_norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else utils.PPMissingLayer()
        # Rounded to bfloat16 for every dtype, as in the training of the published models.
        self.scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16).item()
        self.make_empty_intermediate_tensors = utils.make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return (N, E) embeddings, scaled."""
        x_NE = self.embed_tokens(input_ids)
        return x_NE * self.scale if self.config.embeddings_scale_by_sqrt_dim else x_NE

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return the last stage's hidden states (N, E) after the final norm, or the input of the next stage."""
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            x_NE = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            x_NE = inputs_embeds
        else:
            assert input_ids is not None
            x_NE = self.embed_input_ids(input_ids)
        step_positions = Positions.of(positions, self.config, x_NE.dtype)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_NE = layer(x_NE, step_positions)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_NE})
        return self.final_norm(x_NE)


class RecurrentGemmaForCausalLM(
    nn.Module,
    interfaces.HasInnerState,
    interfaces.IsHybrid,
    interfaces.SupportsLoRA,
    interfaces.SupportsMambaPrefixCaching,
    interfaces.SupportsPP,
    interfaces.SupportsQuant,
):
    """The language model, as vLLM calls it."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "linear_yx": ["linear_y", "linear_x"],
    }
    hf_to_vllm_mapper = utils.WeightsMapper(
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

    get_mamba_state_shape_from_config = staticmethod(state_shapes)
    get_mamba_state_dtype_from_config = staticmethod(state_dtypes)
    get_mamba_state_copy_func = staticmethod(MambaStateCopyFuncCalculator.mamba1_state_copy_func)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = RecurrentGemmaModel(vllm_config=vllm_config, prefix=utils.maybe_prefix(prefix, "model"))
        self.lm_head = utils.PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
                prefix=utils.maybe_prefix(prefix, "lm_head"),
            )  # fmt: skip
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.logits_soft_cap or None)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return (N, E) embeddings, scaled."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Call `RecurrentGemmaModel.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return (n, V) soft-capped logits of the rows that vLLM samples from."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of `RecurrentGemmaForCausalLM`; vLLM rejects one with missing weights."""
        return utils.AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
