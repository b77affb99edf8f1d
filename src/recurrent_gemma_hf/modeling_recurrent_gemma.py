"""RecurrentGemma, Griffin and Hawk: layers, model, heads; read from top to bottom.

Shapes: B batch, T tokens, E hidden_size, D lru_width, H heads (of attention and of the gates), G key/value heads,
h head_dim, K keys, W attention_window_size, V vocabulary. Equations are those of the Griffin paper (arXiv 2402.19427).

Two ideas carry the file:
- Where a token stands is its *rank* among the tokens of its row; padding has none. A padded batch is packed first, the
  tokens of each row in front and its padding behind, where causality hides it, and unpacked last.
- Where a document begins is its *position* 0. Attention, convolution and recurrence of a token at position p look at
  most p tokens back, so packed documents never meet.
State lives in the cache alone (RecurrentGemmaCache, which Transformers' own empty caches become).
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, GradientCheckpointingLayer, PreTrainedModel, logging
from transformers import initialization as init

from .cache_recurrent_gemma import RecurrentGemmaCache
from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .linear_cross_entropy import IGNORE_INDEX, check_labels, chunked_cross_entropy, linear_cross_entropy
from .linear_recurrence import is_transformed, linear_recurrence, resolve_backend
from .recurrent_block import (
    MIN_4X_IN_SQRT_GRADIENT,
    RG_LRU_C,
    RecurrentBlockParameters,
    bounded_sqrt,
    causal_conv1d,
    recurrent_block,
    recurrent_block_step,
    resolve_block_backend,
)
from .tensor_parallel import check_tensor_parallel
from .transformers_compat import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    CACHE_NAME,
    CONTINUES_IN_CHUNKS,
    ForCausalLMLoss,
    GenerationMode,
    QuestionAnsweringModelOutput,
    RecurrentGemmaCausalLMOutput,
    RecurrentGemmaModelOutput,
    RecurrentGemmaSequenceClassifierOutput,
    TokenClassifierOutput,
    can_return_tuple,
    one_cache,
    unread_columns,
    with_both_cache_names,
)

logger = logging.get_logger(__name__)

QUERY_BLOCK = 512  # queries per block of banded attention; the waste is block / window
ONEDNN: Any = torch.backends.mkldnn  # Any: its attributes are properties, made at run time
HAS_ONEDNN = ONEDNN.is_available()
FEW_ROWS = 256  # up to so many rows oneDNN's float32 product is the faster one on a CPU (benchmarks/LOG.md)
FEW_INT8_ROWS = 16  # up to so many rows int8 weights are better multiplied as they are than converted first


class Step(NamedTuple):
    """What every layer needs to know about one forward; computed once. A tuple, so accelerate can move it."""

    cos_BTr: torch.Tensor  # (B or 1, T, rotary_dim / 2), dtype of the activations
    sin_BTr: torch.Tensor
    reset_BT1: torch.Tensor  # (B or 1, T, 1) bool: a document begins
    hold_BT1: torch.Tensor | None  # bool, True at padding, where states pass unchanged; None where it cannot matter
    reach_BTK: torch.Tensor | None  # (B or 1, T, K) 0 or 1: conv taps that stay in the document; None: all do
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


class _OneDnnOff:
    """A context in which torch computes without oneDNN; threads share it, and the last to leave switches back on.

    torch has this switch for the process as a whole: what another thread computes meanwhile is as right, and slower.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.was_on = True

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.was_on = ONEDNN.enabled
                ONEDNN.enabled = False
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                ONEDNN.enabled = self.was_on


_onednn_off = _OneDnnOff()


