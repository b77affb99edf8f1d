"""Tools shared by the Triton kernels: launch configuration, segments of time, elementwise functions.

Each thread loops over the time steps of a few channels, so a scan needs no communication. If batch and channels alone
do not fill the GPU, time is split into segments (`segments`): a first kernel reduces each segment to a summary, the
affine map h -> decay * h + end; then every segment composes the summaries before it (`compose_summaries`) and scans its
own steps. There are no atomics and no program waits for another, so results are bitwise reproducible.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError('backend "triton" needs the triton package: pip install triton') from error

__all__ = [
    "CHANNELS", "OPTIONS", "SIZES", "UNROLLED", "advance", "allocate", "compose", "compose_summaries", "flag", "gelu",
    "is_interpreted", "load_rows", "on_device", "own_row", "row_stride", "rows_of_channels", "seen", "segments",
    "sigmoid", "softplus", "summaries", "tl", "triton", "within",
]  # fmt: skip

# Measured on an H200 (benchmarks/LOG.md). Constants, so that the same input gives the same bits on every GPU.
CHANNELS = 64  # per program of a scan: one warp, two channels per thread
UNROLLED = 4  # steps loaded at once
WANTED_PROGRAMS = 4224  # 32 warps for each of the H200's 132 multiprocessors
MAX_SEGMENTS = 64

# Fused multiply-add; and no software pipelining unless a loop sets its own `num_stages`: by default Triton keeps three
# copies of the operands of a matmul.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}

# Not specialized: by default Triton recompiles a kernel, for seconds, when a size changes between 1, multiples of 16
# and others, as prompt lengths do. These sizes do not affect vectorized loads.
SIZES = ("B", "T", "S", "M", "N", "steps", "reset_stride_B", "is_padding_stride_B", "conv_tap_mask_stride_B")


def segments(programs: int, T: int, unrolled: int) -> tuple[int, int]:
    """Return the number S of time segments, and the steps of each, given `programs` over batch and channels.

    With several segments the inputs are read twice, so S is 1 if `programs` alone fill half of the GPU.
    """
    S = 1 if programs * 2 > WANTED_PROGRAMS else min(-(-WANTED_PROGRAMS // programs), MAX_SEGMENTS)
    tiles = -(-T // unrolled)
    steps = -(-tiles // S) * unrolled
    return -(-T // steps), steps


def summaries(B: int, S: int, D: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Allocate decay and end of S segments, (B, S, D) float32 each; None for one segment."""
    if S == 1:
        return None, None
    return allocate((B, S, D), torch.float32, device), allocate((B, S, D), torch.float32, device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a result. Tests replace this to fill it with NaN, which shows what a kernel does not write."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of_channels(x_BTD: Tensor) -> Tensor:
    """Return x with contiguous channels; the kernels take any stride of batch and time."""
    return x_BTD if x_BTD.stride(-1) == 1 or x_BTD.shape[-1] == 1 else x_BTD.contiguous()


def row_stride(tensor: Tensor | None) -> int:
    """Return the stride between rows of the batch; 0 if they share one row."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def flag(bools_BT: Tensor | None) -> Tensor | None:
    """Return a mask as the kernels read it: contiguous bytes."""
    return None if bools_BT is None else bools_BT.contiguous().view(torch.uint8)


def on_device(tensor: Tensor) -> Any:
    """Return a context in which the tensor's device is the current one, on which Triton launches."""
    if tensor.device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device_of(tensor)


def is_interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def own_row(programs):
    """Split program_id(0) into the index within a row of the batch, and the row (int64). Both share the grid's first
    axis, because the others are limited to 65,535."""
    return tl.program_id(0) % programs, (tl.program_id(0) // programs).to(tl.int64)


@triton.jit
def within(is_channel, t, T):
    """Return is_channel if 0 <= t < T, else False. (In the interpreter a vector & a scalar is not a mask.)"""
    t = tl.where(is_channel, t, -1)
    return (t >= 0) & (t < T)


@triton.jit
def load_rows(pointers, stride, start, T, is_channel, other, ROWS: tl.constexpr):
    """Load rows start to start + ROWS as a tuple of float32 vectors, `other` outside 0 .. T - 1. All are loaded before
    any is used, so that the loads overlap."""
    rows = ()
    for k in tl.static_range(ROWS):
        t = start + k
        row = tl.load(pointers + t * stride, mask=within(is_channel, t, T), other=other)
        rows = rows + (row.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, channel):
    """Compute the state that enters a segment from the state h that enters the first. Summaries are (B, S, D)."""
    first = b * S * D
    for s in range(segment):
        decay = tl.load(decay_ptr + first + s * D + channel, mask=channel < D, other=0.0)
        end = tl.load(end_ptr + first + s * D + channel, mask=channel < D, other=0.0)
        h = advance(decay, h, end)
    return h


@triton.jit
def advance(a, h, x):
    """Compute a h + x, where a coefficient of 0 drops the past whatever it is: 0 times NaN would be NaN."""
    return tl.where(a == 0.0, x, a * h + x)


@triton.jit
def seen(a, h):
    """Return h, with 0 where a coefficient of 0 drops a value that is not finite."""
    return tl.where((a == 0.0) & ((tl.abs(h) <= 3.4e38) == 0), 0.0, h)


@triton.jit
def compose(a, decay):
    """Compute the product a decay within the range of float32: infinity times a state of 0 would be NaN, and only a
    coefficient of 0 makes a product of 0."""
    product = a * decay
    product = tl.where(product > 3.0e38, 3.0e38, tl.where(product < -3.0e38, -3.0e38, product))
    product = tl.where(tl.abs(product) < 2.0e-38, 2.0e-38, product)
    return tl.where((a == 0.0) | (decay == 0.0), 0.0, product)


@triton.jit
def sigmoid(x):
    """Compute the sigmoid of float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Compute log(1 + exp(x)) of float32, corrected for the rounding of 1 + z, z = exp(-|x|)."""
    z = tl.exp(-tl.abs(x))
    one_and = 1.0 + z
    return tl.maximum(x, 0.0) + tl.where(one_and == 1.0, z, tl.log(one_and) * (z / tl.maximum(one_and - 1.0, 1e-30)))


@triton.jit
def gelu(y):
    """Compute gelu_tanh(y) and its derivative. (1 + tanh(x)) / 2 = sigmoid(2 x)."""
    inner = 1.5957691216057308 * y * (1.0 + 0.044715 * y * y)  # 2 sqrt(2 / pi) (y + 0.044715 y^3)
    s = sigmoid(inner)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * y * y)
    return y * s, s + y * s * (1.0 - s) * slope
