"""The depthwise causal convolution in front of the RG-LRU (Griffin, arXiv 2402.19427, section 2.3).

Shapes: B batch, T tokens, D lru_width, K conv1d_width, F = T, or K - 1 + T with the earlier inputs in front.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import is_transformed, plain_gradients, use_triton

_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)  # of the operators, as in scan.py


def causal_conv1d(
    u_BFD: Tensor, weight_D1K: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None = None, *, past: int = 0
) -> Tensor:
    """Compute out_t = bias + sum over k of weight[k] u[t - (K - 1) + k], (B, T, D) in the dtype of u.

    Args:
        u_BFD: the inputs; zeros are assumed before the first.
        weight_D1K: as in torch.nn.Conv1d, the tap of the newest input last.
        bias_D: one per channel.
        conv_tap_mask_BTK: (B or 1, T, K) bool, False for taps that would read an earlier document, which are left out,
            not multiplied by 0; None: all True.
        past: number of earlier inputs in front, which have no output: 0 or K - 1.
    """
    K = weight_D1K.shape[2]
    # One token takes less time in plain torch than a kernel launch.
    if u_BFD.shape[1] - past > 1 and use_triton(u_BFD.device, u_BFD.dtype):
        return _conv(u_BFD, weight_D1K[:, 0].t(), bias_D, conv_tap_mask_BTK, past)
    full = u_BFD if past == K - 1 else F.pad(u_BFD, (0, 0, K - 1, 0))
    weight_D1K, bias_D = weight_D1K.to(u_BFD.dtype), bias_D.to(u_BFD.dtype)
    if is_transformed():
        return CausalConv1d.plain(full, weight_D1K, bias_D, conv_tap_mask_BTK)
    # Without gradients skip autograd.Function, whose overhead counts in decoding.
    function = CausalConv1d.apply if torch.is_grad_enabled() else CausalConv1d.compute
    return function(full, weight_D1K, bias_D, conv_tap_mask_BTK)


def _seen(x_BTD: Tensor, conv_tap_mask_BTK: Tensor | None, tap: int) -> Tensor:
    """Return x, with zeros where the tap would read an earlier document."""
    return x_BTD if conv_tap_mask_BTK is None else x_BTD.masked_fill(~conv_tap_mask_BTK[..., tap, None], 0.0)


class CausalConv1d(torch.autograd.Function):
    """Convolution of (B, K - 1 + T, D) in plain torch; weight (D, 1, K).

    Sums K shifted inputs times their taps in place: on a CPU twice as fast as the alternatives, forward and backward,
    and without a transpose.
    """

    @staticmethod
    def compute(full: Tensor, weight: Tensor, bias: Tensor, conv_tap_mask: Tensor | None) -> Tensor:
        """Compute the convolution without gradients."""
        weight_KD = weight[:, 0].t()
        K, T = weight_KD.shape[0], full.shape[1] - weight_KD.shape[0] + 1
        if T == 1:  # one multiplication instead of K
            seen = full if conv_tap_mask is None else full.masked_fill(~conv_tap_mask.transpose(1, 2), 0.0)
            return (seen * weight_KD).sum(1, keepdim=True) + bias
        weight_KD = weight_KD.contiguous()
        out = bias.expand(full.shape[0], T, -1).clone()
        for tap in range(K):
            x = full[:, tap : tap + T]
            out.addcmul_(_seen(x, conv_tap_mask, tap), weight_KD[tap])
        return out

    @staticmethod
    def plain(full: Tensor, weight: Tensor, bias: Tensor, conv_tap_mask: Tensor | None) -> Tensor:
        """Compute the convolution by operations that autograd and every transform of torch.func can differentiate."""
        K, T = weight.shape[2], full.shape[1] - weight.shape[2] + 1
        out = bias.expand(full.shape[0], T, -1)
        for tap in range(K):
            x = full[:, tap : tap + T]
            out = out + _seen(x, conv_tap_mask, tap) * weight[:, 0, tap]
        return out

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Compute the convolution, and save the inputs for `backward`."""
        ctx.save_for_backward(*inputs)
        return CausalConv1d.compute(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the inputs, the weight and the bias."""
        saved_tensors = ctx.saved_tensors  # read once: activation checkpointing raises on a second read
        if torch.is_grad_enabled():
            return plain_gradients(CausalConv1d.plain, saved_tensors, (grad,))
        full, weight, _, conv_tap_mask = saved_tensors
        weight_KD = weight[:, 0].t().contiguous()
        T = grad.shape[1]
        grad_full, grad_taps = torch.zeros_like(full), []
        for tap, weight_D in enumerate(weight_KD):
            seen = _seen(grad, conv_tap_mask, tap)
            grad_full[:, tap : tap + T].addcmul_(seen, weight_D)
            grad_taps.append((full[:, tap : tap + T] * seen).sum((0, 1)))
        return grad_full, torch.stack(grad_taps, dim=1)[:, None], grad.sum((0, 1)), None


@torch.library.custom_op(f"{_NAMESPACE}::conv", mutates_args=())
def _conv(u_BFD: Tensor, weight_KD: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None, past: int) -> Tensor:
    """Compute the convolution by a Triton kernel, which accumulates in float32."""
    from .causal_conv1d_triton import conv

    return conv(u_BFD, weight_KD, bias_D, conv_tap_mask_BTK, past)


@torch.library.custom_op(f"{_NAMESPACE}::conv_backward", mutates_args=())
def _conv_backward(
    dout_BTD: Tensor, u_BFD: Tensor, weight_KD: Tensor, conv_tap_mask_BTK: Tensor | None, past: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the inputs, and those of weight and bias stacked, (K + 1, D) in float32."""
    from .causal_conv1d_triton import conv_backward

    return conv_backward(dout_BTD, u_BFD, weight_KD, conv_tap_mask_BTK, past)


@_conv.register_fake
def _(u_BFD: Tensor, weight_KD: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None, past: int) -> Tensor:
    return u_BFD.new_empty((u_BFD.shape[0], u_BFD.shape[1] - past, u_BFD.shape[2]))


@_conv_backward.register_fake
def _(
    dout_BTD: Tensor, u_BFD: Tensor, weight_KD: Tensor, conv_tap_mask_BTK: Tensor | None, past: int
) -> tuple[Tensor, Tensor]:
    K, D = weight_KD.shape
    return u_BFD.new_empty(u_BFD.shape), u_BFD.new_empty((K + 1, D), dtype=torch.float32)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.past = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dout_BTD: Tensor) -> tuple[Tensor | None, ...]:
    u, weight_KD, bias, conv_tap_mask = ctx.saved_tensors
    if torch.is_grad_enabled():

        def plain(u: Tensor, weight_KD: Tensor, bias: Tensor) -> Tensor:
            full = F.pad(u, (0, 0, weight_KD.shape[0] - 1 - ctx.past, 0))
            return CausalConv1d.plain(full, weight_KD.t()[:, None], bias, conv_tap_mask).to(u.dtype)

        return *plain_gradients(plain, (u, weight_KD, bias), (dout_BTD,)), None, None
    du, sums_KD = _conv_backward(dout_BTD, u, weight_KD, conv_tap_mask, ctx.past)
    return du, sums_KD[:-1].to(weight_KD.dtype), sums_KD[-1].to(bias.dtype), None, None


_conv.register_autograd(_gradient, setup_context=_save_for_gradient)
