"""Local attention: rotary position embedding, masks, and the implementations that compute it.

Shapes: B batch, T queries, K keys, H heads, G key/value heads, N heads of either kind, h head_dim, r half of the
rotated dimensions, W attention_window_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .inputs import Columns, InputMask

QUERY_BLOCK = 512  # queries per block of banded attention; the extra work is about block / window


class AttentionMask(NamedTuple):
    """The keys that a query attends to: itself and those of its document at most W tokens before it."""

    query_index: torch.Tensor  # (B or 1, T) int64
    key_index: torch.Tensor  # (B or 1, K) int64, negative where there is no key
    max_lookback: torch.Tensor  # (B or 1, T) int64: min(W, position, tokens before)
    query_is_token: torch.Tensor | None  # (B, 1) bool of a single query; None: a token, or padding that sees itself
    window: int
    query_offset: int | None  # query t is key query_offset + t; None: the keys are an unordered ring buffer
    # No padding, one document, empty cache: the mask is the same for every row and every block of queries.
    is_single_causal_block: bool
    has_documents: bool  # masked keys may belong to another document
    in_blocks: bool = False  # long enough for `attend_in_blocks`
    backend_mask: Any = None  # the attention implementation's mask, made once for all layers

    @staticmethod
    def local(columns: Columns, seen: int, window: int) -> AttentionMask:
        """Make the mask for keys in sequence order: up to W of the `seen` earlier columns, then those of this forward.

        A row's tokens are contiguous, so distances in tokens are distances in columns. `max_lookback` excludes padding
        in front of the first token, and keys that the cache does not hold yet.
        """
        T, before = columns.token_index.shape[1], min(window, seen)
        index = torch.arange(before + T, device=columns.token_index.device)[None]
        is_plain = columns.is_one_document and columns.is_token is None and seen == 0
        lookback, has_documents = _max_lookback(columns, window), not columns.is_one_document
        return AttentionMask(index[:, before:], index, lookback, None, window, before, is_plain, has_documents)

    @staticmethod
    def of_ring(columns: Columns, slot_token_indices_BS: torch.Tensor, window: int) -> AttentionMask:
        """Make the mask of one query for the slots of the cache's ring buffer."""
        keys = slot_token_indices_BS.to(columns.token_index.device)
        lookback, has_documents = _max_lookback(columns, window), not columns.is_one_document
        return AttentionMask(columns.token_index, keys, lookback, columns.is_token, window, None, False, has_documents)

    @property
    def in_sequence_order(self) -> bool:
        """Tell whether the cache is to return the keys in sequence order."""
        return self.query_offset is not None

    def visible(self, queries: slice | None = None, keys: slice | None = None) -> torch.Tensor:
        """Return the mask of a block of queries and keys, (B or 1, 1, T', K') bool."""
        everything = slice(None)  # not a default argument, which torch 2.11 cannot compile
        queries, keys = everything if queries is None else queries, everything if keys is None else keys
        key_index = self.key_index[:, None, keys]
        distance = self.query_index[:, queries, None] - key_index
        seen = (distance >= 0) & (distance <= self.max_lookback[:, queries, None]) & (key_index >= 0)
        if self.query_is_token is not None:
            # Padding attends to everything: its output is not used, and a softmax over no keys would be NaN.
            seen = seen | ~self.query_is_token[:, queries, None]
        return seen[:, None]

    def without_broken(self, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return q, k and v with zeros in tokens that are not finite, and (B, 1, T, 1) bool, True at the queries that
        see such a token, whose output is NaN. A masked key weighs 0, but 0 times NaN is NaN, in every document."""
        broken_q, *broken_kv = (~x.isfinite().all(3).all(1) for x in qkv)
        broken_k = broken_kv[0] | broken_kv[1]
        if self.query_offset is None:
            is_broken_BT = (self.visible()[:, 0] & broken_k[:, None]).any(2)
        else:  # the keys that a query sees are one run of columns
            count = F.pad(broken_k.cumsum(1), (1, 0))
            first, last = (self.query_index - self.max_lookback).clamp(min=0), self.query_index + 1
            first, last = (count.gather(1, index.expand(len(count), -1)) for index in (first, last))
            is_broken_BT = last > first
        is_broken_BT = is_broken_BT | broken_q
        q, k, v = (
            x.masked_fill(broken[:, None, :, None], 0.0)
            for x, broken in zip(qkv, (broken_q, broken_k, broken_k), strict=True)
        )
        return q, k, v, is_broken_BT[:, None, :, None]


def _max_lookback(columns: Columns, window: int) -> torch.Tensor:
    lookback = columns.position
    if not columns.is_one_document:
        lookback = torch.minimum(lookback, columns.token_index)
    return lookback.clamp(max=window)


def rotary_angles(position: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    """Return the angles (..., rotary_dim / 2) of positions (...), float32; no table limits the length."""
    r = rotary_dim // 2
    exponent = torch.arange(r, device=position.device, dtype=torch.float32) / max(r, 1)
    # Multiply by the reciprocal as the official code does: division changes the last bits of angles at large positions.
    return position[..., None].float() * (1.0 / theta**exponent)


def rotate(x_BNTh: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to the first 2 r of h dimensions: rotate each pair (i, i + r) by the angle of the token's position."""
    cos, sin = cos_BTr[:, None], sin_BTr[:, None]
    first, second, rest = x_BNTh.split([cos.shape[-1], cos.shape[-1], x_BNTh.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def eager_attention(
    q_BHTh: torch.Tensor, k_BGKh: torch.Tensor, v_BGKh: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention by matmuls and softmax; return the output (B, H, T, h) and the probabilities (B, H, T, K).

    The heads of a group share keys, so they are folded into the queries; keys are not repeated.
    """
    (B, H, T, h), (G, K) = q_BHTh.shape, k_BGKh.shape[1:3]
    scores = torch.matmul(q_BHTh.reshape(B, G, H // G * T, h), k_BGKh.transpose(2, 3)).view(B, H, T, K) * h**-0.5
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    probabilities = F.dropout(probabilities.to(q_BHTh.dtype), dropout)
    out = torch.matmul(probabilities.view(B, G, H // G * T, K), v_BGKh).view(B, H, T, h)
    return out, probabilities


def sdpa_attention(
    q_BHTh: torch.Tensor, k_BGKh: torch.Tensor, v_BGKh: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, None]:
    """Compute attention by torch's fused kernels; `mask=None` means causal."""
    (B, H, T, h), G = q_BHTh.shape, k_BGKh.shape[1]
    if T == 1 and (mask is None or mask.shape[1] == 1):
        # One token: the heads of a group become the queries, so that the keys are read once.
        q = q_BHTh.reshape(B, G, H // G, h)
        out = F.scaled_dot_product_attention(q, k_BGKh, v_BGKh, attn_mask=mask, dropout_p=dropout)
        return out.reshape(B, H, 1, h), None
    k, v = (
        x[:, :, None].expand(-1, -1, H // G, -1, -1).flatten(1, 2) if G > 1 else x.expand(-1, H, -1, -1)
        for x in (k_BGKh, v_BGKh)
    )
    return F.scaled_dot_product_attention(q_BHTh, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None), None


def attend_in_blocks(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    q_BHTh: torch.Tensor,
    k_BGKh: torch.Tensor,
    v_BGKh: torch.Tensor,
    mask: AttentionMask,
    dropout: float,
) -> torch.Tensor:
    """Compute banded attention: each block of queries attends to the keys of its band only, at linear cost in T.

    The bands have one size, with masked keys in front of the first, so that `unfold` makes them without a copy and its
    backward is linear too.
    """
    T, W = q_BHTh.shape[2], mask.window
    starts = range(0, T, QUERY_BLOCK)
    pad = (0, 0, W - mask.query_offset, len(starts) * QUERY_BLOCK - T)
    k_bands, v_bands = (F.pad(x, pad).unfold(2, W + QUERY_BLOCK, QUERY_BLOCK).unbind(2) for x in (k_BGKh, v_BGKh))
    outputs, inner = [], None
    for start, k_band, v_band in zip(starts, k_bands, v_bands, strict=True):
        size = min(QUERY_BLOCK, T - start)
        first_key = start + mask.query_offset - W  # negative in front of the first key
        is_inner = mask.is_single_causal_block and first_key >= 0 and size == QUERY_BLOCK
        if is_inner and inner is not None:
            visible = inner
        else:
            keys = slice(max(0, first_key), first_key + W + size)
            visible = F.pad(mask.visible(slice(start, start + size), keys), (max(0, -first_key), 0))
            inner = visible if is_inner else inner
        k, v = (band.transpose(2, 3)[:, :, : W + size] for band in (k_band, v_band))
        outputs.append(attend(q_BHTh[:, :, start : start + size], k, v, visible, dropout)[0])
    return torch.cat(outputs, dim=2)


def attend_locally(
    implementation: str,
    q_BHTh: torch.Tensor,
    k_BGKh: torch.Tensor,
    v_BGKh: torch.Tensor,
    mask: AttentionMask,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention by one of `LOCAL_IMPLEMENTATIONS`; return the output (B, T, H, h) and its probabilities."""
    attend = LOCAL_IMPLEMENTATIONS[implementation]
    if mask.in_blocks:
        out, weights = attend_in_blocks(attend, q_BHTh, k_BGKh, v_BGKh, mask, dropout), None
    else:
        out, weights = attend(q_BHTh, k_BGKh, v_BGKh, mask.backend_mask, dropout)
    return out.transpose(1, 2), weights


LOCAL_IMPLEMENTATIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
}


def with_backend_mask(
    attention: AttentionMask,
    columns: Columns,
    past_lengths_B: torch.Tensor | None,
    mask_4d: torch.Tensor | None,
    implementation: str,
    batch_size: int,
    wants_probabilities: bool,
) -> AttentionMask:
    """Return `attention` with the mask that the attention implementation reads, or marked for `attend_in_blocks`."""
    T, K = attention.max_lookback.shape[1], attention.key_index.shape[1]
    if mask_4d is not None:
        return attention._replace(backend_mask=mask_4d[..., mask_4d.shape[3] - K :], has_documents=False)
    if implementation == "flex_attention":
        return attention._replace(backend_mask=_flex_mask(attention, (batch_size, T)))
    if "flash" in implementation:
        return attention._replace(backend_mask=_flash_mask(columns, past_lengths_B, K, batch_size))
    if implementation in LOCAL_IMPLEMENTATIONS:
        is_long = attention.window + 2 * QUERY_BLOCK < K
        if attention.in_sequence_order and is_long and not wants_probabilities:
            return attention._replace(in_blocks=True)
        if implementation == "sdpa" and attention.is_single_causal_block and attention.window >= T - 1:
            return attention  # the window covers all earlier keys, so the mask is causal
    return attention._replace(backend_mask=attention.visible())


def _flex_mask(attention: AttentionMask, shape: tuple[int, int]) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = shape
    query, key, max_lookback = (
        x.expand(B, -1).contiguous() for x in (attention.query_index, attention.key_index, attention.max_lookback)
    )
    query_ok = attention.query_is_token

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = query[b, q] - key[b, k]
        seen = (distance >= 0) & (distance <= max_lookback[b, q]) & (key[b, k] >= 0)
        return seen if query_ok is None else seen | ~query_ok[b, q]

    return create_block_mask(sees, B, None, T, key.shape[1], device=query.device)


def check_attention(config: RecurrentGemmaConfig, mask: InputMask, T: int, has_cache: bool) -> None:
    """Raise ValueError for a 4D mask that the attention implementation cannot take."""
    implementation = config._attn_implementation
    if mask.mask_4d is None or "attention" not in config.layers_block_type:
        return
    if implementation not in LOCAL_IMPLEMENTATIONS:
        raise ValueError(f"a 4D attention_mask needs attn_implementation 'eager' or 'sdpa', not {implementation!r}")
    K = T + (min(config.attention_window_size, mask.seen) if has_cache else 0)
    if mask.mask_4d.shape[2] != T or not K <= mask.mask_4d.shape[3] <= max(K, mask.seen + T):
        raise ValueError(
            f"a 4D attention_mask of shape {tuple(mask.mask_4d.shape)} must be (batch or 1, heads or 1, {T}, {K})"
        )
    hidden = mask.mask_4d[..., : mask.mask_4d.shape[3] - K]
    if (hidden if hidden.dtype == torch.bool else hidden > torch.finfo(hidden.dtype).min / 2).any():
        raise ValueError(
            f"the 4D attention_mask shows keys that the cache no longer holds: it keeps the last {K - T} "
            "(attention_window_size); mask the earlier ones"
        )


def check_flash(columns: Columns, window: int, has_past: bool) -> None:
    """Raise ValueError for packed documents in several rows or with a cache, which flash attention cannot separate."""
    if columns.is_one_document or (not has_past and columns.position.shape[0] == 1):
        return
    is_apart = columns.position.clamp(max=window) < columns.token_index.clamp(max=window)
    if columns.is_token is not None:
        is_apart = is_apart & columns.is_token
    if is_apart.any():
        raise ValueError(
            "flash attention separates packed documents only in one row and without a cache; use "
            "attn_implementation='sdpa' or 'flex_attention'"
        )


def _flash_mask(columns: Columns, past_lengths_B: torch.Tensor | None, K: int, batch_size: int) -> torch.Tensor | None:
    """Return the padding mask of flash attention, (B, K) bool, False where there is no key; None: no padding."""
    is_token, device = columns.is_token, columns.token_index.device
    before = K - columns.token_index.shape[1]
    if past_lengths_B is None or not before:
        return is_token
    is_past = torch.arange(-before, 0, device=device) >= -past_lengths_B.to(device)[:, None]
    if is_token is None:
        if is_past.all():
            return None
        is_token = torch.ones((batch_size, K - before), dtype=torch.bool, device=device)
    return torch.cat([is_past, is_token], dim=1)