def _fast_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """F.linear on a CPU by the kernel that reads the weights fastest; None where torch's own choice is to be taken.

    What torch takes by itself leaves half of the memory's bandwidth unused when there are few rows, as in decoding:
    in float32 MKL (on processors that are not Intel's it runs on one thread), in bfloat16 oneDNN (it repacks the
    weights), with torchao's int8 weights a conversion of all of them. Measured in benchmarks/LOG.md. Under
    torch.compile one row is a sum that Inductor makes a loop of its own of: faster than either library's product.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or type(x) is not torch.Tensor or is_transformed():
        return None
    rows, dtype = x.numel() // x.shape[-1], x.dtype
    if rows > FEW_ROWS or dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return None
    if torch.compiler.is_compiling():
        return _row_times_weight(x, weight, bias) if rows == 1 and not torch.compiler.is_exporting() else None
    if not HAS_ONEDNN:
        return None
    if type(weight) is not nn.Parameter:
        is_for_kernel = dtype == torch.bfloat16 and rows <= FEW_INT8_ROWS and x.shape[-1] % 4 == 0
        return _int8_linear(x, weight, bias) if is_for_kernel and _is_int8_by_row(weight) else None
    if dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if dtype == torch.bfloat16 and rows == 1:
        with _onednn_off:
            return F.linear(x, weight, bias)
    return None


def _row_times_weight(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product of one row as Inductor wants it: it calls MKL or oneDNN for anything that is written as a product.

    What makes the row (a normalisation) would go into the loop, and be computed again for every row of the weight: the
    strided views make Inductor store it first. Sums of more than 4096 terms get a slower loop, so long ones are cut.
    """
    if type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.bfloat16):
        values, scale = weight, None
    elif _is_int8_by_row(weight):
        values, scale = weight.qdata, weight.scale.flatten().float()
    else:
        return None
    parts, unit = _float32_parts(values)
    inputs = parts[0].shape[1]
    pieces = next((n for n in range(1, 9) if inputs % n == 0 and inputs // n <= 4096), 1)
    row = x.reshape(-1).float()
    shares = (row[i :: len(parts)].contiguous().as_strided((inputs,), (1,)) for i in range(len(parts)))
    products = [
        part.view(-1, pieces, inputs // pieces) * share.view(pieces, -1)
        for part, share in zip(parts, shares, strict=True)
    ]
    out = sum(products[1:], products[0]).sum(-1).sum(-1)
    out = out if scale is None else out * (scale * unit)
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _float32_parts(values_NK: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """[values[:, i::n] / unit for i < n] in float32 and the unit, the n values that share 32 bits told apart by shifts:
    n is 2 for bfloat16, the upper half of a float32, and 4 for int8. Conversions one by one are slower."""
    n = 4 // values_NK.itemsize
    in_words = values_NK.shape[1] % n == 0 and values_NK.is_contiguous() and sys.byteorder == "little"
    if n == 1 or not in_words:
        return [values_NK.float()], 1.0
    bits = 32 // n
    words = values_NK.view(torch.int32)
    parts = [(words << (32 - bits * (i + 1))) & -(1 << (32 - bits)) for i in range(n)]
    if values_NK.dtype.is_floating_point:
        return [part.view(torch.float32) for part in parts], 1.0
    return [part.float() for part in parts], 2.0 ** (bits - 32)


def _int8_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    scale = weight.scale.to(x.dtype).flatten()
    out = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight.qdata, scale)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


def _is_int8_by_row(weight: Any) -> bool:
    """Whether these are torchao's int8 weights with one scale per row, and nothing done to the activations."""
    if type(weight).__name__ != "Int8Tensor":
        return False
    by_row = weight.scale.numel() == weight.shape[0]
    return by_row and weight.act_quant_kwargs is None and weight.act_pre_scale is None


def _projected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), by `_fast_linear` where it can. The layers themselves are nn.Linear to the letter, which is what
    quantizers look for; one with hooks, or with a forward that somebody (accelerate) has put before it, is called."""
    if type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)):
        out = _fast_linear(x, layer.weight, layer.bias)
        if out is not None:
            return out
    return layer(x)


def _linear(inputs: int, outputs: int, *, bias: bool, variance_scale: float = 1.0) -> nn.Linear:
    """A linear layer that remembers its official initialisation, std = sqrt(variance_scale / inputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.init_std = math.sqrt(variance_scale / inputs)  # type: ignore[assignment]  # read by _init_weights
    return layer


class RecurrentGemmaMLP(nn.Module):
    """Gated MLP (section 2.2): down(act(gate(x)) * up(x)); config.intermediate_size counts both branches."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.gate_proj = _linear(config.hidden_size, width, bias=True)
        self.up_proj = _linear(config.hidden_size, width, bias=True)
        self.down_proj = _linear(
            width, config.hidden_size, bias=True, variance_scale=config.final_w_init_variance_scale
        )
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(_projected(self.gate_proj, x_BTE)) * _projected(self.up_proj, x_BTE)
        return _projected(self.down_proj, hidden)


# --- Local attention ----------------------------------------------------------------------------------------------


class AttentionMask(NamedTuple):
    """Which keys a query sees: itself and those of its document at most W before it; by rank, see the file's head."""

    query_rank: torch.Tensor  # (B or 1, T) int64
    key_rank: torch.Tensor  # (B or 1, K) int64, negative where there is no key
    reach: torch.Tensor  # (B or 1, T) int64: how far back, min(W, position)
    query_is_token: torch.Tensor | None  # (B, T) bool; None: padding cannot matter
    window: int
    diagonal: int | None  # keys are in order and query t is key diagonal + t; None: they are not
    plain: bool  # no padding, no documents and no past: every row and every block of queries looks alike
    ordered: bool  # the cache is to return the keys in order
    in_blocks: bool = False  # long enough for `attend_in_blocks`
    prepared: Any = None  # what the attention implementation gets: made once, for all layers

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> torch.Tensor:
        """(B or 1, 1, T', K') bool for a block of queries and keys."""
        key_rank = self.key_rank[:, None, keys]
        distance = self.query_rank[:, queries, None] - key_rank
        seen = (distance >= 0) & (distance <= self.reach[:, queries, None]) & (key_rank >= 0)
        if self.query_is_token is not None:
            # Padding sees everything: nobody reads its output, and a softmax over nothing would be NaN.
            seen = seen | ~self.query_is_token[:, queries, None]
        return seen[:, None]


def rotate(x_BNTh: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor) -> torch.Tensor:
    """RoPE on the first 2 r of h dimensions: pairs (i, i + r) turn by the angle of the token's position."""
    cos, sin = cos_BTr[:, None], sin_BTr[:, None]
    first, second, rest = x_BNTh.split([cos.shape[-1], cos.shape[-1], x_BNTh.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def eager_attention(
    q_BHTh: torch.Tensor, k_BGKh: torch.Tensor, v_BGKh: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by hand; returns the output (B, H, T, h) and the probabilities (B, H, T, K).

    The heads of a group share keys, so they are folded into the queries instead of repeating the keys.
    """
    (B, H, T, h), (G, K) = q_BHTh.shape, k_BGKh.shape[1:3]
    scores = torch.matmul(q_BHTh.reshape(B, G, H // G * T, h), k_BGKh.transpose(2, 3)).view(B, H, T, K) * h**-0.5
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    probabilities = F.dropout(probabilities.to(q_BHTh.dtype), dropout)
    out = torch.matmul(probabilities.view(B, G, H // G * T, K), v_BGKh).view(B, H, T, h)
    return out, probabilities


def sdpa_attention(
    q_BHTh: torch.Tensor, k_BGKh: torch.Tensor, v_BGKh: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, None]:
    """The same by torch's fused kernels; `mask=None` means causal."""
    (B, H, T, h), G = q_BHTh.shape, k_BGKh.shape[1]
    if T == 1 and (mask is None or mask.shape[1] == 1):
        # One token: the heads of a group become the queries, and the keys are read once.
        q = q_BHTh.reshape(B, G, H // G, h)
        out = F.scaled_dot_product_attention(q, k_BGKh, v_BGKh, attn_mask=mask, dropout_p=dropout)
        return out.reshape(B, H, 1, h), None
    k, v = (
        x[:, :, None].expand(-1, -1, H // G, -1, -1).flatten(1, 2) if G > 1 else x.expand(-1, H, -1, -1)
        for x in (k_BGKh, v_BGKh)
    )
    return F.scaled_dot_product_attention(q_BHTh, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None), None


def attend_in_blocks(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    q_BHTh: torch.Tensor,
    k_BGKh: torch.Tensor,
    v_BGKh: torch.Tensor,
    mask: AttentionMask,
    dropout: float,
) -> torch.Tensor:
    """Linear cost in T: each block of queries meets the keys of its band alone.

    The bands are of one size, padded in front with keys that no query sees, so that `unfold` cuts them without a copy
    and its backward is linear too.
    """
    T, W = q_BHTh.shape[2], mask.window
    starts = range(0, T, QUERY_BLOCK)
    pad = (0, 0, W - mask.diagonal, len(starts) * QUERY_BLOCK - T)
    k_bands, v_bands = (F.pad(x, pad).unfold(2, W + QUERY_BLOCK, QUERY_BLOCK).unbind(2) for x in (k_BGKh, v_BGKh))
    outputs, inner = [], None
    for start, k_band, v_band in zip(starts, k_bands, v_bands, strict=True):
        size = min(QUERY_BLOCK, T - start)
        first_key = start + mask.diagonal - W  # may lie before the first key
        is_inner = mask.plain and first_key >= 0 and size == QUERY_BLOCK
        if is_inner and inner is not None:
            visible = inner
        else:
            keys = slice(max(0, first_key), first_key + W + size)
            visible = F.pad(mask.visible(slice(start, start + size), keys), (max(0, -first_key), 0))
            inner = visible if is_inner else inner
        k, v = (band.transpose(2, 3)[:, :, : W + size] for band in (k_band, v_band))
        outputs.append(attend(q_BHTh[:, :, start : start + size], k, v, visible, dropout)[0])
    return torch.cat(outputs, dim=2)


LOCAL_IMPLEMENTATIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
}


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
        self.q_proj = _linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = _linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = _linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = _linear(
            config.hidden_size,
            config.hidden_size,
            bias=True,
            variance_scale=config.final_w_init_variance_scale,
        )

    def forward(
        self, x_BTE: torch.Tensor, step: Step, cache: Cache | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*x_BTE.shape[:2], -1, self.head_dim)
        q = rotate(_projected(self.q_proj, x_BTE).view(shape).transpose(1, 2), step.cos_BTr, step.sin_BTr)
        k = rotate(_projected(self.k_proj, x_BTE).view(shape).transpose(1, 2), step.cos_BTr, step.sin_BTr)
        v = _projected(self.v_proj, x_BTE).view(shape).transpose(1, 2)
        if step.shard is not None:
            k, v = step.shard.with_left(k, v, size=self.config.attention_window_size, dim=2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, ordered=step.attention.ordered)
            k, v = k.to(q.dtype), v.to(q.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if implementation in LOCAL_IMPLEMENTATIONS:
            attend = LOCAL_IMPLEMENTATIONS[implementation]
            out, weights = self._attend(attend, q, k, v, step.attention, dropout)
            out = out.transpose(1, 2)
        else:
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)(
                self, q, k, v, step.attention.prepared, dropout=dropout, scaling=self.scaling,
                sliding_window=self.config.sliding_window, is_causal=True, **kwargs,
            )  # fmt: skip
        return _projected(self.o_proj, out.reshape(*x_BTE.shape[:2], -1)), weights

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
        return attend(q, k, v, mask.prepared, dropout)


# --- The recurrent block ------------------------------------------------------------------------------------------


class RgLruCoefficients(torch.autograd.Function):
    """Gates to recurrence (equations 1 to 4): a = exp(-c r softplus(Lambda)), x' = sqrt(1 - a^2) i x.

    Recomputes everything in its backward: three activations are saved instead of nine. The derivative of the square
    root is bounded as in the official code. Inputs (B, T, D) before the sigmoids, softplus(Lambda) (D,) in float32;
    `reset` (B or 1, T, 1) bool, `hold` likewise or None. Outputs a and x' in float32 (float64 for float64).
    """

    @staticmethod
    def _parts(r_pre: torch.Tensor, i_pre: torch.Tensor, softplus_D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = softplus_D.dtype
        r, i = torch.sigmoid(r_pre.to(dtype)), torch.sigmoid(i_pre.to(dtype))
        log_a = r * (-RG_LRU_C * softplus_D)
        # 1 - exp(2 log a), not -expm1(2 log a): at a = 1 the official code rounds to 0, and so must we.
        return r, i, log_a, 1.0 - torch.exp(2.0 * log_a)

    @staticmethod
    def compute(
        r_pre: torch.Tensor,
        i_pre: torch.Tensor,
        x: torch.Tensor,
        softplus_D: torch.Tensor,
        reset: torch.Tensor,
        hold: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        a, multiplier = log_a.exp_(), one_minus_a2.sqrt_()
        # A document begins: nothing of the past, and x enters undamped.
        a, multiplier = a.masked_fill_(reset, 0.0), multiplier.masked_fill_(reset, 1.0)
        gated = multiplier.mul_(i).mul_(x)
        if hold is not None:  # padding: the state passes unchanged
            a, gated = a.masked_fill_(hold, 1.0), gated.masked_fill_(hold, 0.0)
        return a, gated

    @staticmethod
    def plain(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the same for autograd and every transform of torch."""
        r_pre, i_pre, x, softplus_D, reset, hold = inputs
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        a, gated = log_a.exp().masked_fill(reset, 0.0), bounded_sqrt(one_minus_a2).masked_fill(reset, 1.0) * i * x
        return (a, gated) if hold is None else (a.masked_fill(hold, 1.0), gated.masked_fill(hold, 0.0))

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*inputs)
        return RgLruCoefficients.compute(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: torch.Tensor, grad_gated: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved_tensors = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        if torch.is_grad_enabled():
            return _differentiable_gradients(RgLruCoefficients, saved_tensors, (grad_a, grad_gated))
        r_pre, i_pre, x, softplus_D, reset, hold = saved_tensors
        r, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        x = x.to(softplus_D.dtype)
        if hold is not None:
            grad_a, grad_gated = grad_a.masked_fill(hold, 0.0), grad_gated.masked_fill(hold, 0.0)
        multiplier = one_minus_a2.sqrt().masked_fill_(reset, 1.0)
        grad_x = grad_gated * multiplier
        grad_i = grad_x * x * i * (1.0 - i)
        grad_x = grad_x.mul_(i)
        grad_square = grad_gated * i * x / torch.clamp(4.0 * one_minus_a2, min=MIN_4X_IN_SQRT_GRADIENT).sqrt_()
        a = log_a.exp_()
        grad_log_a = a.mul(grad_a).sub_(grad_square.mul_(2.0).mul_(a).mul_(a))
        grad_log_a = grad_log_a.masked_fill_(reset, 0.0).mul_(-RG_LRU_C).mul_(r)
        grad_softplus = grad_log_a.sum((0, 1))
        grad_r = grad_log_a.mul_(softplus_D).mul_(1.0 - r)
        grads = (grad_r, grad_i, grad_x)
        grads = tuple(grad.to(saved.dtype) for grad, saved in zip(grads, saved_tensors[:3], strict=True))
        return *grads, grad_softplus, None, None


class RecurrentGemmaRglru(nn.Module):
    """The Real-Gated Linear Recurrent Unit (section 2.4); its gates are block-diagonal with one block per head."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        block = config.lru_width // self.num_heads
        self.recurrent_param = nn.Parameter(torch.empty(config.lru_width))
        self.input_gate_weight = nn.Parameter(torch.empty(self.num_heads, block, block))
        self.input_gate_bias = nn.Parameter(torch.empty(self.num_heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(self.num_heads, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(self.num_heads, block))

    def _gate(self, x_BTD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # As many heads as the weight has: under tensor parallelism they are this rank's.
        blocks = x_BTD.reshape(-1, *weight.shape[:2]).transpose(0, 1)
        out_HNd = torch.baddbmm(bias[:, None].to(x_BTD.dtype), blocks, weight.to(x_BTD.dtype))
        return out_HNd.transpose(0, 1).reshape(x_BTD.shape)

    def forward(
        self,
        x_BTD: torch.Tensor,
        step: Step,
        h0_BD: torch.Tensor | None,
        kernel: Callable[[RecurrentBlockParameters], Any] | None = None,
        conv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """The states (B, T, D) and the last one (B, D), both in float32 (float64 for float64).

        With a `kernel`: what it makes of these parameters and those of the convolution.
        """
        if kernel is not None:
            return kernel(
                RecurrentBlockParameters(
                    conv[0],
                    conv[1],
                    self.recurrent_gate_weight,
                    self.recurrent_gate_bias,
                    self.input_gate_weight,
                    self.input_gate_bias,
                    self.recurrent_param,
                )
            )
        r_pre = self._gate(x_BTD, self.recurrent_gate_weight, self.recurrent_gate_bias)
        i_pre = self._gate(x_BTD, self.input_gate_weight, self.input_gate_bias)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        softplus_D = F.softplus(self.recurrent_param.to(dtype))
        coefficients = _differentiable(RgLruCoefficients)
        a, gated = coefficients(r_pre, i_pre, x_BTD, softplus_D, step.reset_BT1, step.hold_BT1)
        if step.shard is not None:
            return step.shard.linear_recurrence(gated, a)
        return linear_recurrence(gated, a, h0_BD)


class CausalConv1d(torch.autograd.Function):
    """Depthwise causal convolution of (B, K - 1 + T, D), the context in front, to (B, T, D); weight (D, 1, K).

    `reach` (B or 1, T, K) of 0 and 1 or None (all 1) keeps it from reading across the start of a document. By hand,
    because a sum of shifted products in place is twice as fast on a CPU as any other form, forward and backward, and
    keeps time before the channels.
    """

    @staticmethod
    def compute(
        full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reach: torch.Tensor | None
    ) -> torch.Tensor:
        weight_KD = weight[:, 0].t()
        K, T = weight_KD.shape[0], full.shape[1] - weight_KD.shape[0] + 1
        if T == 1:  # one product instead of K
            seen = full if reach is None else full * reach.transpose(1, 2)
            return (seen * weight_KD).sum(1, keepdim=True) + bias
        weight_KD = weight_KD.contiguous()
        out = bias.expand(full.shape[0], T, -1).clone()
        for tap in range(K):
            x = full[:, tap : tap + T]
            out.addcmul_(x if reach is None else x * reach[..., tap, None], weight_KD[tap])
        return out

    @staticmethod
    def plain(full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reach: torch.Tensor | None) -> torch.Tensor:
        """Compute the same for autograd and every transform of torch."""
        K, T = weight.shape[2], full.shape[1] - weight.shape[2] + 1
        out = bias.expand(full.shape[0], T, -1)
        for tap in range(K):
            x = full[:, tap : tap + T]
            out = out + (x if reach is None else x * reach[..., tap, None]) * weight[:, 0, tap]
        return out

    @staticmethod
    def forward(
        ctx: Any, full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reach: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(full, weight, bias, reach)
        return CausalConv1d.compute(full, weight, bias, reach)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved_tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(CausalConv1d, saved_tensors, (grad,))
        full, weight, _, reach = saved_tensors
        weight_KD = weight[:, 0].t().contiguous()
        T = grad.shape[1]
        grad_full, grad_taps = torch.zeros_like(full), []
        for tap, weight_D in enumerate(weight_KD):
            seen = grad if reach is None else grad * reach[..., tap, None]
            grad_full[:, tap : tap + T].addcmul_(seen, weight_D)
            grad_taps.append((full[:, tap : tap + T] * seen).sum((0, 1)))
        return grad_full, torch.stack(grad_taps, dim=1)[:, None], grad.sum((0, 1)), None


def _differentiable(function: type[RgLruCoefficients] | type[CausalConv1d]) -> Callable[..., Any]:
    """Choose a form of `function`: plain under a transform of torch, with its own backward pass where gradients are
    wanted, else the computation alone (decoding feels the difference)."""
    if is_transformed():
        return function.plain
    return function.apply if torch.is_grad_enabled() else function.compute


def _differentiable_gradients(
    function: type[RgLruCoefficients] | type[CausalConv1d],
    inputs: tuple[torch.Tensor | None, ...],
    grads: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients of `inputs` so that they can be differentiated again (`create_graph=True`), by autograd
    through the plain form. The backward passes above are faster, and constants to autograd."""
    inputs = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function.plain(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


class RecurrentGemmaConv1d(nn.Conv1d):
    """The convolution's parameters under their published names. A module that is called, and not only read, because
    accelerate's offloading and ZeRO-3 fetch parameters when the module that owns them is called."""

    def forward(
        self,
        input: torch.Tensor,
        reach: torch.Tensor | None = None,
        inside: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
    ) -> Any:
        """The convolution of (B, K - 1 + T, D), or what `inside` makes of the parameters, called meanwhile."""
        if inside is not None:
            return inside(self.weight, self.bias)
        # By a kernel wherever the scan is one, except for a single step of decoding, which is less than its launch.
        if input.shape[1] != self.weight.shape[2]:
            scan_dtype = torch.promote_types(input.dtype, torch.float32)
            if resolve_backend("auto", input.device, scan_dtype) == "triton":
                return causal_conv1d(input, self.weight, self.bias, reach)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return _differentiable(CausalConv1d)(input, weight, bias, reach)


class RecurrentGemmaRecurrentBlock(nn.Module):
    """linear_out(act(linear_y(x)) * RG-LRU(conv1d(linear_x(x)))) (section 2.3), `lru_width` wide inside."""

    def __init__(self, config: RecurrentGemmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.conv1d_width = config.conv1d_width
        E, D = config.hidden_size, config.lru_width
        self.linear_y = _linear(E, D, bias=True)
        self.linear_x = _linear(E, D, bias=True)
        self.linear_out = _linear(D, E, bias=True, variance_scale=config.final_w_init_variance_scale)
        self.conv_1d = RecurrentGemmaConv1d(D, D, kernel_size=config.conv1d_width, groups=D)
        self.conv_1d.init_std = math.sqrt(config.w_init_variance_scale / config.conv1d_width)  # type: ignore[assignment]
        self.rg_lru = RecurrentGemmaRglru(config)
        self.activation = config.hidden_activation
        self.head_width = D // config.num_attention_heads
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, x_BTE: torch.Tensor, step: Step, cache: Cache | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        u, y = _projected(self.linear_x, x_BTE), _projected(self.linear_y, x_BTE)
        layer = None if cache is None else cache.layers[self.layer_idx]
        records = layer is not None and layer.record_past
        backend = resolve_block_backend(u.device, u.dtype, self.head_width, self.activation)
        # A kernel keeps to itself the states that a recording cache wants, and the one that the next rank needs.
        if backend == "triton" and not records and step.shard is None:
            out = self._by_kernel(u, y, step, cache, layer)
        else:
            full, h0 = self._conv_input(u, step, cache, layer), self._initial_state(layer)
            states, last = self.rg_lru(self.conv_1d(full, step.reach_BTK), step, h0)
            if layer is not None:
                cache.update_recurrent_state(last, self.layer_idx, history=states if records else None)
            out = (states * self.act_fn(y)).to(x_BTE.dtype)
        return _projected(self.linear_out, out), None

    def _conv_input(self, u: torch.Tensor, step: Step, cache: Cache | None, layer: Any) -> torch.Tensor:
        """(B, K - 1 + T, D): u behind what came before it; the cache keeps what comes before the next."""
        context = self.conv1d_width - 1
        if step.shard is not None and context:
            (full,) = step.shard.with_left(u, size=context, dim=1)
            return F.pad(full, (0, 0, context + u.shape[1] - full.shape[1], 0))
        if layer is None:
            return F.pad(u, (0, 0, context, 0))
        return cache.update_conv_state(u.transpose(1, 2), self.layer_idx).transpose(1, 2).to(u.dtype)

    def _initial_state(self, layer: Any) -> torch.Tensor | None:
        if layer is None or not layer.is_recurrent_states_initialized[0]:
            return None
        h0 = layer.recurrent_states[0]
        # The backward pass reads it, after the cache has overwritten its own.
        return h0.clone() if torch.is_grad_enabled() else h0

    def _by_kernel(self, u: torch.Tensor, y: torch.Tensor, step: Step, cache: Cache | None, layer: Any) -> torch.Tensor:
        """All of it in one kernel. It runs inside the calls of the modules that own its parameters (see
        `RecurrentGemmaConv1d`), and reads them there, so that offloading, adapters and parametrizations keep working.
        """
        reset, hold = (None if flag is None else flag[..., 0] for flag in (step.reset_BT1, step.hold_BT1))
        ready = layer is not None and layer.is_recurrent_states_initialized[0]
        if ready and u.shape[1] == 1 and self.conv1d_width > 1 and not torch.is_grad_enabled():
            states = layer.conv_states[0], layer.recurrent_states[0]
            layer.has_previous_state[0] = True
            reset, hold, reach = (None if flag is None else flag[:, 0] for flag in (reset, hold, step.reach_BTK))

            def run(parameters: RecurrentBlockParameters) -> torch.Tensor:
                out = recurrent_block_step(
                    u[:, 0], y[:, 0], parameters, *states, reset_B=reset, hold_B=hold, reach_BK=reach
                )
                return out[:, None]

        else:
            context, h0 = None, self._initial_state(layer)
            if layer is not None:
                full, C = self._conv_input(u, step, cache, layer), self.conv1d_width - 1
                context, u = full[:, :C], full[:, C:]

            def run(parameters: RecurrentBlockParameters) -> torch.Tensor:
                out, last = recurrent_block(
                    u, y, parameters, context_BCD=context if self.conv1d_width > 1 else None, h0_BD=h0,
                    reset_BT=reset, hold_BT=hold, reach_BTK=step.reach_BTK,
                )  # fmt: skip
                if layer is not None:
                    cache.update_recurrent_state(last, self.layer_idx)
                return out

        return self.conv_1d(u, inside=lambda *conv: self.rg_lru(u, step, None, kernel=run, conv=conv))


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
        if self.dtype != torch.bfloat16 or devices != {"cpu"} or is_quantized or not _is_cpu_without_bfloat16("cpu"):
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


def _is_cpu_without_bfloat16(device: torch.device | str) -> bool:
    has_onednn = torch.backends.mkldnn.is_available()  # without it, as on a Mac, there is nothing to ask
    return str(device) == "cpu" and has_onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _unpacked(x: torch.Tensor, index_BT: torch.Tensor | None, dim: int = 1) -> torch.Tensor:
    """Reorders dimension `dim` of x (B, ...) by index_BT (B, T); None changes nothing."""
    if index_BT is None:
        return x
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[dim] = index_BT.shape[1]
    size = list(x.shape)
    size[dim] = index_BT.shape[1]
    return x.gather(dim, index_BT.view(shape).expand(size))


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
        position_ids = _document_positions(position_ids, kwargs, B, T)
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
        pack = None
        if mask.tokens is not None and T > 1:
            pack = (~mask.tokens).to(torch.int8).argsort(dim=1, stable=True)  # tokens first, then padding
            x = _unpacked(x, pack)
            position_ids = None if position_ids is None else _unpacked(position_ids.expand(B, T), pack)
        if position_ids is not None and mask.seen == 0 and _is_counted(position_ids):
            position_ids = None
        if cache is not None:
            cache.begin_forward(B, T, x.device, mask.tokens)
        step = self._step(x, mask, position_ids, cache, pack is not None, output_attentions)
        step = step._replace(shard=sequence_shard)
        unpack = None if pack is None else pack.argsort(dim=1)
        if "flash" in self.config._attn_implementation and cache is None and position_ids is not None:
            kwargs["position_ids"] = position_ids  # how Transformers' flash attention learns of packed documents
        return self._run_layers(x, step, cache, unpack, output_hidden_states, output_attentions, **kwargs)

    def _run_layers(
        self,
        x: torch.Tensor,
        step: Step,
        cache: Cache | None,
        unpack: torch.Tensor | None,
        output_hidden_states: bool,
        output_attentions: bool,
        **kwargs: Any,
    ) -> RecurrentGemmaModelOutput:
        hidden_states: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(_unpacked(x, unpack))
            x, weights = layer(x, step, cache=cache, **kwargs)
            if output_attentions and weights is not None:
                attentions.append(_unpacked_attention(weights, unpack))
        x = _unpacked(self.final_norm(x), unpack)
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
        if position_ids is not None and _may_look_at(position_ids):
            _check_positions(position_ids.expand(B, T), mask.tokens)
        if cache is not None:
            cache.check_config(self.config)
        if mask.custom is None or self.first_attention is None:
            return
        if implementation not in LOCAL_IMPLEMENTATIONS:
            raise ValueError(f"a 4D attention_mask needs attn_implementation 'eager' or 'sdpa', not {implementation!r}")
        K = T
        if cache is not None:
            K += min(self.config.attention_window_size, mask.seen)
        if mask.custom.shape[2] != T or not K <= mask.custom.shape[3] <= max(K, mask.seen + T):
            raise ValueError(
                f"a 4D attention_mask of shape {tuple(mask.custom.shape)} must be (batch or 1, heads or 1, {T}, {K})"
            )
        if mask.custom.shape[3] > K and _shows_any(mask.custom[..., : mask.custom.shape[3] - K]):
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
            if _may_look_at(input_ids):
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
        packed: bool,
        output_attentions: bool,
    ) -> Step:
        B, T = x.shape[:2]
        columns = torch.arange(T, device=x.device)[None]
        is_token = mask.tokens
        if packed:  # tokens first; without a cache nothing ever looks at what stands behind them
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
            plain = attention.plain and position_ids is None
            attention = attention._replace(plain=plain)
            attention = _prepared(attention, mask, self.config._attn_implementation, B, output_attentions)
        reach = None
        if position_ids is not None:  # else there is one document
            back = torch.arange(self.config.conv1d_width - 1, -1, -1, device=x.device)
            reach = (position[..., None] >= back).to(x.dtype)
        hold = None if is_token is None else ~is_token[..., None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return Step(cos, sin, (position == 0)[..., None], hold, reach, attention)

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
        reach = position.clamp(max=W)
        if cache is None:
            before = min(W, mask.seen)  # keys of other ranks
            key = torch.arange(mask.seen - before, mask.seen + T, device=position.device)[None]
            query, plain = mask.seen + columns, mask.seen == 0
            return AttentionMask(query, key, reach, None, W, before, plain=plain, ordered=False)
        past = cache.progress.past_lengths.to(position.device)[:, None]
        in_order = T > 1 or output_attentions or mask.custom is not None or torch.is_grad_enabled()
        in_order = in_order or "flash" in self.config._attn_implementation
        if in_order:
            diagonal = min(W, cache.progress.columns - T)
            key = past - diagonal + torch.arange(diagonal + T, device=position.device)
        else:
            diagonal, key = None, cache.slot_ranks().to(position.device)
        query_is_token = is_token if T == 1 else None
        # With nothing before it, every row counts from 0 and padding stands behind, where causality hides it.
        plain = T > 1 and cache.progress.columns == T
        return AttentionMask(past + columns, key, reach, query_is_token, W, diagonal, plain=plain, ordered=in_order)


def _document_positions(
    position_ids: torch.Tensor | None, kwargs: dict[str, Any], B: int, T: int
) -> torch.Tensor | None:
    """position_ids, or what the other descriptions of packed documents say about them: `cu_seq_lens_q` (documents +
    1,), where each document begins and the last ends, or `seq_idx` (B, T), the number of each token's document."""
    ends, documents = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if position_ids is not None or (ends is None and documents is None):
        return position_ids
    if documents is None:
        if B != 1 or ends.ndim != 1:
            raise ValueError(
                f"cu_seq_lens_q of shape {tuple(ends.shape)} for {B} rows: it describes one row of packed documents; "
                "give position_ids that begin at 0 with each document"
            )
        if _may_look_at(ends) and (ends[0] != 0 or ends[-1] != T):
            raise ValueError(f"cu_seq_lens_q={ends.tolist()} must begin with 0 and end with the row's {T} tokens")
        documents = torch.searchsorted(ends, torch.arange(T, device=ends.device, dtype=ends.dtype), right=True)[None]
    if documents.shape != (B, T):
        raise ValueError(f"seq_idx of shape {tuple(documents.shape)} must be ({B}, {T})")
    columns = torch.arange(T, device=documents.device).expand(B, T)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return columns - torch.where(begins, columns, 0).cummax(1).values


def _may_look_at(x: torch.Tensor) -> bool:
    """Tell whether values may be read to check them: a GPU would be waited for, torch.compile and vmap cannot."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def _check_positions(position_BT: torch.Tensor, tokens_BT: torch.Tensor | None) -> None:
    """Positions grow within a document; one that goes back to anything but 0 is a mistake. Looks on a CPU alone."""
    falls = (position_BT[:, 1:] < position_BT[:, :-1]) & (position_BT[:, 1:] != 0)  # from column t to t + 1
    if tokens_BT is not None:
        falls = falls & tokens_BT[:, 1:] & tokens_BT[:, :-1]
    if position_BT.amin() < 0 or falls.any():
        row, start = (falls if falls.any() else position_BT < 0).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} from column {start} on are {position_BT[row, start : start + 4].tolist()}: "
            "positions grow by one within a document, and a new document begins at position 0"
        )


def _is_counted(position_BT: torch.Tensor) -> bool:
    """Whether these are just 0, 1, 2, ..., as generate() passes them: then there is nothing to mask. Asked on a CPU
    alone, where looking costs nothing."""
    if position_BT.shape[1] == 1 or not _may_look_at(position_BT):
        return False
    return bool((position_BT == torch.arange(position_BT.shape[1])).all())


def _shows_any(mask: torch.Tensor) -> bool:
    return bool((mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any())


def _default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _unpacked_attention(weights_BHTK: torch.Tensor, unpack: torch.Tensor | None) -> torch.Tensor:
    """Queries, and the keys of this forward among all keys, back to the order of the caller's columns."""
    if unpack is None:
        return weights_BHTK
    past = weights_BHTK.shape[3] - unpack.shape[1]
    keys = torch.cat([torch.arange(past, device=unpack.device).expand(unpack.shape[0], -1), past + unpack], dim=1)
    return _unpacked(_unpacked(weights_BHTK, unpack, dim=2), keys, dim=3)


class InputMask(NamedTuple):
    """The caller's attention_mask, checked and taken apart."""

    tokens: torch.Tensor | None  # (B, T) bool of this forward's columns; None: no padding
    custom: torch.Tensor | None  # 4D
    seen: int  # columns before this forward

    @staticmethod
    def read(attention_mask: Any, cache: RecurrentGemmaCache | None, B: int, T: int) -> InputMask:
        seen = 0
        # A single token asks how many there were only to check a mask. A compiled step must not ask, see
        # `_Progress.compiled_columns`.
        if cache is not None and (T > 1 or isinstance(attention_mask, torch.Tensor)):
            seen = cache.get_seq_length()
        if attention_mask is None:
            return InputMask(None, None, seen)
        if isinstance(attention_mask, dict):  # what create_masks_for_generate made
            return InputMask(attention_mask["tokens"], None, seen)
        if attention_mask.ndim == 4:
            return InputMask(None, attention_mask, seen)
        if attention_mask.ndim != 2 or attention_mask.shape != (B, seen + T):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must be (batch, columns so far + new ones) = "
                f"({B}, {seen} + {T}), or 4D"
            )
        return InputMask(attention_mask[:, seen:].bool(), None, seen)


def _prepared(attention: AttentionMask, mask: InputMask, implementation: str, B: int, whole: bool) -> AttentionMask:
    """Makes what the attention implementation reads; `whole`: all probabilities at once are wanted."""
    T, K = attention.reach.shape[1], attention.key_rank.shape[1]
    if mask.custom is not None:
        return attention._replace(prepared=mask.custom[..., mask.custom.shape[3] - K :])
    if implementation == "flex_attention":
        return attention._replace(prepared=_flex_mask(attention, (B, T)))
    if "flash" in implementation:
        return attention._replace(prepared=_flash_mask(attention, B))
    if implementation in LOCAL_IMPLEMENTATIONS:
        if attention.diagonal is not None and attention.window + 2 * QUERY_BLOCK < K and not whole:
            return attention._replace(in_blocks=True)
        if implementation == "sdpa" and attention.plain and attention.window >= T - 1:
            return attention  # the window reaches every earlier key: plainly causal
    return attention._replace(prepared=attention.visible())


def _flex_mask(attention: AttentionMask, shape: tuple[int, int]) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = shape
    query, key, reach = (
        x.expand(B, -1).contiguous() for x in (attention.query_rank, attention.key_rank, attention.reach)
    )
    query_ok = attention.query_is_token

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = query[b, q] - key[b, k]
        seen = (distance >= 0) & (distance <= reach[b, q]) & (key[b, k] >= 0)
        return seen if query_ok is None else seen | ~query_ok[b, q]

    return create_block_mask(sees, B, None, T, key.shape[1], device=query.device)


def _flash_mask(attention: AttentionMask, batch_size: int) -> torch.Tensor | None:
    """(B, K) bool or None, all that flash attention takes; what that cannot say is refused."""
    if not attention.plain and (attention.diagonal != 0 or batch_size > 1):
        hidden = attention.reach < attention.query_rank.clamp(max=attention.window)
        if attention.query_is_token is not None:
            hidden = hidden & attention.query_is_token
        if hidden.any():
            raise ValueError(
                "flash attention keeps packed documents apart only in one row and without a cache; use "
                "attn_implementation='sdpa' or 'flex_attention'"
            )
    has_gaps = attention.key_rank < 0
    return ~has_gaps if has_gaps.any() else None


# --- Heads --------------------------------------------------------------------------------------------------------


def _last_true(tokens_BT: torch.Tensor) -> torch.Tensor:
    """(B, 1) column of the last True of each row; 0 where there is none."""
    count = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
    return (tokens_BT * count).argmax(1, keepdim=True)


def _kept(x_BTE: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions whose logits are wanted: the last n, an index (n,) for all rows, or one per row (B, n)."""
    if isinstance(logits_to_keep, int):
        return x_BTE[:, -logits_to_keep:] if logits_to_keep else x_BTE
    if logits_to_keep.ndim == 2:
        return _unpacked(x_BTE, logits_to_keep)
    return x_BTE[:, logits_to_keep]


def _first_tokens(like_BT: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, T) bool: tokens that only padding or another document stands before. They are nobody's next token: so a
    padded row has the loss of the row alone, and packed documents that of each by itself."""
    first = torch.zeros_like(like_BT, dtype=torch.bool)
    if position_ids is not None:
        first |= position_ids.to(first.device) == 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, -first.shape[1] :].to(first.device).bool()
        first[:, 1:] |= ~is_token[:, :-1]
    return first


class RecurrentGemmaLMHead(nn.Linear):
    """The head: logits of hidden states, or with labels the losses of the tokens, without the logits. Both in its
    forward, because sharding (FSDP, ZeRO-3) and offloading fetch the weight of a module that is called."""

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None, **loss_kwargs: Any) -> torch.Tensor:
        if labels is None:
            out = _fast_linear(input, self.weight, self.bias)
            return F.linear(input, self.weight, self.bias) if out is None else out
        return linear_cross_entropy(input, self.weight, labels, **loss_kwargs)


class RecurrentGemmaForCausalLM(RecurrentGemmaPreTrainedModel, GenerationMixin):
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
            positions = _document_positions(position_ids, kwargs, *x.shape[:2])
            labels, kwargs = self._targets(labels, _first_tokens(labels, attention_mask, positions), kwargs)
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
        if _may_look_at(labels_BT):
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

    # --- generate() ---

    def generate(
        self, *args: Any, cache: Cache | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Any:
        """Write text as Transformers does, with the cache under either of its names."""
        given = one_cache(cache, past_key_values)
        if given is not None:
            kwargs[CACHE_NAME] = RecurrentGemmaCache.adopt(given, self.config)
        return with_both_cache_names(super().generate(*args, **kwargs))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: Any
    ) -> None:
        """Every `cache_implementation` is a RecurrentGemmaCache: it is dynamic and static at once."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._check_speculation(model_kwargs)
        self._check_chunks(generation_config, model_kwargs)
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        kind = generation_config.cache_implementation or "dynamic"
        if "offloaded" in kind or kind == "quantized":
            logger.warning_once(
                f"cache_implementation={kind!r}: the cache of this model has a constant size and stays on the device "
                "in full precision."
            )
        cache = RecurrentGemmaCache(self.config, static="static" in kind)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache
        return None

    @staticmethod
    def _check_chunks(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Reads at once what follows a cache, where this Transformers cannot go on from one in chunks."""
        size = generation_config.prefill_chunk_size
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        if size is None or cache is None or CONTINUES_IN_CHUNKS or not cache.get_seq_length():
            return
        if mask is None or mask.shape[1] - cache.get_seq_length() > size:
            logger.warning_once(
                f"prefill_chunk_size={size}: this Transformers reads in chunks only what comes first; what follows the "
                "cache is read at once, which gives the same text and takes more memory. Transformers 5.21 can do it."
            )
        generation_config.prefill_chunk_size = None

    def _check_speculation(self, model_kwargs: dict[str, Any]) -> None:
        """Drafts stand directly behind the text, and what the model does not confirm is taken back from the cache."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError(
                "padding on the right does not go with assisted and prompt-lookup decoding: drafts follow the last "
                "column; leave the padding out, or pad on the left"
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Positions count tokens; padding behind them repeats the last one, so that the next token follows on."""
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
        """As in Transformers; where a prompt is padded on the right, the next token follows its last token."""
        mask, given = attention_mask, one_cache(cache, past_key_values)
        own = None if given is None else RecurrentGemmaCache.adopt(given, self.config)
        if own is not None and next_sequence_length is None:
            next_sequence_length = unread_columns(own, input_ids, mask)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: own},
            **kwargs,
        )
        if own is not None:
            # PEFT's prompt tuning looks for this name on every release, and without it puts its virtual tokens in anew.
            model_inputs["past_key_values"] = own
        new = model_inputs["input_ids"] if model_inputs.get("input_ids") is not None else model_inputs["inputs_embeds"]
        T = new.shape[1]
        if mask is not None and mask.ndim == 2 and T > 1 and not mask[:, -1].all():
            tokens, earlier = mask[:, -T:].bool(), mask[:, :-T].bool()
            if (earlier.any(1) & ~tokens.any(1)).any():
                raise ValueError("padding on the right does not go with prefill_chunk_size; pad prompts on the left")
            model_inputs["logits_to_keep"] = _last_true(tokens).to(new.device)
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: RecurrentGemmaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | None:
        """What a compiled forward gets instead of the growing 2D mask, so that its shapes stay the same."""
        if attention_mask is None:
            return None
        return {"tokens": attention_mask[:, -inputs_embeds.shape[1] :].bool()}


# Tools look at a signature for what generate() takes, and people at its help.
functools.update_wrapper(RecurrentGemmaForCausalLM.generate, GenerationMixin.generate)


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
    return _last_true(tokens)


def _refuse_shard(kwargs: dict[str, Any]) -> None:
    if kwargs.get("sequence_shard") is not None:
        raise ValueError("only the language model works on a chunk of a sequence; give this one whole sequences")


class RecurrentGemmaForSequenceClassification(RecurrentGemmaPreTrainedModel):
    """One label (or `num_labels` values) per sequence, read from its last token."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentGemmaModel(config)
        self.score = _linear(config.hidden_size, config.num_labels, bias=False)
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
        self.score = _linear(config.hidden_size, config.num_labels, bias=True)
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
        self.qa_outputs = _linear(config.hidden_size, 2, bias=True)
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
