"""The linear recurrence of the RG-LRU: h_t = a_t * h_{t-1} + x_t, elementwise, for every channel by itself.

This is the part of the RG-LRU layer (Griffin, arXiv:2402.19427, section 2.4, equation 4) that runs along time; gates
and the normalisation of the input belong to the layer. One contract, `linear_recurrence`, and several implementations
behind it:

- `linear_recurrence_reference`: the loop over time, differentiated by autograd. It defines what is right.
- `linear_recurrence_chunked`: a scan over chunks in plain torch for every device, with a backward of its own.
- `linear_recurrence_triton`: kernels for GPUs, in scan_triton.py, which is imported when they are used.

Which implementation runs is decided in `resolve_backend` and nowhere else.

Shape suffixes: B batch, T time, D lru_width, M chunks, K chunks of full length (M - 1); N tokens of S sequences in one
row, P rows of a pool of states.
"""

import functools
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# A chunk's decay is the product of its coefficients. At most 64 of them keep it finite in float32 for |a| < 4, and
# measured on a CPU longer chunks gain nothing (benchmarks/scan.py).
_MAX_CHUNK = 64

# Each copy of this file (the installed package, a checkpoint's remote code) registers operators under its own module
# name, so that two copies loaded side by side do not replace each other's.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


# ---------------------------------------------------------------- the contract


