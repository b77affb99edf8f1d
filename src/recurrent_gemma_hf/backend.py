"""The only place that chooses between the Triton kernels and plain torch."""

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
    """Choose the implementation of the recurrence, its convolution and its gates in this process: "triton", "portable"
    (plain torch) or "auto" (the default). The choice holds for the model, context parallelism and serving on vLLM.

    "auto" takes the Triton kernels on GPUs that Triton compiles for (NVIDIA from compute capability 8.0, AMD, Intel)
    and plain torch everywhere else. With "triton", a model on a device or with a dtype that the kernels do not support
    raises ValueError when it runs. A compiled model keeps the backend that it was compiled with.

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

    Transforms need plain torch: a custom operator drops the tangent of its inputs without an error. Under a transform
    the reference loop and the plain forms run instead, slower. The answer is a constant in a compiled program, which
    Dynamo uses only under the transforms that it was traced under.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def triton_refusal(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, with a remedy; None if they can.

    With TRITON_INTERPRET=1 in the environment they also run on a CPU, very slowly, for tests.
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
    """Return the gradients of `inputs` by autograd through the plain form of an operation, so that they can be
    differentiated again (`create_graph=True`). The operations' own backward passes are faster but not differentiable.
    """
    inputs = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(plain(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
