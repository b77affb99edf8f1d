"""The next-token loss from hidden states, without the full logits.

The logits of 8192 tokens with a vocabulary of 256,000 take 8.4 GB in float32, and the usual loss holds several such
tensors. Here only one block of logits exists at a time: blocks of tokens for the losses and the gradient of the hidden
states, blocks of the vocabulary for the gradient of the weight, so that one matmul sums each of its rows over all
tokens, as accurately as the usual loss does. The logits are computed twice if the weight is trained, once if it is
frozen (LoRA). Tokens without a label cost nothing.

Shapes: B batch, T tokens, N = B T, n tokens with a label, R tokens of a block, E hidden_size, V vocabulary, v
vocabulary entries of a block.
"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import is_transformed

IGNORE_INDEX = -100

# Elements of one block of logits: 0.5 GB in float32; two or three blocks exist at a time. At V = 256,000 a block has
# 524 tokens, enough for the matmul to be compute-bound.
BLOCK_ELEMENTS = 2**27

# Each copy of this file registers operators under its own module name, as scan.py does.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


def linear_cross_entropy(
    x_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    *,
    soft_cap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Compute the cross entropy of each token, (N,) float32, from `soft_cap * tanh(x weight^T / soft_cap)` (0: no cap).

    Equals `F.cross_entropy(logits.float(), labels, reduction="none")` in value and gradient. Soft cap and softmax are
    in float32, also where the model's forward rounds the capped logits to bfloat16. Differentiable once in x and
    weight; to any order under transforms of torch.func, where all logits are computed. Inside torch.autocast the
    matmuls run in the autocast dtype, as in `F.linear`.

    Args:
        x_NE: hidden states, bfloat16, float16, float32 or float64 (then everything is float64).
        weight_VE: rows of the head, of the same dtype.
        labels_N: int64 token ids; `ignore_index` gives loss 0 and no gradient.
        soft_cap: c of c tanh(logits / c).
        label_smoothing: share of the target that is spread evenly over the vocabulary, as in `F.cross_entropy`.
        ignore_index: the label of tokens that are not predicted.

    Raises:
        ValueError: a label outside the vocabulary, shapes that do not match, or a label_smoothing outside 0 to 1.
    """
    if x_NE.ndim != 2 or labels_N.shape != x_NE.shape[:1] or weight_VE.shape[1:] != x_NE.shape[1:]:
        raise ValueError(
            f"hidden states {tuple(x_NE.shape)}, weight {tuple(weight_VE.shape)} and labels {tuple(labels_N.shape)} "
            "must be (N, E), (V, E) and (N,)"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing!r} must be from 0 to 1")
    device = x_NE.device.type
    can_autocast = torch.amp.is_autocast_available(device)  # the meta device cannot
    if can_autocast and torch.is_autocast_enabled(device) and x_NE.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_NE, weight_VE = x_NE.to(dtype), weight_VE.to(dtype)
    labels_N = labels_N.to(x_NE.device)
    how: dict[str, Any] = dict(
        soft_cap=float(soft_cap), label_smoothing=float(label_smoothing), ignore_index=ignore_index
    )
    if is_transformed():
        return _plain_losses(F.linear(x_NE, weight_VE), labels_N, **how)
    want_gradient = torch.is_grad_enabled() and x_NE.requires_grad
    return _token_losses(x_NE, weight_VE, labels_N, **how, want_gradient=want_gradient)[0]


