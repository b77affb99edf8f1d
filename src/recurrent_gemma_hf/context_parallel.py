"""Context parallelism: one long sequence over several ranks, each with a contiguous chunk of it.

    batch = shard_sequence({"input_ids": ids, "labels": ids}, group)  # the same whole batch on every rank of the group
    loss = model(**batch).loss  # the loss of the whole sequence, on every rank
    loss.backward()  # gradients to be averaged over the ranks, as DDP and FSDP do

What a chunk needs from earlier chunks has a constant size for any length of sequence: a recurrent layer needs the state
and the last K - 1 inputs of its convolution, an attention layer the last W keys and values (of several ranks if a chunk
is shorter than W). No rank waits for the scan of another: the recurrence is linear in the state that enters a chunk, h
-> decay * h + end, so each rank computes decay and end of its chunk, all ranks exchange them at once, and each scans
again from its incoming state; the backward pass does the same in the other direction. This costs one more pass over the
chunk, a few per cent of the layer's arithmetic. Passing the state from rank to rank would save that pass, but N ranks
in a chain wait for N - 1 scans: once per training step, or once per layer under FSDP, whose collectives keep the ranks
at the same layer.

Shapes: B batch, T tokens of the whole sequence, C = T / N tokens of a chunk, N ranks, D lru_width, G key/value heads,
h head_dim, K conv1d_width, W attention_window_size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .cross_entropy import IGNORE_INDEX
from .inputs import check_positions, document_positions, first_tokens, is_counted, token_columns
from .scan import exact_zeros, linear_recurrence, seen

_HASHED = 1 << 24  # elements that are hashed at a time
_SEGMENT = 4096  # tokens whose decays exist at a time in the backward pass

_KNOWN_KEYS = (
    "input_ids", "inputs_embeds", "labels", "position_ids", "attention_mask", "num_items_in_batch",
    "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",  # other descriptions of documents
)  # fmt: skip


def shard_sequence(batch: Mapping[str, Any], group: dist.ProcessGroup | DeviceMesh) -> dict[str, Any]:
    """Return this rank's chunk of a batch of long sequences, as keyword arguments of `RecurrentGemmaForCausalLM`.

    Args:
        batch: the same on every rank of the group. input_ids (B, T) int64 or inputs_embeds (B, T, E); optionally labels
            (B, T), not shifted; position_ids (B or 1, T), where a 0 begins a document, or the document keys of
            `DataCollatorWithFlattening`; attention_mask (B, T) with padding on the right only; num_items_in_batch, the
            divisor of the sum of the losses (by default the number of targets).
        group: the ranks that share the sequence, in order: a process group or a mesh of one dimension.

    Returns:
        The chunk, (B, T / N) of each tensor, with `shift_labels` (the target of a chunk's last token is the next
        chunk's first label), `num_items_in_batch` and a `SequenceShard`. The model's loss is that of the whole
        sequence.

    Raises:
        ValueError: T is not a multiple of the number of ranks, padding is not on the right, the attention_mask is 4D, a
            key is unknown, or the batch differs between the ranks.
    """
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    _check_same_batch(batch, group)
    unknown = sorted(set(batch) - set(_KNOWN_KEYS))
    if unknown:
        raise ValueError(f"shard_sequence cannot split {', '.join(unknown)}; it takes {', '.join(_KNOWN_KEYS)}")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError(f"the batch has {', '.join(sorted(batch))}; it needs input_ids or inputs_embeds")
    B, T = tokens.shape[:2]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if T % ranks:
        raise ValueError(
            f"{T} tokens cannot be split evenly over {ranks} ranks; pad them on the right to {-(-T // ranks) * ranks} "
            f"(pad_to_multiple_of={ranks}), with labels of {IGNORE_INDEX}"
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    _check_mask(mask, (B, T))
    is_token = token_columns(mask, T)
    positions = document_positions(batch.get("position_ids"), dict(batch), is_token, (B, T))
    shard = SequenceShard(group, rank, ranks, rank * (T // ranks), T // ranks)
    whole = {name: batch[name] for name in ("input_ids", "inputs_embeds", "labels") if batch.get(name) is not None}
    if positions is not None:
        check_positions(positions, is_token, (B, T))
        if not is_counted(positions, torch.arange(T, device=positions.device), None):  # else it is one document
            whole["position_ids"] = positions
    if labels is not None:
        if labels.shape != (B, T):
            raise ValueError(f"labels of shape {tuple(labels.shape)} must be one per token, ({B}, {T})")
        targets = labels.masked_fill(first_tokens(labels, is_token, positions), IGNORE_INDEX)
        whole["shift_labels"] = F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)
    sharded: dict[str, Any] = {
        name: tensor.narrow(1, shard.offset, shard.length).contiguous() for name, tensor in whole.items()
    }
    if labels is not None:
        items = batch.get("num_items_in_batch")
        sharded["num_items_in_batch"] = (whole["shift_labels"] != IGNORE_INDEX).sum() if items is None else items
    return {**sharded, "sequence_shard": shard}


def _check_mask(mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
    if mask is None:
        return
    if mask.ndim != 2 or mask.shape != shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} must be {shape}: a sequence over several ranks takes no "
            "other masks; position_ids separate documents"
        )
    if (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        raise ValueError(
            "the attention_mask has padding before tokens; pad a sequence over several ranks on the right "
            "(tokenizer.padding_side = 'right'), or pack it with position_ids"
        )


def _check_same_batch(batch: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Raise ValueError if the ranks' batches differ in anything: their chunks would not form one sequence.

    Before every other check, so that no rank waits for one that raised an error.
    """
    about = [(name, (*x.shape, x.dtype) if isinstance(x, torch.Tensor) else x) for name, x in sorted(batch.items())]
    total = zlib.crc32(repr(about).encode()) + sum(_checksum(x) for x in batch.values() if isinstance(x, torch.Tensor))
    # A device that the group's backend can send from; the batch may not be there yet.
    device = torch.device("cpu") if "gloo" in dist.get_backend(group) else torch.accelerator.current_accelerator()
    own = torch.tensor([total % 2**63], device=device)
    seen = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(seen, own, group=group)
    differing = [rank for rank, other in enumerate(seen) if not torch.equal(other, seen[0])]
    if differing:
        raise ValueError(
            f"ranks {differing} of the group were given another batch than rank 0; give all ranks of the group the "
            "same batch (for example by seeding their samplers alike)"
        )


def _checksum(x: torch.Tensor) -> int:
    """Sum the bits of all elements, each times pseudo-random 64 bits of its position (splitmix64), modulo 2^64."""
    bits = x.detach().contiguous().flatten()
    if bits.is_floating_point():
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = 0
    for start in range(0, len(bits), _HASHED):
        part = bits[start : start + _HASHED].long()
        weights = torch.arange(start + 1, start + 1 + len(part), device=x.device) * -0x61C8864680B583EB
        weights = (weights ^ (weights >> 31)) * -0x40A7B892E31B1A47
        total += int((part * (weights ^ (weights >> 29))).sum())
    return total


@dataclass(frozen=True)
class SequenceShard:
    """This rank's chunk of a sequence, and the communication with the other ranks.

    `shard_sequence` makes it. The model's layers call its methods, in the same order on every rank.
    """

    group: dist.ProcessGroup
    rank: int  # in the group
    ranks: int
    offset: int  # tokens before the chunk
    length: int  # tokens of the chunk, the same on every rank

    def check(
        self, config: RecurrentGemmaConfig, length: int, attention_mask: Any, cache: Any, output_attentions: bool
    ) -> None:
        """Raise ValueError for arguments that do not work on a chunk of a sequence."""
        if length != self.length:
            raise ValueError(f"the input has {length} tokens, this rank's chunk {self.length}; pass that chunk whole")
        context = config.conv1d_width - 1
        if "recurrent" in config.layers_block_type and length < context:
            raise ValueError(
                f"a chunk of {length} tokens is shorter than the {context} that the convolution looks back "
                f"(conv1d_width={config.conv1d_width}); use fewer than {self.ranks} ranks"
            )
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not go with a chunk of a sequence; give "
                "2D masks to shard_sequence, and separate documents by position_ids"
            )
        if cache is not None:
            raise ValueError("a chunk of a sequence goes without past_key_values; pass use_cache=False")
        if output_attentions:
            raise ValueError("output_attentions does not work with a sequence over several ranks; use one rank")

    def with_left(self, *tensors: torch.Tensor, size: int, dim: int) -> tuple[torch.Tensor, ...]:
        """Return each tensor with up to `size` entries of earlier chunks in front along dimension `dim` (as many as
        there are, so none on the first rank). Tensors may differ in their last dimension, which must not be `dim`."""
        return _WithLeft.apply(self, size, dim, *tensors)

    def linear_recurrence(self, x_BCD: torch.Tensor, a_BCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `linear_recurrence` of the whole sequence; return this chunk's states and its last state."""
        with torch.no_grad():
            _, end_BD = linear_recurrence(x_BCD, a_BCD)
            decay_BD = exact_zeros(a_BCD.prod(1, dtype=end_BD.dtype), (a_BCD == 0.0).any(1))
            chunks = self._gather(decay_BD, end_BD)
            h0_BD = torch.zeros_like(end_BD)
            for decay, end in chunks[: self.rank]:
                h0_BD = torch.addcmul(end, decay, seen(decay, h0_BD))
        h_BCD, last_BD = linear_recurrence(x_BCD, a_BCD, h0_BD)
        return _LaterGrad.apply(self, h_BCD, last_BD, a_BCD, decay_BD) if torch.is_grad_enabled() else (h_BCD, last_BD)

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' shares of the loss. Its gradients are to be averaged over the ranks."""
        return _Total.apply(self, loss)

    def _gather(self, *tensors_BD: torch.Tensor) -> torch.Tensor:
        """Return the tensors of every rank, (N, number of tensors, B, D)."""
        own = torch.stack(tensors_BD)
        everyone = own.new_empty((self.ranks, *own.shape))
        dist.all_gather(list(everyone.unbind(0)), own, group=self.group)
        return everyone

    def _exchange(self, sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor]) -> None:
        """Send and receive at most one tensor per rank of the group, all at once."""
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(self.group, rank), self.group)
            for operation, tensors in ((dist.isend, sent), (dist.irecv, received))
            for rank, tensor in tensors.items()
        ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _hops(self, size: int) -> list[tuple[int, int]]:
        """Return (distance in ranks, entries) of each earlier chunk with some of the `size` entries before a chunk."""
        return [
            (hop, min(self.length, size - (hop - 1) * self.length)) for hop in range(1, -(-size // self.length) + 1)
        ]


class _WithLeft(torch.autograd.Function):
    """The operator of `SequenceShard.with_left`. The first rank, which receives nothing, and the last, which sends
    nothing, use it too: in the backward pass gradients flow the other way."""

    @staticmethod
    def forward(ctx: Any, shard: SequenceShard, size: int, dim: int, *tensors: torch.Tensor) -> Any:
        ctx.shard, ctx.size, ctx.dim = shard, size, dim
        ctx.widths = [tensor.shape[-1] for tensor in tensors]
        sent, received = {}, {}
        for hop, entries in shard._hops(size):
            tails = [tensor.narrow(dim, shard.length - entries, entries) for tensor in tensors]
            message = torch.cat(tails, dim=-1).contiguous()
            if shard.rank + hop < shard.ranks:
                sent[shard.rank + hop] = message
            if shard.rank >= hop:
                received[shard.rank - hop] = torch.empty_like(message)
        shard._exchange(sent, received)
        if not received:
            return tuple(tensor.view_as(tensor) for tensor in tensors)
        left = torch.cat([received[rank] for rank in sorted(received)], dim=dim)
        return tuple(
            torch.cat([own_left, own], dim=dim)
            for own_left, own in zip(left.split(ctx.widths, dim=-1), tensors, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shard, dim = ctx.shard, ctx.dim
        before = grads[0].shape[dim] - shard.length
        sent, received = {}, {}
        for hop, entries in shard._hops(ctx.size):
            if shard.rank >= hop:
                start = before - (hop - 1) * shard.length - entries
                message = torch.cat([grad.narrow(dim, start, entries) for grad in grads], dim=-1)
                sent[shard.rank - hop] = message.contiguous()
            if shard.rank + hop < shard.ranks:
                shape = list(grads[0].shape)
                shape[dim], shape[-1] = entries, sum(ctx.widths)
                received[shard.rank + hop] = grads[0].new_empty(shape)
        shard._exchange(sent, received)
        own = [grad.narrow(dim, before, shard.length).clone() for grad in grads]
        for message in received.values():
            entries = message.shape[dim]
            for grad, part in zip(own, message.split(ctx.widths, dim=-1), strict=True):
                grad.narrow(dim, shard.length - entries, entries).add_(part)
        return None, None, None, *own


class _LaterGrad(torch.autograd.Function):
    """Identity in the forward pass; the backward pass adds the later ranks' gradient to that of the last state.

    The gradient of the state that enters a chunk is affine in the gradient of the chunk's last state, as in the forward
    pass: own + decay * later, with own = sum_t (a_0 ... a_t) dh_t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shard: SequenceShard,
        h_BCD: torch.Tensor,
        last_BD: torch.Tensor,
        a_BCD: torch.Tensor,
        decay_BD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shard = shard
        ctx.save_for_backward(a_BCD, decay_BD)
        return h_BCD.view_as(h_BCD), last_BD.view_as(last_BD)

    @staticmethod
    def backward(ctx: Any, dh_BCD: torch.Tensor, dlast_BD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a sequence over several ranks can be differentiated once; leave create_graph=True out")
        a_BCD, decay_BD = ctx.saved_tensors
        shard = ctx.shard
        own_BD = _through_decay(dh_BCD, a_BCD, decay_BD.dtype)
        own_BD = torch.addcmul(own_BD, decay_BD, seen(decay_BD, dlast_BD))
        chunks = shard._gather(decay_BD, own_BD)
        later_BD = torch.zeros_like(own_BD)
        for decay, own in chunks[shard.rank + 1 :].flip(0):
            later_BD = torch.addcmul(own, decay, seen(decay, later_BD))
        return None, dh_BCD, dlast_BD + later_BD, None, None


def _through_decay(dh_BCD: torch.Tensor, a_BCD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute sum_t (a_0 ... a_t) dh_t, (B, D); a recurrence without inputs that starts at 1 gives the products."""
    decay_BD, total_BD = torch.ones_like(dh_BCD[:, 0], dtype=dtype), torch.zeros_like(dh_BCD[:, 0], dtype=dtype)
    for a, dh in zip(a_BCD.split(_SEGMENT, dim=1), dh_BCD.split(_SEGMENT, dim=1), strict=True):
        decays, decay_BD = linear_recurrence(torch.zeros_like(a), a, decay_BD)
        total_BD += (decays * seen(decays, dh)).sum(1)
    return total_BD


class _Total(torch.autograd.Function):
    """Sum over the ranks. The gradient is multiplied by N, because DDP and FSDP average gradients over the ranks, and
    the result is to be their sum."""

    @staticmethod
    def forward(ctx: Any, shard: SequenceShard, loss: torch.Tensor) -> torch.Tensor:
        ctx.ranks = shard.ranks
        total = loss.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad * ctx.ranks


__all__ = ["SequenceShard", "shard_sequence"]
