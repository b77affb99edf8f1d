"""Triton kernels of the depthwise causal convolution, forward and backward.

Shapes: B batch, T tokens, D lru_width, K conv1d_width, F = T, or K - 1 + T with the earlier inputs in front,
S segments of time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_tools import (
    CHANNELS,
    OPTIONS,
    SIZES,
    allocate,
    flag,
    on_device,
    own_row,
    row_stride,
    rows_of_channels,
    segments,
    tl,
    triton,
)

STEPS = 32  # time steps of a program's tile, times `CHANNELS` channels, in 4 warps


@triton.jit(do_not_specialize=SIZES)
def conv_kernel(
    u_ptr, weight_ptr, bias_ptr, conv_tap_mask_ptr, out_ptr,
    T, D, u_stride_B, u_stride_T, conv_tap_mask_stride_B,
    K: tl.constexpr, PAST: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute out (B, T, D); weight (K, D). PAST: rows of u before that of the first output."""
    program, b = own_row(tl.cdiv(D, CHANNELS) * tl.cdiv(T, STEPS))
    blocks = tl.cdiv(D, CHANNELS)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_c = c < D
    t = (program // blocks * STEPS + tl.arange(0, STEPS)[:, None]).to(tl.int64)
    out = tl.load(bias_ptr + c, mask=is_c, other=0.0).to(tl.float32) + tl.zeros((STEPS, CHANNELS), tl.float32)
    for tap in tl.static_range(K):
        f = t + tap - (K - 1 - PAST)
        inside = (f >= 0) & (t < T) & is_c
        u = tl.load(u_ptr + b * u_stride_B + f * u_stride_T + c, mask=inside, other=0.0).to(tl.float32)
        if conv_tap_mask_ptr is not None:
            seen = tl.load(conv_tap_mask_ptr + b * conv_tap_mask_stride_B + t * K + tap, mask=t < T, other=0)
            u = tl.where(seen != 0, u, 0.0)
        out += u * tl.load(weight_ptr + tap * D + c, mask=is_c, other=0.0).to(tl.float32)
    tl.store(out_ptr + (b * T + t) * D + c, out.to(out_ptr.dtype.element_ty), mask=(t < T) & is_c)


@triton.jit(do_not_specialize=SIZES)
def conv_backward_kernel(
    dout_ptr, u_ptr, weight_ptr, conv_tap_mask_ptr, du_ptr, sums_ptr,
    T, D, S, steps, dout_stride_B, dout_stride_T, u_stride_B, u_stride_T, conv_tap_mask_stride_B,
    K: tl.constexpr, PAST: tl.constexpr, SUMS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute du (B, F, D), and sums over each segment's inputs, (B, S, K + 1, D): K rows of dweight, one of dbias.

    SUMS: K + 1, rounded up to a power of 2.
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    segment = tl.program_id(1)
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_c = c < D
    sum_row = tl.arange(0, SUMS)[:, None]
    sums = tl.zeros((SUMS, CHANNELS), tl.float32)
    for start in range(segment * steps, segment * steps + steps, STEPS):
        f = (start + tl.arange(0, STEPS)[:, None]).to(tl.int64)
        is_input = (f < T + PAST) & is_c
        u = tl.load(u_ptr + b * u_stride_B + f * u_stride_T + c, mask=is_input, other=0.0).to(tl.float32)
        du = tl.zeros((STEPS, CHANNELS), tl.float32)
        for tap in tl.static_range(K):
            t = f - tap + (K - 1 - PAST)  # the output that reads input f through this tap
            is_output = (t >= 0) & (t < T)
            dout = tl.load(dout_ptr + b * dout_stride_B + t * dout_stride_T + c, mask=is_output & is_c, other=0.0)
            dout = dout.to(tl.float32)
            if tap == K - 1:
                # The newest tap reads every output's gradient exactly once.
                dbias = tl.sum(dout, axis=0)
                sums += tl.where(sum_row == K, dbias[None, :], 0.0)
            if conv_tap_mask_ptr is not None:
                tap_mask_ptr = conv_tap_mask_ptr + b * conv_tap_mask_stride_B + t * K + tap
                dout = tl.where(tl.load(tap_mask_ptr, mask=is_output, other=0) != 0, dout, 0.0)
            du += dout * tl.load(weight_ptr + tap * D + c, mask=is_c, other=0.0).to(tl.float32)
            dtap = tl.sum(dout * u, axis=0)
            sums += tl.where(sum_row == tap, dtap[None, :], 0.0)
        tl.store(du_ptr + (b * (T + PAST) + f) * D + c, du.to(du_ptr.dtype.element_ty), mask=is_input)
    out = sums_ptr + ((b * S + segment) * (K + 1) + sum_row) * D + c
    tl.store(out, sums, mask=(sum_row <= K) & is_c)


def conv(u_BFD: Tensor, weight_KD: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None, past: int) -> Tensor:
    """Compute the convolution (B, T, D)."""
    u_BFD = rows_of_channels(u_BFD)
    (B, length, D), K = u_BFD.shape, weight_KD.shape[0]
    T = length - past
    out_BTD = allocate((B, T, D), u_BFD.dtype, u_BFD.device)
    if out_BTD.numel() == 0:
        return out_BTD
    mask = flag(conv_tap_mask_BTK)
    with on_device(u_BFD):
        conv_kernel[(B * -(-D // CHANNELS) * -(-T // STEPS),)](
            u_BFD, weight_KD.contiguous(), bias_D.contiguous(), mask, out_BTD,
            T, D, *u_BFD.stride()[:2], row_stride(mask),
            K=K, PAST=past, STEPS=STEPS, CHANNELS=CHANNELS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out_BTD


def conv_backward(
    dout_BTD: Tensor, u_BFD: Tensor, weight_KD: Tensor, conv_tap_mask_BTK: Tensor | None, past: int
) -> tuple[Tensor, Tensor]:
    """Compute du (B, F, D), and the gradients of weight and bias as (K + 1, D) in float32."""
    dout_BTD, u_BFD = rows_of_channels(dout_BTD), rows_of_channels(u_BFD)
    (B, T, D), K = dout_BTD.shape, weight_KD.shape[0]
    du_BFD = allocate(tuple(u_BFD.shape), u_BFD.dtype, u_BFD.device)
    if dout_BTD.numel() == 0:
        return du_BFD.zero_(), weight_KD.new_zeros((K + 1, D), dtype=torch.float32)
    mask = flag(conv_tap_mask_BTK)
    blocks = -(-D // CHANNELS)
    S, steps = segments(B * blocks, T + past, STEPS)
    sums_BSKD = allocate((B, S, K + 1, D), torch.float32, u_BFD.device)
    with on_device(u_BFD):
        conv_backward_kernel[(B * blocks, S)](
            dout_BTD, u_BFD, weight_KD.contiguous(), mask, du_BFD, sums_BSKD,
            T, D, S, steps, *dout_BTD.stride()[:2], *u_BFD.stride()[:2], row_stride(mask),
            K=K, PAST=past, SUMS=triton.next_power_of_2(K + 1), STEPS=STEPS, CHANNELS=CHANNELS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return du_BFD, sums_BSKD.sum((0, 1))
