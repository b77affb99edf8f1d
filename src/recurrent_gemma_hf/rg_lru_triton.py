"""Triton kernels of the RG-LRU after the gates' matmuls: coefficients, scan and gelu gate fused, forward and backward.
See triton_tools.py.

cuBLAS computes the matmuls: a kernel that computed the gates itself spilled registers and took 5 to 6 times as long
(benchmarks/LOG.md). Memory traffic in bfloat16, per element: 10 bytes forward and 18 backward, the gates' two values
included; with several segments of time the inputs of the coefficients are read twice.

Shapes: B batch, T tokens, D lru_width, H heads of the gates, d = D / H, N = B T, e = 2 d (recurrence gate, then input
gate), S segments of time, M = T / `UNROLLED` states kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_tools import (
    CHANNELS,
    OPTIONS,
    SIZES,
    UNROLLED,
    advance,
    allocate,
    compose,
    compose_summaries,
    flag,
    gelu,
    load_rows,
    on_device,
    own_row,
    row_stride,
    rows_of_channels,
    segments,
    sigmoid,
    summaries,
    tl,
    triton,
    within,
)


@triton.jit
def coefficients(r, i, x, log_a_scale, is_reset, is_padding):
    """Compute a, the multiplier of x, x', exp(log a) and 1 - exp(2 log a), in float32.

    log_a_scale: -c softplus(Lambda). Padding is selected out, not multiplied by 0, so that NaN there has no effect.
    """
    log_a = r * log_a_scale
    a = tl.exp(log_a)
    square = 1.0 - tl.exp(2.0 * log_a)
    multiplier = tl.where(is_reset, 1.0, tl.sqrt(square))
    gated = tl.where(is_padding, 0.0, multiplier * i * x)
    return tl.where(is_padding, 1.0, tl.where(is_reset, 0.0, a)), multiplier, gated, a, square


@triton.jit
def is_set(flag_ptr, row, t, T):
    """Load one byte of a mask; False without a mask or outside 0 .. T - 1."""
    result = t < t
    if flag_ptr is not None:
        result = tl.load(flag_ptr + row + t, mask=(t >= 0) & (t < T), other=0) != 0
    return result


@triton.jit(do_not_specialize=SIZES)
def rg_lru_kernel(
    x_ptr, y_ptr, gates_ptr, r_bias_ptr, i_bias_ptr, log_a_ptr, h0_ptr, reset_ptr, is_padding_ptr, decay_ptr, end_ptr,
    out_ptr, last_ptr, carries_ptr,
    T, D, d, N, S, M, steps,
    x_stride_B, x_stride_T, y_stride_B, y_stride_T, reset_stride_B, is_padding_stride_B,
    SUMMARY: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute out (B, T, D), the last state (B, D), and the state before every `ROWS` steps (B, M, D) or None.

    SUMMARY: instead compute the summary of each segment, decay and end (B, S, D).
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    is_channel = channel < D
    x_ptr += b * x_stride_B + channel
    y_ptr += b * y_stride_B + channel
    gates_ptr += ((channel // d).to(tl.int64) * N + b * T) * 2 * d + channel % d
    reset_row, is_padding_row = b * reset_stride_B, b * is_padding_stride_B
    r_bias = tl.load(r_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    i_bias = tl.load(i_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    log_a_scale = tl.load(log_a_ptr + channel, mask=is_channel, other=0.0)
    h = tl.zeros((CHANNELS,), tl.float32)
    decay = tl.full((CHANNELS,), 1.0, tl.float32)
    if not SUMMARY:
        if h0_ptr is not None:
            h = tl.load(h0_ptr + b * D + channel, mask=is_channel, other=0.0).to(tl.float32)
        if decay_ptr is not None:
            h = compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, channel)
    for tile in range(0, steps, ROWS):
        start = b * 0 + segment * steps + tile  # int64
        x = load_rows(x_ptr, x_stride_T, start, T, is_channel, 0.0, ROWS)
        r_pre = load_rows(gates_ptr, 2 * d, start, T, is_channel, 0.0, ROWS)
        i_pre = load_rows(gates_ptr + d, 2 * d, start, T, is_channel, 0.0, ROWS)
        if not SUMMARY:
            y = load_rows(y_ptr, y_stride_T, start, T, is_channel, 0.0, ROWS)
            if carries_ptr is not None:
                carry = carries_ptr + (b * M + start // ROWS) * D + channel
                tl.store(carry, h, mask=within(is_channel, start, T))
        for k in tl.static_range(ROWS):
            t = start + k
            is_padding = is_set(is_padding_ptr, is_padding_row, t, T) | (t >= T)  # no change after the end
            r, i = sigmoid(r_pre[k] + r_bias), sigmoid(i_pre[k] + i_bias)
            a, _, gated, _, _ = coefficients(r, i, x[k], log_a_scale, is_set(reset_ptr, reset_row, t, T), is_padding)
            h = advance(a, h, gated)
            if SUMMARY:
                decay = compose(a, decay)
            else:
                out = out_ptr + (b * T + t) * D + channel
                tl.store(out, (h * gelu(y[k])[0]).to(out_ptr.dtype.element_ty), mask=within(is_channel, t, T))
    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, h, mask=is_channel)
    elif segment == S - 1:
        tl.store(last_ptr + b * D + channel, h, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def rg_lru_backward_kernel(
    dout_ptr, dlast_ptr, x_ptr, y_ptr, gates_ptr, r_bias_ptr, i_bias_ptr, log_a_ptr, reset_ptr, is_padding_ptr,
    carries_ptr, decay_ptr, end_ptr,
    dx_ptr, dy_ptr, dgates_ptr, dh0_ptr, sums_ptr,
    T, D, d, N, S, M, steps,
    dout_stride_B, dout_stride_T, x_stride_B, x_stride_T, y_stride_B, y_stride_T, reset_stride_B, is_padding_stride_B,
    MIN_4X: tl.constexpr, SUMMARY: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients, backwards in time, from those of out and of the last state.

    Writes dx without the part through the gates, and dy (B, T, D); the gates' gradients before their sigmoids
    (H, N, e); dh0 (B, D); and sums over each segment (B, S, 3, D): the gradients of log_a_scale and of both gates'
    biases.

    Segments are counted from the end. SUMMARY: as in `rg_lru_kernel`, for G_t = a_t g_t, the gradient of h_{t-1}.
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    is_channel = channel < D
    dout_ptr += b * dout_stride_B + channel
    x_ptr += b * x_stride_B + channel
    y_ptr += b * y_stride_B + channel
    gate = ((channel // d).to(tl.int64) * N + b * T) * 2 * d + channel % d
    reset_row, is_padding_row = b * reset_stride_B, b * is_padding_stride_B
    r_bias = tl.load(r_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    i_bias = tl.load(i_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    log_a_scale = tl.load(log_a_ptr + channel, mask=is_channel, other=0.0)
    G = tl.zeros((CHANNELS,), tl.float32)
    decay = tl.full((CHANNELS,), 1.0, tl.float32)
    sum_scale = tl.zeros((CHANNELS,), tl.float32)
    sum_r = tl.zeros((CHANNELS,), tl.float32)
    sum_i = tl.zeros((CHANNELS,), tl.float32)
    if not SUMMARY:
        G = tl.load(dlast_ptr + b * D + channel, mask=is_channel, other=0.0)
        if decay_ptr is not None:
            G = compose_summaries(G, decay_ptr, end_ptr, b, segment, S, D, channel)
    for tile in range(0, steps, ROWS):
        start = b * 0 + M * ROWS - segment * steps - tile - ROWS  # int64
        dout = load_rows(dout_ptr, dout_stride_T, start, T, is_channel, 0.0, ROWS)
        y = load_rows(y_ptr, y_stride_T, start, T, is_channel, 0.0, ROWS)
        r_pre = load_rows(gates_ptr + gate, 2 * d, start, T, is_channel, 0.0, ROWS)
        if SUMMARY:
            for k in tl.static_range(ROWS - 1, -1, -1):
                t = start + k
                is_padding = is_set(is_padding_ptr, is_padding_row, t, T) | (t < 0) | (t >= T)
                r = sigmoid(r_pre[k] + r_bias)
                a, _, _, _, _ = coefficients(r, 0.0, 0.0, log_a_scale, is_set(reset_ptr, reset_row, t, T), is_padding)
                G = advance(a, dout[k] * gelu(y[k])[0] + G, 0.0)
                decay = compose(a, decay)
        else:
            x = load_rows(x_ptr, x_stride_T, start, T, is_channel, 0.0, ROWS)
            i_pre = load_rows(gates_ptr + gate + d, 2 * d, start, T, is_channel, 0.0, ROWS)
            # Steps before time 0 have no effect, so any state serves there.
            carry = carries_ptr + (b * M + (start // ROWS) * (start >= 0)) * D + channel
            before = (tl.load(carry, mask=is_channel, other=0.0),)  # h_{t-1} of each step, and the last state
            for k in tl.static_range(ROWS):
                t = start + k
                is_padding = is_set(is_padding_ptr, is_padding_row, t, T) | (t < 0) | (t >= T)
                r, i = sigmoid(r_pre[k] + r_bias), sigmoid(i_pre[k] + i_bias)
                a, _, gated, _, _ = coefficients(
                    r, i, x[k], log_a_scale, is_set(reset_ptr, reset_row, t, T), is_padding
                )
                before = before + (advance(a, before[k], gated),)  # type: ignore[assignment]  # noqa: RUF005
            for k in tl.static_range(ROWS - 1, -1, -1):
                t = start + k
                inside = within(is_channel, t, T)
                is_reset, is_padding = (
                    is_set(reset_ptr, reset_row, t, T),
                    is_set(is_padding_ptr, is_padding_row, t, T) | (t < 0) | (t >= T),
                )
                r, i = sigmoid(r_pre[k] + r_bias), sigmoid(i_pre[k] + i_bias)
                a, multiplier, _, raw_a, square = coefficients(r, i, x[k], log_a_scale, is_reset, is_padding)
                gelu_y, slope = gelu(y[k])
                offset = (b * T + t) * D + channel
                tl.store(dy_ptr + offset, (dout[k] * before[k + 1] * slope).to(dy_ptr.dtype.element_ty), mask=inside)
                g = dout[k] * gelu_y + G
                G = advance(a, g, 0.0)
                dgated = tl.where(is_padding, 0.0, g)
                dx = tl.where(is_padding, 0.0, g * multiplier * i)
                di = tl.where(is_padding, 0.0, dgated * multiplier * x[k] * i * (1.0 - i))
                dsquare = dgated * i * x[k] / tl.sqrt(tl.maximum(4.0 * square, MIN_4X))
                dlog_a = tl.where(is_reset | is_padding, 0.0, raw_a * (g * before[k] - 2.0 * raw_a * dsquare))
                dr = dlog_a * log_a_scale * r * (1.0 - r)
                dr = tl.where(is_padding, 0.0, dr)
                tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
                dgates = dgates_ptr + gate + t * 2 * d
                tl.store(dgates, dr.to(dgates_ptr.dtype.element_ty), mask=inside)
                tl.store(dgates + d, di.to(dgates_ptr.dtype.element_ty), mask=inside)
                sum_scale += tl.where(is_padding, 0.0, dlog_a * r)
                sum_r += dr
                sum_i += di
    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, G, mask=is_channel)
    else:
        sums = sums_ptr + (b * S + segment) * 3 * D + channel
        tl.store(sums, sum_scale, mask=is_channel)
        tl.store(sums + D, sum_r, mask=is_channel)
        tl.store(sums + 2 * D, sum_i, mask=is_channel)
        if segment == S - 1:
            tl.store(dh0_ptr + b * D + channel, G, mask=is_channel)


def _launch(kernel: Any, shape: tuple[int, int, int], arguments: tuple[Any, ...], on: Tensor, **constants: Any) -> None:
    """Launch a kernel, with several segments first for the summaries."""
    B, _, D = shape
    blocks, S = -(-D // CHANNELS), constants.pop("S")
    constants |= {"CHANNELS": CHANNELS, "ROWS": UNROLLED, "num_warps": 1, **OPTIONS}
    with on_device(on):
        if S > 1:
            kernel[(B * blocks, S - 1)](*arguments, SUMMARY=True, **constants)
        kernel[(B * blocks, S)](*arguments, SUMMARY=False, **constants)


def forward(
    x_BTD: Tensor, y_BTD: Tensor, gates_HNe: Tensor, r_bias_Hd: Tensor, i_bias_Hd: Tensor, log_a_scale_D: Tensor,
    h0_BD: Tensor | None, reset_BT: Tensor | None, is_padding_BT: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute out (B, T, D), the last state (B, D), and with `keep` the states (B, M, D) that `backward` reads."""
    (B, T, D), device = x_BTD.shape, x_BTD.device
    x_BTD, y_BTD, reset, is_padding = (
        rows_of_channels(x_BTD),
        rows_of_channels(y_BTD),
        flag(reset_BT),
        flag(is_padding_BT),
    )
    S, steps = segments(max(1, B * -(-D // CHANNELS)), T, UNROLLED)
    M = -(-T // UNROLLED)
    out_BTD = allocate((B, T, D), x_BTD.dtype, device)
    last_BD = allocate((B, D), torch.float32, device)
    carries_BMD = allocate((B, M, D) if keep else (0,), torch.float32, device)
    if out_BTD.numel():
        arguments = (
            x_BTD, y_BTD, gates_HNe, r_bias_Hd.contiguous(), i_bias_Hd.contiguous(), log_a_scale_D,
            None if h0_BD is None else h0_BD.contiguous(), reset, is_padding, *summaries(B, S, D, device),
            out_BTD, last_BD, carries_BMD if keep else None,
            T, D, gates_HNe.shape[2] // 2, B * T, S, M, steps,
            *x_BTD.stride()[:2], *y_BTD.stride()[:2], row_stride(reset), row_stride(is_padding),
        )  # fmt: skip
        _launch(rg_lru_kernel, (B, T, D), arguments, x_BTD, S=S)
    return out_BTD, last_BD, carries_BMD


def backward(
    dout_BTD: Tensor, dlast_BD: Tensor, x_BTD: Tensor, y_BTD: Tensor, gates_HNe: Tensor, carries_BMD: Tensor,
    r_bias_Hd: Tensor, i_bias_Hd: Tensor, log_a_scale_D: Tensor, reset_BT: Tensor | None, is_padding_BT: Tensor | None,
    min_4x: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dx without the part through the gates, dy, the gates' gradients, dh0, and the sums (3, D) over batch and
    time of the gradients of log_a_scale and of both biases."""
    (B, T, D), device = x_BTD.shape, x_BTD.device
    x_BTD, y_BTD, dout_BTD = rows_of_channels(x_BTD), rows_of_channels(y_BTD), rows_of_channels(dout_BTD)
    reset, is_padding = flag(reset_BT), flag(is_padding_BT)
    S, steps = segments(max(1, B * -(-D // CHANNELS)), T, UNROLLED)
    dx, dy = (allocate((B, T, D), x_BTD.dtype, device) for _ in range(2))
    dgates_HNe = allocate(tuple(gates_HNe.shape), gates_HNe.dtype, device)
    dh0_BD = allocate((B, D), torch.float32, device)
    sums_BS3D = allocate((B, S, 3, D), torch.float32, device)
    if dx.numel():
        arguments = (
            dout_BTD, dlast_BD.contiguous(), x_BTD, y_BTD, gates_HNe, r_bias_Hd.contiguous(), i_bias_Hd.contiguous(),
            log_a_scale_D, reset, is_padding, carries_BMD, *summaries(B, S, D, device),
            dx, dy, dgates_HNe, dh0_BD, sums_BS3D,
            T, D, gates_HNe.shape[2] // 2, B * T, S, -(-T // UNROLLED), steps,
            *dout_BTD.stride()[:2], *x_BTD.stride()[:2], *y_BTD.stride()[:2], row_stride(reset), row_stride(is_padding),
        )  # fmt: skip
        _launch(rg_lru_backward_kernel, (B, T, D), arguments, x_BTD, S=S, MIN_4X=min_4x)
    return dx, dy, dgates_HNe, dh0_BD, sums_BS3D.sum((0, 1))
