"""Time and memory per token of a long text, for a checkpoint and a transformer of equal size.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, GemmaConfig, GemmaForCausalLM, PreTrainedModel

from .. import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from ..transformers_compat import CACHE_NAME
from .records import provenance
from .streaming import chunk_length

MLP_STEP = 8  # the width of the transformer's MLP is a multiple of this


def transformer_of_equal_size(config: RecurrentGemmaConfig) -> GemmaForCausalLM:
    """Make an untrained Gemma with the layers, heads and widths of `config`, and an MLP of the width that makes the
    parameter counts equal.

    Untrained weights are as fast as trained ones.
    """

    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip

    def build(mlp: int) -> GemmaForCausalLM:
        fields = {name: getattr(config, name) for name in shared}
        return GemmaForCausalLM(GemmaConfig(intermediate_size=mlp, max_position_embeddings=1 << 24, **fields))

    with torch.device("meta"):
        wanted = RecurrentGemmaForCausalLM(config).num_parameters()
        base = build(MLP_STEP).num_parameters()
        step = build(2 * MLP_STEP).num_parameters() - base
    return build(MLP_STEP * (1 + max(0, round((wanted - base) / step))))


def cache_bytes(cache: Cache) -> int:
    """Return the size of a cache's tensors in bytes."""
    if isinstance(cache, RecurrentGemmaCache):
        return cache.memory_footprint()
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def measure(
    model: PreTrainedModel, label: str, prompt: int, tokens: int, every: int, batch_size: int = 1, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Prefill `prompt` random tokens and generate `tokens` more; yield a record after the prompt and after every
    `every`.

    `tokens_per_second` counts all rows of the batch and only the tokens since the previous record. Raises ValueError
    for numbers below 1.
    """
    for name, value in (("prompt", prompt), ("tokens", tokens), ("every", every), ("batch size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be 1 or more")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=generator).to(model.device)
    about = {"label": label, "parameters": model.num_parameters(), "batch_size": batch_size, **provenance()}
    step = chunk_length(model.config.vocab_size, batch_size)
    cache, start = None, _now(model)
    for first in range(0, prompt, step):
        output = model(ids_BT[:, first : first + step], use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
    yield _record(about, prompt, prompt, batch_size, _now(model) - start, cache)
    start = _now(model)
    for written in tqdm(range(1, tokens + 1), desc=label, unit="token"):
        ids_B1 = output.logits[:, -1:].argmax(-1)
        output = model(ids_B1, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        if written % every == 0 or written == tokens:
            since = (written - 1) % every + 1
            yield _record(about, prompt + written, since, batch_size, _now(model) - start, cache)
            start = _now(model)


def _now(model: PreTrainedModel) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _record(
    about: dict[str, Any], length: int, since: int, batch_size: int, seconds: float, cache: Cache
) -> dict[str, Any]:
    return {
        **about,
        "length": length,
        "tokens_per_second": batch_size * since / seconds,
        "cache_bytes": cache_bytes(cache),
    }
