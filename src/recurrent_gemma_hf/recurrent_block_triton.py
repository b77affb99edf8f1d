"""The inside of the recurrent block on a GPU, in Triton: `recurrent_block` of recurrent_block.py.

Forward, one kernel: a program owns a row, a segment of time and a block of channels of one head. Tile by tile it
convolves the whole head (its gates read all of it), multiplies with its columns of both gate matrices, which stay on
the chip, scans, gates with gelu(y) and writes. Nothing but the inputs and the state that enters each tile is kept.

Backward, by recomputation: one kernel walks back through time, tile by tile, recomputes the tile forward from its kept
state and writes the gradients of y and of everything in front of the scan; matrix products (of torch) take those of the
gates to the convolution's output and to the gates' weights; one kernel takes them through the convolution.

As in scan_triton.py, time is cut into segments where rows and channels alone would leave the GPU idle, and
nothing depends on the order in which programs run.

Shape suffixes: B batch, T time, D lru_width, H heads, d width of a head (D / H), K conv taps, S segments of time,
M tiles of time.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recurrent_block import MIN_4X_IN_SQRT_GRADIENT as _MIN_4X_IN_SQRT_GRADIENT
from .recurrent_block import RG_LRU_C as _RG_LRU_C
from .scan_triton import (
    OPTIONS,
    SIZES,
    Tile,
    allocate,
    compose,
    compose_summaries,
    finite,
    last_row,
    on_device,
    own_row,
    pointer,
    rows_of_channels,
    segments,
    tl,
    triton,
)

_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)

RG_LRU_C = tl.constexpr(_RG_LRU_C)
MIN_4X_IN_SQRT_GRADIENT = tl.constexpr(_MIN_4X_IN_SQRT_GRADIENT)


# ---------------------------------------------------------------- launch configuration: all of it

CHUNK = 64  # channels of a head that are convolved and multiplied at once

# (half precision, float32): steps and output channels of a program, which reads all channels of its head. Forward and
# backward share the steps of a tile, for a state is kept per tile.
FORWARD_TILES = (Tile(64, 64, 4), Tile(32, 32, 8))
BACKWARD_TILES = (Tile(64, 32, 8), Tile(32, 16, 8))
CONV_TILE = Tile(32, 64, 4)
# "time" counts rows of the batch here. float32 is multiplied without tensor cores, from many more registers.
DECODE_TILES = (Tile(16, 32, 8), Tile(16, 32, 16))


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---------------------------------------------------------------- pieces of kernels


@triton.jit
def sigmoid(x):
    """Of float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of float32. Where exp(x) is small, what it loses by rounding in 1 + exp(x) is made good."""
    z = tl.exp(-tl.abs(x))
    one_and = 1.0 + z
    return tl.maximum(x, 0.0) + tl.where(one_and == 1.0, z, tl.log(one_and) * (z / tl.maximum(one_and - 1.0, 1e-30)))


@triton.jit
def gelu(y):
    """gelu_tanh(y), and its derivative. tanh(x) = 2 sigmoid(2 x) - 1, so half of 1 + tanh(x) is a sigmoid."""
    inner = 1.5957691216057308 * y * (1.0 + 0.044715 * y * y)  # 2 sqrt(2 / pi) (y + 0.044715 y^3)
    s = sigmoid(inner)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * y * y)
    return y * s, s + y * s * (1.0 - s) * slope


@triton.jit
def dot(x, weight, total, UPCAST: tl.constexpr):
    """total + x weight, accumulated in float32. The interpreter cannot multiply bfloat16."""
    if UPCAST:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def convolve(
    u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, u_stride, context_stride, start, row, T, c,
    is_channel, D,
    K: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr,
):  # fmt: skip
    """The causal convolution at times start + row, row (steps, 1), and channels c (1, channels); weight (K, D).

    float32. Within a tile offsets have 32 bits (see `rows_of_channels`): wider ones would take registers for each.
    """
    u_ptr += tl.cast(start, tl.int64) * u_stride
    conv_tap_mask_ptr += tl.cast(start, tl.int64) * K
    out = tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32) + tl.zeros_like(row).to(tl.float32)
    for tap in tl.static_range(K):
        back = row + (tap - (K - 1))
        s = start + back
        x = tl.load(u_ptr + back * u_stride + c, mask=(s >= 0) & (s < T) & is_channel, other=0.0).to(tl.float32)
        if HAS_CONTEXT:
            before = context_ptr + (s + K - 1) * context_stride + c
            x += tl.load(before, mask=(s < 0) & (s > -K) & is_channel, other=0.0).to(tl.float32)
        if HAS_CONV_TAP_MASK:
            is_time = (start + row >= 0) & (start + row < T)
            x *= tl.load(conv_tap_mask_ptr + row * K + tap, mask=is_time, other=0.0).to(tl.float32)
        out += x * tl.load(weight_ptr + tap * D + c, mask=is_channel, other=0.0).to(tl.float32)
    return out


@triton.jit
def gate_weights(weight_ptr, head, d, outer, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """A head's columns `outer` of a gate's matrix, as a tuple of transposed blocks, (CHANNELS, CHUNK) each."""
    blocks = ()
    for chunk in tl.static_range(HEAD // CHUNK):
        inner = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        at = head * d * d + inner * d + outer[:, None]
        blocks = blocks + (tl.load(weight_ptr + at, mask=(inner < d) & (outer < d)[:, None], other=0.0),)  # type: ignore[assignment]
    return blocks


@triton.jit
def gate_parameters(
    a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, softplus_ptr, head, d, outer,
    HEAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Both gates' weights, their biases and softplus(Lambda), (1, CHANNELS) each, of a head's channels `outer`."""
    c, is_c = (head * d + outer)[None, :], (outer < d)[None, :]
    return (
        gate_weights(a_weight_ptr, head, d, outer, HEAD, CHUNK),
        gate_weights(x_weight_ptr, head, d, outer, HEAD, CHUNK),
        tl.load(a_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32),
        tl.load(x_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32),
        tl.load(softplus_ptr + c, mask=is_c, other=0.0),
    )


