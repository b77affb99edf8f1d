"""The inside of the recurrent block (Griffin, arXiv:2402.19427, sections 2.3 and 2.4), all that lies between its linear
layers: gelu(y) * RG-LRU(conv1d(u)), and its step of decoding.

- `recurrent_block_reference`: plain torch over the loop in time, differentiated by autograd. It defines what is right.
- `recurrent_block`, `recurrent_block_step`: Triton kernels, in recurrent_block_triton.py, imported when they are used.

The portable path is the model's own modules, called one after the other. Which of the two a model takes is decided in
`resolve_block_backend` and nowhere else; `set_backend` asks for one by name.

Shape suffixes: B batch, T time, D lru_width, H heads, d = D / H, K conv taps, C = K - 1 inputs before the first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .scan import ask_for, asked_for, is_transformed, linear_recurrence_reference, triton_refusal

RG_LRU_C = 8.0  # c of equation 3: log a = -c r softplus(Lambda)
MIN_4X_IN_SQRT_GRADIENT = 1e-6  # the official code divides the gradient of sqrt(x) by sqrt(max(4 x, this))

BACKENDS = ("triton", "portable")  # in the order in which "auto" prefers them
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNEL_MAX_HEAD = 256


class RecurrentBlockParameters(NamedTuple):
    """Everything that is learned between the block's linear layers, under the names of the Griffin paper."""

    conv_weight_D1K: Tensor  # as torch.nn.Conv1d has it, the newest input last
    conv_bias_D: Tensor
    a_weight_Hdd: Tensor  # W_a of the recurrence gate (equation 1), one (in, out) block per head
    a_bias_Hd: Tensor
    x_weight_Hdd: Tensor  # W_x of the input gate (equation 2)
    x_bias_Hd: Tensor
    lambda_D: Tensor  # Lambda, before its softplus


# ---------------------------------------------------------------- the choice


