"""Next-token loss against position: how far does a longer context help?

A document is cut into segments of a given length; each begins with the beginning-of-sequence token and is streamed
through the cache, so memory does not grow with the length. Losses are averaged in bins whose width grows with the
position; each bin has a confidence band by bootstrap.

Shape suffixes: S segments, T positions, N bins, K blocks of one bin, R bootstrap samples.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .. import RecurrentGemmaForCausalLM
from .records import provenance
from .streaming import streamed_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The bootstrap resamples segments if there are this many, else blocks of `BLOCK` neighbouring tokens.
ENOUGH_SEGMENTS = 5
BLOCK = 64
BOOTSTRAP_SAMPLES = 400


@dataclass(frozen=True)
class Wanted:
    """Settings: `length` positions per segment, `segments` of them (None: all), `bins_per_octave` of the position."""

    length: int
    segments: int | None = None
    bins_per_octave: int = 2
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "segments", "bins_per_octave"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} {value} must be 1 or more")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence {self.confidence} must be above 0 and below 1")


def read_documents(paths: Sequence[Path], part: tuple[float, float] = (0.0, 1.0)) -> list[str]:
    """Read the given part of each file (from and to, as shares of its characters).

    Raises ValueError for a file that is missing, empty, or not UTF-8.
    """
    start, end = part
    if not 0 <= start < end <= 1:
        raise ValueError(f"part {start}:{end} must be two shares from 0 to 1, the second the larger")
    texts = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give a text file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for instance with iconv") from error
        text = text[int(start * len(text)) : int(end * len(text))]
        if not text.strip():
            raise ValueError(f"{path} has no text in the part {start}:{end}; give a file with text")
        texts.append(text)
    return texts


def cut_segments(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> torch.Tensor:
    """Return segments (S, T + 1) int64: <bos> and `length` tokens of a document in each row.

    The rest of a document is dropped. Raises ValueError for too few segments, or a tokenizer without <bos>.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "the tokenizer has no beginning-of-sequence token, which begins every text; use the model's own tokenizer"
        )
    longest = 0
    rows: list[torch.Tensor] = []
    for text in texts:
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        longest = max(longest, len(tokens))
        rows.extend(tokens[: len(tokens) // wanted.length * wanted.length].view(-1, wanted.length))
    if not rows:
        raise ValueError(
            f"the longest text has {longest} tokens, {wanted.length} were asked for; give a longer text or a length of "
            f"at most {longest}"
        )
    if wanted.segments is not None and len(rows) < wanted.segments:
        raise ValueError(
            f"there are {len(rows)} segments of {wanted.length} tokens, {wanted.segments} were asked for; give more "
            "text, or fewer or shorter segments"
        )
    chosen_ST = torch.stack(rows[: wanted.segments])
    return torch.cat([torch.full((len(chosen_ST), 1), tokenizer.bos_token_id), chosen_ST], dim=1)


def position_losses(
    model: RecurrentGemmaForCausalLM, segments_ST: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Compute the loss of every token in nats, (S, T) float32 on the CPU, one segment at a time."""
    segments, length = segments_ST.shape[0], segments_ST.shape[1] - 1
    # Allocated at once: small tensors kept between the chunks' logits would fragment memory, by 4 GB in a million
    # tokens.
    losses_ST = torch.empty(segments, length)
    with tqdm(total=segments * length, unit="token", unit_scale=True) as progress:
        for tokens, losses_T in zip(segments_ST, losses_ST, strict=True):
            start = 0
            for losses_BC in streamed_losses(model, tokens[None], chunk):
                losses_T[start : start + losses_BC.shape[1]] = losses_BC[0]
                start += losses_BC.shape[1]
                progress.update(losses_BC.shape[1])
    return losses_ST


def bin_edges(length: int, bins_per_octave: int) -> list[int]:
    """Return edges e_0 = 0 < e_1 < ... = length, in equal steps of log2; bin i holds positions e_i to e_(i+1) - 1."""
    edges = {0, length}
    for step in range(1 + math.ceil(bins_per_octave * math.log2(length)) if length > 1 else 0):
        edges.add(min(length, round(2 ** (step / bins_per_octave))))
    return sorted(edges)


def summarise(losses_ST: torch.Tensor, wanted: Wanted) -> list[dict[str, float]]:
    """Return mean loss and band of each bin. `first` and `last` count positions from 1, the first predicted token."""
    edges = bin_edges(losses_ST.shape[1], wanted.bins_per_octave)
    generator = torch.Generator().manual_seed(wanted.seed)
    rows = []
    for start, end in itertools.pairwise(edges):
        inside_ST = losses_ST[:, start:end].double()
        low, high = _band(inside_ST, wanted.confidence, generator)
        loss = inside_ST.mean().item()
        rows.append(
            {"first": start + 1, "last": end, "tokens": inside_ST.numel(), "loss": loss, "low": low, "high": high}
        )
    return rows


def _band(inside_ST: torch.Tensor, confidence: float, generator: torch.Generator) -> tuple[float, float]:
    """Return bootstrap percentiles of the mean loss, resampling segments, or blocks of tokens for few segments."""
    units = inside_ST.mean(1)
    weights = torch.ones_like(units)
    if len(units) < ENOUGH_SEGMENTS:
        blocks = [block for row in inside_ST for block in row.split(BLOCK)]
        units = torch.stack([block.mean() for block in blocks])
        weights = torch.tensor([float(len(block)) for block in blocks], dtype=torch.float64)
    means = []
    for _ in range(BOOTSTRAP_SAMPLES):  # one at a time, because a bin may have thousands of blocks
        drawn = torch.randint(len(units), (len(units),), generator=generator)
        means.append((units[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    tail = (1 - confidence) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def measure(
    model: RecurrentGemmaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    wanted: Wanted,
    label: str,
) -> dict[str, Any]:
    """Measure the losses; return a record of the bins, the mean loss, the text's SHA-256, device and versions."""
    segments_ST = cut_segments(texts, tokenizer, wanted)
    losses_ST = position_losses(model, segments_ST)
    resampled = "segments" if len(segments_ST) >= ENOUGH_SEGMENTS else f"blocks of {BLOCK} tokens"
    return {
        "label": label,
        "length": wanted.length,
        "segments": len(segments_ST),
        "text_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "mean_loss": losses_ST.double().mean().item(),
        "band": f"{wanted.confidence:.0%} bootstrap over {resampled}",
        "bins": summarise(losses_ST, wanted),
        **provenance(),
    }
