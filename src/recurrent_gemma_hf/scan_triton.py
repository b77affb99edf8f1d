"""Triton kernels of the linear recurrence h_t = a_t h_{t-1} + x_t, forward and backward. See triton_tools.py.

Memory traffic in bfloat16, per element: 6 bytes forward and 10 backward; with several segments of time, 4 more each.

Shapes: B batch, T tokens, D channels, S segments of time.
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
    load_rows,
    on_device,
    own_row,
    rows_of_channels,
    seen,
    segments,
    summaries,
    tl,
    triton,
    within,
)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    x_ptr, a_ptr, h0_ptr, decay_ptr, end_ptr, h_ptr, last_ptr,
    T, D, S, steps, x_stride_B, x_stride_T, a_stride_B, a_stride_T,
    SUMMARY: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute all states (B, T, D), contiguous, and the last (B, D); h0 (B, D) contiguous or None.

    SUMMARY: instead compute the summary of each segment, decay and end (B, S, D).
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    is_channel = channel < D
    x_ptr += b * x_stride_B + channel
    a_ptr += b * a_stride_B + channel
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
        a = load_rows(a_ptr, a_stride_T, start, T, is_channel, 1.0, ROWS)
        for k in tl.static_range(ROWS):
            h = advance(a[k], h, x[k])
            if SUMMARY:
                decay = compose(a[k], decay)
            else:
                out = h_ptr + (b * T + start + k) * D + channel
                tl.store(out, h.to(h_ptr.dtype.element_ty), mask=within(is_channel, start + k, T))
    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, h, mask=is_channel)
    elif segment == S - 1:
        tl.store(last_ptr + b * D + channel, h, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    dh_ptr, dlast_ptr, a_ptr, h_ptr, h0_ptr, decay_ptr, end_ptr, dx_ptr, da_ptr, dh0_ptr,
    T, D, S, steps, dh_stride_B, dh_stride_T, a_stride_B, a_stride_T,
    SUMMARY: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute dx, da (B, T, D) and dh0 (B, D), contiguous; h (B, T, D), h0 and dlast (B, D) contiguous.

    Segments are counted from the end. SUMMARY: as in `scan_kernel`, for G_t = a_t g_t, the gradient of h_{t-1}.
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    is_channel = channel < D
    row = b * D + channel
    dh_ptr += b * dh_stride_B + channel
    a_ptr += b * a_stride_B + channel
    G = tl.zeros((CHANNELS,), tl.float32)
    decay = tl.full((CHANNELS,), 1.0, tl.float32)
    h0 = tl.zeros((CHANNELS,), tl.float32)
    if not SUMMARY:
        if h0_ptr is not None:
            h0 = tl.load(h0_ptr + row, mask=is_channel, other=0.0).to(tl.float32)
        G = tl.load(dlast_ptr + row, mask=is_channel, other=0.0).to(tl.float32)
        if decay_ptr is not None:
            G = compose_summaries(G, decay_ptr, end_ptr, b, segment, S, D, channel)
    for tile in range(0, steps, ROWS):
        start = b * 0 + tl.cdiv(T, ROWS) * ROWS - segment * steps - tile - ROWS  # int64
        dh = load_rows(dh_ptr, dh_stride_T, start, T, is_channel, 0.0, ROWS)
        a = load_rows(a_ptr, a_stride_T, start, T, is_channel, 1.0, ROWS)
        if not SUMMARY:
            before = load_rows(h_ptr + b * T * D + channel, D, start - 1, T, is_channel, 0.0, ROWS)
        for k in tl.static_range(ROWS - 1, -1, -1):
            g = dh[k] + G
            G = advance(a[k], g, 0.0)
            if SUMMARY:
                decay = compose(a[k], decay)
            else:
                t = start + k
                inside, offset = within(is_channel, t, T), (b * T + t) * D + channel
                da = g * seen(a[k], tl.where(t == 0, h0, before[k]))
                tl.store(dx_ptr + offset, g.to(dx_ptr.dtype.element_ty), mask=inside)
                tl.store(da_ptr + offset, da.to(da_ptr.dtype.element_ty), mask=inside)
    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, G, mask=is_channel)
    elif segment == S - 1:
        tl.store(dh0_ptr + row, G, mask=is_channel)


def _launch(kernel: Any, x_BTD: Tensor, pointers: Any, strides: tuple[int, ...]) -> None:
    """Launch a kernel, with several segments first for the summaries. `pointers` takes decay and end."""
    B, T, D = x_BTD.shape
    blocks = -(-D // CHANNELS)
    S, steps = segments(B * blocks, T, UNROLLED)
    arguments = *pointers(*summaries(B, S, D, x_BTD.device)), T, D, S, steps, *strides
    constants = {"CHANNELS": CHANNELS, "ROWS": UNROLLED, "num_warps": 1, **OPTIONS}
    with on_device(x_BTD):
        if S > 1:
            kernel[(B * blocks, S - 1)](*arguments, SUMMARY=True, **constants)
        kernel[(B * blocks, S)](*arguments, SUMMARY=False, **constants)


def scan(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute all states, in the dtype of x, and the last state in float32."""
    x_BTD, a_BTD = rows_of_channels(x_BTD), rows_of_channels(a_BTD)
    h0_BD = None if h0_BD is None else h0_BD.contiguous()
    h_BTD = allocate(tuple(x_BTD.shape), x_BTD.dtype, x_BTD.device)
    last_BD = allocate((x_BTD.shape[0], x_BTD.shape[2]), torch.float32, x_BTD.device)
    if h_BTD.numel():
        strides = (*x_BTD.stride()[:2], *a_BTD.stride()[:2])
        _launch(scan_kernel, x_BTD, lambda *sums: (x_BTD, a_BTD, h0_BD, *sums, h_BTD, last_BD), strides)
    return h_BTD, last_BD


def scan_backward(
    dh_BTD: Tensor, dlast_BD: Tensor, a_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, a and h0 (float32)."""
    dh_BTD, a_BTD = rows_of_channels(dh_BTD), rows_of_channels(a_BTD)
    dlast_BD, h0_BD = dlast_BD.contiguous(), None if h0_BD is None else h0_BD.contiguous()
    dx_BTD = allocate(tuple(h_BTD.shape), h_BTD.dtype, h_BTD.device)
    da_BTD = allocate(tuple(h_BTD.shape), a_BTD.dtype, h_BTD.device)
    dh0_BD = allocate(tuple(dlast_BD.shape), torch.float32, h_BTD.device)
    if dx_BTD.numel():
        strides, results = (*dh_BTD.stride()[:2], *a_BTD.stride()[:2]), (dx_BTD, da_BTD, dh0_BD)
        _launch(
            scan_backward_kernel,
            dh_BTD,
            lambda *sums: (dh_BTD, dlast_BD, a_BTD, h_BTD, h0_BD, *sums, *results),
            strides,
        )
    return dx_BTD, da_BTD, dh0_BD
