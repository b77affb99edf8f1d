"""Triton kernels of the recurrent block for one token: one for the convolution and its state, one for the gates, the
RG-LRU and the gelu gate.

Shapes: B batch, D lru_width, H heads of the gates, d = D / H, K conv1d_width, C = K - 1, S rows of the pool of states.
"""

from __future__ import annotations

from torch import Tensor

from .rg_lru_triton import coefficients
from .triton_tools import (
    OPTIONS,
    SIZES,
    advance,
    allocate,
    flag,
    gelu,
    is_interpreted,
    on_device,
    own_row,
    row_stride,
    rows_of_channels,
    sigmoid,
    softplus,
    tl,
    triton,
)

# Per program: rows of the batch; channels of the convolution; outputs of a head, from `CHUNK` inputs at a time. One
# program for a whole head took 32 us for one row: ten multiprocessors read 256 KB of weights each (benchmarks/LOG.md).
ROWS, CONVOLVED, OUTPUTS, CHUNK, WARPS = 16, 64, 32, 64, 4


@triton.jit
def dot(x, weight, total, UPCAST: tl.constexpr):
    """Compute total + x weight, accumulated in float32. UPCAST: for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def state_rows(index_ptr, b, B):
    """Return the row of the pool for each row b of the batch, and a mask of the rows b that have one."""
    index, is_row = b, b < B
    if index_ptr is not None:
        index = tl.load(index_ptr + b, mask=is_row, other=-1).to(tl.int64)
        is_row = is_row & (index >= 0)
    return index, is_row


@triton.jit
def row_flag(flag_ptr, stride, b, is_row):
    """Load one byte of a mask for each row; False without a mask."""
    result = b < 0
    if flag_ptr is not None:
        result = tl.load(flag_ptr + b * stride, mask=is_row, other=0) != 0
    return result


@triton.jit(do_not_specialize=SIZES)
def conv_step_kernel(
    u_ptr, state_ptr, weight_ptr, bias_ptr, is_padding_ptr, conv_tap_mask_ptr, index_ptr, x_ptr,
    B, D, u_stride_B, state_stride_S, state_stride_T, state_stride_D, is_padding_stride_B, conv_tap_mask_stride_B,
    K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the convolution x (B, D) of one token, and update its state in place. Weight (D, K)."""
    block, rows = own_row(tl.cdiv(D, CHANNELS))
    b = rows * ROWS + tl.arange(0, ROWS)[:, None]
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    index, is_row = state_rows(index_ptr, b, B)
    is_moved = is_row & (row_flag(is_padding_ptr, is_padding_stride_B, b, is_row) == 0) & (c < D)
    state = state_ptr + index * state_stride_S + c * state_stride_D
    out = tl.load(bias_ptr + c, mask=c < D, other=0.0).to(tl.float32) + tl.zeros((ROWS, CHANNELS), tl.float32)
    seen = ()
    for tap in tl.static_range(K):
        inputs = u_ptr + b * u_stride_B + c if tap == K - 1 else state + tap * state_stride_T
        u = tl.load(inputs, mask=is_row & (c < D), other=0.0).to(tl.float32)
        seen = seen + (u.to(state_ptr.dtype.element_ty),)  # type: ignore[assignment]  # noqa: RUF005
        if conv_tap_mask_ptr is not None:
            in_document = tl.load(conv_tap_mask_ptr + b * conv_tap_mask_stride_B + tap, mask=is_row, other=0) != 0
            u = tl.where(in_document, u, 0.0)
        out += u * tl.load(weight_ptr + c * K + tap, mask=c < D, other=0.0).to(tl.float32)
    tl.store(x_ptr + b * D + c, out.to(x_ptr.dtype.element_ty), mask=(b < B) & (c < D))
    tl.debug_barrier()  # all threads read the old state before any writes the new one
    for tap in tl.static_range(K - 1):
        tl.store(state + tap * state_stride_T, seen[tap + 1], mask=is_moved)


