"""The RG-LRU's coefficients (Griffin, arXiv 2402.19427, equations 1 to 4) and the causal convolution, in plain torch
with backward passes that recompute.

Shapes: B batch, T tokens, D lru_width, K conv1d_width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .recurrent_block import MIN_4X_IN_SQRT_GRADIENT, RG_LRU_C, bounded_sqrt
from .scan import is_transformed


class RgLruCoefficients(torch.autograd.Function):
    """Gates to recurrence (equations 1 to 4): a = exp(-c r softplus(Lambda)), x' = sqrt(1 - a^2) i x.

    Recomputes everything in its backward: three activations are saved instead of nine. The derivative of the square
    root is bounded as in the official code. Inputs (B, T, D) before the sigmoids, softplus(Lambda) (D,) in float32;
    `reset` (B or 1, T, 1) bool, `is_padding` likewise or None. Outputs a and x' in float32 (float64 for float64).
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
        is_padding: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a and x' without gradients, in place where it can."""
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        a, multiplier = log_a.exp_(), one_minus_a2.sqrt_()
        # A document begins: nothing of the past, and x enters undamped.
        a, multiplier = a.masked_fill_(reset, 0.0), multiplier.masked_fill_(reset, 1.0)
        gated = multiplier.mul_(i).mul_(x)
        if is_padding is not None:  # padding: the state passes unchanged
            a, gated = a.masked_fill_(is_padding, 1.0), gated.masked_fill_(is_padding, 0.0)
        return a, gated

    @staticmethod
    def plain(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the same for autograd and every transform of torch."""
        r_pre, i_pre, x, softplus_D, reset, is_padding = inputs
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        a, gated = log_a.exp().masked_fill(reset, 0.0), bounded_sqrt(one_minus_a2).masked_fill(reset, 1.0) * i * x
        return (
            (a, gated) if is_padding is None else (a.masked_fill(is_padding, 1.0), gated.masked_fill(is_padding, 0.0))
        )

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute them and keep the inputs for `backward`."""
        ctx.save_for_backward(*inputs)
        return RgLruCoefficients.compute(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: torch.Tensor, grad_gated: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the three inputs and of softplus(Lambda)."""
        saved_tensors = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        if torch.is_grad_enabled():
            return _differentiable_gradients(RgLruCoefficients, saved_tensors, (grad_a, grad_gated))
        r_pre, i_pre, x, softplus_D, reset, is_padding = saved_tensors
        r, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, softplus_D)
        x = x.to(softplus_D.dtype)
        if is_padding is not None:
            grad_a, grad_gated = grad_a.masked_fill(is_padding, 0.0), grad_gated.masked_fill(is_padding, 0.0)
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


class CausalConv1d(torch.autograd.Function):
    """Depthwise causal convolution of (B, K - 1 + T, D), the context in front, to (B, T, D); weight (D, 1, K).

    `conv_tap_mask` (B or 1, T, K) of 0 and 1 or None (all 1) keeps it from reading across the start of a document. By
    hand, because a sum of shifted products in place is twice as fast on a CPU as any other form, forward and backward,
    and keeps time before the channels.
    """

    @staticmethod
    def compute(
        full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, conv_tap_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the convolution without gradients."""
        weight_KD = weight[:, 0].t()
        K, T = weight_KD.shape[0], full.shape[1] - weight_KD.shape[0] + 1
        if T == 1:  # one product instead of K
            seen = full if conv_tap_mask is None else full * conv_tap_mask.transpose(1, 2)
            return (seen * weight_KD).sum(1, keepdim=True) + bias
        weight_KD = weight_KD.contiguous()
        out = bias.expand(full.shape[0], T, -1).clone()
        for tap in range(K):
            x = full[:, tap : tap + T]
            out.addcmul_(x if conv_tap_mask is None else x * conv_tap_mask[..., tap, None], weight_KD[tap])
        return out

    @staticmethod
    def plain(
        full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, conv_tap_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the same for autograd and every transform of torch."""
        K, T = weight.shape[2], full.shape[1] - weight.shape[2] + 1
        out = bias.expand(full.shape[0], T, -1)
        for tap in range(K):
            x = full[:, tap : tap + T]
            out = out + (x if conv_tap_mask is None else x * conv_tap_mask[..., tap, None]) * weight[:, 0, tap]
        return out

    @staticmethod
    def forward(
        ctx: Any, full: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, conv_tap_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute it and keep the inputs for `backward`."""
        ctx.save_for_backward(full, weight, bias, conv_tap_mask)
        return CausalConv1d.compute(full, weight, bias, conv_tap_mask)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the inputs, the weight and the bias."""
        saved_tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(CausalConv1d, saved_tensors, (grad,))
        full, weight, _, conv_tap_mask = saved_tensors
        weight_KD = weight[:, 0].t().contiguous()
        T = grad.shape[1]
        grad_full, grad_taps = torch.zeros_like(full), []
        for tap, weight_D in enumerate(weight_KD):
            seen = grad if conv_tap_mask is None else grad * conv_tap_mask[..., tap, None]
            grad_full[:, tap : tap + T].addcmul_(seen, weight_D)
            grad_taps.append((full[:, tap : tap + T] * seen).sum((0, 1)))
        return grad_full, torch.stack(grad_taps, dim=1)[:, None], grad.sum((0, 1)), None


def differentiable(function: type[RgLruCoefficients] | type[CausalConv1d]) -> Callable[..., Any]:
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
