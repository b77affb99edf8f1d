"""The caller's masks, positions and documents: checked, and turned into what the model computes with.

Shapes: B batch, T tokens of this forward, E hidden_size, H heads, K keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .backend import is_transformed
from .cache_recurrent_gemma import RecurrentGemmaCache


class InputMask(NamedTuple):
    """The caller's attention_mask, checked and taken apart."""

    tokens: torch.Tensor | None  # (B, T) bool of this forward's columns; None: no padding
    mask_4d: torch.Tensor | None  # 4D
    seen: int  # columns before this forward

    @staticmethod
    def read(attention_mask: Any, cache: RecurrentGemmaCache | None, B: int, T: int) -> InputMask:
        """Check an attention_mask of `RecurrentGemmaModel.forward` for (B, T) inputs, or raise ValueError."""
        seen = 0
        # A single token asks how many there were only to check a mask. A compiled step must not ask, see
        # `_Progress.compiled_columns`.
        if cache is not None and (T > 1 or isinstance(attention_mask, torch.Tensor)):
            seen = cache.get_seq_length()
        if attention_mask is None:
            return InputMask(None, None, seen)
        if isinstance(attention_mask, dict):  # what create_masks_for_generate made
            return InputMask(attention_mask["tokens"], None, seen)
        if attention_mask.ndim == 4:
            return InputMask(None, attention_mask, seen)
        fits = attention_mask.ndim == 2 and attention_mask.shape[0] == B
        # A compiled step does not know how many columns there were, see `_Progress.compiled_columns`.
        columns = max(T, attention_mask.shape[-1]) if torch.compiler.is_compiling() else seen + T
        if not fits or attention_mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must be (batch, columns so far + new ones) = "
                f"({B}, {seen} + {T}), or 4D"
            )
        return InputMask(attention_mask[:, -T:].bool(), None, seen)


def document_positions(
    position_ids: torch.Tensor | None, kwargs: dict[str, Any], B: int, T: int
) -> torch.Tensor | None:
    """position_ids, or what the other descriptions of packed documents say about them: `cu_seq_lens_q` (documents +
    1,), where each document begins and the last ends, or `seq_idx` (B, T), the number of each token's document."""
    ends, documents = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if position_ids is not None or (ends is None and documents is None):
        return position_ids
    if documents is None:
        if B != 1 or ends.ndim != 1:
            raise ValueError(
                f"cu_seq_lens_q of shape {tuple(ends.shape)} for {B} rows: it describes one row of packed documents; "
                "give position_ids that begin at 0 with each document"
            )
        if may_look_at(ends) and (ends[0] != 0 or ends[-1] != T):
            raise ValueError(f"cu_seq_lens_q={ends.tolist()} must begin with 0 and end with the row's {T} tokens")
        documents = torch.searchsorted(ends, torch.arange(T, device=ends.device, dtype=ends.dtype), right=True)[None]
    if documents.shape != (B, T):
        raise ValueError(f"seq_idx of shape {tuple(documents.shape)} must be ({B}, {T})")
    columns = torch.arange(T, device=documents.device).expand(B, T)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return columns - torch.where(begins, columns, 0).cummax(1).values


def may_look_at(x: torch.Tensor) -> bool:
    """Tell whether values may be read to check them: a GPU would be waited for, torch.compile and vmap cannot."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def check_positions(position_BT: torch.Tensor, tokens_BT: torch.Tensor | None) -> None:
    """Positions grow within a document; one that goes back to anything but 0 is a mistake. Looks on a CPU alone."""
    falls = (position_BT[:, 1:] < position_BT[:, :-1]) & (position_BT[:, 1:] != 0)  # from column t to t + 1
    if tokens_BT is not None:
        falls = falls & tokens_BT[:, 1:] & tokens_BT[:, :-1]
    if position_BT.amin() < 0 or falls.any():
        row, start = (falls if falls.any() else position_BT < 0).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} from column {start} on are {position_BT[row, start : start + 4].tolist()}: "
            "positions grow by one within a document, and a new document begins at position 0"
        )


def is_counted(position_BT: torch.Tensor) -> bool:
    """Whether these are just 0, 1, 2, ..., as generate() passes them: then there is nothing to mask. Asked on a CPU
    alone, where looking costs nothing."""
    if position_BT.shape[1] == 1 or not may_look_at(position_BT):
        return False
    return bool((position_BT == torch.arange(position_BT.shape[1])).all())


def shows_any(mask: torch.Tensor) -> bool:
    """Tell whether a bool or additive mask shows any key."""
    return bool((mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any())


def first_tokens(like_BT: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, T) bool: tokens that only padding or another document stands before. They are nobody's next token: so a
    padded row has the loss of the row alone, and packed documents that of each by itself."""
    first = torch.zeros_like(like_BT, dtype=torch.bool)
    if position_ids is not None:
        first |= position_ids.to(first.device) == 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, -first.shape[1] :].to(first.device).bool()
        first[:, 1:] |= ~is_token[:, :-1]
    return first


def last_true(tokens_BT: torch.Tensor) -> torch.Tensor:
    """(B, 1) column of the last True of each row; 0 where there is none."""
    count = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
    return (tokens_BT * count).argmax(1, keepdim=True)


def reorder(x: torch.Tensor, index_BT: torch.Tensor | None, dim: int = 1) -> torch.Tensor:
    """Reorders dimension `dim` of x (B, ...) by index_BT (B, T); None changes nothing."""
    if index_BT is None:
        return x
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[dim] = index_BT.shape[1]
    size = list(x.shape)
    size[dim] = index_BT.shape[1]
    return x.gather(dim, index_BT.view(shape).expand(size))


def reorder_attention(weights_BHTK: torch.Tensor, restore: torch.Tensor | None) -> torch.Tensor:
    """Queries, and the keys of this forward among all keys, back to the order of the caller's columns."""
    if restore is None:
        return weights_BHTK
    past = weights_BHTK.shape[3] - restore.shape[1]
    keys = torch.cat([torch.arange(past, device=restore.device).expand(restore.shape[0], -1), past + restore], dim=1)
    return reorder(reorder(weights_BHTK, restore, dim=2), keys, dim=3)
