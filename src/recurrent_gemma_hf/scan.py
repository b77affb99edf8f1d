"""The linear recurrence of the RG-LRU (Griffin, arXiv 2402.19427, equation 4): h_t = a_t * h_{t-1} + x_t, elementwise.

`linear_recurrence` has three implementations:

- `linear_recurrence_reference`: the loop over time, differentiated by autograd; it defines the correct result.
- a scan over chunks in plain torch, for every device, and Triton kernels (scan_triton.py, imported on first use), as
  one operator with one backward pass. backend.py chooses between the two.

Shapes: B batch, T tokens, D lru_width, M chunks, K = M - 1 chunks before the last; N tokens of S concatenated
sequences, P rows of a pool of states.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from .backend import is_transformed, plain_gradients, use_triton

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# A chunk's decay is the product of its coefficients: 64 of them stay finite in float32 for |a| < 4. On a CPU longer
# chunks are no faster (benchmarks/scan.py).
_MAX_CHUNK = 64

# Each copy of this file (the installed package, a checkpoint's remote code) registers operators under its own module
# name, so that two copies in one process do not replace each other's.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


def linear_recurrence(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t * h_{t-1} + x_t for t = 0 .. T - 1, with h_{-1} = h0.

    A coefficient of 0 drops the past, whatever it is: NaN or infinity before it do not pass, forwards or backwards.
    Accumulates in float32, or in float64 if any input is float64. Differentiable in x, a and h0 through both results,
    to any order and in every mode; higher orders and transforms of torch.func use the loop over time. Time and memory
    are linear in T. Products of up to 64 coefficients are formed (by the kernels, of all coefficients of a segment), so
    use |a| < 4 (with kernels |a| <= 1); the RG-LRU has 0 <= a <= 1.

    Args:
        x_BTD: the inputs, bfloat16, float16, float32 or float64.
        a_BTD: the coefficients, of the same shape and any of these dtypes. 0 drops the past.
        h0_BD: the state before the first step; None means zeros.

    Returns:
        h_BTD, every state, in the dtype of x; and h_last_BD, the state after the last step, in the accumulation dtype.
        For T = 1 they may share memory.

    Raises:
        ValueError: a wrong shape, dtype or device, T = 0, or inputs that the backend of `set_backend` does not support.
    """
    _check_inputs(x_BTD, a_BTD, h0_BD)
    if is_transformed():
        return linear_recurrence_reference(x_BTD, a_BTD, h0_BD)
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    if x_BTD.shape[1] == 1:  # decoding: nothing to scan, and autograd differentiates one step as it is
        x_BD, a_BD = x_BTD[:, 0].to(dtype), a_BTD[:, 0].to(dtype)
        if h0_BD is None:
            h_BD = torch.addcmul(x_BD, a_BD, torch.zeros_like(x_BD))
        elif torch.is_grad_enabled():
            h_BD = torch.addcmul(x_BD, a_BD, seen(a_BD, h0_BD.to(dtype)))
        else:  # `seen` is eight operations, 11 to 23% of a decoding step of the demo (benchmarks/LOG.md)
            h_BD = torch.where(a_BD == 0.0, x_BD, torch.addcmul(x_BD, a_BD, h0_BD.to(dtype)))
        return h_BD.unsqueeze(1).to(x_BTD.dtype), h_BD
    h_BTD, h_last_BD = _scan(x_BTD, a_BTD, h0_BD, use_triton(x_BTD.device, torch.promote_types(dtype, x_BTD.dtype)))
    return h_BTD.to(x_BTD.dtype), h_last_BD