def set_backend(name: str) -> None:
    """Ask for an implementation of all recurrent blocks and scans of this process: "triton", "portable" or "auto" (the
    default). It reaches context parallelism and serving on vLLM too.

    "auto" takes Triton's kernels on a GPU that suits them (NVIDIA from Hopper on, AMD, Intel), and the portable code
    everywhere else, there with scan and convolution alone by Triton where they run. A backend asked for by name that
    cannot serve a model, its device or dtype raises ValueError when the model runs. A compiled model keeps what it was
    compiled with.

    Raises:
        ValueError: no such backend.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"unknown backend {name!r}: choose one of {(*BACKENDS, 'auto')}")
    ask_for(name)


def get_backend() -> str:
    """What `set_backend` asked for last."""
    return asked_for()


def resolve_block_backend(device: torch.device | str, dtype: torch.dtype, head_width: int, activation: str) -> str:
    """The name of the implementation that runs: "triton" or "portable".

    Args:
        device: where the activations are.
        dtype: of the activations.
        head_width: d, lru_width / num_attention_heads.
        activation: config.hidden_activation.

    Raises:
        ValueError: `set_backend` asked for "triton", and it cannot serve this.
    """
    device = torch.device(device)
    name = asked_for()
    if name == "portable" or (name == "auto" and not _suits_the_kernels(device)) or is_transformed():
        return "portable"
    refusal = triton_refusal(device) or _kernel_refusal(dtype, head_width, activation)
    if refusal is None:
        return "triton"
    if name == "triton":
        raise ValueError(f'backend "triton" {refusal}, or call set_backend("auto")')
    return "portable"


@torch.compiler.assume_constant_result
def _suits_the_kernels(device: torch.device) -> bool:
    return _suits(device)


@functools.cache
def _suits(device: torch.device) -> bool:
    """Whether "auto" may take the fused kernels: on a GPU whose registers hold their tiles. On NVIDIA's before
    Hopper they do not fit (60 kB per thread spilled, benchmarks/LOG.md)."""
    if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type != "cpu"


def _kernel_refusal(dtype: torch.dtype, head_width: int, activation: str) -> str | None:
    if dtype not in _KERNEL_DTYPES:
        return f"does not take dtype {dtype}: convert the model to one of {_KERNEL_DTYPES}"
    if head_width > _KERNEL_MAX_HEAD:
        return (
            f"serves gates of at most {_KERNEL_MAX_HEAD} channels per head, not lru_width / num_attention_heads = "
            f"{head_width}: use more heads"
        )
    if activation != "gelu_pytorch_tanh":
        return f'has "gelu_pytorch_tanh" built in, not hidden_activation={activation!r}: change the config'
    return None


# ---------------------------------------------------------------- the contract


def recurrent_block(
    u_BTD: Tensor,
    y_BTD: Tensor,
    parameters: RecurrentBlockParameters,
    *,
    context_BCD: Tensor | None = None,
    h0_BD: Tensor | None = None,
    reset_BT: Tensor | None = None,
    is_padding_BT: Tensor | None = None,
    conv_tap_mask_BTK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu(y) * RG-LRU(conv1d(u)) by Triton kernels. Once differentiable in u, y, context, h0 and all parameters.

    Gates, coefficients, states and sums over time are float32; matrix products and gradients per token have the dtype
    of u. The backward pass recomputes: it needs the inputs and one state for every 64 (float32: 32) steps.

    Args:
        u_BTD: inputs of the convolution; bfloat16, float16 or float32.
        y_BTD: the gating branch before its gelu, dtype of u.
        context_BCD: the K - 1 inputs before the first; None means zeros.
        h0_BD: the state before the first step; None means zeros.
        reset_BT: (B or 1, T) bool; where True a document begins: a = 0, and x enters undamped.
        is_padding_BT: (B or 1, T) bool; where True (padding) the state passes unchanged. It counts before reset.
        conv_tap_mask_BTK: (B or 1, T, K), 0 for taps that would read across the start of a document; None: all 1.

    Returns:
        out_BTD in the dtype of u, and the last state (B, D) in float32.

    Raises:
        ValueError: T = 0.
    """
    if u_BTD.shape[1] == 0:
        raise ValueError(f"u_BTD has shape {tuple(u_BTD.shape)}: pass at least one token, or skip the call")
    from .recurrent_block_triton import block

    weight_KD, *rest = _kernel_parameters(parameters, u_BTD.dtype)
    out_BTD, last_BD, _ = block(
        u_BTD, y_BTD, context_BCD, h0_BD, weight_KD, *rest, reset_BT, is_padding_BT, conv_tap_mask_BTK
    )  # fmt: skip
    return out_BTD, last_BD


def recurrent_block_step(
    u_BD: Tensor,
    y_BD: Tensor,
    parameters: RecurrentBlockParameters,
    conv_state_BDC: Tensor,
    h_BD: Tensor,
    *,
    reset_B: Tensor | None = None,
    is_padding_B: Tensor | None = None,
    conv_tap_mask_BK: Tensor | None = None,
) -> Tensor:
    """`recurrent_block` for one token, in one launch, without gradients.

    The conv state (B, D, K - 1), of any strides, and the float32 state (B, D) are updated in place, so a CUDA graph
    finds them at their old addresses. Returns out (B, D) in the dtype of u.
    """
    from .recurrent_block_triton import decode

    conv_weight, conv_bias, a_weight, a_bias, x_weight, x_bias, lambda_D = parameters
    a_weight, x_weight = a_weight.to(u_BD.dtype), x_weight.to(u_BD.dtype)
    return decode(
        u_BD, y_BD, conv_state_BDC, h_BD, conv_weight, conv_bias, a_weight, a_bias, x_weight, x_bias, lambda_D,
        reset_B, is_padding_B, conv_tap_mask_BK,
    )  # fmt: skip


