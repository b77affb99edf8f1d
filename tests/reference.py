"""The inside of the recurrent block line by line as the paper has it: plain torch over the loop in time.

Shape suffixes: B batch, T time, F = T or K - 1 + T, D lru_width, H heads, d = D / H, K conv taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from recurrent_gemma_hf.rg_lru import RG_LRU_C, RgLruParameters, bounded_sqrt
from recurrent_gemma_hf.scan import linear_recurrence_reference


def conv(u_BFD: Tensor, weight_D1K: Tensor, bias_D: Tensor, conv_tap_mask_BTK: Tensor | None, past: int) -> Tensor:
    K, T = weight_D1K.shape[2], u_BFD.shape[1] - past
    full = F.pad(u_BFD, (0, 0, K - 1 - past, 0))
    out = bias_D
    for tap in range(K):
        seen = full[:, tap : tap + T]
        if conv_tap_mask_BTK is not None:
            seen = torch.where(conv_tap_mask_BTK[..., tap, None], seen, 0.0)
        out = out + seen * weight_D1K[:, 0, tap]
    return out


def rg_lru(
    x_BTD: Tensor,
    y_BTD: Tensor,
    parameters: RgLruParameters,
    h0_BD: Tensor | None = None,
    reset_BT: Tensor | None = None,
    is_padding_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu(y) * RG-LRU(x) and the last state, in the dtype of x."""
    r_weight, r_bias, i_weight, i_bias, lambda_D = parameters
    heads = x_BTD.unflatten(2, r_weight.shape[:2])
    r = torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, r_weight) + r_bias).flatten(2)
    i = torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, i_weight) + i_bias).flatten(2)
    log_a = -RG_LRU_C * r * F.softplus(lambda_D)
    a, multiplier = log_a.exp(), bounded_sqrt(1.0 - torch.exp(2.0 * log_a))
    if reset_BT is not None:
        a, multiplier = a.masked_fill(reset_BT[..., None], 0.0), multiplier.masked_fill(reset_BT[..., None], 1.0)
    gated = multiplier * i * x_BTD
    if is_padding_BT is not None:
        a, gated = a.masked_fill(is_padding_BT[..., None], 1.0), gated.masked_fill(is_padding_BT[..., None], 0.0)
    states, last = linear_recurrence_reference(gated, a, h0_BD)
    return states * F.gelu(y_BTD, approximate="tanh"), last
