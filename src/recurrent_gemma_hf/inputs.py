"""Check the caller's masks, positions and documents, and convert them for the layers.

Shapes: B batch, T tokens of this forward, E hidden_size, H heads, K keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .backend import is_transformed
from .cache_recurrent_gemma import RecurrentGemmaCache


class InputMask(NamedTuple):
    """The caller's attention_mask, checked and split by kind."""

    is_token: torch.Tensor | None  # (B, T) bool of this forward's columns; None: no padding
    mask_4d: torch.Tensor | None  # (B or 1, H or 1, T, K or more), bool or added to the scores
    seen: int  # columns before this forward

    @staticmethod
    def read(attention_mask: Any, cache: RecurrentGemmaCache | None, B: int, T: int) -> InputMask:
        """Check an attention_mask of `RecurrentGemmaModel.forward` for (B, T) inputs, or raise ValueError."""
        seen = 0
        # For a single token the count serves only to check a mask. A compiled step must not read it, see
        # `_Progress.columns`.
        if cache is not None and (T > 1 or isinstance(attention_mask, torch.Tensor)):
            seen = cache.get_seq_length()
        if attention_mask is None:
            return InputMask(None, None, seen)
        if isinstance(attention_mask, dict):
            return InputMask(token_columns(attention_mask, T), None, seen)
        if attention_mask.ndim == 4:
            return InputMask(None, attention_mask, seen)
        fits = attention_mask.ndim == 2 and attention_mask.shape[0] == B
        columns = max(T, attention_mask.shape[-1]) if torch.compiler.is_compiling() else seen + T
        if not fits or attention_mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must be (batch, columns so far + new ones) = "
                f"({B}, {seen} + {T}), or 4D"
            )
        return InputMask(token_columns(attention_mask, T), None, seen)


def token_columns(attention_mask: Any, T: int) -> torch.Tensor | None:
    """Return (B, T) bool, True at the tokens of this forward; None for a mask that does not describe padding."""
    if isinstance(attention_mask, dict):  # what create_masks_for_generate made
        return attention_mask["is_token"]
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -T:].bool()


class Columns(NamedTuple):
    """Indices, positions and padding of a forward's columns. Layers see the caller's columns, except in rows with
    padding between tokens, which are compacted (tokens first)."""

    token_index: torch.Tensor  # (B or 1, T) int64: index among the row's tokens; at padding, that of the token before
    position: torch.Tensor  # (B or 1, T) int64: position in the document
    is_token: torch.Tensor | None  # (B, T) bool; None: no padding can affect a token or a kept state
    restore: torch.Tensor | None  # (B, T) int64: new column of each of the caller's columns; None: the same
    is_one_document: bool  # positions equal token indices

    @staticmethod
    def locate(
        x_BTE: torch.Tensor,
        is_token: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        start: torch.Tensor | int,
        keeps_state: bool,
    ) -> tuple[torch.Tensor, Columns]:
        """Return x with zeros at padding, compacted in rows with gaps, and its columns.

        `start` is the number of tokens before this forward, (B, 1) or an int. `keeps_state`: a cache keeps the state.
        """
        (B, T), restore = x_BTE.shape[:2], None
        if is_token is not None and T > 1:
            is_token = is_token.to(x_BTE.device)
            has_gap_B = (_is_gap(is_token, start)).any(1)
            is_padded = is_padded_left = has_gaps = True
            if can_read_back(x_BTE):
                flags = [~is_token.all(), ~is_token[:, 0].all(), has_gap_B.any()]
                is_padded, is_padded_left, has_gaps = torch.stack(flags).tolist()
            if is_padded:  # a NaN times the zero of a mask would be NaN
                x_BTE = x_BTE.masked_fill(~is_token[..., None], 0.0)
            if has_gaps:
                counted = torch.arange(T, device=x_BTE.device)
                order = torch.where(has_gap_B[:, None], (~is_token).to(torch.int8).argsort(dim=1, stable=True), counted)
                x_BTE, is_token, restore = reorder(x_BTE, order), reorder(is_token, order), order.argsort(1)
                position_ids = None if position_ids is None else reorder(position_ids.expand(B, T), order)
            # The causal mask hides padding after the last token.
            if not is_padded or not (is_padded_left or keeps_state):
                is_token = None
        if is_token is None:
            token_index = start + torch.arange(T, device=x_BTE.device)[None]
        else:
            token_index = start + (is_token.cumsum(1) - 1).clamp(min=0)
        if position_ids is None or is_counted(position_ids, token_index, is_token):
            return x_BTE, Columns(token_index, token_index, is_token, restore, is_one_document=True)
        return x_BTE, Columns(token_index, position_ids, is_token, restore, is_one_document=False)


