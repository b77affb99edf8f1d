"""Memory of a training step: weights, gradients, optimizer and activations, computed without allocating them.

Activations are counted: the model, with its adapters, runs a forward pass on the meta device, and the sizes of the
tensors that autograd saves are added up. The effects of checkpointing and autocast on them, and all other terms, are
formulas. benchmarks/memory.py compares the result with the allocator.

Shapes: B batch, T tokens, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .modeling_recurrent_gemma import RecurrentGemmaForCausalLM
from .peft_defaults import LINEAR_LAYERS

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Strategy:
    """Dtypes of weights and activations, and which weights are trained, with AdamW."""

    explanation: str
    bytes_per_weight: float  # of everything that is not quantized
    compute_dtype: torch.dtype  # of activations
    has_adapter: bool = False
    bytes_per_quantized_weight: float | None = None  # of the linear layers


STRATEGIES = {
    "full-fp32": Strategy("everything in float32", 4, torch.float32),
    "full-amp": Strategy("float32 weights, bfloat16 autocast: Trainer(bf16=True)", 4, torch.bfloat16),
    "full-bf16": Strategy("weights, gradients and optimizer in bfloat16", 2, torch.bfloat16),
    "lora": Strategy("bfloat16 weights, float32 adapters on all linear layers", 2, torch.bfloat16, has_adapter=True),
    # 4 bits, and per 64 weights one byte of scale (itself quantized: double quantization).
    "qlora": Strategy("the same over 4-bit linear layers", 2, torch.bfloat16, True, 0.5 + 1 / 64 + 4 / (64 * 256)),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward pass for the backward pass
    loss: int  # blocks of logits and the gradient of the head, while the loss is computed
    gathered: int  # weights that FSDP gathers temporarily
    peak: int  # of one step; less than the sum, because not all of it exists at once


def training_memory(
    config: RecurrentGemmaConfig,
    strategy: str,
    *,
    tokens: int = 8192,
    batch_size: int = 1,
    checkpointing: bool = False,
    devices: int = 1,
    rank: int = 16,
) -> TrainingMemory:
    """Compute the memory of one training step with AdamW, from the second step on.

    Args:
        config: the model's config; nothing is allocated.
        strategy: a key of `STRATEGIES`.
        tokens: T, the length of a row.
        batch_size: B, rows per device.
        checkpointing: whether the backward pass recomputes the activations of each layer.
        devices: number of devices over which FSDP shards weights, gradients and optimizer.
        rank: rank of the adapters.

    Raises:
        ValueError: the strategy is unknown, or a number is below 1.
        ModuleNotFoundError: the strategy has adapters, and peft is not installed.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; there are {', '.join(STRATEGIES)}")
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("devices", devices), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    how = STRATEGIES[strategy]
    model = _on_meta(config, how, rank)
    trained, frozen, quantized = _count(model, how)
    bytes_per_trained = 4 if how.has_adapter else how.bytes_per_weight
    weights = (frozen - quantized) * how.bytes_per_weight + trained * bytes_per_trained
    weights += quantized * (how.bytes_per_quantized_weight or 0)
    gradients, optimizer = trained * bytes_per_trained, 2 * trained * bytes_per_trained
    per_layer, rest = _activations(model, batch_size, tokens)
    activations, recomputed = sum(per_layer) + rest, 0
    if checkpointing:  # each layer's input is saved, and one layer at a time is recomputed
        row = batch_size * tokens * config.hidden_size * how.compute_dtype.itemsize
        activations, recomputed = len(per_layer) * row + rest, max(per_layer)
    if how is STRATEGIES["full-amp"]:  # autocast's bfloat16 copies of the matrices are kept for the backward pass
        activations += sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) * 2
    loss = _loss(model, how, batch_size * tokens)
    gathered = _gathered(model, how) if devices > 1 else 0
    # Head and embedding share their weight, and autograd adds their two gradients at the end.
    twice = config.vocab_size * config.hidden_size * bytes_per_trained if not how.has_adapter else 0
    at_the_loss = activations + max(loss, recomputed)
    at_the_end = gradients / devices + twice
    peak = (weights + optimizer) / devices + gathered + max(at_the_loss, at_the_end)
    shares = (weights / devices, gradients / devices, optimizer / devices, activations, loss, gathered, peak)
    return TrainingMemory(*(round(share) for share in shares))


def _on_meta(config: RecurrentGemmaConfig, how: Strategy, rank: int) -> RecurrentGemmaForCausalLM | PeftModel:
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config).to(how.compute_dtype)
        model.tie_weights()
        if not how.has_adapter:
            return model
        from peft import LoraConfig, get_peft_model

        # In the activations' dtype, as under autocast; their float32 weights are counted separately.
        lora = LoraConfig(r=rank, target_modules=list(LINEAR_LAYERS))
        with warnings.catch_warnings():  # peft uses a deprecated name of Transformers 5.23
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, lora).to(how.compute_dtype)


def _count(model: nn.Module, how: Strategy) -> tuple[int, int, int]:
    """Count the trained, the frozen and, among these, the quantized weights."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if how.bytes_per_quantized_weight is None:
        return trained, frozen, 0
    quantized = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".base_layer.weight"))
    return trained, frozen, quantized


class _FusedAttention(TorchFunctionMode):
    """Mode that calls a fused attention kernel: on the meta device attention would be traced as T x T matmuls."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        mask, is_causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], 0.0, is_causal, attn_mask=mask)[0]


@contextmanager
def _kept_for_backward(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Collect the storages that autograd saves, except those of the weights."""
    kept: dict[Any, int] = {}
    alive: list[Tensor] = []  # kept, because the address of a freed storage is reused
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _activations(model: nn.Module, batch_size: int, tokens: int) -> tuple[list[int], int]:
    """Return the bytes saved for the backward pass: of each layer, and of the rest of the model."""
    layers = next(module for name, module in model.named_modules() if name.endswith("model.layers"))
    per_layer: list[int] = []
    ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")
    model.train()
    with _kept_for_backward(model) as kept, _FusedAttention():
        before: list[int] = []
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: before.append(sum(kept.values())))
            layer.register_forward_hook(lambda *_: per_layer.append(sum(kept.values()) - before[-1]))
        model(input_ids=ids, labels=ids)
    return per_layer, sum(kept.values()) - sum(per_layer)


def _loss(model: Any, how: Strategy, tokens: int) -> int:
    """Return the bytes of the loss (cross_entropy.py): two blocks of logits in float32, one more in a narrower dtype,
    and the gradient of the head if it is trained."""
    from .cross_entropy import BLOCK_ELEMENTS

    head = model.get_output_embeddings()
    V, E = head.weight.shape
    elements = min(tokens, max(1, BLOCK_ELEMENTS // V)) * V
    narrow = how.compute_dtype.itemsize if how.compute_dtype != torch.float32 else 0
    gradient = V * E * how.compute_dtype.itemsize if head.weight.requires_grad else 0
    return elements * (8 + narrow) + gradient


def _gathered(model: nn.Module, how: Strategy) -> int:
    """Return the bytes that FSDP gathers: embedding and head during the whole step, and two layers (one prefetched)."""
    layers = next(module for name, module in model.named_modules() if name.endswith("model.layers"))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    root = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return (root + sum(sorted(sizes)[-2:])) * how.compute_dtype.itemsize


__all__ = ["STRATEGIES", "Strategy", "TrainingMemory", "training_memory"]
