"""Linear layers on a CPU: the matmul that reads the weights fastest, for float32, bfloat16 and int8 weights.

Shapes: B batch, T tokens, E inputs, N outputs, K inputs of a product.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .backend import is_transformed

HAS_ONEDNN = torch.backends.mkldnn.is_available()
_FORWARD = nn.Linear.forward
FEW_ROWS = 256  # oneDNN's float32 matmul is faster than MKL's up to this many rows (benchmarks/LOG.md)
FEW_PRODUCTS = 1 << 17  # fewer multiplications than this take less than the 12 us that calling oneDNN costs
FEW_INT8_ROWS = 16  # up to this many rows, multiplying int8 weights directly is faster than converting them


class _OneDnnOff:
    """Context in which torch computes without oneDNN. Threads share it; the last to leave restores the setting.

    torch has one such setting per process: other threads compute without oneDNN too, correctly but slower.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.was_on = True

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.was_on = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch._C._set_mkldnn_enabled(self.was_on)


_onednn_off = _OneDnnOff()


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute layer(x), by `fast_linear` where it can.

    The layers are plain nn.Linear, which is what quantizers look for. A layer with hooks, its own or global ones, or
    with a forward that somebody has replaced, is called.
    """
    is_plain = type(layer) is nn.Linear and nn.Linear.forward is _FORWARD and "forward" not in layer.__dict__
    if is_plain and not (layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook()):
        out = fast_linear(x, layer.weight, layer.bias)
        if out is not None:
            return out
    return layer(x)


def fast_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Compute F.linear on a CPU by the kernel that reads the weights fastest; return None where F.linear is to do it.

    For few rows, as in decoding, F.linear uses half of the memory's bandwidth: in float32 it calls MKL, which runs on
    one thread on processors that are not Intel's; in bfloat16 it calls oneDNN, which repacks the weights; it converts
    torchao's int8 weights first. Under torch.compile, Inductor's own loop for one row is faster than either library.
    Measured in benchmarks/LOG.md.
    """
    if torch.is_grad_enabled() or not x.is_cpu or type(x) is not torch.Tensor or is_transformed():
        return None
    rows, dtype = x.numel() // x.shape[-1], x.dtype
    if rows > FEW_ROWS or dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return None
    if x.shape[-1] != weight.shape[-1]:  # F.linear raises the error
        return None
    if torch.compiler.is_compiling():
        return _row_times_weight(x, weight, bias) if rows == 1 and not torch.compiler.is_exporting() else None
    # A FLOP counter, a function mode or torch.jit.trace wants to see F.linear.
    is_watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._is_tracing()
    if is_watched or not HAS_ONEDNN:
        return None
    if type(weight) is not nn.Parameter:
        is_for_kernel = dtype == torch.bfloat16 and rows <= FEW_INT8_ROWS and x.shape[-1] % 4 == 0
        return _int8_linear(x, weight, bias) if is_for_kernel and _is_int8_by_row(weight) else None
    if dtype == torch.float32:
        if rows * weight.numel() < FEW_PRODUCTS:
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if dtype == torch.bfloat16 and rows == 1:
        with _onednn_off:
            return F.linear(x, weight, bias)
    return None


def _row_times_weight(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Compute one row's W x as multiply and sum, so that Inductor emits its own loop instead of calling MKL or oneDNN.

    `.contiguous().as_strided()` is a fusion barrier: without it Inductor would recompute what produces x (RMSNorm) for
    every row of the weight. Sums of more than 4096 terms get a slower loop, so they are cut into pieces.
    """
    if type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.bfloat16):
        values, scale = weight, None
    elif _is_int8_by_row(weight):
        values, scale = weight.qdata, weight.scale.flatten().float()
    else:
        return None
    parts, unit = _float32_parts(values)
    inputs = parts[0].shape[1]
    pieces = next((n for n in range(1, 9) if inputs % n == 0 and inputs // n <= 4096), 1)
    row = x.reshape(-1).float()
    shares = (row[i :: len(parts)].contiguous().as_strided((inputs,), (1,)) for i in range(len(parts)))
    products = [
        part.view(-1, pieces, inputs // pieces) * share.view(pieces, -1)
        for part, share in zip(parts, shares, strict=True)
    ]
    out = sum(products[1:], products[0]).sum(-1).sum(-1)
    out = out if scale is None else out * (scale * unit)
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _float32_parts(values_NK: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """Decode bfloat16 or int8 values to float32, one load per 32-bit word: return the n slices values[:, i::n] / unit,
    and unit. n is 2 for bfloat16 (the upper half of a float32) and 4 for int8. Converting each value is slower."""
    n = 4 // values_NK.itemsize
    in_words = values_NK.shape[1] % n == 0 and values_NK.is_contiguous() and sys.byteorder == "little"
    if n == 1 or not in_words:
        return [values_NK.float()], 1.0
    bits = 32 // n
    words = values_NK.view(torch.int32)
    parts = [(words << (32 - bits * (i + 1))) & -(1 << (32 - bits)) for i in range(n)]
    if values_NK.dtype.is_floating_point:
        return [part.view(torch.float32) for part in parts], 1.0
    return [part.float() for part in parts], 2.0 ** (bits - 32)


def _int8_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute F.linear without converting the int8 weight."""
    scale = weight.scale.to(x.dtype).flatten()
    out = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight.qdata, scale)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


def _is_int8_by_row(weight: Any) -> bool:
    """Tell whether these are torchao's int8 weights with one scale per row and unquantized activations."""
    if type(weight).__name__ != "Int8Tensor":
        return False
    by_row = weight.scale.numel() == weight.shape[0]
    return by_row and weight.act_quant_kwargs is None and weight.act_pre_scale is None


def is_cpu_without_bfloat16(device: torch.device | str) -> bool:
    """Tell whether bfloat16 would be emulated on this device, ten times slower than float32."""
    has_onednn = torch.backends.mkldnn.is_available()  # without it, as on a Mac, there is nothing to ask
    return str(device) == "cpu" and has_onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
