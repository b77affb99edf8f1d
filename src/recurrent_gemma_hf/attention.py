"""Local attention: rotary positions, which keys a query sees, and the implementations that compute it.

Shapes: B batch, T queries, K keys, H heads, G key/value heads, N either of them, h head_dim, r half of the rotated
dimensions, W attention_window_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .inputs import InputMask

QUERY_BLOCK = 512  # queries per block of banded attention; the waste is block / window


class AttentionMask(NamedTuple):
    """Which keys a query sees: itself and those of its document at most W before it; by token index."""

    query_index: torch.Tensor  # (B or 1, T) int64
    key_index: torch.Tensor  # (B or 1, K) int64, negative where there is no key
    max_lookback: torch.Tensor  # (B or 1, T) int64: min(W, position)
    query_is_token: torch.Tensor | None  # (B, T) bool; None: padding cannot matter
    window: int
    query_offset: int | None  # query t is key query_offset + t; None: the keys are a ring, without order
    # No padding, one document, nothing cached: every row and every block of queries is masked alike.
    is_single_causal_block: bool
    in_sequence_order: bool  # the cache is to return the keys in order
    in_blocks: bool = False  # long enough for `attend_in_blocks`
    backend_mask: Any = None  # what the attention implementation gets: made once, for all layers

    def visible(self, queries: slice | None = None, keys: slice | None = None) -> torch.Tensor:
        """(B or 1, 1, T', K') bool for a block of queries and keys."""
        everything = slice(None)  # no default argument: torch 2.11 cannot compile one
        queries, keys = everything if queries is None else queries, everything if keys is None else keys
        key_index = self.key_index[:, None, keys]
        distance = self.query_index[:, queries, None] - key_index
        seen = (distance >= 0) & (distance <= self.max_lookback[:, queries, None]) & (key_index >= 0)
        if self.query_is_token is not None:
            # Padding sees everything: nobody reads its output, and a softmax over nothing would be NaN.
            seen = seen | ~self.query_is_token[:, queries, None]
        return seen[:, None]


def rotate(x_BNTh: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor) -> torch.Tensor:
    """RoPE on the first 2 r of h dimensions: pairs (i, i + r) turn by the angle of the token's position."""
    cos, sin = cos_BTr[:, None], sin_BTr[:, None]
    first, second, rest = x_BNTh.split([cos.shape[-1], cos.shape[-1], x_BNTh.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def eager_attention(
    q_BHTh: torch.Tensor, k_BGKh: torch.Tensor, v_BGKh: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by hand; returns the output (B, H, T, h) and the probabilities (B, H, T, K).

    The heads of a group share keys, so they are folded into the queries instead of repeating the keys.
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
    """The same by torch's fused kernels; `mask=None` means causal."""
    (B, H, T, h), G = q_BHTh.shape, k_BGKh.shape[1]
    if T == 1 and (mask is None or mask.shape[1] == 1):
        # One token: the heads of a group become the queries, and the keys are read once.
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
    """Linear cost in T: each block of queries meets the keys of its band alone.

    The bands are of one size, padded in front with keys that no query sees, so that `unfold` cuts them without a copy
    and its backward is linear too.
    """
    T, W = q_BHTh.shape[2], mask.window
    starts = range(0, T, QUERY_BLOCK)
    pad = (0, 0, W - mask.query_offset, len(starts) * QUERY_BLOCK - T)
    k_bands, v_bands = (F.pad(x, pad).unfold(2, W + QUERY_BLOCK, QUERY_BLOCK).unbind(2) for x in (k_BGKh, v_BGKh))
    outputs, inner = [], None
    for start, k_band, v_band in zip(starts, k_bands, v_bands, strict=True):
        size = min(QUERY_BLOCK, T - start)
        first_key = start + mask.query_offset - W  # may lie before the first key
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


LOCAL_IMPLEMENTATIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
}


def with_backend_mask(
    attention: AttentionMask, mask: InputMask, implementation: str, B: int, whole: bool
) -> AttentionMask:
    """Makes what the attention implementation reads; `whole`: all probabilities at once are wanted."""
    T, K = attention.max_lookback.shape[1], attention.key_index.shape[1]
    if mask.mask_4d is not None:
        return attention._replace(backend_mask=mask.mask_4d[..., mask.mask_4d.shape[3] - K :])
    if implementation == "flex_attention":
        return attention._replace(backend_mask=_flex_mask(attention, (B, T)))
    if "flash" in implementation:
        return attention._replace(backend_mask=_flash_mask(attention, B))
    if implementation in LOCAL_IMPLEMENTATIONS:
        if attention.query_offset is not None and attention.window + 2 * QUERY_BLOCK < K and not whole:
            return attention._replace(in_blocks=True)
        if implementation == "sdpa" and attention.is_single_causal_block and attention.window >= T - 1:
            return attention  # the window reaches every earlier key: plainly causal
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


def _flash_mask(attention: AttentionMask, batch_size: int) -> torch.Tensor | None:
    """(B, K) bool or None, all that flash attention takes; what that cannot say is refused."""
    if not attention.is_single_causal_block and (attention.query_offset != 0 or batch_size > 1):
        hidden = attention.max_lookback < attention.query_index.clamp(max=attention.window)
        if attention.query_is_token is not None:
            hidden = hidden & attention.query_is_token
        if hidden.any():
            raise ValueError(
                "flash attention keeps packed documents apart only in one row and without a cache; use "
                "attn_implementation='sdpa' or 'flex_attention'"
            )
    has_gaps = attention.key_index < 0
    return ~has_gaps if has_gaps.any() else None
