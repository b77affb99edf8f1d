"""Losses of a text of any length in constant memory, equal to those of one forward over the whole text.

Shape suffixes: B batch, T time, C tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .. import RecurrentGemmaCache, RecurrentGemmaForCausalLM

# Logits per chunk, tokens times vocabulary entries, four bytes each: 1 GB, or less with a small vocabulary.
LOGITS_OF_A_CHUNK = 1 << 28
LONGEST_CHUNK = 4096


def chunk_length(vocab_size: int, batch_size: int = 1) -> int:
    """Return how many tokens to read per forward, so that the logits take at most about 1 GB in float32."""
    return max(1, min(LONGEST_CHUNK, LOGITS_OF_A_CHUNK // (vocab_size * batch_size)))


@torch.no_grad()
def streamed_logits(
    model: RecurrentGemmaForCausalLM, tokens_BT: torch.Tensor, chunk: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits_BCV, targets_BC) per chunk; every token but the first is a target, predicted from all before it.

    Raises ValueError for fewer than two tokens.
    """
    if tokens_BT.shape[1] < 2:
        raise ValueError(f"{tokens_BT.shape[1]} tokens leave nothing to predict; give 2 or more")
    model.eval()
    cache = RecurrentGemmaCache(model.config)
    step = chunk or chunk_length(model.config.vocab_size, tokens_BT.shape[0])
    last = tokens_BT.shape[1] - 1
    for start in range(0, last, step):
        end = min(start + step, last)
        inputs_BC = tokens_BT[:, start:end].to(model.device)
        logits_BCV = model(inputs_BC, cache=cache).logits
        yield logits_BCV, tokens_BT[:, start + 1 : end + 1].to(model.device)


def streamed_losses(
    model: RecurrentGemmaForCausalLM, tokens_BT: torch.Tensor, chunk: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the losses (B, C) in nats, float32, of every token but the first, chunk by chunk."""
    for logits_BCV, targets_BC in streamed_logits(model, tokens_BT, chunk):
        yield F.cross_entropy(logits_BCV.float().transpose(1, 2), targets_BC, reduction="none")