def _plain_losses(
    logits: Tensor, labels_R: Tensor, soft_cap: float, label_smoothing: float, ignore_index: int
) -> Tensor:
    """Compute the losses (R,) from logits (R, V), in float32 or float64."""
    logits = soft_capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), soft_cap)
    return F.cross_entropy(
        logits, labels_R, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise ValueError, naming the range of the labels, if one is neither in the vocabulary nor `ignore_index`."""
    ids = labels[labels != ignore_index]
    if ids.numel() and (ids.amin() < 0 or ids.amax() >= vocab_size):
        raise ValueError(
            f"labels from {ids.amin().item()} to {ids.amax().item()} do not fit vocab_size={vocab_size} (ids from "
            f"0 to {vocab_size - 1}, or {ignore_index} for tokens not to be predicted); is this the tokenizer of this "
            "model?"
        )


# ---------------------------------------------------------------- the operators


def _capped(logits: Tensor, soft_cap: float) -> tuple[Tensor, Tensor | None]:
    """Return the capped logits in float32 (or float64) and the derivative of the cap, None without one; overwrites
    `logits`."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not soft_cap:
        return z, None
    tanh = z.div_(soft_cap).tanh_()
    z = tanh * soft_cap
    return z, tanh.square_().neg_().add_(1.0)


def _logit_gradient(p: Tensor, slope: Tensor | None, labels: Tensor, label_smoothing: float, V: int) -> Tensor:
    """Compute d loss / d logits from the probabilities p, in place; a label outside the columns of p adds no target."""
    here = (labels >= 0) & (labels < p.shape[1])
    target = here.to(p.dtype).mul_(label_smoothing - 1.0)
    p.scatter_add_(1, labels.clamp(0, p.shape[1] - 1)[:, None], target[:, None])
    if label_smoothing:
        p.sub_(label_smoothing / V)
    return p if slope is None else p.mul_(slope)


@torch.library.custom_op(f"{_NAMESPACE}::token_losses", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _token_losses(
    x_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    soft_cap: float,
    label_smoothing: float,
    ignore_index: int,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,), log sum exp of the logits (N,) and, if wanted, d loss_n / d x_n (N, E); all are 0 for
    tokens without a label."""
    V = weight_VE.shape[0]
    check_labels(labels_N, V, ignore_index)
    dtype = torch.promote_types(x_NE.dtype, torch.float32)
    losses_N, lse_N = (torch.zeros(len(x_NE), dtype=dtype, device=x_NE.device) for _ in range(2))
    grad_NE = torch.zeros(x_NE.shape if want_gradient else (0, 0), dtype=dtype, device=x_NE.device)
    labelled_n = (labels_N != ignore_index).nonzero()[:, 0]
    with torch.autocast(x_NE.device.type, enabled=False):
        for rows_R in labelled_n.split(max(1, BLOCK_ELEMENTS // V)):
            labels_R = labels_N[rows_R]
            z_RV, slope_RV = _capped(x_NE[rows_R] @ weight_VE.t(), soft_cap)
            target_R = z_RV.gather(1, labels_R[:, None])[:, 0]
            if label_smoothing:
                target_R = torch.lerp(target_R, z_RV.mean(1), label_smoothing)
            largest_R1 = z_RV.amax(1, keepdim=True)
            p_RV = z_RV.sub_(largest_R1).exp_()
            sum_R1 = p_RV.sum(1, keepdim=True)
            lse_R = (largest_R1 + sum_R1.log())[:, 0]
            losses_N[rows_R] = lse_R - target_R
            lse_N[rows_R] = lse_R
            if want_gradient:
                p_RV = _logit_gradient(p_RV.div_(sum_R1), slope_RV, labels_R, label_smoothing, V)
                grad_NE[rows_R] = (p_RV.to(x_NE.dtype) @ weight_VE).to(dtype)
    return losses_N, lse_N, grad_NE


@torch.library.custom_op(f"{_NAMESPACE}::weight_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _weight_gradient(
    grad_N: Tensor,
    x_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    soft_cap: float,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Return the gradient of sum(grad_N * losses) with respect to the weight, (V, E)."""
    V = weight_VE.shape[0]
    labelled_n = (labels_N != ignore_index).nonzero()[:, 0]
    x_nE, labels_n = x_NE[labelled_n], labels_N[labelled_n]
    lse_n1, grad_n1 = lse_N[labelled_n, None], grad_N[labelled_n, None]
    out_VE = torch.empty_like(weight_VE, memory_format=torch.contiguous_format)
    size = max(1, BLOCK_ELEMENTS // max(1, len(x_nE)))
    with torch.autocast(x_NE.device.type, enabled=False):
        for start in range(0, V, size):
            z_nv, slope_nv = _capped(x_nE @ weight_VE[start : start + size].t(), soft_cap)
            p_nv = z_nv.sub_(lse_n1).exp_()
            p_nv = _logit_gradient(p_nv, slope_nv, labels_n - start, label_smoothing, V).mul_(grad_n1)
            torch.mm(p_nv.to(x_nE.dtype).t(), x_nE, out=out_VE[start : start + size])
    return out_VE


@_token_losses.register_fake
def _(
    x_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    soft_cap: float,
    label_smoothing: float,
    ignore_index: int,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses_N = x_NE.new_empty(x_NE.shape[:1], dtype=torch.promote_types(x_NE.dtype, torch.float32))
    return losses_N, torch.empty_like(losses_N), losses_N.new_empty(x_NE.shape if want_gradient else (0, 0))


@_weight_gradient.register_fake
def _(grad_N: Tensor, x_NE: Tensor, weight_VE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight_VE, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_NE, weight_VE, labels_N, ctx.soft_cap, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    ctx.x_dtype = x_NE.dtype
    ctx.set_materialize_grads(False)
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    for_weight = (x_NE, weight_VE, labels_N, output[1]) if needs_weight else (None,) * 4
    ctx.save_for_backward(output[2] if needs_x else None, *for_weight)


def _gradient(ctx: Any, grad_N: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the loss without logits can be differentiated once; for create_graph=True compute it from the logits: "
            "call model.eval() first, or apply a loss function to model(...).logits"
        )
    unit_NE, x_NE, weight_VE, labels_N, lse_N = ctx.saved_tensors
    grad_x = grad_weight = None
    if grad_N is not None and ctx.needs_input_grad[0]:
        grad_x = (unit_NE * grad_N[:, None]).to(ctx.x_dtype)
    if grad_N is not None and ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(
            grad_N, x_NE, weight_VE, labels_N, lse_N, ctx.soft_cap, ctx.label_smoothing, ctx.ignore_index
        )
    return grad_x, grad_weight, None, None, None, None, None


_token_losses.register_autograd(_gradient, setup_context=_save)


# ---------------------------------------------------------------- heads that are more than one weight


def chunked_cross_entropy(
    head: Any,
    x_NE: Tensor,
    labels_N: Tensor,
    vocab_size: int,
    *,
    soft_cap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Compute `linear_cross_entropy` for any callable head that returns logits (with LoRA, sharded), in blocks of
    tokens that the backward pass recomputes."""

    def losses(x_RE: Tensor, labels_R: Tensor) -> Tensor:
        return _plain_losses(head(x_RE), labels_R, soft_cap, label_smoothing, ignore_index)

    labels_N = labels_N.to(x_NE.device)
    if is_transformed():  # transforms do not support checkpoints
        return losses(x_NE, labels_N)
    if labels_N.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels_N, vocab_size, ignore_index)
    size = max(1, BLOCK_ELEMENTS // vocab_size)
    blocks = zip(x_NE.split(size), labels_N.split(size), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(losses, x, y, use_reentrant=False) for x, y in blocks])


# ---------------------------------------------------------------- the loss of a language model


def soft_capped(logits: Tensor, soft_cap: float) -> Tensor:
    """Compute soft_cap tanh(logits / soft_cap); 0: no cap."""
    return torch.tanh(logits / soft_cap) * soft_cap if soft_cap else logits


def next_token_loss(
    head: Any,
    x_BTE: Tensor,
    labels_BT: Tensor,
    vocab_size: int,
    is_weight: bool,
    soft_cap: float,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of Transformers' `ForCausalLMLoss`, () in float32, from hidden states instead of logits.

    Args:
        head: called with hidden states and labels if it is one weight, else with hidden states, block by block.
        x_BTE: hidden states.
        labels_BT: int64; position t predicts label t + 1.
        vocab_size: V, number of logits.
        is_weight: whether the head is one weight without a bias.
        soft_cap: see `linear_cross_entropy`, also for ignore_index and label_smoothing.
        num_items_in_batch: divisor of the sum of the losses; None: the number of targets.
        shift_labels: (B, T) int64, the target of each position, in place of the labels.
        kwargs: ignored.
    """
    targets = F.pad(labels_BT[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    x_NE, targets_N = x_BTE.flatten(0, 1), targets.flatten()
    how: dict[str, Any] = dict(soft_cap=soft_cap, label_smoothing=label_smoothing, ignore_index=ignore_index)
    if is_weight:
        losses_N = head(x_NE, targets_N, **how)
    else:
        losses_N = chunked_cross_entropy(head, x_NE, targets_N, vocab_size, **how)
    if num_items_in_batch is None:
        num_items_in_batch = (targets_N != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses_N.device)
    return losses_N.sum() / num_items_in_batch


__all__ = ["check_labels", "chunked_cross_entropy", "linear_cross_entropy", "next_token_loss", "soft_capped"]