@triton.jit(do_not_specialize=SIZES)
def rg_lru_step_kernel(
    x_ptr, y_ptr, h_ptr, r_weight_ptr, r_bias_ptr, i_weight_ptr, i_bias_ptr, recurrent_param_ptr,
    reset_ptr, is_padding_ptr, index_ptr, out_ptr,
    B, D, d, y_stride_B, h_stride_S, reset_stride_B, is_padding_stride_B,
    C: tl.constexpr, UPCAST: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Compute out (B, D), and update the state h in place. C: c of equation 3; HEAD: d rounded up to multiples of
    CHUNK."""
    blocks = tl.cdiv(d, OUTPUTS)
    program, rows = own_row(D // d * blocks)
    head, outer = program // blocks, program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    c, is_c = head * d + outer, outer < d
    b = rows * ROWS + tl.arange(0, ROWS)[:, None]
    index, is_row = state_rows(index_ptr, b, B)
    is_padding = row_flag(is_padding_ptr, is_padding_stride_B, b, is_row)
    is_reset = row_flag(reset_ptr, reset_stride_B, b, is_row)
    r = tl.load(r_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32) + tl.zeros((ROWS, OUTPUTS), tl.float32)
    i = tl.load(i_bias_ptr + c, mask=is_c, other=0.0).to(tl.float32) + tl.zeros((ROWS, OUTPUTS), tl.float32)
    for chunk in tl.static_range(0, HEAD, CHUNK):
        inner = chunk + tl.arange(0, CHUNK)
        is_in = is_row & (inner < d)[None, :]
        x_in = tl.load(x_ptr + b * D + head * d + inner[None, :], mask=is_in, other=0.0)
        offset, is_weight = (head * d + inner[:, None]) * d + outer, (inner < d)[:, None] & is_c
        r = dot(x_in, tl.load(r_weight_ptr + offset, mask=is_weight, other=0.0), r, UPCAST)
        i = dot(x_in, tl.load(i_weight_ptr + offset, mask=is_weight, other=0.0), i, UPCAST)
    inside = is_row & is_c
    x = tl.load(x_ptr + b * D + c, mask=inside, other=0.0).to(tl.float32)
    log_a_scale = -C * softplus(tl.load(recurrent_param_ptr + c, mask=is_c, other=0.0).to(tl.float32))
    a, _, gated, _, _ = coefficients(sigmoid(r), sigmoid(i), x, log_a_scale, is_reset, is_padding)
    h = advance(a, tl.load(h_ptr + index * h_stride_S + c, mask=inside, other=0.0), gated)
    tl.store(h_ptr + index * h_stride_S + c, h, mask=inside)
    gelu_y, _ = gelu(tl.load(y_ptr + b * y_stride_B + c, mask=inside, other=0.0).to(tl.float32))
    out = tl.where(is_row, h * gelu_y, 0.0)
    tl.store(out_ptr + b * D + c, out.to(out_ptr.dtype.element_ty), mask=(b < B) & is_c)


def step(
    u_BD: Tensor,
    y_BD: Tensor,
    conv_state_SDC: Tensor,
    h_SD: Tensor,
    parameters: tuple[Tensor, ...],
    flags: tuple[Tensor | None, ...],
    c: float,
) -> Tensor:
    """Compute `rg_lru_step` (rg_lru.py) by two kernels. `c` is that of equation 3."""
    conv_weight, conv_bias, r_weight, r_bias, i_weight, i_bias, recurrent_param = (p.contiguous() for p in parameters)
    (B, D), (H, d, _), K = u_BD.shape, r_weight.shape, conv_weight.shape[2]
    x_BD, out_BD = (allocate((B, D), u_BD.dtype, u_BD.device) for _ in range(2))
    if out_BD.numel() == 0:
        return out_BD
    u_BD, y_BD = rows_of_channels(u_BD), rows_of_channels(y_BD)
    reset, is_padding, conv_tap_mask, index = flags
    reset, is_padding, conv_tap_mask = flag(reset), flag(is_padding), flag(conv_tap_mask)
    outputs, chunk = (min(limit, max(16, triton.next_power_of_2(d))) for limit in (OUTPUTS, CHUNK))
    batches = -(-B // ROWS)
    with on_device(u_BD):
        conv_step_kernel[(-(-D // CONVOLVED) * batches,)](
            u_BD, conv_state_SDC, conv_weight, conv_bias, is_padding, conv_tap_mask, index, x_BD,
            B, D, u_BD.stride(0), conv_state_SDC.stride(0), conv_state_SDC.stride(2), conv_state_SDC.stride(1),
            row_stride(is_padding), row_stride(conv_tap_mask),
            K=K, ROWS=ROWS, CHANNELS=CONVOLVED, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        rg_lru_step_kernel[(H * -(-d // outputs) * batches,)](
            x_BD, y_BD, h_SD, r_weight.to(u_BD.dtype), r_bias, i_weight.to(u_BD.dtype), i_bias, recurrent_param,
            reset, is_padding, index, out_BD,
            B, D, d, y_BD.stride(0), h_SD.stride(0), row_stride(reset), row_stride(is_padding),
            C=c, UPCAST=is_interpreted(), HEAD=-(-d // chunk) * chunk, CHUNK=chunk, ROWS=ROWS, OUTPUTS=outputs,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return out_BD