def linear_recurrence_reference(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute `linear_recurrence` by a loop over time, without checking the inputs."""
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    h = torch.zeros_like(x_BTD[:, 0], dtype=dtype) if h0_BD is None else h0_BD.to(dtype)
    states = []
    for x_t, a_t in zip(x_BTD.to(dtype).unbind(1), a_BTD.to(dtype).unbind(1), strict=True):
        h = a_t * seen(a_t, h) + x_t
        states.append(h)
    return torch.stack(states, dim=1).to(x_BTD.dtype), h


def seen(a: Tensor, past: Tensor) -> Tensor:
    """Return the past, with 0 where a coefficient of 0 drops a value that is not finite: their product would be NaN."""
    return past.masked_fill((a == 0.0) & ~past.isfinite(), 0.0)


def exact_zeros(decay: Tensor, drops: Tensor) -> Tensor:
    """Return a product of coefficients with 0 where one of them was 0, `drops`, and not where it underflowed."""
    return decay.masked_fill(decay == 0.0, torch.finfo(decay.dtype).tiny).masked_fill(drops, 0.0)


def _is_finite(last_BD: Tensor) -> bool:
    """Tell whether a scan without `seen` was right: what is not finite reaches its last state. Only a CPU is asked,
    because other devices would have to wait."""
    return last_BD.device.type == "cpu" and bool(last_BD.isfinite().all())


def _accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _check_inputs(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None) -> None:
    """Raise ValueError, with the value and the remedy, for inputs outside the contract of `linear_recurrence`."""
    shape = x_BTD.shape
    if len(shape) != 3:
        raise ValueError(f"x_BTD has shape {tuple(shape)}: pass three dimensions (batch, time, channels)")
    if shape[1] == 0:
        raise ValueError(
            f"x_BTD has shape {tuple(shape)}: pass at least one time step, or skip the call for an empty sequence"
        )
    wanted = (("x_BTD", x_BTD, shape), ("a_BTD", a_BTD, shape), ("h0_BD", h0_BD, (shape[0], shape[2])))
    for name, tensor, size in wanted:
        if tensor is None:
            continue
        if tensor.shape != size:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: with x_BTD of shape {tuple(shape)} it must be {tuple(size)}"
            )
        if tensor.device != x_BTD.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x_BTD is on {x_BTD.device}: move it with .to(x_BTD.device)"
            )
        if tensor.dtype not in _FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}: convert it to one of {_FLOAT_DTYPES}")


# ---------------------------------------------------------------- the operator
#
# These are custom operators, because torch.compile would unroll the loops and recompile them for every length.


@torch.library.custom_op(f"{_NAMESPACE}::scan", mutates_args=())
def _scan(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, kernels: bool) -> tuple[Tensor, Tensor]:
    """Return all states, in the dtype of x by kernels, else in the accumulation dtype; and the last state, in the
    accumulation dtype."""
    if kernels:
        from .scan_triton import scan

        return scan(x_BTD, a_BTD, h0_BD)
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    h_BTD = torch.empty(x_BTD.shape, dtype=dtype, device=x_BTD.device)
    h0_BD = torch.zeros_like(h_BTD[:, 0]) if h0_BD is None else h0_BD.to(dtype)
    _chunked_scan(x_BTD, a_BTD, h0_BD, h_BTD, backwards=False)
    return h_BTD, h_BTD[:, -1].clone()


@torch.library.custom_op(f"{_NAMESPACE}::scan_backward", mutates_args=())
def _scan_backward(
    dh_BTD: Tensor, dlast_BD: Tensor, a_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor | None, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx_t = g_t, da_t = g_t * h_{t-1} and dh0 = a_0 * g_0, where g_t = dh_t + a_{t+1} * g_{t+1}, and the last g
    is dh + dlast. Where a is 0, values of g and h that are not finite are dropped (`seen`)."""
    if kernels:
        from .scan_triton import scan_backward

        return scan_backward(dh_BTD, dlast_BD, a_BTD, h_BTD, h0_BD)
    g_BTD = torch.empty_like(h_BTD)
    torch.add(dh_BTD[:, -1], dlast_BD, out=g_BTD[:, -1])
    _chunked_scan(dh_BTD[:, :-1], a_BTD[:, 1:], g_BTD[:, -1], g_BTD[:, :-1], backwards=True)
    # In place on one copy: on a CPU touching a new large tensor for the first time costs more than the multiplication.
    da_BTD = g_BTD.clone()
    before_BTD = h_BTD[:, :-1]
    if not _is_finite(before_BTD.sum(1)):
        before_BTD = seen(a_BTD[:, 1:], before_BTD)
    da_BTD[:, 1:].mul_(before_BTD)
    if h0_BD is None:
        da_BTD[:, 0].zero_()
    else:
        da_BTD[:, 0].mul_(seen(a_BTD[:, 0], h0_BD))
    return g_BTD, da_BTD, a_BTD[:, 0] * seen(a_BTD[:, 0], g_BTD[:, 0])


@_scan.register_fake
def _(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, kernels: bool) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    h_BTD = torch.empty(x_BTD.shape, dtype=x_BTD.dtype if kernels else dtype, device=x_BTD.device)
    return h_BTD, torch.empty_like(h_BTD[:, 0], dtype=dtype, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(
    dh_BTD: Tensor, dlast_BD: Tensor, a_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor | None, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    da_dtype = a_BTD.dtype if kernels else h_BTD.dtype
    return torch.empty_like(h_BTD), torch.empty_like(h_BTD, dtype=da_dtype), torch.empty_like(dlast_BD)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BTD, a_BTD, h0_BD, ctx.kernels = inputs
    ctx.save_for_backward(x_BTD, a_BTD, h0_BD, output[0])


def _gradient(ctx: Any, dh_BTD: Tensor, dlast_BD: Tensor) -> tuple[Tensor | None, ...]:
    x, a, h0, h = ctx.saved_tensors  # read once: activation checkpointing raises on a second read
    if torch.is_grad_enabled():
        return *plain_gradients(linear_recurrence_reference, (x, a, h0), (dh_BTD.to(x.dtype), dlast_BD)), None
    dx, da, dh0 = _scan_backward(dh_BTD, dlast_BD, a, h, h0, ctx.kernels)
    return dx.to(x.dtype), da.to(a.dtype), None if h0 is None else dh0.to(h0.dtype), None


_scan.register_autograd(_gradient, setup_context=_save_for_gradient)


# ---------------------------------------------------------------- the scan over chunks


def _chunked_scan(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor, out_BTD: Tensor, *, backwards: bool) -> None:
    """Write out_t = a_t * out_{t-1} + x_t from the state h0, in the dtype of `out_BTD`. Backwards, for gradients:
    out_t = a_t * out_{t+1} + x_t.

    The first try multiplies; if its last state is not finite, or on a device that is not asked, each product is
    computed from `seen` states, which takes twice as long.
    """
    if out_BTD.device.type == "cpu":
        _scan_chunks(x_BTD, a_BTD, h0_BD, out_BTD, backwards=backwards, selects=False)
    if not _is_finite(out_BTD[:, 0 if backwards else -1]):
        _scan_chunks(x_BTD, a_BTD, h0_BD, out_BTD, backwards=backwards, selects=True)


def _scan_chunks(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor, out_BTD: Tensor, *, backwards: bool, selects: bool
) -> None:
    """Compute `_chunked_scan` with or without `seen`.

    Time is split into M chunks of C steps from the side where the scan starts; the last chunk may be shorter. Three
    passes: (1) reduce each chunk but the last, in parallel, to the affine map h -> decay * h + end (C steps); (2) carry
    the state through the chunks (M steps on 1 / C of the data); (3) rescan every chunk, in parallel, from its incoming
    state (C steps). Reading x and a twice costs less than writing each step's decay. Nothing is divided by a product,
    which may be 0. Inputs are converted slice by slice, never as a whole.
    """
    T, dtype = x_BTD.shape[1], out_BTD.dtype
    C = min(math.isqrt(T), _MAX_CHUNK)
    M = math.ceil(T / C)
    state_BMD = _chunk_states(x_BTD, a_BTD, h0_BD, C, M, backwards=backwards, selects=selects)
    for c in range(C):
        # Step c of every chunk that has one: a slice of stride C, in memory order for both directions.
        times = slice((T - 1 - c) % C if backwards else c, None, C)
        x, a, out = x_BTD[:, times].to(dtype), a_BTD[:, times].to(dtype), out_BTD[:, times]
        n = out.shape[1]
        state_BMD = state_BMD[:, -n:] if backwards else state_BMD[:, :n]
        torch.addcmul(x, a, seen(a, state_BMD) if selects else state_BMD, out=out)
        state_BMD = out


def _chunk_states(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor, C: int, M: int, *, backwards: bool, selects: bool
) -> Tensor:
    """Return the state that enters each of the M chunks of `_scan_chunks`, in memory order."""
    dtype = h0_BD.dtype
    first = x_BTD.shape[1] - (M - 1) * C if backwards else 0
    stop = first + (M - 1) * C
    steps = [slice(t, stop, C) for t in range(first, first + C)]
    if backwards:
        steps.reverse()
    end_BKD = x_BTD[:, steps[0]].to(dtype, copy=True)
    decay_BKD = a_BTD[:, steps[0]].to(dtype, copy=True)
    drops_BKD = decay_BKD == 0.0
    for times in steps[1:]:
        a = a_BTD[:, times].to(dtype)
        torch.addcmul(x_BTD[:, times].to(dtype), a, seen(a, end_BKD) if selects else end_BKD, out=end_BKD)
        decay_BKD.mul_(a)
        if selects:
            drops_BKD |= a == 0.0
    if selects:
        decay_BKD = exact_zeros(decay_BKD, drops_BKD)

    state_BMD = h0_BD.new_empty(h0_BD.shape[0], M, h0_BD.shape[1])
    states = state_BMD.unbind(1)
    chunks = list(zip(end_BKD.unbind(1), decay_BKD.unbind(1), strict=True))
    if backwards:
        states, chunks = states[::-1], chunks[::-1]
    states[0].copy_(h0_BD)
    for m, (end_BD, decay_BD) in enumerate(chunks):
        past_BD = seen(decay_BD, states[m]) if selects else states[m]
        torch.addcmul(end_BD, decay_BD, past_BD, out=states[m + 1])
    return state_BMD


# ---------------------------------------------------------------- sequences of different lengths, concatenated


def linear_recurrence_varlen(
    x_ND: Tensor,
    a_ND: Tensor,
    states_PD: Tensor,
    state_indices_S: Tensor,
    cu_seqlens: Tensor,
    has_initial_state_S: Tensor,
) -> Tensor:
    """Compute `linear_recurrence` of S concatenated sequences, with their states in a pool; for inference.

    Sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. It starts from row state_indices_S[s] of the pool (from
    zeros where has_initial_state_S[s] is False) and stores its last state there. What is not finite stays in its
    sequence. Nothing is read back from the device, except on a CPU, so the call can be captured in a CUDA graph.

    Args:
        x_ND: the inputs of all sequences, as in `linear_recurrence`; N tokens.
        a_ND: the coefficients, of the same shape.
        states_PD: the pool, float32 (float64 if any input is), updated in place; rows of other sequences are not.
        state_indices_S: int32 or int64, a different row for each sequence. Empty sequences (the padding of a captured
            batch) leave their row unchanged; any number of them may share a row that no other sequence uses.
        cu_seqlens: int32 or int64 (S + 1,), not decreasing, from 0 to at most N; tokens after the last are padding.
        has_initial_state_S: bool.

    Returns:
        h_ND, every state, in the dtype of x; undefined at padding.

    Raises:
        ValueError: a wrong shape, dtype or device, N = 0, or inputs that the backend of `set_backend` does not support.
    """
    dtype = _accumulation_dtype(x_ND, a_ND, states_PD)
    _check_varlen(x_ND, a_ND, states_PD, state_indices_S, cu_seqlens, has_initial_state_S, dtype)
    N, D = x_ND.shape
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    is_empty_S = starts == stops
    rows = state_indices_S.long()
    before_SD = states_PD[rows]
    h0_SD = before_SD.masked_fill(~has_initial_state_S[:, None], 0.0)

    # The initial state is added to the first token's input, and the first coefficient set to 0. Empty sequences write
    # to one more row after the tokens.
    first_S = torch.where(is_empty_S, N, starts)
    x, a = torch.zeros((2, N + 1, D), dtype=dtype, device=x_ND.device)
    x[:N], a[:N] = x_ND, a_ND
    x[first_S] = torch.addcmul(x[first_S], a[first_S], seen(a[first_S], h0_SD))
    a[first_S] = 0.0
    h_1ND, _ = linear_recurrence(x[None, :N], a[None, :N])
    states_PD[rows] = torch.where(is_empty_S[:, None], before_SD, h_1ND[0, (stops - 1).clamp(min=0)])
    return h_1ND[0].to(x_ND.dtype)


def _check_varlen(
    x_ND: Tensor,
    a_ND: Tensor,
    states_PD: Tensor,
    state_indices_S: Tensor,
    cu_seqlens: Tensor,
    has_initial_state_S: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError for inputs outside the contract of `linear_recurrence_varlen`, without reading any value."""
    if x_ND.ndim != 2:
        raise ValueError(f"x_ND has shape {tuple(x_ND.shape)}: pass two dimensions (tokens, channels)")
    _check_inputs(x_ND[None], a_ND[None], None)
    S, D = len(state_indices_S), x_ND.shape[1]
    if states_PD.ndim != 2 or states_PD.shape[1] != D:
        raise ValueError(f"states_PD has shape {tuple(states_PD.shape)}: with {D} channels it must be (rows, {D})")
    if states_PD.dtype != dtype:
        raise ValueError(f"states_PD has dtype {states_PD.dtype}: the states of these inputs are kept in {dtype}")
    integers = (torch.int32, torch.int64)
    for name, tensor, shape, dtypes in (
        ("state_indices_S", state_indices_S, (S,), integers),
        ("cu_seqlens", cu_seqlens, (S + 1,), integers),
        ("has_initial_state_S", has_initial_state_S, (S,), (torch.bool,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: for {S} sequences it must be {shape}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} has dtype {tensor.dtype}: pass one of {dtypes}")
    for name, tensor in (
        ("states_PD", states_PD),
        ("state_indices_S", state_indices_S),
        ("cu_seqlens", cu_seqlens),
        ("has_initial_state_S", has_initial_state_S),
    ):
        if tensor.device != x_ND.device:
            raise ValueError(f"{name} is on {tensor.device} but x_ND is on {x_ND.device}: move it there")