def causal_conv1d(
    full_BFD: Tensor, weight_D1K: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None = None
) -> Tensor:
    """The depthwise causal convolution by itself, by Triton kernels: of F = K - 1 + T inputs to (B, T, D).

    Accumulates in float32. Differentiable in all but `conv_tap_mask`; (B or 1, T, K), as in `recurrent_block`.
    """
    from .recurrent_block_triton import conv

    return conv(full_BFD, conv_tap_mask_BTK, weight_D1K[:, 0].t(), bias_D)


def _kernel_parameters(parameters: RecurrentBlockParameters, dtype: torch.dtype) -> list[Tensor]:
    conv_weight, conv_bias, a_weight, a_bias, x_weight, x_bias, lambda_D = parameters
    softplus_D = F.softplus(lambda_D.float())
    return [
        conv_weight[:, 0].t(), conv_bias, a_weight.to(dtype), a_bias.reshape(-1), x_weight.to(dtype),
        x_bias.reshape(-1), softplus_D,
    ]  # fmt: skip


# ---------------------------------------------------------------- the reference


def bounded_sqrt(x: Tensor) -> Tensor:
    """Compute sqrt(x), whose derivative is 1 / sqrt(max(4 x, m)) with m = `MIN_4X_IN_SQRT_GRADIENT`, as officially.

    Written so that autograd finds that derivative, and those of any order and in any mode, by itself: below m / 4 the
    value is the root's and the slope that of a line.
    """
    slope = MIN_4X_IN_SQRT_GRADIENT**-0.5
    line = slope * x + (x.sqrt() - slope * x).detach()
    smallest = MIN_4X_IN_SQRT_GRADIENT / 4
    return torch.where(x > smallest, x.clamp(min=smallest).sqrt(), line)


def recurrent_block_reference(
    u_BTD: Tensor,
    y_BTD: Tensor,
    parameters: RecurrentBlockParameters,
    *,
    context_BCD: Tensor | None = None,
    h0_BD: Tensor | None = None,
    reset_BT: Tensor | None = None,
    is_padding_BT: Tensor | None = None,
    conv_tap_mask_BTK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrent_block` in plain torch, in the widest dtype of u and float32, line by line as the paper has it."""
    dtype = torch.promote_types(u_BTD.dtype, torch.float32)
    weight, bias, a_weight, a_bias, x_weight, x_bias, lambda_D = (p.to(dtype) for p in parameters)
    (B, T, D), K, (H, d, _) = u_BTD.shape, weight.shape[2], a_weight.shape
    context = u_BTD.new_zeros(B, K - 1, D) if context_BCD is None else context_BCD
    full = torch.cat([context, u_BTD], dim=1).to(dtype)
    conv_tap_mask = (
        torch.ones(1, T, K, dtype=dtype, device=full.device)
        if conv_tap_mask_BTK is None
        else conv_tap_mask_BTK.to(dtype)
    )
    x = bias + sum(full[:, tap : tap + T] * conv_tap_mask[..., tap, None] * weight[:, 0, tap] for tap in range(K))

    heads = x.view(B, T, H, d)
    r = torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, a_weight) + a_bias).reshape(B, T, D)
    i = torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, x_weight) + x_bias).reshape(B, T, D)
    log_a = -RG_LRU_C * r * F.softplus(lambda_D)
    a, multiplier = log_a.exp(), bounded_sqrt(1.0 - torch.exp(2.0 * log_a))
    if reset_BT is not None:
        a, multiplier = a.masked_fill(reset_BT[..., None], 0.0), multiplier.masked_fill(reset_BT[..., None], 1.0)
    gated = multiplier * i * x
    if is_padding_BT is not None:
        a, gated = a.masked_fill(is_padding_BT[..., None], 1.0), gated.masked_fill(is_padding_BT[..., None], 0.0)
    states, last = linear_recurrence_reference(gated, a, None if h0_BD is None else h0_BD.to(dtype))
    out = states * F.gelu(y_BTD.to(dtype), approximate="tanh")
    return out.to(u_BTD.dtype), last