def linear_recurrence(
    x_BTD: Tensor,
    a_BTD: Tensor,
    h0_BD: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t * h_{t-1} + x_t for t = 0 .. T - 1, with h_{-1} = h0.

    Accumulates in float32, or in float64 if any input is float64. Differentiable in x, a and h0 through both results,
    any number of times, in reverse and (by the reference loop, see `is_transformed`) in forward mode. Inputs are never
    modified.

    Args:
        x_BTD: what is added to the state; bfloat16, float16, float32 or float64.
        a_BTD: the coefficients, of the same shape; their dtype may differ from that of x.
        h0_BD: the state before the first step; None means zeros.
        reset_BT: bool; where True, a counts as 0 (h_t = x_t) and its gradient is 0.
        output_dtype: dtype of the first result; None means that of x.
        backend: one of `available_backends()`, or "auto", which does what `set_backend` asks for.

    Returns:
        h_BTD, every state, in `output_dtype`; and h_last_BD, the state after the last step, in the accumulation dtype.
        For T = 1 they may share memory.

    Raises:
        ValueError: a wrong shape, dtype or device, T = 0, or a backend that does not exist or cannot serve the inputs.
    """
    dtype = torch.promote_types(x_BTD.dtype, a_BTD.dtype)
    if h0_BD is not None:
        dtype = torch.promote_types(dtype, h0_BD.dtype)
    name = resolve_backend(backend, x_BTD.device, dtype)
    return _BACKENDS[name].run(x_BTD, a_BTD, h0_BD, reset_BT=reset_BT, output_dtype=output_dtype)


def _accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def _check_inputs(
    x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None, output_dtype: torch.dtype | None
) -> None:
    """Raise ValueError, with the value and the remedy, for inputs outside the contract of `linear_recurrence`."""
    shape = x_BTD.shape
    if len(shape) != 3:
        raise ValueError(f"x_BTD has shape {tuple(shape)}: pass three dimensions (batch, time, channels)")
    if shape[1] == 0:
        raise ValueError(
            f"x_BTD has shape {tuple(shape)}: pass at least one time step, or skip the call for an empty sequence"
        )
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("x_BTD", x_BTD, shape), ("a_BTD", a_BTD, shape)]
    if h0_BD is not None:
        expected.append(("h0_BD", h0_BD, (shape[0], shape[2])))
    if reset_BT is not None:
        expected.append(("reset_BT", reset_BT, shape[:2]))
    for name, tensor, wanted in expected:
        if tensor.shape != wanted:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: with x_BTD of shape {tuple(shape)} it must be {tuple(wanted)}"
            )
        if tensor.device != x_BTD.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x_BTD is on {x_BTD.device}: move it with .to(x_BTD.device)"
            )
        if name == "reset_BT":
            if tensor.dtype != torch.bool:
                raise ValueError(f"reset_BT has dtype {tensor.dtype}: pass torch.bool, for instance position_ids == 0")
        elif tensor.dtype not in _FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}: convert it to one of {_FLOAT_DTYPES}")
    if output_dtype is not None and output_dtype not in _FLOAT_DTYPES:
        raise ValueError(f"output_dtype is {output_dtype}: choose one of {_FLOAT_DTYPES}")


# ---------------------------------------------------------------- many sequences in one row, as servers batch them


def linear_recurrence_varlen(
    x_ND: Tensor,
    a_ND: Tensor,
    states_PD: Tensor,
    state_indices_S: Tensor,
    cu_seqlens: Tensor,
    has_initial_state_S: Tensor,
    *,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """`linear_recurrence` of S sequences that lie one behind the other, with their states in a pool; for inference.

    Sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. It starts from row state_indices_S[s] of the pool
    (from zeros where has_initial_state_S[s] is False) and leaves its last state there. Nothing is read back from the
    device, so the call can be captured in a CUDA graph.

    Args:
        x_ND: what is added to the states, as in `linear_recurrence`; N tokens of all sequences.
        a_ND: the coefficients, of the same shape.
        states_PD: the pool, float32 (float64 if any input is): updated in place, rows of other sequences untouched.
        state_indices_S: int32 or int64, no two sequences with the same row. Empty sequences (the padding of a captured
            batch) keep their row as it is; any number of them may share a row that no other sequence uses.
        cu_seqlens: int32 or int64 (S + 1,), not decreasing, from 0 to at most N; tokens behind the last are padding.
        has_initial_state_S: bool.
        output_dtype: dtype of the result; None means that of x.
        backend: one of `available_backends()`, or "auto".

    Returns:
        h_ND, every state, in `output_dtype`. Padding holds numbers without a meaning.

    Raises:
        ValueError: a wrong shape, dtype or device, N = 0, or a backend that does not exist or cannot serve the inputs.
    """
    dtype = _accumulation_dtype(x_ND, a_ND, states_PD)
    _check_varlen(x_ND, a_ND, states_PD, state_indices_S, cu_seqlens, has_initial_state_S, dtype)
    N = x_ND.shape[0]
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    is_empty_S1 = (starts == stops)[:, None]
    rows = state_indices_S.long()
    before_SD = states_PD[rows]
    h0_SD = before_SD.masked_fill(~has_initial_state_S[:, None], 0.0)

    # The first token of a sequence takes the state in, and its coefficient counts as 0 from then on. One more row
    # behind the tokens receives what empty sequences write.
    x = torch.empty((N + 1, x_ND.shape[1]), dtype=dtype, device=x_ND.device)
    x[:N] = x_ND
    x[N] = 0.0
    first_S = torch.where(starts == stops, N, starts)
    inside_S = first_S.clamp(max=N - 1)
    x[first_S] = torch.addcmul(x_ND[inside_S].to(dtype), a_ND[inside_S].to(dtype), h0_SD)
    reset = torch.zeros(N + 1, dtype=torch.bool, device=x.device)
    reset[first_S] = True
    h_1ND, _ = linear_recurrence(x[None, :N], a_ND[None], reset_BT=reset[None, :N], backend=backend)
    h_ND = h_1ND[0]
    states_PD[rows] = torch.where(is_empty_S1, before_SD, h_ND[(stops - 1).clamp(min=0)])
    return h_ND.to(output_dtype or x_ND.dtype)


def _check_varlen(
    x_ND: Tensor,
    a_ND: Tensor,
    states_PD: Tensor,
    state_indices_S: Tensor,
    cu_seqlens: Tensor,
    has_initial_state_S: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError for inputs outside the contract of `linear_recurrence_varlen`, without looking at any value."""
    if x_ND.ndim != 2:
        raise ValueError(f"x_ND has shape {tuple(x_ND.shape)}: pass two dimensions (tokens, channels)")
    _check_inputs(x_ND[None], a_ND[None], None, None, None)
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


# ---------------------------------------------------------------- the reference


def linear_recurrence_reference(
    x_BTD: Tensor,
    a_BTD: Tensor,
    h0_BD: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` as a loop over time. Same arguments (except the backend), results and errors."""
    _check_inputs(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    x, a = x_BTD.to(dtype), a_BTD.to(dtype)
    if reset_BT is not None:
        a = a.masked_fill(reset_BT[..., None], 0.0)
    h = torch.zeros_like(x[:, 0]) if h0_BD is None else h0_BD.to(dtype)
    states = []
    for x_t, a_t in zip(x.unbind(1), a.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, dim=1).to(output_dtype or x_BTD.dtype), h


# ---------------------------------------------------------------- the portable fast path


def linear_recurrence_chunked(
    x_BTD: Tensor,
    a_BTD: Tensor,
    h0_BD: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` as a scan over chunks of time. Same arguments (except the backend), results and errors.

    Work and memory grow linearly with T. A chunk holds at most 64 steps and multiplies its coefficients, so |a| < 4 is
    needed for the product to stay finite in float32; the RG-LRU has 0 <= a <= 1.
    """
    _check_inputs(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)
    output_dtype = output_dtype or x_BTD.dtype
    if x_BTD.shape[1] == 1:
        return _single_step(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)
    h_BTD, h_last_BD = _scan(x_BTD, a_BTD, h0_BD, reset_BT)
    return h_BTD.to(output_dtype), h_last_BD


def _single_step(
    x_B1D: Tensor, a_B1D: Tensor, h0_BD: Tensor | None, reset_B1: Tensor | None, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One step of decoding: nothing to scan, and autograd needs no help."""
    dtype = _accumulation_dtype(x_B1D, a_B1D, h0_BD)
    x_B1D, a_B1D = x_B1D.to(dtype), a_B1D.to(dtype)
    if reset_B1 is not None:
        a_B1D = a_B1D.masked_fill(reset_B1[..., None], 0.0)
    h0_B1D = torch.zeros_like(x_B1D) if h0_BD is None else h0_BD.to(dtype).unsqueeze(1)
    h_B1D = torch.addcmul(x_B1D, a_B1D, h0_B1D)
    return h_B1D.to(output_dtype), h_B1D.squeeze(1)


# The recurrence and its adjoint are custom operators, each in the derivative of the other, so that gradients of any
# order exist and torch.compile keeps one node for any T instead of unrolling the loops inside.


@torch.library.custom_op(f"{_NAMESPACE}::scan", mutates_args=())
def _scan(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states of h_t = a_t * h_{t-1} + x_t and the last one, in the accumulation dtype."""
    dtype = _accumulation_dtype(x_BTD, a_BTD, h0_BD)
    h_BTD = torch.empty(x_BTD.shape, dtype=dtype, device=x_BTD.device)
    if h0_BD is None:
        h0_BD = torch.zeros_like(h_BTD[:, 0])
    _chunked_scan(x_BTD, a_BTD, reset_BT, h0_BD.to(dtype), h_BTD, backwards=False)
    return h_BTD, h_BTD[:, -1].clone()


@torch.library.custom_op(f"{_NAMESPACE}::adjoint_scan", mutates_args=())
def _adjoint_scan(dh_BTD: Tensor, a_BTD: Tensor, dh_last_BD: Tensor, reset_BT: Tensor | None) -> Tensor:
    """All g_t = dh_t + a_{t+1} * g_{t+1} with g_{T-1} = dh_{T-1} + dh_last, in the accumulation dtype."""
    g_BTD = torch.empty(dh_BTD.shape, dtype=_accumulation_dtype(dh_BTD, a_BTD), device=dh_BTD.device)
    torch.add(dh_BTD[:, -1], dh_last_BD, out=g_BTD[:, -1])
    reset = None if reset_BT is None else reset_BT[:, 1:]
    _chunked_scan(dh_BTD[:, :-1], a_BTD[:, 1:], reset, g_BTD[:, -1], g_BTD[:, :-1], backwards=True)
    return g_BTD


@_scan.register_fake
def _(x_BTD: Tensor, a_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    h_BTD = torch.empty(x_BTD.shape, dtype=_accumulation_dtype(x_BTD, a_BTD, h0_BD), device=x_BTD.device)
    return h_BTD, torch.empty_like(h_BTD[:, 0])


@_adjoint_scan.register_fake
def _(dh_BTD: Tensor, a_BTD: Tensor, dh_last_BD: Tensor, reset_BT: Tensor | None) -> Tensor:
    return torch.empty(dh_BTD.shape, dtype=_accumulation_dtype(dh_BTD, a_BTD), device=dh_BTD.device)


def _save_for_scan_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BTD, a_BTD, h0_BD, reset_BT = inputs
    ctx.x_dtype = x_BTD.dtype
    # The states serve the gradient of a alone.
    ctx.save_for_backward(a_BTD, output[0] if ctx.needs_input_grad[1] else None, h0_BD, reset_BT)


def _scan_gradient(ctx: Any, dh_BTD: Tensor, dh_last_BD: Tensor) -> tuple[Tensor | None, ...]:
    """dx_t = g_t, da_t = g_t * h_{t-1}, dh0 = a_0 * g_0, where g runs backwards through time (`_adjoint_scan`)."""
    a_BTD, h_BTD, h0_BD, reset_BT = ctx.saved_tensors
    needs_x, needs_a, needs_h0, _ = ctx.needs_input_grad
    g_BTD = _adjoint_scan(dh_BTD, a_BTD, dh_last_BD, reset_BT)
    dx_BTD = g_BTD.to(ctx.x_dtype) if needs_x else None
    da_BTD = _coefficient_gradient(g_BTD, h_BTD, h0_BD, reset_BT).to(a_BTD.dtype) if needs_a else None
    dh0_BD = None
    if needs_h0:
        a_first_BD = _coefficients(a_BTD, reset_BT, slice(0, 1), g_BTD.dtype)[:, 0]
        dh0_BD = (a_first_BD * g_BTD[:, 0]).to(h0_BD.dtype)
    return dx_BTD, da_BTD, dh0_BD, None


def _save_for_adjoint_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, a_BTD, _, reset_BT = inputs
    ctx.save_for_backward(a_BTD, output, reset_BT)


def _adjoint_gradient(ctx: Any, dg_BTD: Tensor) -> tuple[Tensor | None, ...]:
    """dh_t gets y_t, dh_last y_{T-1} and a_t g_t * y_{t-1}, where y_t = dg_t + a_t * y_{t-1} from a zero state."""
    a_BTD, g_BTD, reset_BT = ctx.saved_tensors
    y_BTD, y_last_BD = _scan(dg_BTD, a_BTD, None, reset_BT)
    da_BTD = _coefficient_gradient(g_BTD, y_BTD, None, reset_BT).to(a_BTD.dtype)
    return y_BTD, da_BTD, y_last_BD, None


_scan.register_autograd(_scan_gradient, setup_context=_save_for_scan_gradient)
_adjoint_scan.register_autograd(_adjoint_gradient, setup_context=_save_for_adjoint_gradient)


def _coefficient_gradient(g_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor | None, reset_BT: Tensor | None) -> Tensor:
    """da_t = g_t * h_{t-1}, and 0 at resets."""
    # In place on one copy: on a CPU the first touch of each new large tensor costs more than the product.
    da_BTD = g_BTD.clone()
    da_BTD[:, 1:].mul_(h_BTD[:, :-1])
    if h0_BD is None:
        da_BTD[:, 0].zero_()
    else:
        da_BTD[:, 0].mul_(h0_BD)
    return da_BTD if reset_BT is None else da_BTD.masked_fill_(reset_BT[..., None], 0.0)


def _coefficients(a_BTD: Tensor, reset_BT: Tensor | None, times: slice, dtype: torch.dtype) -> Tensor:
    """a at the given times in `dtype`, 0 at resets."""
    a = a_BTD[:, times].to(dtype)
    return a if reset_BT is None else a.masked_fill(reset_BT[:, times, None], 0.0)


def _chunked_scan(
    x_BTD: Tensor, a_BTD: Tensor, reset_BT: Tensor | None, h0_BD: Tensor, out_BTD: Tensor, *, backwards: bool
) -> None:
    """Write out_t = a_t * out_{t-1} + x_t (backwards: out_{t+1}) from the state h0, in the dtype of `out_BTD`.

    Time is cut into M chunks of C steps, counted from the side where the scan starts; the chunk it ends in may be
    shorter. First every chunk but that one finds what it makes of its incoming state, h -> decay * h + end (C steps,
    all chunks at once); then the state runs through the chunks (M steps on a C-th of the data); then every chunk is run
    again from its right state (C steps, all chunks at once). Reading x and a twice costs less than writing each step's
    decay. No division by a product, which may be 0. Conversions and resets are applied slice by slice, so that no
    converted copy of a whole input is made.
    """
    T, dtype = x_BTD.shape[1], out_BTD.dtype
    C = min(math.isqrt(T), _MAX_CHUNK)
    M = math.ceil(T / C)
    state_BMD = _chunk_states(x_BTD, a_BTD, reset_BT, h0_BD, C, M, backwards=backwards)
    for c in range(C):
        # The c-th step of every chunk that has one: a slice with stride C, in memory order for both directions.
        times = slice((T - 1 - c) % C if backwards else c, None, C)
        x, out = x_BTD[:, times].to(dtype), out_BTD[:, times]
        n = out.shape[1]
        state_BMD = state_BMD[:, -n:] if backwards else state_BMD[:, :n]
        torch.addcmul(x, _coefficients(a_BTD, reset_BT, times, dtype), state_BMD, out=out)
        state_BMD = out


def _chunk_states(
    x_BTD: Tensor, a_BTD: Tensor, reset_BT: Tensor | None, h0_BD: Tensor, C: int, M: int, *, backwards: bool
) -> Tensor:
    """The state that enters each of the M chunks of `_chunked_scan`, in memory order."""
    dtype = h0_BD.dtype
    first = x_BTD.shape[1] - (M - 1) * C if backwards else 0
    stop = first + (M - 1) * C
    steps = [slice(t, stop, C) for t in range(first, first + C)]
    if backwards:
        steps.reverse()
    end_BKD = x_BTD[:, steps[0]].to(dtype, copy=True)
    decay_BKD = _coefficients(a_BTD, reset_BT, steps[0], dtype).clone()
    for times in steps[1:]:
        a = _coefficients(a_BTD, reset_BT, times, dtype)
        torch.addcmul(x_BTD[:, times].to(dtype), a, end_BKD, out=end_BKD)
        decay_BKD.mul_(a)

    state_BMD = h0_BD.new_empty(h0_BD.shape[0], M, h0_BD.shape[1])
    states = state_BMD.unbind(1)
    chunks = list(zip(end_BKD.unbind(1), decay_BKD.unbind(1), strict=True))
    if backwards:
        states, chunks = states[::-1], chunks[::-1]
    states[0].copy_(h0_BD)
    for m, (end_BD, decay_BD) in enumerate(chunks):
        torch.addcmul(end_BD, decay_BD, states[m], out=states[m + 1])
    return state_BMD


# ---------------------------------------------------------------- transforms of torch


def is_transformed() -> bool:
    """Tell whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is active.

    These know plain torch: a custom operator has no tangent for them, and loses the one it is given without a word. So
    the reference loop and the plain forms of everything else run there, slower and right.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


# ---------------------------------------------------------------- the kernels


def linear_recurrence_triton(
    x_BTD: Tensor,
    a_BTD: Tensor,
    h0_BD: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` by Triton kernels. Same arguments (except the backend), results and errors, but no float64.

    A segment of time multiplies its coefficients, so 0 <= |a| <= 1, as in the RG-LRU, is where it is exact; beyond, a
    product that leaves float32 is cut off.
    """
    from .scan_triton import scan

    _check_inputs(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)
    output_dtype = output_dtype or x_BTD.dtype
    if x_BTD.shape[1] == 1:
        return _single_step(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)
    return scan(x_BTD, a_BTD, h0_BD, reset_BT, output_dtype)


@torch.compiler.assume_constant_result
def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device and what to do about it, or None if they can.

    With TRITON_INTERPRET=1 in the environment they run on a CPU too, very slowly: that is for tests.
    """
    return _triton_refusal(device)


@functools.cache
def _triton_refusal(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package: pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type not in _TRITON_DEVICE_TYPES:
        return f"does not run on {device.type}: move the inputs to one of {_TRITON_DEVICE_TYPES}"
    if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or newer, and {device} has {capability}: use a newer GPU"
    return None


# ---------------------------------------------------------------- the choice


class _Backend(NamedTuple):
    run: Callable[..., tuple[Tensor, Tensor]]
    device_types: tuple[str, ...] | None  # where "auto" takes it; None: everywhere
    dtypes: tuple[torch.dtype, ...]
    refusal: Callable[[torch.device], str | None] | None = None  # what else speaks against a device


# The devices that Triton compiles for, as torch calls them; AMD's GPUs are "cuda" too.
_TRITON_DEVICE_TYPES = ("cuda", "xpu")

# In the order in which "auto" prefers them.
_BACKENDS = {
    "triton": _Backend(
        linear_recurrence_triton,
        _TRITON_DEVICE_TYPES,
        (torch.bfloat16, torch.float16, torch.float32),
        triton_refusal,
    ),
    "chunked": _Backend(linear_recurrence_chunked, None, _FLOAT_DTYPES),
    "reference": _Backend(linear_recurrence_reference, None, _FLOAT_DTYPES),
}
_announced: set[tuple[str, torch.dtype]] = set()
_asked_for = "auto"


def ask_for(name: str) -> None:
    """Set what "auto" means in this process: see `recurrent_block.set_backend`, which checks `name` and is public."""
    global _asked_for
    _asked_for = name


def asked_for() -> str:
    """Return what `ask_for` was told last: "triton", "portable" or "auto"."""
    return _asked_for


def available_backends() -> tuple[str, ...]:
    """The names that `linear_recurrence` accepts besides "auto", in the order in which "auto" prefers them."""
    return tuple(_BACKENDS)


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the implementation that runs for `name`, which may be "auto"; under a transform of torch the reference.

    Args:
        name: one of `available_backends()`, or "auto" for what `set_backend` asks for: by default the first of them
            that serves `device` and `dtype`.
        device: where the inputs are.
        dtype: the widest dtype of the inputs (`torch.promote_types`).

    Raises:
        ValueError: no such backend, or it cannot serve this device or dtype.
    """
    device = torch.device(device)
    if name not in (*_BACKENDS, "auto"):
        raise ValueError(f"unknown backend {name!r}: choose one of {(*_BACKENDS, 'auto')}")
    if is_transformed():
        return "reference"
    remedy = 'choose backend="auto"'
    if name == "auto" and _asked_for != "auto":
        name, remedy = "chunked" if _asked_for == "portable" else _asked_for, 'call set_backend("auto")'
    if name == "auto":
        for candidate, backend in _BACKENDS.items():
            is_at_home = backend.device_types is None or device.type in backend.device_types
            if is_at_home and _refusal(candidate, device, dtype) is None:
                _announce(candidate, device.type, dtype)
                return candidate
        raise ValueError(
            f"no backend takes dtype {dtype} on {device.type}: convert the inputs to one of {_FLOAT_DTYPES}"
        )
    refusal = _refusal(name, device, dtype)
    if refusal is not None:
        raise ValueError(f"backend {name!r} {refusal}, or {remedy}")
    return name


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve the inputs and what to do about it, or None if it can."""
    backend = _BACKENDS[name]
    if backend.refusal is not None:
        refusal = backend.refusal(device)
        if refusal is not None:
            return refusal
    elif backend.device_types is not None and device.type not in backend.device_types:
        return f"does not run on {device.type}: move the inputs to one of {backend.device_types}"
    if dtype not in backend.dtypes:
        return f"does not take dtype {dtype}: convert the inputs to one of {backend.dtypes}"
    return None


def _announce(name: str, device_type: str, dtype: torch.dtype) -> None:
    """Log once per device type and dtype what "auto" chose. Not while torch.compile traces, which cannot write logs."""
    if torch.compiler.is_compiling() or (device_type, dtype) in _announced:
        return
    _announced.add((device_type, dtype))
    logger.info("linear_recurrence: backend %r for %s on %s", name, dtype, device_type)