def _is_gap(is_token_BT: torch.Tensor, start: torch.Tensor | int) -> torch.Tensor:
    """Return (B, T - 1) bool, True at the last padding of a gap between tokens (those of earlier forwards included)."""
    has_tokens_before = is_token_BT.cumsum(1) + start > 0
    return has_tokens_before[:, :-1] & ~is_token_BT[:, :-1] & is_token_BT[:, 1:]


def document_positions(
    position_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
    is_token: torch.Tensor | None,
    shape: tuple[int, int],
    cache: RecurrentGemmaCache | None = None,
) -> torch.Tensor | None:
    """Return position_ids, or the positions (B, T) that the other descriptions of packed documents imply:
    `cu_seq_lens_q` (documents + 1,), the start of each document and the end of the last, or `seq_idx` (B, T), each
    token's document number. Padding is not counted.

    Raises:
        ValueError: the description does not fit `shape`, (B, T), or `cache` holds earlier tokens, since it does not say
            whether the first document continues the last one in the cache.
    """
    ends, documents = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if position_ids is not None or (ends is None and documents is None):
        return position_ids
    B, T = shape
    if cache is not None and (seen := cache.get_seq_length()) > 0:
        raise ValueError(
            f"{'cu_seq_lens_q' if documents is None else 'seq_idx'} says where documents begin in these {T} columns, "
            f"but not which of them goes on with the {seen} that the cache has seen: give position_ids, 0 at the "
            "first token of each new document"
        )
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
    if is_token is None:
        is_token = torch.ones_like(columns, dtype=torch.bool)
    is_token = is_token.to(documents.device)
    last_token = torch.where(is_token, columns, -1).cummax(1).values
    before = F.pad(last_token[:, :-1], (1, 0), value=-1)
    begins = is_token & ((before < 0) | (documents != documents.gather(1, before.clamp(min=0))))
    token_index = (is_token.cumsum(1) - 1).clamp(min=0)
    return token_index - torch.where(begins, token_index, 0).cummax(1).values


def can_read_back(x: torch.Tensor) -> bool:
    """Tell whether values can be read: not under torch.compile, a transform or CUDA graph capture, nor on meta."""
    if torch.compiler.is_compiling() or is_transformed() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def may_look_at(x: torch.Tensor) -> bool:
    """Tell whether values may be read only to check them: on a CPU, since on a GPU this would synchronise."""
    return x.device.type == "cpu" and can_read_back(x)


