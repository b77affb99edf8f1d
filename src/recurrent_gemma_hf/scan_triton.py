"""The linear recurrence on a GPU, in Triton: `linear_recurrence` of scan.py, forward and backward.

Time is cut into segments, as many as it takes to fill the GPU (`segments`). With one segment, a program owns a block
of channels of one row and walks through time tile by tile: each input is read once, each result written once, 6 bytes
per element in bfloat16 forward and 10 backward. With several, each segment first finds what it makes of the state that
enters it, h -> decay * h + end, reading x and a once more (from the second-level cache, where they fit); then every
segment composes the summaries of those before it, a few vectors, and walks through its own time.

The backward pass is the same walk from the other side: g_t = dh_t + a_{t+1} g_{t+1}, dx_t = g_t, da_t = g_t h_{t-1}.
Nothing is accumulated by atomics and no program waits for another, so the results are the same bits every time.

Shape suffixes: B batch, T time, D channels, S segments. r counts steps in the direction of the walk; t is time.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError('backend "triton" needs the triton package: pip install triton') from error

# As in scan.py: each copy of this file registers operators under its own name.
__all__ = [
    "OPTIONS", "SIZES", "Tile", "adjoint_scan", "allocate", "compose", "compose_summaries", "finite", "last_row",
    "on_device", "own_row", "pointer", "rows_of_channels", "scan", "scan_backward", "segments", "tl", "triton",
]  # fmt: skip

_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


# ---------------------------------------------------------------- launch configuration: all of it


class Tile(NamedTuple):
    """Steps and channels that a program holds at once, its warps, and how many tiles are on their way meanwhile."""

    time: int
    channels: int
    warps: int
    stages: int = 1


# A tile multiplies its coefficients: with 64 steps they may reach 4 in size before the product leaves float32.
SUMMARY_TILE = Tile(32, 64, 4, 3)
FORWARD_TILE = Tile(32, 64, 4, 3)
BACKWARD_TILE = Tile(32, 64, 4, 2)

# Two programs for each of the 132 multiprocessors of an H100 or H200. A constant, so that the same input gives the same
# bits on every GPU.
WANTED_PROGRAMS = 264
MAX_SEGMENTS = 32


# Products and sums in one rounding; and no loads ahead of time but where a loop asks for them by its own `num_stages`:
# by default Triton keeps three copies of everything that a matrix product reads.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}

# By default Triton compiles a kernel anew for sizes that are 1 or no multiple of 16: seconds, for a prompt of another
# length. These do not decide which loads can be wide.
SIZES = ("B", "T", "S", "M", "steps", "reset_stride_B", "is_padding_stride_B", "conv_tap_mask_stride_B")


def segments(blocks: int, T: int, tile_time: int) -> tuple[int, int]:
    """(S, steps in each): into how many pieces time is cut when `blocks` programs share the rest of the work.

    Several read everything twice (the fused block: compute the gates twice), so not where half of the GPU has work.
    """
    S = 1 if blocks * 2 > WANTED_PROGRAMS else min(-(-WANTED_PROGRAMS // blocks), MAX_SEGMENTS)
    tiles = -(-T // tile_time)
    steps = -(-tiles // S) * tile_time
    return -(-T // steps), steps


# ---------------------------------------------------------------- kernels


@triton.jit
def own_row(programs):
    """This program among those of its row of the batch, and the row: together on the grid's first axis, because the
    others end at 65,535."""
    return tl.program_id(0) % programs, (tl.program_id(0) // programs).to(tl.int64)


@triton.jit
def compose(a_1, x_1, a_2, x_2):
    """First h -> a_1 h + x_1, then h -> a_2 h + x_2."""
    return a_1 * a_2, a_2 * x_1 + x_2


@triton.jit
def last_row(tile, ROWS: tl.constexpr):
    """The last row of a tile (time, channels)."""
    row = tl.arange(0, ROWS)[:, None]
    return tl.sum(tl.where(row == ROWS - 1, tile, 0.0), axis=0)


@triton.jit
def finite(decay):
    """A product that left float32 must not turn a zero state into NaN."""
    return tl.minimum(tl.maximum(decay, -3.0e38), 3.0e38)


@triton.jit
def compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, d):
    """The state that enters a segment, from the one that enters the first. Summaries are (B, S, D)."""
    first = b * S * D
    for s in range(segment):
        decay = tl.load(decay_ptr + first + s * D + d, mask=d < D, other=0.0)
        end = tl.load(end_ptr + first + s * D + d, mask=d < D, other=0.0)
        h = decay * h + end
    return h


@triton.jit
def _coefficients(a_ptr, reset_ptr, a_stride_T, reset_stride_T, t, d, is_step, is_channel, HAS_RESET: tl.constexpr):
    """a at times t (steps, 1), 0 at resets; 1 where there is no step."""
    a = tl.load(a_ptr + t * a_stride_T + d, mask=is_step & is_channel, other=1.0).to(tl.float32)
    if HAS_RESET:
        a = tl.where(tl.load(reset_ptr + t * reset_stride_T, mask=is_step, other=0) != 0, 0.0, a)
    return a


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    x_ptr, a_ptr, reset_ptr, decay_ptr, end_ptr,
    T, D, S, steps,
    x_stride_B, x_stride_T, a_stride_B, a_stride_T, reset_stride_B, reset_stride_T,
    REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each segment but the last makes of the state that enters it: decay and end, (B, S, D) in float32."""
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    d = channel[None, :]
    x_ptr += b * x_stride_B
    a_ptr += b * a_stride_B
    if HAS_RESET:
        reset_ptr += b * reset_stride_B
    decay = tl.full((CHANNELS,), 1.0, tl.float32)
    end = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(segment * steps, segment * steps + steps, TIME, num_stages=STAGES):
        r = (start + tl.arange(0, TIME)[:, None]).to(tl.int64)
        is_channel = d < D
        t = T - 1 - r if REVERSE else r
        t_a = t + 1 if REVERSE else t
        x = tl.load(x_ptr + t * x_stride_T + d, mask=(r < T) & is_channel, other=0.0).to(tl.float32)
        is_step = (r < T) & (t_a < T)
        a = _coefficients(a_ptr, reset_ptr, a_stride_T, reset_stride_T, t_a, d, is_step, is_channel, HAS_RESET)
        a, x = tl.associative_scan((a, x), 0, compose)
        a_last = last_row(a, TIME)
        end = a_last * end + last_row(x, TIME)
        decay = finite(a_last * decay)
    out = (b * S + segment) * D + channel
    tl.store(decay_ptr + out, decay, mask=channel < D)
    tl.store(end_ptr + out, end, mask=channel < D)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    x_ptr, a_ptr, reset_ptr, h0_ptr, decay_ptr, end_ptr, out_ptr, last_ptr,
    T, D, S, steps,
    x_stride_B, x_stride_T, a_stride_B, a_stride_T, reset_stride_B, reset_stride_T,
    REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_H0: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All states, (B, T, D) contiguous, and the last one, (B, D); h0 (B, D) contiguous.

    REVERSE: h_t = x_t + a_{t+1} h_{t+1} from the state h0 behind the end, which enters undamped.
    """
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    d = channel[None, :]
    x_ptr += b * x_stride_B
    a_ptr += b * a_stride_B
    out_ptr += b * T * D
    if HAS_RESET:
        reset_ptr += b * reset_stride_B
    h = tl.zeros((CHANNELS,), tl.float32)
    if HAS_H0:
        h = tl.load(h0_ptr + b * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    h = compose_summaries(h, decay_ptr, end_ptr, b, segment, S, D, channel)
    for start in tl.range(segment * steps, segment * steps + steps, TIME, num_stages=STAGES):
        r = (start + tl.arange(0, TIME)[:, None]).to(tl.int64)
        is_channel = d < D
        t = T - 1 - r if REVERSE else r
        t_a = t + 1 if REVERSE else t
        x = tl.load(x_ptr + t * x_stride_T + d, mask=(r < T) & is_channel, other=0.0).to(tl.float32)
        is_step = (r < T) & (t_a < T)
        a = _coefficients(a_ptr, reset_ptr, a_stride_T, reset_stride_T, t_a, d, is_step, is_channel, HAS_RESET)
        a, x = tl.associative_scan((a, x), 0, compose)
        states = a * h[None, :] + x
        tl.store(out_ptr + t * D + d, states.to(out_ptr.dtype.element_ty), mask=(r < T) & is_channel)
        h = last_row(states, TIME)
    if segment == S - 1:
        tl.store(last_ptr + b * D + channel, h, mask=channel < D)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    dh_ptr, a_ptr, reset_ptr, h_ptr, h0_ptr, dh_last_ptr, decay_ptr, end_ptr, dx_ptr, da_ptr, dh0_ptr,
    T, D, S, steps,
    dh_stride_B, dh_stride_T, a_stride_B, a_stride_T, reset_stride_B, reset_stride_T,
    HAS_RESET: tl.constexpr, HAS_H0: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, da (B, T, D) and dh0 (B, D), contiguous; h (B, T, D), h0 and dh_last (B, D) contiguous."""
    block, b = own_row(tl.cdiv(D, CHANNELS))
    channel, segment = block * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    d = channel[None, :]
    row = b * D + channel
    dh_ptr += b * dh_stride_B
    a_ptr += b * a_stride_B
    h_ptr += b * T * D
    dx_ptr += b * T * D
    da_ptr += b * T * D
    if HAS_RESET:
        reset_ptr += b * reset_stride_B
    h0 = tl.zeros((CHANNELS,), tl.float32)
    if HAS_H0:
        h0 = tl.load(h0_ptr + row, mask=channel < D, other=0.0).to(tl.float32)
    g = tl.load(dh_last_ptr + row, mask=channel < D, other=0.0).to(tl.float32)
    g = compose_summaries(g, decay_ptr, end_ptr, b, segment, S, D, channel)
    for start in tl.range(segment * steps, segment * steps + steps, TIME, num_stages=STAGES):
        r = (start + tl.arange(0, TIME)[:, None]).to(tl.int64)
        is_channel = d < D
        t = T - 1 - r
        inside = (r < T) & is_channel
        dh = tl.load(dh_ptr + t * dh_stride_T + d, mask=inside, other=0.0).to(tl.float32)
        is_step = (r < T) & (r > 0)
        a = _coefficients(a_ptr, reset_ptr, a_stride_T, reset_stride_T, t + 1, d, is_step, is_channel, HAS_RESET)
        h_before = tl.load(h_ptr + (t - 1) * D + d, mask=inside & (t > 0), other=0.0).to(tl.float32)
        h_before = tl.where(t == 0, h0[None, :], h_before)
        a, dh = tl.associative_scan((a, dh), 0, compose)
        adjoint = a * g[None, :] + dh
        da = adjoint * h_before
        if HAS_RESET:
            da = tl.where(tl.load(reset_ptr + t * reset_stride_T, mask=r < T, other=0) != 0, 0.0, da)
        tl.store(dx_ptr + t * D + d, adjoint.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(da_ptr + t * D + d, da.to(da_ptr.dtype.element_ty), mask=inside)
        g = last_row(adjoint, TIME)
    if segment == S - 1:
        a_0 = tl.load(a_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        if HAS_RESET:
            a_0 = tl.where(tl.load(reset_ptr) != 0, 0.0, a_0)
        tl.store(dh0_ptr + row, (a_0 * g).to(dh0_ptr.dtype.element_ty), mask=channel < D)


# ---------------------------------------------------------------- launches


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result. The tests hand out NaN here, so that what a kernel does not write shows."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of_channels(x_BTD: Tensor) -> Tensor:
    """The kernels take any stride of batch and time, but neighbouring channels next to each other.

    And time at strides such that offsets within a tile have 32 bits.
    """
    is_row = x_BTD.stride(-1) == 1 or x_BTD.shape[-1] == 1
    return x_BTD if is_row and x_BTD.stride(-2) < 2**23 else x_BTD.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


class _Walk(NamedTuple):
    """What the launches over one set of inputs share."""

    x_BTD: Tensor
    a_BTD: Tensor
    reset_BT: Tensor | None
    decay_BSD: Tensor
    end_BSD: Tensor
    grid: tuple[int, int]
    sizes: tuple[int, ...]  # T, D, S, steps, and the strides of x, a and reset


def _prepare(x_BTD: Tensor, a_BTD: Tensor, reset_BT: Tensor | None, tile: Tile, *, reverse: bool) -> _Walk:
    """Cuts time into segments and, where there are several, summarises them."""
    (B, T, D), device = x_BTD.shape, x_BTD.device
    x_BTD, a_BTD = rows_of_channels(x_BTD), rows_of_channels(a_BTD)
    if reset_BT is not None:
        reset_BT = reset_BT.view(torch.uint8)
    blocks = -(-D // tile.channels)
    S, steps = segments(blocks * B, T, tile.time)
    shape = (B, S, D) if S > 1 else (1, 1, 1)
    summaries = allocate(shape, torch.float32, device), allocate(shape, torch.float32, device)
    sizes = (T, D, S, steps, *_strides(x_BTD), *_strides(a_BTD), *_strides(reset_BT))
    walk = _Walk(x_BTD, a_BTD, reset_BT, *summaries, (blocks * B, S), sizes)
    if S > 1:
        small = SUMMARY_TILE
        with on_device(x_BTD):
            summary_kernel[(-(-D // small.channels) * B, S - 1)](
                x_BTD, a_BTD, pointer(reset_BT, x_BTD), *summaries, *sizes,
                REVERSE=reverse, HAS_RESET=reset_BT is not None,
                TIME=small.time, CHANNELS=small.channels, STAGES=small.stages, num_warps=small.warps,
                **OPTIONS,
            )  # fmt: skip
    return walk


def pointer(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel's argument must point somewhere, also where it is not read."""
    return unused if tensor is None else tensor


def on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the one of the inputs."""
    if tensor.device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device_of(tensor)


def _launch_scan(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None, dtype: torch.dtype, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    (B, T, D), tile = x_BTD.shape, FORWARD_TILE
    h_BTD = allocate((B, T, D), dtype, x_BTD.device)
    last_BD = allocate((B, D), torch.float32, x_BTD.device)
    if h_BTD.numel() == 0:
        return h_BTD, last_BD
    walk = _prepare(x_BTD, a_BTD, reset_BT, tile, reverse=reverse)
    h0_BD = None if h0_BD is None else h0_BD.contiguous()
    with on_device(x_BTD):
        scan_kernel[walk.grid](
            walk.x_BTD, walk.a_BTD, pointer(walk.reset_BT, x_BTD), pointer(h0_BD, x_BTD),
            walk.decay_BSD, walk.end_BSD, h_BTD, last_BD, *walk.sizes,
            REVERSE=reverse, HAS_RESET=reset_BT is not None, HAS_H0=h0_BD is not None,
            TIME=tile.time, CHANNELS=tile.channels, STAGES=tile.stages, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    return h_BTD, last_BD


def _launch_backward(
    dh_BTD: Tensor, dh_last_BD: Tensor, a_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, D), device, tile = a_BTD.shape, a_BTD.device, BACKWARD_TILE
    dx_BTD, da_BTD = allocate((B, T, D), dx_dtype, device), allocate((B, T, D), a_BTD.dtype, device)
    dh0_BD = allocate((B, D), torch.float32 if h0_BD is None else h0_BD.dtype, device)
    if a_BTD.numel() == 0:
        return dx_BTD, da_BTD, dh0_BD
    walk = _prepare(dh_BTD, a_BTD, reset_BT, tile, reverse=True)
    h0_BD = None if h0_BD is None else h0_BD.contiguous()
    with on_device(a_BTD):
        scan_backward_kernel[walk.grid](
            walk.x_BTD, walk.a_BTD, pointer(walk.reset_BT, a_BTD), h_BTD.contiguous(), pointer(h0_BD, a_BTD),
            dh_last_BD.contiguous(), walk.decay_BSD, walk.end_BSD, dx_BTD, da_BTD, dh0_BD, *walk.sizes,
            HAS_RESET=reset_BT is not None, HAS_H0=h0_BD is not None,
            TIME=tile.time, CHANNELS=tile.channels, STAGES=tile.stages, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    return dx_BTD, da_BTD, dh0_BD


# ---------------------------------------------------------------- operators


@torch.library.custom_op(f"{_NAMESPACE}::scan", mutates_args=())
def scan(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All states in `output_dtype`, and the last one in float32."""
    return _launch_scan(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype, reverse=False)


@torch.library.custom_op(f"{_NAMESPACE}::adjoint_scan", mutates_args=())
def adjoint_scan(dh_BTD: Tensor, a_BTD: Tensor, dh_last_BD: Tensor, reset_BT: Tensor | None) -> Tensor:
    """All g_t = dh_t + a_{t+1} * g_{t+1} with g_{T-1} = dh_{T-1} + dh_last, in float32."""
    return _launch_scan(dh_BTD, a_BTD, dh_last_BD, reset_BT, torch.float32, reverse=True)[0]


@torch.library.custom_op(f"{_NAMESPACE}::scan_backward", mutates_args=())
def scan_backward(
    dh_BTD: Tensor,
    dh_last_BD: Tensor,
    a_BTD: Tensor,
    h_BTD: Tensor,
    h0_BD: Tensor | None,
    reset_BT: Tensor | None,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in `dx_dtype`), a and h0 in one pass. Not differentiable itself: see `_scan_gradient`."""
    return _launch_backward(dh_BTD, dh_last_BD, a_BTD, h_BTD, h0_BD, reset_BT, dx_dtype)


@scan.register_fake
def _(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    h_BTD = torch.empty(x_BTD.shape, dtype=output_dtype, device=x_BTD.device)
    return h_BTD, torch.empty((x_BTD.shape[0], x_BTD.shape[2]), dtype=torch.float32, device=x_BTD.device)


@adjoint_scan.register_fake
def _(dh_BTD: Tensor, a_BTD: Tensor, dh_last_BD: Tensor, reset_BT: Tensor | None) -> Tensor:
    return torch.empty(dh_BTD.shape, dtype=torch.float32, device=dh_BTD.device)


@scan_backward.register_fake
def _(
    dh_BTD: Tensor,
    dh_last_BD: Tensor,
    a_BTD: Tensor,
    h_BTD: Tensor,
    h0_BD: Tensor | None,
    reset_BT: Tensor | None,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dx_BTD = torch.empty(a_BTD.shape, dtype=dx_dtype, device=a_BTD.device)
    da_BTD = torch.empty(a_BTD.shape, dtype=a_BTD.dtype, device=a_BTD.device)
    dh0_dtype = torch.float32 if h0_BD is None else h0_BD.dtype
    return dx_BTD, da_BTD, torch.empty(dh_last_BD.shape, dtype=dh0_dtype, device=a_BTD.device)


def _save_for_scan_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BTD, a_BTD, h0_BD, reset_BT, _ = inputs
    ctx.x_dtype = x_BTD.dtype
    ctx.save_for_backward(a_BTD, output[0], h0_BD, reset_BT)


def _scan_gradient(ctx: Any, dh_BTD: Tensor, dh_last_BD: Tensor) -> tuple[Tensor | None, ...]:
    """In one pass; or, where it is to be differentiated again, from the adjoint scan and products of tensors."""
    a_BTD, h_BTD, h0_BD, reset_BT = ctx.saved_tensors
    if not torch.is_grad_enabled():
        dx_BTD, da_BTD, dh0_BD = scan_backward(dh_BTD, dh_last_BD, a_BTD, h_BTD, h0_BD, reset_BT, ctx.x_dtype)
        return dx_BTD, da_BTD, None if h0_BD is None else dh0_BD, None, None
    g_BTD = adjoint_scan(dh_BTD, a_BTD, dh_last_BD, reset_BT)
    a_first_BD = a_BTD[:, 0].float()
    h_before_BTD = _states_before(h_BTD.float(), h0_BD)
    da_BTD = g_BTD * h_before_BTD
    if reset_BT is not None:
        a_first_BD = a_first_BD.masked_fill(reset_BT[:, :1], 0.0)
        da_BTD = da_BTD.masked_fill(reset_BT[..., None], 0.0)
    dh0_BD = None if h0_BD is None else (a_first_BD * g_BTD[:, 0]).to(h0_BD.dtype)
    return g_BTD.to(ctx.x_dtype), da_BTD.to(a_BTD.dtype), dh0_BD, None, None


def _states_before(h_BTD: Tensor, h0_BD: Tensor | None) -> Tensor:
    first_B1D = torch.zeros_like(h_BTD[:, :1]) if h0_BD is None else h0_BD[:, None].to(h_BTD.dtype)
    return torch.cat([first_B1D, h_BTD[:, :-1]], dim=1)


def _save_for_adjoint_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dh_BTD, a_BTD, dh_last_BD, reset_BT = inputs
    ctx.dtypes = dh_BTD.dtype, dh_last_BD.dtype
    ctx.save_for_backward(a_BTD, output, reset_BT)


def _adjoint_gradient(ctx: Any, dg_BTD: Tensor) -> tuple[Tensor | None, ...]:
    """dh_t gets y_t, dh_last y_{T-1} and a_t g_t * y_{t-1}, where y_t = dg_t + a_t * y_{t-1} from a zero state."""
    a_BTD, g_BTD, reset_BT = ctx.saved_tensors
    y_BTD, y_last_BD = scan(dg_BTD, a_BTD, None, reset_BT, torch.float32)
    da_BTD = g_BTD * _states_before(y_BTD, None)
    if reset_BT is not None:
        da_BTD = da_BTD.masked_fill(reset_BT[..., None], 0.0)
    return y_BTD.to(ctx.dtypes[0]), da_BTD.to(a_BTD.dtype), y_last_BD.to(ctx.dtypes[1]), None


scan.register_autograd(_scan_gradient, setup_context=_save_for_scan_gradient)
adjoint_scan.register_autograd(_adjoint_gradient, setup_context=_save_for_adjoint_gradient)
