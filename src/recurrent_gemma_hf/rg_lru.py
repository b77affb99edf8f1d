"""The Real-Gated Linear Recurrent Unit (Griffin, arXiv 2402.19427, section 2.4), multiplied by its gating branch.

Shapes: B batch, T tokens, D lru_width, H heads of the gates, d = D / H, N = B T, K conv1d_width, S rows of a pool of
states.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import is_transformed, plain_gradients, use_triton
from .scan import linear_recurrence

RG_LRU_C = 8.0  # c of equation 3: log a = -c r softplus(Lambda)
MIN_4X_IN_SQRT_GRADIENT = 1e-6  # the official code divides the gradient of sqrt(x) by sqrt(max(4 x, this))
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)  # of the operators, as in scan.py


class RgLruParameters(NamedTuple):
    """The parameters of the RG-LRU. The gates are block-diagonal: one (in, out) block per head."""

    recurrent_gate_weight_Hdd: Tensor
    recurrent_gate_bias_Hd: Tensor
    input_gate_weight_Hdd: Tensor
    input_gate_bias_Hd: Tensor
    recurrent_param_D: Tensor  # Lambda, before its softplus


def rg_lru(
    x_BTD: Tensor,
    y_BTD: Tensor,
    parameters: RgLruParameters,
    h0_BD: Tensor | None,
    reset_BT: Tensor,
    is_padding_BT: Tensor | None,
    act: Callable[[Tensor], Tensor],
    *,
    is_gelu_tanh: bool,
    scan: Callable[..., tuple[Tensor, Tensor]] = linear_recurrence,
    return_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute act(y) * RG-LRU(x).

    Gates, coefficients and states are float32 (float64 for float64 inputs); matmuls run in the dtype of x.

    Args:
        x_BTD: outputs of the convolution.
        y_BTD: the gating branch before its activation.
        parameters: see `RgLruParameters`.
        h0_BD: the state before the first token; None means zeros.
        reset_BT: (B or 1, T) bool, True where a document begins: a = 0, and x is not scaled by sqrt(1 - a^2).
        is_padding_BT: (B or 1, T) bool, True where the state is carried over unchanged, whatever x and reset are; None:
            no padding.
        act: the activation of y.
        is_gelu_tanh: whether `act` is gelu with tanh, which the kernels compute.
        scan: the recurrence, `linear_recurrence` or, for a sequence over several ranks, SequenceShard's.
        return_states: also return all states.

    Returns:
        out_BTD in the dtype of x, the last state (B, D), and the states (B, T, D) or None.
    """
    is_plain_scan = scan is linear_recurrence and not return_states and is_gelu_tanh
    if is_plain_scan and use_triton(x_BTD.device, x_BTD.dtype):
        keep = torch.is_grad_enabled()
        out_BTD, last_BD, *_ = _rg_lru(x_BTD, y_BTD, *parameters, h0_BD, reset_BT, is_padding_BT, keep)
        return out_BTD, last_BD, None
    r_weight, r_bias, i_weight, i_bias, recurrent_param_D = parameters
    r_pre, i_pre = gate(x_BTD, r_weight, r_bias), gate(x_BTD, i_weight, i_bias)
    scale_D = log_a_scale(recurrent_param_D.to(torch.promote_types(x_BTD.dtype, torch.float32)))
    is_padding = None if is_padding_BT is None else is_padding_BT[..., None]
    a_BTD, gated_BTD = coefficients(r_pre, i_pre, x_BTD, scale_D, reset_BT[..., None], is_padding)
    h_BTD, last_BD = scan(gated_BTD, a_BTD) if h0_BD is None else scan(gated_BTD, a_BTD, h0_BD)
    return (h_BTD * act(y_BTD)).to(x_BTD.dtype), last_BD, h_BTD if return_states else None


def gate(x_BTD: Tensor, weight_Hdd: Tensor, bias_Hd: Tensor) -> Tensor:
    """Compute a gate before its sigmoid: a block-diagonal linear layer, one block per head."""
    blocks_HNd = x_BTD.reshape(-1, *weight_Hdd.shape[:2]).transpose(0, 1)
    out_HNd = torch.baddbmm(bias_Hd[:, None].to(x_BTD.dtype), blocks_HNd, weight_Hdd.to(x_BTD.dtype))
    return out_HNd.transpose(0, 1).reshape(x_BTD.shape)


def log_a_scale(recurrent_param_D: Tensor) -> Tensor:
    """Compute -c softplus(Lambda), (D,), which times r is log a (equation 3)."""
    return -RG_LRU_C * F.softplus(recurrent_param_D)


