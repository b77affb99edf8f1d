"""Files that keep a cache: safetensors with fingerprints of the config, of the weights and of the contents."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FORMAT = "recurrent_gemma_cache_v2"
OLD_FORMATS = ("recurrent_gemma_cache_v1",)
# Values of each parameter that its fingerprint covers. A fine-tune, merged into bfloat16 weights, changes at least some
# percent of the values that it trains, so that 4096 find it; all parameters of 2B take 0.04 s (benchmarks/LOG.md).
SAMPLED = 4096


def weight_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return a fingerprint of each parameter of the stack by its name, "" where its values are not in memory (meta).

    It is the start of the SHA-256 of 4096 values, evenly spaced and rounded to bfloat16, so that float32 and bfloat16
    copies of a checkpoint agree; of quantized weights, of what is stored.
    """
    return {
        name.replace("_orig_mod.", ""): "" if parameter.is_meta else _sample_hash(parameter)
        for name, parameter in getattr(model, "base_model", model).named_parameters()
    }


def _sample_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for part in _parts(tensor.detach()):
        values = part.reshape(-1)[:: max(1, part.numel() // SAMPLED)][:SAMPLED]
        values = values.to(torch.bfloat16) if values.is_floating_point() else values
        digest.update(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that store a parameter: itself, or those of a quantized or distributed one."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
    return [tensor.as_subclass(Tensor)]


@torch.compiler.disable(reason="a loaded cache meets its model: call cache.check(model, rows) before compiled code")
def check_weights(saved: dict[str, str], model: nn.Module) -> None:
    """Raise ValueError, with their names, if weights differ from those that a file was written with."""
    found = weight_fingerprints(model)
    differing = [
        name
        for name in sorted(saved.keys() | found.keys())
        if saved.get(name, "none") != found.get(name, "none") and "" not in (saved.get(name), found.get(name))
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"this cache was saved by a model with other weights ({', '.join(differing[:3])}{more} differ): load it "
            "with the model that wrote it, or run this model over the text again"
        )


def write_file(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors (on the CPU) and metadata with a fingerprint of both, atomically.

    Raises:
        ValueError: `path` is a folder or a device.
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a file (a folder or a device); give the name of a file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    metadata = {"format": FORMAT, **metadata}
    try:
        save_file(tensors, temporary, metadata={**metadata, "contents": _contents_hash(tensors, metadata)})
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the metadata that `write_file` wrote.

    Raises:
        ValueError: it is no such file, or damaged.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); save the cache again") from error
    if metadata.get("format") in OLD_FORMATS:
        raise ValueError(
            f"{path} was written by an older version, without fingerprints of weights and contents; run the model over "
            "the text again and save it"
        )
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by RecurrentGemmaCache.save (format {metadata.get('format')!r})")
    if metadata.pop("contents", "") != _contents_hash(tensors, metadata):
        raise ValueError(f"{path} is damaged: its contents do not have the fingerprint that they were saved with")
    return tensors, metadata


def _contents_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the tensors, and of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