def check_input(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, vocab_size: int, hidden_size: int
) -> None:
    """Raise ValueError unless exactly one input is given, with at least one token, of the model's width or ids."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    if given.ndim != (3 if input_ids is None else 2) or 0 in given.shape[:2]:
        raise ValueError(
            f"the input has shape {tuple(given.shape)}; it must be (batch, tokens) ids or (batch, tokens, width) "
            "embeddings with at least one token (an empty prompt needs at least its BOS token)"
        )
    if inputs_embeds is not None and inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds of shape {tuple(inputs_embeds.shape)} must end with hidden_size={hidden_size}")
    # On a GPU this would synchronise; the embedding's own assertion catches it there.
    if input_ids is not None and may_look_at(input_ids):
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids from {low.item()} to {high.item()} do not fit vocab_size={vocab_size}; is this the "
                "tokenizer of this model?"
            )


def check_positions(position_ids: torch.Tensor, is_token_BT: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Raise ValueError unless positions are (B or 1, T) and do not decrease within a document."""
    B, T = shape
    if position_ids.shape not in ((B, T), (1, T)):
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} must be ({B} or 1, {T})")
    if not may_look_at(position_ids):
        return
    position_BT = position_ids.expand(B, T)
    falls = (position_BT[:, 1:] < position_BT[:, :-1]) & (position_BT[:, 1:] != 0)  # from column t to t + 1
    if is_token_BT is not None:
        falls = falls & is_token_BT[:, 1:] & is_token_BT[:, :-1]
    if position_BT.amin() < 0 or falls.any():
        row, start = (falls if falls.any() else position_BT < 0).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} from column {start} on are {position_BT[row, start : start + 4].tolist()}: "
            "positions grow by one within a document, and a new document begins at position 0"
        )


def is_counted(position_BT: torch.Tensor, token_index_BT: torch.Tensor, is_token_BT: torch.Tensor | None) -> bool:
    """Tell whether positions (B or 1, T) equal token indices, as in a single document, so that nothing is masked.

    Return False, without a check, for one token, and on a GPU in training, where reading them would synchronise.
    """
    if position_BT.shape[1] == 1 or not can_read_back(position_BT):
        return False
    if position_BT.device.type != "cpu" and torch.is_grad_enabled():
        return False
    is_same = position_BT == token_index_BT
    return bool((is_same if is_token_BT is None else is_same | ~is_token_BT).all())


def first_tokens(
    like_BT: torch.Tensor, is_token: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return (B, T) bool, True at the first token of each document. It has no context to be predicted from, so it is
    excluded from the loss; a padded or packed batch then has the loss of its documents run separately."""
    first = torch.zeros_like(like_BT, dtype=torch.bool)
    if position_ids is not None:
        first |= position_ids.to(first.device) == 0
    if is_token is not None:
        first[:, 1:] |= ~is_token.to(first.device)[:, :-1]
    return first


def last_true(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the column of the last True of each row, (B, 1); 0 if there is none."""
    count = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
    return (tokens_BT * count).argmax(1, keepdim=True)


def reorder(x: torch.Tensor, index_BT: torch.Tensor | None, dim: int = 1) -> torch.Tensor:
    """Reorder dimension `dim` of x (B, ...) by index_BT (B, T); None changes nothing."""
    if index_BT is None:
        return x
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[dim] = index_BT.shape[1]
    size = list(x.shape)
    size[dim] = index_BT.shape[1]
    return x.gather(dim, index_BT.view(shape).expand(size))


def select_columns(x_BTE: torch.Tensor, which: torch.Tensor | int) -> torch.Tensor:
    """Return the last `which` columns (0: all), or those at the indices `which`, (n,) for all rows or (B, n)."""
    if isinstance(which, int):
        return x_BTE[:, -which:] if which else x_BTE
    return reorder(x_BTE, which) if which.ndim == 2 else x_BTE[:, which]


def selected(output_hidden_states: bool | int | list[int], count: int) -> set[int]:
    """Return which of `count` hidden states to return: all, none, or the given indices, negative ones from the end.

    Raises:
        ValueError: an index is out of range.
    """
    if isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
    if not all(isinstance(index, int) and -count <= index < count for index in indices):
        raise ValueError(f"output_hidden_states={output_hidden_states!r}: there are {count}, from 0 to {count - 1}")
    return {index % count for index in indices}


def reorder_attention(weights_BHTK: torch.Tensor, restore: torch.Tensor | None) -> torch.Tensor:
    """Reorder queries, and this forward's keys among all keys, to the caller's columns."""
    if restore is None:
        return weights_BHTK
    past = weights_BHTK.shape[3] - restore.shape[1]
    keys = torch.cat([torch.arange(past, device=restore.device).expand(restore.shape[0], -1), past + restore], dim=1)
    return reorder(reorder(weights_BHTK, restore, dim=2), keys, dim=3)