@triton.jit
def convolve_and_gate(
    u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, u_stride, context_stride, start, row, T, head, d, D,
    outer,
    a_weights, x_weights, a_bias, x_bias,
    K: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr, UPCAST: tl.constexpr,
    HEAD: tl.constexpr, CHUNK: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The convolution of the channels `outer` of a head, and r and i from that of the whole head, chunk by chunk.

    Transposed, because a left factor that has been computed would go to the tensor cores through registers, and
    Triton would then do the whole convolution, once per tap through shared memory, in their layout.
    """
    r = tl.zeros((CHANNELS, TIME), tl.float32)
    i = tl.zeros((CHANNELS, TIME), tl.float32)
    for chunk in tl.static_range(HEAD // CHUNK):
        inner = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        x = convolve(
            u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, u_stride, context_stride,
            start, row, T, head * d + inner, inner < d, D, K, HAS_CONTEXT, HAS_CONV_TAP_MASK,
        ).to(u_ptr.dtype.element_ty)  # fmt: skip
        r = dot(a_weights[chunk], tl.trans(x), r, UPCAST)
        i = dot(x_weights[chunk], tl.trans(x), i, UPCAST)
    x = convolve(
        u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, u_stride, context_stride,
        start, row, T, (head * d + outer)[None, :], (outer < d)[None, :], D, K, HAS_CONTEXT, HAS_CONV_TAP_MASK,
    )  # fmt: skip
    return x, sigmoid(tl.trans(r) + a_bias), sigmoid(tl.trans(i) + x_bias)


@triton.jit
def coefficients(r, i, x, rate, is_reset, is_padding):
    """a, the multiplier of x, x', exp(log a) and 1 - exp(2 log a).

    rate: softplus(Lambda); is_reset and is_padding (steps, 1).
    """
    log_a = r * (-RG_LRU_C * rate)
    a = tl.exp(log_a)
    square = 1.0 - tl.exp(2.0 * log_a)
    multiplier = tl.where(is_reset, 1.0, tl.sqrt(square))
    gated = tl.where(is_padding, 0.0, multiplier * i * x)
    decay = tl.where(is_padding, 1.0, tl.where(is_reset, 0.0, a))
    return decay, multiplier, gated, a, square


@triton.jit
def flag(pointer_T, t, T, HAS: tl.constexpr):
    """A bool per step, (steps, 1); False where there is none."""
    if HAS:
        return tl.load(pointer_T + t, mask=(t >= 0) & (t < T), other=0) != 0
    return tl.zeros_like(t) != 0


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=SIZES)
def block_kernel(
    u_ptr, y_ptr, context_ptr, h0_ptr, reset_ptr, is_padding_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr,
    a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, softplus_ptr,
    decay_ptr, end_ptr, out_ptr, last_ptr, carries_ptr,
    T, D, d, S, M, steps, blocks,
    u_stride_B, u_stride_T, y_stride_B, y_stride_T, context_stride_B, context_stride_T,
    reset_stride_B, is_padding_stride_B, conv_tap_mask_stride_B,
    SUMMARY: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_H0: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (B, T, D), the last state (B, D), and the state that enters each tile (B, M, D).

    SUMMARY: instead of these what each segment makes of the state that enters it, decay and end (B, S, D).
    """
    program, b = own_row(D // d * blocks)
    head, block, segment = program // blocks, program % blocks, tl.program_id(1)
    outer = block * CHANNELS + tl.arange(0, CHANNELS)  # channels of the head that this program writes
    channel, is_channel = head * d + outer, outer < d
    c, is_c = channel[None, :], is_channel[None, :]
    u_ptr += b * u_stride_B
    y_ptr += b * y_stride_B
    out_ptr += b * T * D
    context_ptr += b * context_stride_B
    reset_ptr += b * reset_stride_B
    is_padding_ptr += b * is_padding_stride_B
    conv_tap_mask_ptr += b * conv_tap_mask_stride_B

    a_weights, x_weights, a_bias, x_bias, rate = gate_parameters(
        a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, softplus_ptr, head, d, outer, HEAD, CHUNK
    )
    row = tl.arange(0, TIME)[:, None]

    if SUMMARY:
        h = tl.zeros((CHANNELS,), tl.float32)
        decay = tl.full((CHANNELS,), 1.0, tl.float32)
    else:
        h = tl.zeros((CHANNELS,), tl.float32)
        if HAS_H0:
            h = tl.load(h0_ptr + b * D + channel, mask=is_channel, other=0.0)
        h = compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, channel)

    for start in range(segment * steps, segment * steps + steps, TIME):
        t = (start + row).to(tl.int64)
        x, r, i = convolve_and_gate(
            u_ptr, context_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr, u_stride_T, context_stride_T,
            start, row, T, head, d, D, outer, a_weights, x_weights, a_bias, x_bias,
            K, HAS_CONTEXT, HAS_CONV_TAP_MASK, UPCAST, HEAD, CHUNK, TIME, CHANNELS,
        )  # fmt: skip
        is_padding = flag(is_padding_ptr, t, T, HAS_PADDING) | (t >= T)  # nothing happens behind the end
        a, _, gated, _, _ = coefficients(r, i, x, rate, flag(reset_ptr, t, T, HAS_RESET), is_padding)
        a, gated = tl.associative_scan((a, gated), 0, compose)
        if SUMMARY:
            a_last = last_row(a, TIME)
            h = a_last * h + last_row(gated, TIME)
            decay = finite(a_last * decay)
        else:
            if start < T:
                tl.store(carries_ptr + (b * M + start // TIME) * D + channel, h, mask=is_channel)
            states = a * h[None, :] + gated
            inside = (t < T) & is_c
            y = tl.load(y_ptr + t * y_stride_T + c, mask=inside, other=0.0).to(tl.float32)
            opened, _ = gelu(y)
            tl.store(out_ptr + t * D + c, (states * opened).to(out_ptr.dtype.element_ty), mask=inside)
            h = last_row(states, TIME)

    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, h, mask=is_channel)
    elif segment == S - 1:
        tl.store(last_ptr + b * D + channel, h, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def block_backward_kernel(
    dout_ptr, dlast_ptr, u_ptr, y_ptr, context_ptr, reset_ptr, is_padding_ptr, conv_tap_mask_ptr, conv_weight_ptr,
    conv_bias_ptr,
    a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, softplus_ptr, carries_ptr,
    decay_ptr, end_ptr, dy_ptr, conv_ptr, dconv_ptr, dgates_ptr, dh0_ptr, sums_ptr,
    T, D, d, S, M, steps, blocks,
    dout_stride_B, dout_stride_T, u_stride_B, u_stride_T, y_stride_B, y_stride_T, context_stride_B, context_stride_T,
    reset_stride_B, is_padding_stride_B, conv_tap_mask_stride_B,
    SUMMARY: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Backwards through the scan, from the gradients of out and of the last state.

    Writes dy; the convolution's output again and the gradient that reaches it past the gates; the gradients in front
    of the gates' sigmoids, (B, T, H, 2, d), r before i; dh0; and sums over each segment's time, (B, S, 3, D): of the
    gradient of softplus(Lambda) and of both gates' biases.

    Segments count from the end. SUMMARY: as in `block_kernel`, for G_t = a_t g_t, the gradient of the state h_{t-1}.
    """
    program, b = own_row(D // d * blocks)
    head, block, segment = program // blocks, program % blocks, tl.program_id(1)
    outer = block * CHANNELS + tl.arange(0, CHANNELS)
    channel, is_channel = head * d + outer, outer < d
    c, is_c = channel[None, :], is_channel[None, :]
    dout_ptr += b * dout_stride_B
    u_ptr += b * u_stride_B
    y_ptr += b * y_stride_B
    dy_ptr += b * T * D
    conv_ptr += b * T * D
    dconv_ptr += b * T * D
    dgates_ptr += b * T * D * 2
    context_ptr += b * context_stride_B
    reset_ptr += b * reset_stride_B
    is_padding_ptr += b * is_padding_stride_B
    conv_tap_mask_ptr += b * conv_tap_mask_stride_B

    a_weights, x_weights, a_bias, x_bias, rate = gate_parameters(
        a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, softplus_ptr, head, d, outer, HEAD, CHUNK
    )
    row = tl.arange(0, TIME)[:, None]
    following = tl.minimum(row + 1, TIME - 1) + tl.zeros((TIME, CHANNELS), tl.int32)
    preceding = tl.maximum(row - 1, 0) + tl.zeros((TIME, CHANNELS), tl.int32)

    decay = tl.full((CHANNELS,), 1.0, tl.float32)
    sum_softplus = tl.zeros((CHANNELS,), tl.float32)
    sum_r = tl.zeros((CHANNELS,), tl.float32)
    sum_i = tl.zeros((CHANNELS,), tl.float32)
    G = tl.zeros((CHANNELS,), tl.float32)  # the gradient of the state that leaves the tile
    if not SUMMARY:
        G = tl.load(dlast_ptr + b * D + channel, mask=is_channel, other=0.0)
        G = compose_summaries(G, decay_ptr, end_ptr, b, segment, S, D, channel)

    for tile in range(0, steps, TIME):
        start = M * TIME - segment * steps - tile - TIME
        t = (start + row).to(tl.int64)
        is_time = (t >= 0) & (t < T)
        x, r, i = convolve_and_gate(
            u_ptr, context_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr, u_stride_T, context_stride_T,
            start, row, T, head, d, D, outer, a_weights, x_weights, a_bias, x_bias,
            K, HAS_CONTEXT, HAS_CONV_TAP_MASK, UPCAST, HEAD, CHUNK, TIME, CHANNELS,
        )  # fmt: skip
        is_reset = flag(reset_ptr, t, T, HAS_RESET)
        is_padding = flag(is_padding_ptr, t, T, HAS_PADDING) | (is_time == 0)
        a, multiplier, gated, raw_a, square = coefficients(r, i, x, rate, is_reset, is_padding)

        inside = is_time & is_c
        y = tl.load(y_ptr + t * y_stride_T + c, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + t * dout_stride_T + c, mask=inside, other=0.0).to(tl.float32)
        opened, slope = gelu(y)
        dh = dout * opened

        # G_t = a_t (dh_t + G_{t+1}): in this form a step's coefficient is its own, not its successor's.
        A, E = tl.associative_scan((a, a * dh), 0, compose, reverse=True)
        G_t = A * G[None, :] + E
        if SUMMARY:
            G = tl.sum(tl.where(row == 0, G_t, 0.0), axis=0)
            decay = finite(decay * tl.sum(tl.where(row == 0, A, 0.0), axis=0))
        else:
            g = dh + tl.where(row == TIME - 1, G[None, :], tl.gather(G_t, following, 0))
            A, E = tl.associative_scan((a, gated), 0, compose)
            # Before time 0 there is nothing to do, and any state will do.
            carry = carries_ptr + (b * M + (start // TIME) * (start >= 0)) * D + channel
            entering = tl.load(carry, mask=is_channel, other=0.0)
            states = A * entering[None, :] + E
            before = tl.where(row == 0, entering[None, :], tl.gather(states, preceding, 0))
            tl.store(dy_ptr + t * D + c, (dout * states * slope).to(dy_ptr.dtype.element_ty), mask=inside)
            tl.store(conv_ptr + t * D + c, x.to(conv_ptr.dtype.element_ty), mask=inside)

            dgated = tl.where(is_padding, 0.0, g)
            dx = dgated * multiplier * i
            tl.store(dconv_ptr + t * D + c, dx.to(dconv_ptr.dtype.element_ty), mask=inside)
            di = dgated * multiplier * x * i * (1.0 - i)
            dsquare = dgated * i * x / tl.sqrt(tl.maximum(4.0 * square, MIN_4X_IN_SQRT_GRADIENT))
            dlog_a = raw_a * (g * before - 2.0 * raw_a * dsquare)
            dlog_a = tl.where(is_reset | is_padding, 0.0, dlog_a) * (-RG_LRU_C * r)
            dr = dlog_a * rate * (1.0 - r)
            dgates = dgates_ptr + t * D * 2 + (head * d + c)  # head * 2 d + its channel
            tl.store(dgates, dr.to(dgates_ptr.dtype.element_ty), mask=inside)
            tl.store(dgates + d, di.to(dgates_ptr.dtype.element_ty), mask=inside)
            sum_softplus += tl.sum(dlog_a, axis=0)
            sum_r += tl.sum(dr, axis=0)
            sum_i += tl.sum(di, axis=0)
            G = tl.sum(tl.where(row == 0, G_t, 0.0), axis=0)

    if SUMMARY:
        summary = (b * S + segment) * D + channel
        tl.store(decay_ptr + summary, decay, mask=is_channel)
        tl.store(end_ptr + summary, G, mask=is_channel)
    else:
        sums = sums_ptr + (b * S + segment) * 3 * D + channel
        tl.store(sums, sum_softplus, mask=is_channel)
        tl.store(sums + D, sum_r, mask=is_channel)
        tl.store(sums + 2 * D, sum_i, mask=is_channel)
        if segment == S - 1:
            tl.store(dh0_ptr + b * D + channel, G, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def conv_kernel(
    u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, out_ptr,
    T, D, u_stride_B, u_stride_T, context_stride_B, context_stride_T, conv_tap_mask_stride_B,
    HAS_CONTEXT: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr,
    K: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The depthwise causal convolution by itself, (B, T, D)."""
    blocks = tl.cdiv(D, CHANNELS)
    program, b = own_row(blocks * tl.cdiv(T, TIME))
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    start, row = program // blocks * TIME, tl.arange(0, TIME)[:, None]
    t = (start + row).to(tl.int64)
    out = convolve(
        u_ptr + b * u_stride_B, context_ptr + b * context_stride_B, conv_tap_mask_ptr + b * conv_tap_mask_stride_B,
        weight_ptr, bias_ptr, u_stride_T, context_stride_T, start, row, T, c, c < D, D, K, HAS_CONTEXT,
        HAS_CONV_TAP_MASK,
    )  # fmt: skip
    tl.store(out_ptr + (b * T + t) * D + c, out.to(out_ptr.dtype.element_ty), mask=(t < T) & (c < D))


@triton.jit(do_not_specialize=SIZES)
def conv_backward_kernel(
    dout_ptr, u_ptr, context_ptr, conv_tap_mask_ptr, weight_ptr, du_ptr, dcontext_ptr, sums_ptr,
    T, D, S, steps, dout_stride_B, dout_stride_T, u_stride_B, u_stride_T, context_stride_B, context_stride_T,
    du_stride_B, dcontext_stride_B, conv_tap_mask_stride_B,
    HAS_CONTEXT: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr,
    K: tl.constexpr, SUMS: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """du (B, T, D), dcontext (B, K - 1, D), and sums over each segment's time, (B, S, K + 1, D): dweight, then dbias.

    The first two with rows of D numbers, one behind the other. SUMS is K + 1 rounded up to a power of 2. Time begins at
    -(K - 1), with the context.
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    c, is_c = channel[None, :], (channel < D)[None, :]
    dout_ptr += b * dout_stride_B
    u_ptr += b * u_stride_B
    context_ptr += b * context_stride_B
    conv_tap_mask_ptr += b * conv_tap_mask_stride_B
    sum_row = tl.arange(0, SUMS)[:, None]
    sums = tl.zeros((SUMS, CHANNELS), tl.float32)
    for start in range(segment * steps - (K - 1), segment * steps + steps - (K - 1), TIME):
        s = (start + tl.arange(0, TIME)[:, None]).to(tl.int64)
        x = tl.load(u_ptr + s * u_stride_T + c, mask=(s >= 0) & (s < T) & is_c, other=0.0).to(tl.float32)
        if HAS_CONTEXT:
            before = context_ptr + (s + K - 1) * context_stride_T + c
            x += tl.load(before, mask=(s < 0) & is_c, other=0.0).to(tl.float32)
        du = tl.zeros((TIME, CHANNELS), tl.float32)
        for tap in tl.static_range(K):
            t = s + (K - 1) - tap  # the output that reads input s through this tap
            is_output = (t >= 0) & (t < T)
            dout = tl.load(dout_ptr + t * dout_stride_T + c, mask=is_output & is_c, other=0.0).to(tl.float32)
            if tap == K - 1:
                dbias = tl.sum(dout, axis=0)
                sums += tl.where(sum_row == K, dbias[None, :], 0.0)
            if HAS_CONV_TAP_MASK:
                dout *= tl.load(conv_tap_mask_ptr + t * K + tap, mask=is_output, other=0.0).to(tl.float32)
            du += dout * tl.load(weight_ptr + tap * D + c, mask=is_c, other=0.0).to(tl.float32)
            dtap = tl.sum(dout * x, axis=0)
            sums += tl.where(sum_row == tap, dtap[None, :], 0.0)
        du = du.to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + b * du_stride_B + s * D + c, du, mask=(s >= 0) & (s < T) & is_c)
        if HAS_CONTEXT:
            tl.store(dcontext_ptr + b * dcontext_stride_B + (s + K - 1) * D + c, du, mask=(s < 0) & is_c)
    out = sums_ptr + ((b * S + segment) * (K + 1) + sum_row) * D + c
    tl.store(out, sums, mask=(sum_row <= K) & is_c)


@triton.jit
def conv_input(
    u_ptr, conv_state_ptr, u_stride_B, state_stride_B, state_stride_T, state_stride_D, b, c, inside, tap: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """What tap `tap` of the convolution reads: the newest input is not in the state yet. float32."""
    if tap == K - 1:
        return tl.load(u_ptr + b * u_stride_B + c, mask=inside, other=0.0).to(tl.float32)
    pointers = conv_state_ptr + b * state_stride_B + tap * state_stride_T + c * state_stride_D
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve_step(
    u_ptr, conv_state_ptr, conv_tap_mask_ptr, weight_ptr, bias_ptr, u_stride_B, state_stride_B, state_stride_T,
    state_stride_D,
    conv_tap_mask_stride_B, b, c, is_row, is_channel, K: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr,
):  # fmt: skip
    """The convolution of one token for rows b (rows, 1) and channels c (1, channels); weight (D, K). float32."""
    out = tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32) + tl.zeros_like(b).to(tl.float32)
    for tap in tl.static_range(K):
        seen = conv_input(
            u_ptr, conv_state_ptr, u_stride_B, state_stride_B, state_stride_T, state_stride_D,
            b, c, is_row & is_channel, tap, K,
        )  # fmt: skip
        if HAS_CONV_TAP_MASK:
            seen *= tl.load(conv_tap_mask_ptr + b * conv_tap_mask_stride_B + tap, mask=is_row, other=0.0).to(tl.float32)
        out += seen * tl.load(weight_ptr + c * K + tap, mask=is_channel, other=0.0).to(tl.float32)
    return out


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    u_ptr, y_ptr, conv_state_ptr, h_ptr, reset_ptr, is_padding_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr,
    a_weight_ptr, a_bias_ptr, x_weight_ptr, x_bias_ptr, lambda_ptr, out_ptr,
    B, D, d, u_stride_B, y_stride_B, state_stride_B, state_stride_T, state_stride_D, h_stride_B,
    reset_stride_B, is_padding_stride_B, conv_tap_mask_stride_B,
    HAS_RESET: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_CONV_TAP_MASK: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token of a head for some rows of the batch: out (B, D); the states are updated in place. Conv weight (D, K).

    One program for a whole head: all of its gates read all of its conv state, which it may overwrite only then.
    """
    head, rows = own_row(D // d)
    b = rows * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = b < B
    inner = tl.arange(0, HEAD)
    c_in, is_in = (head * d + inner)[None, :], is_row & (inner < d)[None, :]
    is_padding = tl.load(is_padding_ptr + b * is_padding_stride_B, mask=is_row, other=0) != 0 if HAS_PADDING else b < 0
    is_reset = tl.load(reset_ptr + b * reset_stride_B, mask=is_row, other=0) != 0 if HAS_RESET else b < 0

    x_in = convolve_step(
        u_ptr, conv_state_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr, u_stride_B, state_stride_B,
        state_stride_T,
        state_stride_D, conv_tap_mask_stride_B, b, c_in, is_row, (inner < d)[None, :], K, HAS_CONV_TAP_MASK,
    ).to(u_ptr.dtype.element_ty)  # fmt: skip

    for block in range(0, d, CHANNELS):
        outer = block + tl.arange(0, CHANNELS)
        c, is_c = (head * d + outer)[None, :], (outer < d)[None, :]
        at = head * d * d + inner[:, None] * d + outer[None, :]
        is_weight = (inner < d)[:, None] & is_c
        a_weight = tl.load(a_weight_ptr + at, mask=is_weight, other=0.0)
        x_weight = tl.load(x_weight_ptr + at, mask=is_weight, other=0.0)
        start = tl.zeros((ROWS, CHANNELS), tl.float32)
        a_bias = tl.load(a_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32)
        x_bias = tl.load(x_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32)
        r = sigmoid(dot(x_in, a_weight, start + a_bias, UPCAST))
        i = sigmoid(dot(x_in, x_weight, start + x_bias, UPCAST))
        inside = is_row & is_c
        # The convolution again for the channels of this block: a tile cannot be cut out of another.
        x = convolve_step(
            u_ptr, conv_state_ptr, conv_tap_mask_ptr, conv_weight_ptr, conv_bias_ptr, u_stride_B, state_stride_B,
            state_stride_T, state_stride_D, conv_tap_mask_stride_B, b, c, is_row, is_c, K, HAS_CONV_TAP_MASK,
        )  # fmt: skip
        rate = softplus(tl.load(lambda_ptr + c, mask=is_c, other=0.0).to(tl.float32))
        a, _, gated, _, _ = coefficients(r, i, x, rate, is_reset, is_padding)
        h = a * tl.load(h_ptr + b * h_stride_B + c, mask=inside, other=0.0) + gated
        tl.store(h_ptr + b * h_stride_B + c, h, mask=inside)
        opened, _ = gelu(tl.load(y_ptr + b * y_stride_B + c, mask=inside, other=0.0).to(tl.float32))
        tl.store(out_ptr + b * D + c, (h * opened).to(out_ptr.dtype.element_ty), mask=inside)

    moved = ()
    for tap in tl.static_range(1, K):
        state = conv_input(
            u_ptr, conv_state_ptr, u_stride_B, state_stride_B, state_stride_T, state_stride_D, b, c_in, is_in, tap, K
        )
        moved = moved + (state.to(conv_state_ptr.dtype.element_ty),)  # type: ignore[assignment]  # noqa: RUF005
    tl.debug_barrier()  # every thread has read the old state before any writes the new one
    for tap in tl.static_range(K - 1):
        state = conv_state_ptr + b * state_stride_B + tap * state_stride_T + c_in * state_stride_D
        tl.store(state, moved[tap], mask=is_in & (is_padding == 0))


# ---------------------------------------------------------------- launches


def _row_stride(tensor: Tensor | None) -> int:
    """From row to row of the batch; 0 where all share one."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def _context_strides(context_BCD: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if context_BCD is None else context_BCD.stride()[:2]


class _Block(NamedTuple):
    """The inputs of `block` as the kernels want them, in the order of their arguments."""

    u_BTD: Tensor
    y_BTD: Tensor
    context_BCD: Tensor | None
    reset_BT: Tensor | None
    is_padding_BT: Tensor | None
    conv_tap_mask_BTK: Tensor | None
    conv_weight_KD: Tensor
    conv_bias_D: Tensor
    a_weight_Hdd: Tensor
    a_bias_D: Tensor
    x_weight_Hdd: Tensor
    x_bias_D: Tensor
    softplus_D: Tensor

    @classmethod
    def prepare(
        cls, u: Tensor, y: Tensor, context: Tensor | None, parameters: tuple[Tensor, ...], flags: tuple[Any, ...]
    ) -> _Block:
        def contiguous(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.contiguous()

        reset, is_padding = (None if flag is None else flag.contiguous().view(torch.uint8) for flag in flags[:2])
        context = None if context is None else rows_of_channels(context)
        return cls(
            rows_of_channels(u), rows_of_channels(y), context, reset, is_padding, contiguous(flags[2]),
            *(parameter.contiguous() for parameter in parameters),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """d, of a head."""
        return self.a_weight_Hdd.shape[1]

    @property
    def pointers(self) -> list[Tensor]:
        return [pointer(tensor, self.u_BTD) for tensor in self]

    @property
    def row_strides(self) -> list[int]:
        """Of context (two), reset, hold and reach."""
        flags = (self.reset_BT, self.is_padding_BT, self.conv_tap_mask_BTK)
        return [*_context_strides(self.context_BCD), *map(_row_stride, flags)]

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "HAS_CONTEXT": self.context_BCD is not None,
            "HAS_RESET": self.reset_BT is not None,
            "HAS_PADDING": self.is_padding_BT is not None,
            "HAS_CONV_TAP_MASK": self.conv_tap_mask_BTK is not None,
            "K": self.conv_weight_KD.shape[0],
        }


class _Plan(NamedTuple):
    """How the work is cut: see `_plan`."""

    blocks: int  # of channels in a head
    S: int
    steps: int
    M: int
    constants: dict[str, Any]
    warps: int


def padded(width: int) -> int:
    """A head's width as the tensor cores take it."""
    return max(16, triton.next_power_of_2(width))


def _plan(block: _Block, tiles: tuple[Tile, Tile]) -> _Plan:
    (B, T, D), d = block.u_BTD.shape, block.width
    tile = tiles[block.u_BTD.dtype == torch.float32]
    channels = min(tile.channels, padded(d))
    blocks = -(-d // channels)
    S, steps = segments(max(1, B * (D // d) * blocks), T, tile.time)
    constants = {
        "HEAD": padded(d),
        "CHUNK": min(CHUNK, padded(d)),
        "TIME": tile.time,
        "CHANNELS": channels,
        "UPCAST": _is_interpreted(),
    }
    return _Plan(blocks, S, steps, -(-T // tile.time), constants, tile.warps)


def _summaries(block: _Block, plan: _Plan) -> list[Tensor]:
    B, _, D = block.u_BTD.shape
    shape = (B, plan.S, D) if plan.S > 1 else (1, 1, 1)
    return [allocate(shape, torch.float32, block.u_BTD.device) for _ in range(2)]


def _launch_block(block: _Block, h0_BD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, D), device = block.u_BTD.shape, block.u_BTD.device
    plan = _plan(block, FORWARD_TILES)
    out_BTD = allocate((B, T, D), block.u_BTD.dtype, device)
    last_BD = allocate((B, D), torch.float32, device)
    carries_BMD = allocate((B, plan.M, D), torch.float32, device)
    if out_BTD.numel() == 0:
        return out_BTD, last_BD, carries_BMD
    u, y, context, *rest = block.pointers
    arguments = [
        u, y, context, pointer(None if h0_BD is None else h0_BD.float().contiguous(), u), *rest,
        *_summaries(block, plan), out_BTD, last_BD, carries_BMD,
        T, D, block.width, plan.S, plan.M, plan.steps, plan.blocks,
        *block.u_BTD.stride()[:2], *block.y_BTD.stride()[:2], *block.row_strides,
    ]  # fmt: skip
    constants = {**block.constants, **plan.constants, "HAS_H0": h0_BD is not None, "num_warps": plan.warps}
    programs = B * D // block.width * plan.blocks
    with on_device(block.u_BTD):
        if plan.S > 1:
            block_kernel[(programs, plan.S - 1)](*arguments, SUMMARY=True, **OPTIONS, **constants)
        block_kernel[(programs, plan.S)](*arguments, SUMMARY=False, **OPTIONS, **constants)
    return out_BTD, last_BD, carries_BMD


def _launch_scan_backward(
    block: _Block, dout_BTD: Tensor, dlast_BD: Tensor, carries_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy, the convolution's output, the gradient that reaches it past the gates, dgates, dh0, sums (3, D)."""
    (B, T, D), dtype, device = block.u_BTD.shape, block.u_BTD.dtype, block.u_BTD.device
    plan = _plan(block, BACKWARD_TILES)
    dy, conv, dconv = (allocate((B, T, D), dtype, device) for _ in range(3))
    dgates = allocate((B, T, D // block.width, 2 * block.width), dtype, device)
    dh0_BD = allocate((B, D), torch.float32, device)
    sums_BS3D = allocate((B, plan.S, 3, D), torch.float32, device)
    dout_BTD = rows_of_channels(dout_BTD)
    arguments = [
        dout_BTD, dlast_BD.float().contiguous(), *block.pointers, carries_BMD,
        *_summaries(block, plan), dy, conv, dconv, dgates, dh0_BD, sums_BS3D,
        T, D, block.width, plan.S, plan.M, plan.steps, plan.blocks,
        *dout_BTD.stride()[:2], *block.u_BTD.stride()[:2], *block.y_BTD.stride()[:2], *block.row_strides,
    ]  # fmt: skip
    constants = {**block.constants, **plan.constants, "num_warps": plan.warps, **OPTIONS}
    programs = B * D // block.width * plan.blocks
    with on_device(block.u_BTD):
        if plan.S > 1:
            block_backward_kernel[(programs, plan.S - 1)](*arguments, SUMMARY=True, **constants)
        block_backward_kernel[(programs, plan.S)](*arguments, SUMMARY=False, **constants)
    return dy, conv, dconv, dgates, dh0_BD, sums_BS3D.sum((0, 1))


def _launch_conv_backward(
    dout_BTD: Tensor, u_BTD: Tensor, context_BCD: Tensor | None, conv_tap_mask_BTK: Tensor | None, weight_KD: Tensor,
    du_BTD: Tensor, dcontext_BCD: Tensor | None,
) -> Tensor:  # fmt: skip
    """Writes du and dcontext; returns dweight and dbias, (K + 1, D) in float32."""
    (B, T, D), K, tile = u_BTD.shape, weight_KD.shape[0], CONV_TILE
    blocks = -(-D // tile.channels)
    S, steps = segments(B * blocks, T + K - 1, tile.time)
    sums_BSKD = allocate((B, S, K + 1, D), torch.float32, u_BTD.device)
    with on_device(u_BTD):
        conv_backward_kernel[(B * blocks, S)](
            dout_BTD, u_BTD, pointer(context_BCD, u_BTD), pointer(conv_tap_mask_BTK, u_BTD), weight_KD,
            du_BTD, pointer(dcontext_BCD, u_BTD), sums_BSKD,
            T, D, S, steps, *dout_BTD.stride()[:2], *u_BTD.stride()[:2], *_context_strides(context_BCD),
            du_BTD.stride(0), _row_stride(dcontext_BCD), _row_stride(conv_tap_mask_BTK),
            HAS_CONTEXT=context_BCD is not None, HAS_CONV_TAP_MASK=conv_tap_mask_BTK is not None, K=K,
            SUMS=triton.next_power_of_2(K + 1), TIME=tile.time, CHANNELS=tile.channels, num_warps=tile.warps,
            **OPTIONS,
        )  # fmt: skip
    return sums_BSKD.sum((0, 1))


def _block_gradients(
    block: _Block, dout_BTD: Tensor, dlast_BD: Tensor, carries_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """du, dy, dcontext, dh0 and the gradients of the parameters, in the order of `block`."""
    dy, conv, dconv, dgates, dh0_BD, sums_3D = _launch_scan_backward(block, dout_BTD, dlast_BD, carries_BMD)
    H, d, _ = block.a_weight_Hdd.shape
    # Both gates in one product each: (H, N, 2 d) times (H, 2 d, d) onto the convolution, (H, d, N) times (H, N, 2 d).
    dgates_HNe = dgates.view(-1, H, 2 * d).transpose(0, 1)
    conv_HNd, dconv_HNd = (x.view(-1, H, d).transpose(0, 1) for x in (conv, dconv))
    weights_Hed = torch.cat([block.a_weight_Hdd.mT, block.x_weight_Hdd.mT], dim=1)
    dweights_Hde = torch.bmm(conv_HNd.mT, dgates_HNe)
    dconv_HNd.baddbmm_(dgates_HNe, weights_Hed)
    du, context = allocate(dy.shape, dy.dtype, dy.device), block.context_BCD
    dcontext = None if context is None else allocate(tuple(context.shape), dy.dtype, dy.device)
    sums_KD = _launch_conv_backward(
        dconv, block.u_BTD, context, block.conv_tap_mask_BTK, block.conv_weight_KD, du, dcontext
    )
    da_weight, dx_weight = dweights_Hde.split(d, dim=2)
    dsoftplus, da_bias, dx_bias = sums_3D
    parameters = (sums_KD[:-1], sums_KD[-1], da_weight, da_bias, dx_weight, dx_bias, dsoftplus)
    return du, dy, dcontext, dh0_BD, parameters


# ---------------------------------------------------------------- operators


@torch.library.custom_op(f"{_NAMESPACE}::block", mutates_args=())
def block(
    u_BTD: Tensor,
    y_BTD: Tensor,
    context_BCD: Tensor | None,
    h0_BD: Tensor | None,
    conv_weight_KD: Tensor,
    conv_bias_D: Tensor,
    a_weight_Hdd: Tensor,
    a_bias_D: Tensor,
    x_weight_Hdd: Tensor,
    x_bias_D: Tensor,
    softplus_D: Tensor,
    reset_BT: Tensor | None,
    is_padding_BT: Tensor | None,
    conv_tap_mask_BTK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's inside; its last state in float32; and, for the backward pass, the state that enters each tile."""
    parameters = (conv_weight_KD, conv_bias_D, a_weight_Hdd, a_bias_D, x_weight_Hdd, x_bias_D, softplus_D)
    prepared = _Block.prepare(u_BTD, y_BTD, context_BCD, parameters, (reset_BT, is_padding_BT, conv_tap_mask_BTK))
    return _launch_block(prepared, h0_BD)


@block.register_fake
def _(
    u_BTD: Tensor, y_BTD: Tensor, context_BCD: Tensor | None, h0_BD: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = u_BTD.shape
    tile = FORWARD_TILES[u_BTD.dtype == torch.float32]
    last_BD = torch.empty((B, D), dtype=torch.float32, device=u_BTD.device)
    carries_BMD = torch.empty((B, -(-T // tile.time), D), dtype=torch.float32, device=u_BTD.device)
    return torch.empty((B, T, D), dtype=u_BTD.dtype, device=u_BTD.device), last_BD, carries_BMD


@torch.library.custom_op(f"{_NAMESPACE}::block_backward", mutates_args=())
def block_backward(
    dout_BTD: Tensor,
    dlast_BD: Tensor,
    carries_BMD: Tensor,
    u_BTD: Tensor,
    y_BTD: Tensor,
    context_BCD: Tensor | None,
    conv_weight_KD: Tensor,
    conv_bias_D: Tensor,
    a_weight_Hdd: Tensor,
    a_bias_D: Tensor,
    x_weight_Hdd: Tensor,
    x_bias_D: Tensor,
    softplus_D: Tensor,
    reset_BT: Tensor | None,
    is_padding_BT: Tensor | None,
    conv_tap_mask_BTK: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, y, h0, the parameters in the order of `block`, and the context, if there is one."""
    parameters = (conv_weight_KD, conv_bias_D, a_weight_Hdd, a_bias_D, x_weight_Hdd, x_bias_D, softplus_D)
    if u_BTD.numel() == 0:
        inputs = (u_BTD, y_BTD, dlast_BD, *parameters, *([] if context_BCD is None else [context_BCD]))
        return [torch.zeros_like(x) for x in inputs]
    prepared = _Block.prepare(u_BTD, y_BTD, context_BCD, parameters, (reset_BT, is_padding_BT, conv_tap_mask_BTK))
    du, dy, dcontext, dh0_BD, gradients = _block_gradients(prepared, dout_BTD, dlast_BD, carries_BMD)
    # Copies, where nothing is cast: an operator's results share no memory.
    pairs = zip(gradients, parameters, strict=True)
    copies = [gradient.to(parameter.dtype, copy=True) for gradient, parameter in pairs]
    return [du, dy, dh0_BD, *copies, *([] if dcontext is None else [dcontext])]


@block_backward.register_fake
def _(
    dout_BTD: Tensor, dlast_BD: Tensor, carries_BMD: Tensor, u_BTD: Tensor, y_BTD: Tensor, context_BCD: Tensor | None,
    *rest: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    like = (u_BTD, y_BTD, dlast_BD, *rest[:7], *([] if context_BCD is None else [context_BCD]))
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like if x is not None]


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, y, context, h0, *rest = inputs
    ctx.h0_dtype = None if h0 is None else h0.dtype
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(output[2], u, y, context, *rest)


def _gradient(ctx: Any, dout_BTD: Tensor, dlast_BD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    carries, u, y, context, *rest = saved
    du, dy, dh0, *gradients = block_backward(dout_BTD, dlast_BD, carries, u, y, context, *rest)
    dcontext = None if context is None else gradients.pop().to(context.dtype)
    dh0 = None if ctx.h0_dtype is None else dh0.to(ctx.h0_dtype)
    return du, dy, dcontext, dh0, *gradients, None, None, None


block.register_autograd(_gradient, setup_context=_save_for_gradient)


@torch.library.custom_op(f"{_NAMESPACE}::decode", mutates_args=("conv_state_BDC", "h_BD"))
def decode(
    u_BD: Tensor,
    y_BD: Tensor,
    conv_state_BDC: Tensor,
    h_BD: Tensor,
    conv_weight_D1K: Tensor,
    conv_bias_D: Tensor,
    a_weight_Hdd: Tensor,
    a_bias_Hd: Tensor,
    x_weight_Hdd: Tensor,
    x_bias_Hd: Tensor,
    lambda_D: Tensor,
    reset_B: Tensor | None,
    is_padding_B: Tensor | None,
    conv_tap_mask_BK: Tensor | None,
) -> Tensor:
    """The block's inside for one token; updates the conv state (any strides) and the float32 state in place."""
    (B, D), (H, d, _) = u_BD.shape, a_weight_Hdd.shape
    out_BD = allocate((B, D), u_BD.dtype, u_BD.device)
    if out_BD.numel() == 0:
        return out_BD
    u_BD, y_BD = rows_of_channels(u_BD), rows_of_channels(y_BD)
    flags = [None if flag is None else flag.contiguous() for flag in (reset_B, is_padding_B, conv_tap_mask_BK)]
    reset, is_padding = (None if flag is None else flag.view(torch.uint8) for flag in flags[:2])
    parameters = (conv_weight_D1K, conv_bias_D, a_weight_Hdd, a_bias_Hd, x_weight_Hdd, x_bias_Hd, lambda_D)
    state_strides = conv_state_BDC.stride()
    tile = DECODE_TILES[u_BD.dtype == torch.float32]
    with on_device(u_BD):
        decode_kernel[(H * -(-B // tile.time),)](
            u_BD, y_BD, conv_state_BDC, h_BD, *(pointer(flag, u_BD) for flag in (reset, is_padding, flags[2])),
            *(parameter.contiguous() for parameter in parameters), out_BD,
            B, D, d, u_BD.stride(0), y_BD.stride(0), state_strides[0], state_strides[2], state_strides[1],
            h_BD.stride(0), *map(_row_stride, flags),
            HAS_RESET=reset is not None, HAS_PADDING=is_padding is not None,
            HAS_CONV_TAP_MASK=conv_tap_mask_BK is not None,
            UPCAST=_is_interpreted(), K=conv_weight_D1K.shape[2], HEAD=padded(d), ROWS=tile.time,
            CHANNELS=min(tile.channels, padded(d)), num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    return out_BD


@decode.register_fake
def _(u_BD: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.empty(u_BD.shape, dtype=u_BD.dtype, device=u_BD.device)


@torch.library.custom_op(f"{_NAMESPACE}::conv", mutates_args=())
def conv(full_BFD: Tensor, conv_tap_mask_BTK: Tensor | None, weight_KD: Tensor, bias_D: Tensor) -> Tensor:
    """The depthwise causal convolution by itself: of F = K - 1 + T inputs to (B, T, D)."""
    B, _, D = full_BFD.shape
    u_BTD, context_BCD = _parted(rows_of_channels(full_BFD), weight_KD)
    T, tile = u_BTD.shape[1], CONV_TILE
    out_BTD = allocate((B, T, D), u_BTD.dtype, u_BTD.device)
    if out_BTD.numel() == 0:
        return out_BTD
    conv_tap_mask_BTK = None if conv_tap_mask_BTK is None else conv_tap_mask_BTK.contiguous()
    with on_device(u_BTD):
        conv_kernel[(B * -(-D // tile.channels) * -(-T // tile.time),)](
            u_BTD, pointer(context_BCD, u_BTD), pointer(conv_tap_mask_BTK, u_BTD), weight_KD.contiguous(),
            bias_D.contiguous(),
            out_BTD, T, D, *u_BTD.stride()[:2], *_context_strides(context_BCD), _row_stride(conv_tap_mask_BTK),
            HAS_CONTEXT=context_BCD is not None, HAS_CONV_TAP_MASK=conv_tap_mask_BTK is not None, K=weight_KD.shape[0],
            TIME=tile.time, CHANNELS=tile.channels, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    return out_BTD


def _parted(full_BFD: Tensor, weight_KD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Views: the inputs that have an output, and the K - 1 before them."""
    C = weight_KD.shape[0] - 1
    return full_BFD[:, C:], full_BFD[:, :C] if C else None


@conv.register_fake
def _(full_BFD: Tensor, conv_tap_mask_BTK: Tensor | None, weight_KD: Tensor, bias_D: Tensor) -> Tensor:
    B, F, D = full_BFD.shape
    return torch.empty((B, F - weight_KD.shape[0] + 1, D), dtype=full_BFD.dtype, device=full_BFD.device)


@torch.library.custom_op(f"{_NAMESPACE}::conv_backward", mutates_args=())
def conv_backward(
    dout_BTD: Tensor, full_BFD: Tensor, conv_tap_mask_BTK: Tensor | None, weight_KD: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs; and of weight and bias, one below the other, (K + 1, D) in float32."""
    dfull_BFD = allocate(tuple(full_BFD.shape), full_BFD.dtype, full_BFD.device)
    if dout_BTD.numel() == 0:
        K, D = weight_KD.shape
        return dfull_BFD.zero_(), weight_KD.new_zeros((K + 1, D), dtype=torch.float32)
    conv_tap_mask_BTK = None if conv_tap_mask_BTK is None else conv_tap_mask_BTK.contiguous()
    inputs, gradients = (_parted(full, weight_KD) for full in (rows_of_channels(full_BFD), dfull_BFD))
    dout_BTD = rows_of_channels(dout_BTD)
    return dfull_BFD, _launch_conv_backward(dout_BTD, *inputs, conv_tap_mask_BTK, weight_KD.contiguous(), *gradients)


@conv_backward.register_fake
def _(dout_BTD: Tensor, full_BFD: Tensor, conv_tap_mask_BTK: Tensor | None, weight_KD: Tensor) -> tuple[Tensor, Tensor]:
    K, D = weight_KD.shape
    dfull_BFD = torch.empty(full_BFD.shape, dtype=full_BFD.dtype, device=full_BFD.device)
    return dfull_BFD, torch.empty((K + 1, D), dtype=torch.float32, device=full_BFD.device)


def _save_for_conv_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    full, conv_tap_mask, weight, bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(full, conv_tap_mask, weight)


def _conv_gradient(ctx: Any, dout_BTD: Tensor) -> tuple[Tensor | None, ...]:
    full, conv_tap_mask, weight = ctx.saved_tensors
    dfull, sums_KD = conv_backward(dout_BTD, full, conv_tap_mask, weight)
    return dfull, None, sums_KD[:-1].to(weight.dtype), sums_KD[-1].to(ctx.bias_dtype)


conv.register_autograd(_conv_gradient, setup_context=_save_for_conv_gradient)