def coefficients(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a and x' of the recurrence: see `RgLruCoefficients`."""
    if is_transformed():
        return RgLruCoefficients.plain(*inputs)
    # Without gradients skip autograd.Function, whose overhead counts in decoding.
    return (RgLruCoefficients.apply if torch.is_grad_enabled() else RgLruCoefficients.compute)(*inputs)


def bounded_sqrt(x: Tensor) -> Tensor:
    """Compute sqrt(x) with the official code's derivative, 1 / sqrt(max(4 x, m)), m = `MIN_4X_IN_SQRT_GRADIENT`.

    Plain operations, so that derivatives of any order and mode follow: below m / 4 the value is that of the root and
    the slope that of a line.
    """
    slope = MIN_4X_IN_SQRT_GRADIENT**-0.5
    line = slope * x + (x.sqrt() - slope * x).detach()
    smallest = MIN_4X_IN_SQRT_GRADIENT / 4
    return torch.where(x > smallest, x.clamp(min=smallest).sqrt(), line)


class RgLruCoefficients(torch.autograd.Function):
    """Coefficients of the recurrence (equations 1 to 4): a = exp(-c r softplus(Lambda)), x' = sqrt(1 - a^2) i x.

    The backward pass recomputes everything: three activations are saved instead of nine. The derivative of the square
    root is bounded as in the official code. Inputs: the gates before their sigmoids and x, (B, T, D); `log_a_scale`
    (D,) in float32; `reset` (B or 1, T, 1) bool; `is_padding` likewise, or None. Outputs: a and x' in float32 (float64
    for float64 inputs).
    """

    @staticmethod
    def _parts(r_pre: Tensor, i_pre: Tensor, scale_D: Tensor) -> tuple[Tensor, ...]:
        dtype = scale_D.dtype
        r, i = torch.sigmoid(r_pre.to(dtype)), torch.sigmoid(i_pre.to(dtype))
        log_a = r * scale_D
        # 1 - exp(2 log a), not -expm1(2 log a): near a = 1 it rounds to 0, as in the official code.
        return r, i, log_a, 1.0 - torch.exp(2.0 * log_a)

    @staticmethod
    def compute(
        r_pre: Tensor,
        i_pre: Tensor,
        x: Tensor,
        scale_D: Tensor,
        reset: Tensor,
        is_padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute a and x' without gradients, in place where possible."""
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, scale_D)
        a, multiplier = log_a.exp_(), one_minus_a2.sqrt_()
        # At the start of a document the past is dropped and x is not scaled.
        a, multiplier = a.masked_fill_(reset, 0.0), multiplier.masked_fill_(reset, 1.0)
        gated = multiplier.mul_(i).mul_(x)
        if is_padding is not None:  # the state is carried over unchanged
            a, gated = a.masked_fill_(is_padding, 1.0), gated.masked_fill_(is_padding, 0.0)
        return a, gated

    @staticmethod
    def plain(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a and x' by operations that autograd and every transform of torch.func can differentiate."""
        r_pre, i_pre, x, scale_D, reset, is_padding = inputs
        _, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, scale_D)
        a, gated = log_a.exp().masked_fill(reset, 0.0), bounded_sqrt(one_minus_a2).masked_fill(reset, 1.0) * i * x
        return (
            (a, gated) if is_padding is None else (a.masked_fill(is_padding, 1.0), gated.masked_fill(is_padding, 0.0))
        )

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a and x', and save the inputs for `backward`."""
        ctx.save_for_backward(*inputs)
        return RgLruCoefficients.compute(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_gated: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the three inputs and of `log_a_scale`."""
        saved_tensors = ctx.saved_tensors  # read once: activation checkpointing raises on a second read
        if torch.is_grad_enabled():
            return plain_gradients(RgLruCoefficients.plain, saved_tensors, (grad_a, grad_gated))
        r_pre, i_pre, x, scale_D, reset, is_padding = saved_tensors
        r, i, log_a, one_minus_a2 = RgLruCoefficients._parts(r_pre, i_pre, scale_D)
        x = x.to(scale_D.dtype)
        if is_padding is not None:
            grad_a, grad_gated = grad_a.masked_fill(is_padding, 0.0), grad_gated.masked_fill(is_padding, 0.0)
        multiplier = one_minus_a2.sqrt().masked_fill_(reset, 1.0)
        grad_x = grad_gated * multiplier
        grad_i = grad_x * x * i * (1.0 - i)
        grad_x = grad_x.mul_(i)
        # 1e-6 is MIN_4X_IN_SQRT_GRADIENT; torch.compile(dynamic=True) would make the named float a graph input.
        grad_square = grad_gated * i * x / torch.clamp(4.0 * one_minus_a2, min=1e-6).sqrt_()
        a = log_a.exp_()
        grad_log_a = a.mul(grad_a).sub_(grad_square.mul_(2.0).mul_(a).mul_(a))
        grad_log_a = grad_log_a.masked_fill_(reset, 0.0).mul_(r)
        grad_scale = grad_log_a.sum((0, 1))
        grad_r = grad_log_a.mul_(scale_D).mul_(1.0 - r)
        grads = (grad_r, grad_i, grad_x)
        grads = tuple(grad.to(saved.dtype) for grad, saved in zip(grads, saved_tensors[:3], strict=True))
        return *grads, grad_scale, None, None


# ---------------------------------------------------------------- Triton kernels


def rg_lru_step(
    u_BD: Tensor,
    y_BD: Tensor,
    conv_weight_D1K: Tensor,
    conv_bias_D: Tensor,
    parameters: RgLruParameters,
    conv_state_SDC: Tensor,
    h_SD: Tensor,
    *,
    reset_B: Tensor | None = None,
    is_padding_B: Tensor | None = None,
    conv_tap_mask_BK: Tensor | None = None,
    state_indices_B: Tensor | None = None,
) -> Tensor:
    """Compute gelu(y) * RG-LRU(conv1d(u)) for one token per row by two kernels, without gradients.

    Updates the convolution's state (S, D, K - 1), of any strides, and the float32 state (S, D) in place, so that a CUDA
    graph can capture the call. Row b of the batch uses row state_indices_B[b] of the states, by default row b; an index
    < 0 marks padding, whose output is 0. Masks: see `rg_lru`, `causal_conv1d`. Returns out (B, D) in the dtype of u.
    """
    return _step(
        u_BD, y_BD, conv_state_SDC, h_SD, conv_weight_D1K, conv_bias_D, *parameters,
        reset_B, is_padding_B, conv_tap_mask_BK, state_indices_B,
    )  # fmt: skip


@torch.library.custom_op(f"{_NAMESPACE}::rg_lru", mutates_args=())
def _rg_lru(
    x_BTD: Tensor,
    y_BTD: Tensor,
    r_weight_Hdd: Tensor,
    r_bias_Hd: Tensor,
    i_weight_Hdd: Tensor,
    i_bias_Hd: Tensor,
    recurrent_param_D: Tensor,
    h0_BD: Tensor | None,
    reset_BT: Tensor | None,
    is_padding_BT: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out, the last state and, for the backward pass if `keep` (else empty), the gates before their sigmoids and
    the state before every `UNROLLED` steps."""
    from .rg_lru_triton import forward

    gates_HNe = torch.bmm(*_gate_factors(x_BTD, r_weight_Hdd, i_weight_Hdd))
    log_a_D = log_a_scale(recurrent_param_D.float())
    out_BTD, last_BD, carries_BMD = forward(
        x_BTD, y_BTD, gates_HNe, r_bias_Hd, i_bias_Hd, log_a_D, h0_BD, reset_BT, is_padding_BT, keep
    )
    return out_BTD, last_BD, gates_HNe if keep else gates_HNe.new_empty(0), carries_BMD


def _gate_factors(x_BTD: Tensor, r_weight_Hdd: Tensor, i_weight_Hdd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the matmul that computes both gates, (H, N, d) and (H, d, 2 d)."""
    H, d, _ = r_weight_Hdd.shape
    return x_BTD.reshape(-1, H, d).transpose(0, 1), torch.cat([r_weight_Hdd, i_weight_Hdd], dim=2).to(x_BTD.dtype)


@torch.library.custom_op(f"{_NAMESPACE}::rg_lru_backward", mutates_args=())
def _rg_lru_backward(
    dout_BTD: Tensor,
    dlast_BD: Tensor,
    gates_HNe: Tensor,
    carries_BMD: Tensor,
    x_BTD: Tensor,
    y_BTD: Tensor,
    r_weight_Hdd: Tensor,
    r_bias_Hd: Tensor,
    i_weight_Hdd: Tensor,
    i_bias_Hd: Tensor,
    recurrent_param_D: Tensor,
    reset_BT: Tensor | None,
    is_padding_BT: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of x, y, the five parameters and h0."""
    from .rg_lru_triton import backward

    H, d, _ = r_weight_Hdd.shape
    recurrent_param_D32 = recurrent_param_D.float()
    log_a_D = log_a_scale(recurrent_param_D32)
    dx, dy, dgates_HNe, dh0_BD, sums_3D = backward(
        dout_BTD, dlast_BD, x_BTD, y_BTD, gates_HNe, carries_BMD, r_bias_Hd, i_bias_Hd, log_a_D, reset_BT,
        is_padding_BT, MIN_4X_IN_SQRT_GRADIENT,
    )  # fmt: skip
    x_HNd, weights_Hde = _gate_factors(x_BTD, r_weight_Hdd, i_weight_Hdd)
    # Add the part of the gradient of x that comes through the gates.
    dx.view(-1, H, d).transpose(0, 1).baddbmm_(dgates_HNe, weights_Hde.mT)
    dr_weight, di_weight = (part.contiguous() for part in torch.bmm(x_HNd.mT, dgates_HNe).split(d, dim=2))
    dlog_a, dr_bias, di_bias = sums_3D
    drecurrent_param = dlog_a * -RG_LRU_C * torch.sigmoid(recurrent_param_D32)
    gradients = (dr_weight, dr_bias.view(H, d), di_weight, di_bias.view(H, d), drecurrent_param)
    like = (r_weight_Hdd, r_bias_Hd, i_weight_Hdd, i_bias_Hd, recurrent_param_D)
    # Copies also where nothing is cast, because an operator's results must not share memory.
    copies = [gradient.to(parameter.dtype, copy=True) for gradient, parameter in zip(gradients, like, strict=True)]
    return [dx, dy, *copies, dh0_BD]


@_rg_lru.register_fake
def _(x_BTD: Tensor, y_BTD: Tensor, r_weight_Hdd: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_tools import UNROLLED

    (B, T, D), (H, d, _), keep = x_BTD.shape, r_weight_Hdd.shape, rest[-1]
    gates = x_BTD.new_empty((H, B * T, 2 * d) if keep else 0)
    carries = x_BTD.new_empty((B, -(-T // UNROLLED), D) if keep else 0, dtype=torch.float32)
    return x_BTD.new_empty((B, T, D)), x_BTD.new_empty((B, D), dtype=torch.float32), gates, carries


@_rg_lru_backward.register_fake
def _(
    dout: Tensor, dlast: Tensor, gates: Tensor, carries: Tensor, x: Tensor, y: Tensor, *rest: Tensor | None
) -> list[Tensor]:
    like = (x, y, *rest[:5])
    return [*(tensor.new_empty(tensor.shape) for tensor in like if tensor is not None), dlast.new_empty(dlast.shape)]


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:], *inputs[:-1])


def _gradient(ctx: Any, dout_BTD: Tensor, dlast_BD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gates, carries, *inputs = ctx.saved_tensors  # read once: activation checkpointing raises on a second read
    h0, reset, is_padding = inputs[7:]
    if torch.is_grad_enabled():

        def plain(x: Tensor, y: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
            return _plain_rg_lru(x, y, RgLruParameters(*rest[:5]), rest[5], reset, is_padding)

        return *plain_gradients(plain, tuple(inputs[:8]), (dout_BTD, dlast_BD)), None, None, None
    *gradients, dh0 = _rg_lru_backward(dout_BTD, dlast_BD, gates, carries, *inputs[:7], reset, is_padding)
    return *gradients, None if h0 is None else dh0.to(h0.dtype), None, None, None


_rg_lru.register_autograd(_gradient, setup_context=_save_for_gradient)


def _plain_rg_lru(
    x: Tensor,
    y: Tensor,
    parameters: RgLruParameters,
    h0: Tensor | None,
    reset: Tensor | None,
    is_padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r_weight, r_bias, i_weight, i_bias, recurrent_param = parameters
    scale_D = log_a_scale(recurrent_param.float())
    flags = (None if flag is None else flag[..., None] for flag in (reset, is_padding))
    pre = gate(x, r_weight, r_bias), gate(x, i_weight, i_bias)
    a, gated = RgLruCoefficients.plain(*pre, x, scale_D, *flags)
    h, last = linear_recurrence(gated, a, h0)
    return (h * F.gelu(y, approximate="tanh")).to(x.dtype), last


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args=("conv_state_SDC", "h_SD"))
def _step(
    u_BD: Tensor,
    y_BD: Tensor,
    conv_state_SDC: Tensor,
    h_SD: Tensor,
    conv_weight_D1K: Tensor,
    conv_bias_D: Tensor,
    r_weight_Hdd: Tensor,
    r_bias_Hd: Tensor,
    i_weight_Hdd: Tensor,
    i_bias_Hd: Tensor,
    recurrent_param_D: Tensor,
    reset_B: Tensor | None,
    is_padding_B: Tensor | None,
    conv_tap_mask_BK: Tensor | None,
    state_indices_B: Tensor | None,
) -> Tensor:
    """Compute `rg_lru_step` by its kernels."""
    from .rg_lru_step_triton import step

    parameters = (conv_weight_D1K, conv_bias_D, r_weight_Hdd, r_bias_Hd, i_weight_Hdd, i_bias_Hd, recurrent_param_D)
    flags = (reset_B, is_padding_B, conv_tap_mask_BK, state_indices_B)
    return step(u_BD, y_BD, conv_state_SDC, h_SD, parameters, flags, RG_LRU_C)


@_step.register_fake
def _(u_BD: Tensor, *rest: Tensor | None) -> Tensor:
    return u_BD.new_empty(u_BD.shape)
