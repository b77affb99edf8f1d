"""The choice between the Triton kernels and plain torch. It is made here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

BACKENDS = ("triton", "portable")
# The devices that Triton compiles for, as torch calls them; AMD's GPUs are "cuda" too.
_TRITON_DEVICE_TYPES = ("cuda", "xpu")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_asked_for = "auto"


def set_backend(name: str) -> None:
    """Ask for an implementation of the recurrence, its convolution and its gates in this process: "triton", "portable"
    (plain torch) or "auto" (the default). It reaches the model, context parallelism and serving on vLLM.

    "auto" takes the Triton kernels on GPUs that Triton compiles for (NVIDIA from compute capability 8.0 on, AMD, Intel)
    and plain torch everywhere else. Kernels asked for by name that cannot serve a device or a dtype raise ValueError
    when the model runs. A compiled model keeps what it was compiled with.

    Raises:
        ValueError: no such backend.
    """
    global _asked_for
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"unknown backend {name!r}: choose one of {(*BACKENDS, 'auto')}")
    _asked_for = name


def get_backend() -> str:
    """Return what `set_backend` asked for last."""
    return _asked_for


def use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the kernels run for inputs on `device` whose widest dtype is `dtype`.

    Raises:
        ValueError: `set_backend` asked for "triton", which cannot serve this device or dtype.
    """
    if _asked_for == "portable" or (_asked_for == "auto" and device.type == "cpu") or is_transformed():
        return False
    refusal = triton_refusal(device)
    if refusal is None and dtype not in _TRITON_DTYPES:
        refusal = f"does not take dtype {dtype}: convert the model to one of {_TRITON_DTYPES}"
    if refusal is not None and _asked_for == "triton":
        raise ValueError(f'backend "triton" {refusal}, or call set_backend("auto")')
    return refusal is None


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Tell whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is active.

    These know plain torch: a custom operator has no tangent for them, and loses the one it is given without a word. So
    the reference loop and the plain forms of everything else run there, slower and right. A program that torch.compile
    makes is kept for the transforms it was traced under: Dynamo guards on them.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def triton_refusal(device: torch.device) -> str | None:
    """Say why Triton kernels cannot run on a device and what to do about it; None if they can.

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


def plain_gradients(
    plain: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `inputs` so that they can be differentiated again (`create_graph=True`), by autograd
    through the plain form of an operation. The operations' own backward passes are faster, and constants to autograd.
    """
    inputs = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(plain(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
