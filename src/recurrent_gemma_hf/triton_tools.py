"""What the Triton kernels share: launch configuration, segments of time, elementwise functions.

Along time, a thread walks through the steps of a few channels one after the other, so a scan needs no communication.
Where batch and channels alone leave a GPU idle, time is cut into segments (`segments`): each first finds what it makes
of the state that enters it, h -> decay * h + end; then every segment composes the summaries of those before it
(`compose_summaries`) and walks through its own time. Nothing is accumulated by atomics and no program waits for
another, so results are the same bits every time.
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
    "CHANNELS", "OPTIONS", "SIZES", "UNROLLED", "allocate", "compose_summaries", "finite", "flag", "gelu",
    "is_interpreted", "load_rows", "on_device", "own_row", "row_stride", "rows_of_channels", "segments", "sigmoid",
    "softplus", "summaries", "tl", "triton", "within",
]  # fmt: skip

# Measured on an H200 (benchmarks/LOG.md). Constants, so that the same input gives the same bits on every GPU.
CHANNELS = 64  # of a program that walks through time: one warp, two channels per thread
UNROLLED = 4  # steps that are loaded at once
WANTED_PROGRAMS = 4224  # 32 warps for each of its 132 multiprocessors
MAX_SEGMENTS = 64

# Products and sums in one rounding; and no loads ahead of time but where a loop asks for them by its own `num_stages`:
# by default Triton keeps three copies of everything that a matmul reads.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}

# By default Triton compiles a kernel anew for sizes that are 1 or no multiple of 16: seconds, for a prompt of another
# length. These do not decide which loads can be wide.
SIZES = ("B", "T", "S", "M", "N", "steps", "reset_stride_B", "is_padding_stride_B", "conv_tap_mask_stride_B")


def segments(programs: int, T: int, unrolled: int) -> tuple[int, int]:
    """Return (S, steps in each): into how many pieces time is cut when `programs` share the rest of the work.

    Several pieces read their inputs twice, so not where half of the GPU has work already.
    """
    S = 1 if programs * 2 > WANTED_PROGRAMS else min(-(-WANTED_PROGRAMS // programs), MAX_SEGMENTS)
    tiles = -(-T // unrolled)
    steps = -(-tiles // S) * unrolled
    return -(-T // steps), steps


def summaries(B: int, S: int, D: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return memory for decay and end of S segments, (B, S, D) each in float32; nothing for one segment."""
    if S == 1:
        return None, None
    return allocate((B, S, D), torch.float32, device), allocate((B, S, D), torch.float32, device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a result. The tests hand out NaN here, so that what a kernel does not write shows."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of_channels(x_BTD: Tensor) -> Tensor:
    """Return x with neighbouring channels next to each other; the kernels take any stride of batch and time."""
    return x_BTD if x_BTD.stride(-1) == 1 or x_BTD.shape[-1] == 1 else x_BTD.contiguous()


def row_stride(tensor: Tensor | None) -> int:
    """Return the stride from row to row of the batch; 0 where all share one."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def flag(bools_BT: Tensor | None) -> Tensor | None:
    """Return a mask as the kernels read it: bytes, one row behind the other."""
    return None if bools_BT is None else bools_BT.contiguous().view(torch.uint8)


def on_device(tensor: Tensor) -> Any:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device_of(tensor)


def is_interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def own_row(programs):
    """This program among those of its row of the batch, and the row (int64): together on the grid's first axis, because
    the others end at 65,535."""
    return tl.program_id(0) % programs, (tl.program_id(0) // programs).to(tl.int64)


@triton.jit
def within(is_channel, t, T):
    """is_channel where 0 <= t < T, else False. (In the interpreter a vector & a scalar is no mask.)"""
    t = tl.where(is_channel, t, -1)
    return (t >= 0) & (t < T)


@triton.jit
def load_rows(pointers, stride, start, T, is_channel, other, ROWS: tl.constexpr):
    """Rows start to start + ROWS of an array as a tuple of float32 vectors, `other` outside 0 .. T - 1. All of them
    before any is used, so that the loads overlap."""
    rows = ()
    for k in tl.static_range(ROWS):
        t = start + k
        row = tl.load(pointers + t * stride, mask=within(is_channel, t, T), other=other)
        rows = rows + (row.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, channel):
    """The state that enters a segment, from the one that enters the first. Summaries are (B, S, D)."""
    first = b * S * D
    for s in range(segment):
        decay = tl.load(decay_ptr + first + s * D + channel, mask=channel < D, other=0.0)
        end = tl.load(end_ptr + first + s * D + channel, mask=channel < D, other=0.0)
        h = decay * h + end
    return h


@triton.jit
def finite(decay):
    """A product that left float32 must not turn a zero state into NaN."""
    return tl.minimum(tl.maximum(decay, -3.0e38), 3.0e38)


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
