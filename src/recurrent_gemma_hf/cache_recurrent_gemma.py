"""RecurrentGemmaCache: the only place that keeps the state of a sequence.

Shapes: B batch, T tokens of this forward, D lru_width, G key/value heads, h head_dim, K conv1d_width,
W attention_window_size, S = W + 1 slots of the key/value ring.

The size is constant from the first token and the tensors keep their addresses, so one object serves as dynamic and as
static cache. Each row of a batch counts its own tokens, and padding is never stored.
"""

from __future__ import annotations

import copy
import json
import os
import weakref
from typing import Any

import torch
from torch import nn
from transformers import Cache, CacheLayerMixin, EncoderDecoderCache, StaticCache

from .cache_file import check_weights, read_file, weight_fingerprints, write_file
from .configuration_recurrent_gemma import RecurrentGemmaConfig, fingerprint_of
from .transformers_compat import LinearAttentionCacheLayerMixin

HALF_DTYPES = (torch.bfloat16, torch.float16)


def _mark_static(*tensors: torch.Tensor) -> None:
    """Tell torch.compile that these addresses never change, so that CUDA graphs write to them in place."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


class _Progress:
    """Counters of columns and tokens, shared by all layers of one cache and advanced once per forward."""

    def __init__(self) -> None:
        self._columns = 0
        # Under torch.compile columns are counted in a device tensor and added to `_columns` on read: a changing Python
        # int would be a graph input, and every token would need a new CUDA graph.
        self.compiled_columns: torch.Tensor | None = None
        self.has_compiled_columns = False
        self.lengths: torch.Tensor | None = None  # (B,) int64: tokens seen so far per row, padding excluded
        self.past_lengths: torch.Tensor | None = None  # (B,) the same before the forward in progress
        self.step_columns = 0  # T of the forward in progress
        self.step_lengths: torch.Tensor | None = None  # (B,) tokens of this forward per row; None: all T are tokens
        self.step_ends: torch.Tensor | None = None  # (B,) columns up to a row's last token, 0 without one; None: T
        self.recorded = 0  # columns that crop() can remove
        self.recorded_mask: torch.Tensor | None = None  # (B, recorded) bool; None: no padding among them

    @property
    def columns(self) -> int:
        """Return the columns of input seen so far, padding included."""
        if self.has_compiled_columns:
            self.columns = self._columns + int(self.compiled_columns)
        return self._columns

    @columns.setter
    def columns(self, value: int) -> None:
        self._columns = value
        if self.has_compiled_columns:
            self.compiled_columns.zero_()
            self.has_compiled_columns = False

    def add_columns(self, count: int) -> None:
        """Count the columns of a forward."""
        if count == 1 and torch.compiler.is_compiling():
            self.compiled_columns.add_(1)
            self.has_compiled_columns = True
        else:
            self.columns += count

    def set_lengths(self, lengths_B: torch.Tensor) -> None:
        """Set the tokens seen per row, (B,) int64, and allocate the other counters at new addresses."""
        self.columns = self.columns  # adds what compiled steps have counted
        self.lengths, self.past_lengths = lengths_B, lengths_B.clone()
        self.compiled_columns = lengths_B.new_zeros(())
        _mark_static(self.lengths, self.past_lengths, self.compiled_columns)

    def end_forward(self) -> None:
        """Clear the counters of the latest forward, after a change of the layers' state by other means."""
        self.step_columns, self.step_lengths, self.step_ends = 0, None, None

    def slot_token_indices(self, slots: int) -> torch.Tensor:
        """Return (B, slots) int64: the index of the token that each slot of a ring holds; negative if empty."""
        last_B1 = self.lengths[:, None] - 1
        return last_B1 - (last_B1 - torch.arange(slots, device=last_B1.device)).remainder(slots)


class _Tape:
    """A record of the last `limit` entries along one dimension; each row ends with its latest token."""

    def __init__(self, start: torch.Tensor, dim: int, limit: int) -> None:
        self.tensor, self.dim, self.limit = start, dim, limit

    def _take(self, tensor: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
        shape = [1] * tensor.ndim
        shape[0], shape[self.dim] = index_BL.shape
        size = list(tensor.shape)
        size[self.dim] = index_BL.shape[1]
        return tensor.gather(self.dim, index_BL.to(tensor.device).view(shape).expand(size))

    def append(self, chunk: torch.Tensor, ends_B: torch.Tensor | None) -> None:
        """Append the entries of `chunk` before column ends_B (B,), or all of them."""
        joined = torch.cat([self.tensor, chunk.detach().to(self.tensor.dtype)], dim=self.dim)
        size = min(joined.shape[self.dim], self.limit)
        if ends_B is None:
            # A clone, because a view would keep the whole prompt in memory.
            self.tensor = joined.narrow(self.dim, joined.shape[self.dim] - size, size).clone()
            return
        end_B1 = self.tensor.shape[self.dim] + ends_B[:, None]
        index = end_B1 - size + torch.arange(size, device=end_B1.device)
        self.tensor = self._take(joined, index.clamp(min=0))

    def before(self, removed_B: torch.Tensor, size: int) -> torch.Tensor:
        """Return the `size` entries that precede the last `removed_B` ones of each row (clamped at the start)."""
        end_B1 = self.tensor.shape[self.dim] - removed_B[:, None]
        index = end_B1 - size + torch.arange(size, device=end_B1.device)
        return self._take(self.tensor, index.clamp(min=0))


class _LayerMixin:
    """Base of both kinds of layers: named tensors whose first dimension is the batch, and tapes."""

    progress: _Progress
    max_rollback: int
    record_past: bool

    def tensors(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        raise NotImplementedError

    def tapes(self) -> list[_Tape]:
        raise NotImplementedError

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep rows `rows` (B',) of the batch, in place (same addresses) if the batch size stays the same."""
        for name, tensor in self.tensors().items():
            chosen = tensor.index_select(0, rows.to(tensor.device))
            if chosen.shape == tensor.shape:
                tensor.copy_(chosen)
            else:
                _mark_static(chosen)
                self.set_tensor(name, chosen)
        for tape in self.tapes():
            tape.tensor = tape.tensor.index_select(0, rows.to(tape.tensor.device))

    reorder_cache = select_rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(_row_indices(indices))

    def get_max_length(self) -> int:
        return -1  # no limit


def _holds_something(layer: Any) -> bool:
    """Tell whether a layer of a Transformers cache has seen a token (static ones allocate their tensors earlier)."""
    states = getattr(layer, "has_previous_state", {})
    return any(states.values()) or (isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0)


def _row_indices(indices: torch.Tensor) -> torch.Tensor:
    return indices.nonzero().flatten() if indices.dtype == torch.bool else indices


class RecurrentGemmaAttentionLayer(_LayerMixin, CacheLayerMixin):
    """Keys and values of the last W + 1 tokens of one attention layer, in a ring buffer: token i is in slot i % S.

    A new token overwrites the one that has just left the window, so decoding moves no data.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = True
    supports_early_init = False

    def __init__(self, window: int, progress: _Progress, max_rollback: int) -> None:
        super().__init__()
        self.window = window
        self.progress = progress
        self.max_rollback = max_rollback
        self.record_past = False
        self._tapes: list[_Tape] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def ring(like_BGTh: torch.Tensor) -> torch.Tensor:
            B, G, _, h = like_BGTh.shape
            return like_BGTh.new_zeros((B, G, self.window + 1, h))

        self.keys, self.values = ring(key_states), ring(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        _mark_static(self.keys, self.values)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        in_sequence_order: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of this forward, (B, G, T, h) each, and return those to attend to.

        For one token these are the S slots of the ring in place (see `RecurrentGemmaCache.slot_token_indices`). For
        more, or with `in_sequence_order=True`, they are (B, G, P + T, h) in sequence order, P = min(W, columns seen
        before), and gradients flow to the new ones. Stored tensors are detached: no graph spans two forwards.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        progress = self.progress
        T = key_states.shape[2]
        past_P = None
        if T > 1 or in_sequence_order or (self.record_past and self._tapes is None):
            past_P = self._past_in_order()
        if self.record_past:
            if self._tapes is None:
                limit = self.window + self.max_rollback
                self._tapes = [_Tape(past, dim=2, limit=limit) for past in past_P]
            for tape, new in zip(self._tapes, (key_states, value_states), strict=True):
                tape.append(new, progress.step_ends)
        if T == 1:
            self._store_token(key_states, value_states)
        else:
            self._store_chunk(key_states, value_states)
        if T == 1 and not in_sequence_order:
            return self.keys, self.values
        return torch.cat([past_P[0], key_states], dim=2), torch.cat([past_P[1], value_states], dim=2)

    def _past_in_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the tokens before this forward, (B, G, P, h) each, in sequence order; rows with
        fewer than P tokens begin with arbitrary values."""
        size = min(self.window, self.progress.columns - self.progress.step_columns)
        lengths = self.progress.past_lengths.to(self.keys.device)
        indices_BP = lengths[:, None] - size + torch.arange(size, device=lengths.device)
        slots = indices_BP.remainder(self.window + 1)[:, None, :, None]
        keys, values = (
            ring.gather(2, slots.expand(-1, ring.shape[1], -1, ring.shape[3])) for ring in (self.keys, self.values)
        )
        return keys, values

    def _store_token(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        device = self.keys.device
        slot_B111 = self.progress.past_lengths.to(device).remainder(self.window + 1)[:, None, None, None]
        is_token = self.progress.step_lengths
        for ring, new in ((self.keys, key_states), (self.values, value_states)):
            index = slot_B111.expand(-1, ring.shape[1], 1, ring.shape[3])
            new = new.detach().to(ring.dtype)
            if is_token is not None:
                new = torch.where(is_token.to(device)[:, None, None, None] > 0, new, ring.gather(2, index))
            ring.scatter_(2, index, new)

    def _store_chunk(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write to each slot the latest token that belongs to it, if it is in this forward."""
        progress, device = self.progress, self.keys.device
        chunk_index_BS = (
            progress.slot_token_indices(self.window + 1).to(device) - progress.past_lengths.to(device)[:, None]
        )
        is_new = (chunk_index_BS >= 0)[:, None, :, None]
        if progress.step_ends is not None:  # padding in front of a row's first tokens
            chunk_index_BS = chunk_index_BS + (progress.step_ends - progress.step_lengths).to(device)[:, None]
        index = chunk_index_BS.clamp(min=0)[:, None, :, None]
        for ring, new in ((self.keys, key_states), (self.values, value_states)):
            taken = new.detach().gather(2, index.expand(-1, ring.shape[1], -1, ring.shape[3]))
            ring.copy_(torch.where(is_new, taken, ring))

    def crop_rows(self, removed_B: torch.Tensor) -> None:
        """Remove the last `removed_B` tokens per row; `progress.lengths` excludes them already."""
        size = min(self.window, self._tapes[0].tensor.shape[2])
        if size:
            indices_BS = self.progress.slot_token_indices(self.window + 1).to(self.keys.device)
            index_BS = indices_BS - (self.progress.lengths.to(self.keys.device)[:, None] - size)
            for ring, tape in zip((self.keys, self.values), self._tapes, strict=True):
                kept = tape.before(removed_B, size)
                index = index_BS.clamp(0, size - 1)[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
                ring.copy_(kept.gather(2, index))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "values": self.values} if self.is_initialized else {}

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        setattr(self, name, value)
        self.dtype, self.device, self.is_initialized = value.dtype, value.device, True

    def tapes(self) -> list[_Tape]:
        return self._tapes or []

    def forget_tapes(self) -> None:
        self._tapes = None

    def get_seq_length(self) -> int:
        return self.progress.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the keys that an `update` with `query_length` tokens returns."""
        past = min(self.window, self.progress.columns)
        return (self.window + 1 if query_length == 1 else past + query_length), self.progress.columns - past

    def reset(self) -> None:
        for tensor in self.tensors().values():
            tensor.zero_()
        self.forget_tapes()


class RecurrentGemmaRecurrentLayer(_LayerMixin, LinearAttentionCacheLayerMixin):
    """Conv state (B, D, K - 1), in the activations' dtype, and RG-LRU state (B, D), float32, of one recurrent layer."""

    is_compileable = True
    is_croppable = True

    def __init__(self, conv1d_width: int, progress: _Progress, max_rollback: int) -> None:
        super().__init__()
        self.context = conv1d_width - 1
        self.progress = progress
        self.max_rollback = max_rollback
        self.record_past = False
        self._conv_tape: _Tape | None = None
        self._state_tape: _Tape | None = None

    def lazy_initialization(
        self, conv_states: torch.Tensor | None = None, recurrent_states: torch.Tensor | None = None, **kwargs: Any
    ) -> None:
        if conv_states is not None:
            B, D, _ = conv_states.shape
            # Time comes before channels in memory, as in the model's activations; the interface is channels first.
            self.set_tensor("conv", conv_states.new_zeros((B, self.context, D)).transpose(1, 2))
            _mark_static(self.conv_states[0])
        if recurrent_states is not None:
            self.set_tensor("recurrent", torch.zeros_like(recurrent_states))
            _mark_static(self.recurrent_states[0])

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Store the last K - 1 inputs of the convolution; return this forward's, (B, D, T), with the K - 1 earlier ones
        in front, (B, D, K - 1 + T)."""
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(conv_states=conv_states)
        past = self.conv_states[0]
        full_BTD = torch.cat([past.transpose(1, 2), conv_states.transpose(1, 2).to(past.dtype)], dim=1)
        if self.record_past:
            if self._conv_tape is None:
                self._conv_tape = _Tape(past.transpose(1, 2), dim=1, limit=self.context + self.max_rollback)
            self._conv_tape.append(conv_states.transpose(1, 2), self.progress.step_ends)
        ends = self.progress.step_ends
        if ends is None:
            latest_BKD = full_BTD[:, full_BTD.shape[1] - self.context :]
        else:
            index = ends.to(past.device)[:, None] + torch.arange(self.context, device=past.device)
            latest_BKD = full_BTD.gather(1, index[:, :, None].expand(-1, -1, full_BTD.shape[2]))
        past.copy_(latest_BKD.detach().transpose(1, 2))
        self.has_previous_state[0] = True
        return full_BTD.transpose(1, 2)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, history: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Store and return the state (B, D) after this forward; recording needs `history` (B, T, D), all its states."""
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(recurrent_states=recurrent_states)
        if self.record_past:
            if self._state_tape is None:
                start = self.recurrent_states[0][:, None]
                self._state_tape = _Tape(start, dim=1, limit=self.max_rollback + 1)
            self._state_tape.append(history, self.progress.step_ends)
        self.recurrent_states[0].copy_(recurrent_states.detach())
        return self.recurrent_states[0]

    def crop_rows(self, removed_B: torch.Tensor) -> None:
        self.conv_states[0].copy_(self._conv_tape.before(removed_B, self.context).transpose(1, 2))
        self.recurrent_states[0].copy_(self._state_tape.before(removed_B, 1)[:, 0])

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"conv": self.conv_states[0], "recurrent": self.recurrent_states[0]}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        if name == "conv":
            self.conv_states[0], self.is_conv_states_initialized[0] = value, True
            self.dtype, self.conv_kernel_size[0] = value.dtype, self.context
        else:
            self.recurrent_states[0], self.is_recurrent_states_initialized[0] = value, True
        self.device, self.has_previous_state[0] = value.device, True

    def tapes(self) -> list[_Tape]:
        return [tape for tape in (self._conv_tape, self._state_tape) if tape is not None]

    def forget_tapes(self) -> None:
        self._conv_tape = self._state_tape = None

    def reset(self) -> None:
        for tensor in self.tensors().values():
            tensor.zero_()
        self.has_previous_state[0] = False
        self.forget_tapes()


def _fits(tensor: torch.Tensor, shape: tuple[int, ...], *, is_state: bool) -> bool:
    """Tell whether a saved tensor has the shape, or a tensor-parallel rank's share of the channels, and a dtype of its
    kind: the recurrent state is float32 or float64."""
    dtypes = (torch.float32, torch.float64) if is_state else (torch.float32, torch.float64, *HALF_DTYPES)
    same = tensor.ndim == len(shape) and (tensor.shape[0], *tensor.shape[2:]) == (shape[0], *shape[2:])
    return same and tensor.shape[1] > 0 and shape[1] % tensor.shape[1] == 0 and tensor.dtype in dtypes


class RecurrentGemmaCache(Cache):
    """State of a batch of sequences: constant size for any number of tokens.

    Args:
        config: the config of the model that will use it.
        static: lets `generate()` compile the decoding step, as `cache_implementation="static"` does.
        max_rollback: how many of the latest tokens `crop` can remove while recording. Recording costs
            4 * lru_width bytes per recurrent layer, token and row.

    Assisted and prompt-lookup decoding need recording (`activate_past_recording`): a forward then keeps the state after
    each of its tokens, and `crop(-n)` restores any of them exactly, without recomputation.
    """

    max_cache_len = -1  # no limit; PEFT's prefix tuning reads it on the way to the error that `adopt` raises

    def __init__(self, config: RecurrentGemmaConfig, *, static: bool = False, max_rollback: int = 512) -> None:
        if max_rollback < 1:
            raise ValueError(f"max_rollback={max_rollback} must be at least 1")
        self.config = config
        self.static = static
        self.max_rollback = max_rollback
        self.progress = _Progress()
        layers = [
            RecurrentGemmaRecurrentLayer(config.conv1d_width, self.progress, max_rollback)
            if block == "recurrent"
            else RecurrentGemmaAttentionLayer(config.attention_window_size, self.progress, max_rollback)
            for block in config.layers_block_type
        ]
        super().__init__(layers=layers)
        self._made_for = config.cache_fields()  # compared instead of a hash, which torch.compile cannot trace
        self._model: Any = None  # a weak reference to the model that filled it
        self._saved_weights: dict[str, str] | None = None  # of a loaded file, until a model is compared with them

    @classmethod
    def adopt(cls, cache: Cache, config: RecurrentGemmaConfig) -> RecurrentGemmaCache:
        """Return `cache`, after converting an empty cache of Transformers (`DynamicCache`, `StaticCache`) in place, so
        that the caller's own object holds the state.

        Raises:
            ValueError: the cache holds keys, values or states already, or is for an encoder and a decoder.
        """
        if isinstance(cache, cls):
            return cache
        kind = type(cache).__name__
        if isinstance(cache, EncoderDecoderCache):
            raise ValueError(f"a {kind} is for an encoder and a decoder; give a RecurrentGemmaCache or leave it out")
        if any(_holds_something(layer) for layer in cache.layers):
            if kind == cls.__name__:
                raise ValueError(
                    f"this {kind} was filled by another copy of the code ({type(cache).__module__}, the model's is "
                    f"{cls.__module__}); use one copy for the whole text, or save() it and load() it here"
                )
            raise ValueError(
                f"this {kind} already holds keys or states that RecurrentGemma did not write; give an empty one, or a "
                "RecurrentGemmaCache that this model has filled (PEFT's prefix tuning inserts keys, which recurrent "
                "layers do not have; LoRA and prompt tuning work)"
            )
        is_static = isinstance(cache, StaticCache)
        vars(cache).clear()
        cache.__class__ = cls
        cls.__init__(cache, config, static=is_static)
        return cache

    def check(self, model: nn.Module, batch_size: int) -> None:
        """Raise ValueError unless this cache fits `batch_size` rows of `model`, and its weights if it was loaded from
        a file; the model calls this before it changes anything."""
        config: Any = model.config
        if config is not self.config and config.cache_fields() != self._made_for:
            differing = ", ".join(
                f"{name}={value!r} instead of {self._made_for[name]!r}"
                for name, value in config.cache_fields().items()
                if value != self._made_for[name]
            )
            raise ValueError(
                f"this cache was made for another config (the model has {differing}); make one with "
                "RecurrentGemmaCache(model.config)"
            )
        if self.batch_size not in (-1, batch_size):
            raise ValueError(
                f"this cache holds a batch of {self.batch_size} sequences, the input has {batch_size}; use a new "
                "RecurrentGemmaCache, or batch_repeat_interleave / batch_select_indices"
            )

        if self._saved_weights is not None:
            check_weights(self._saved_weights, model)
            self._saved_weights = None
        if not torch.compiler.is_compiling():
            self._model = weakref.ref(model)

    def begin_forward(
        self,
        batch_size: int,
        columns: int,
        device: torch.device,
        is_token: torch.Tensor | None = None,
        is_token_of_caller: torch.Tensor | None = None,
    ) -> None:
        """Count a forward of (batch_size, columns) inputs; the model calls this once, before the layers.

        `is_token` (B, columns) bool is False at padding, in the columns that the layers see, where a row's tokens are
        contiguous. `is_token_of_caller` is the same in the caller's columns, which `crop` counts.
        """
        progress = self.progress
        if progress.lengths is None:
            progress.set_lengths(torch.zeros(batch_size, dtype=torch.int64, device=device))
        elif not torch.compiler.is_compiling() and self._began_in_inference_mode():
            self._leave_inference_mode()
        progress.step_columns = columns
        progress.step_lengths = progress.step_ends = None
        if is_token is not None:
            is_token = is_token.to(progress.lengths.device)
            progress.step_lengths = is_token.sum(-1)
            progress.step_ends = (is_token * torch.arange(1, columns + 1, device=is_token.device)).amax(-1)
        progress.add_columns(columns)
        progress.past_lengths.copy_(progress.lengths)
        progress.lengths.add_(columns if progress.step_lengths is None else progress.step_lengths)
        if self.is_recording:
            self._record_columns(is_token_of_caller, columns)

    def _began_in_inference_mode(self) -> bool:
        """Tell whether the tensors are inference tensors, which cannot be changed here. Dynamo cannot trace this."""
        return self.progress.lengths.is_inference() and not torch.is_inference_mode_enabled()

    def _leave_inference_mode(self) -> None:
        """Replace tensors made in torch.inference_mode by copies that can be changed."""
        self.progress.set_lengths(self.progress.lengths.clone())
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                layer.set_tensor(name, tensor.clone())
            _mark_static(*layer.tensors().values())

    def _record_columns(self, token_mask: torch.Tensor | None, columns: int) -> None:
        progress = self.progress
        before = progress.recorded
        progress.recorded = min(before + columns, self.max_rollback)
        if token_mask is None and progress.recorded_mask is None:
            return
        B, device = progress.lengths.shape[0], progress.lengths.device
        ones = torch.ones((B, max(before, columns)), dtype=torch.bool, device=device)
        old = ones[:, :before] if progress.recorded_mask is None else progress.recorded_mask
        new = ones[:, :columns] if token_mask is None else token_mask.to(device)
        progress.recorded_mask = torch.cat([old, new], dim=1)[:, -progress.recorded :]

    # --- Sizes ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of input seen so far, padding included; for Hawk as well."""
        return self.progress.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (length, offset) of the keys that attention will see with `query_length` new tokens."""
        for layer in self.layers:
            if isinstance(layer, RecurrentGemmaAttentionLayer):
                return layer.get_mask_sizes(query_length)
        return query_length, self.progress.columns

    def token_counts(self, device: torch.device) -> torch.Tensor | int:
        """Return the tokens of each row so far, (B, 1) int64, padding excluded; 0 before the first forward."""
        return 0 if self.progress.lengths is None else self.progress.lengths.to(device)[:, None]

    def slot_token_indices(self) -> torch.Tensor:
        """Return (B, S) int64: the index of the token that each slot of the rings holds; negative if empty."""
        return self.progress.slot_token_indices(self.config.attention_window_size + 1)

    @property
    def is_linear(self) -> list[bool]:
        """Return False for each layer: for Transformers 5.24, True means a layer that does not count its tokens."""
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """Return the rows of the batch, -1 before the first forward."""
        return -1 if self.progress.lengths is None else self.progress.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        """Tell generate() whether to compile the decoding step. `static` changes nothing else."""
        return self.static

    @property
    def is_initialized(self) -> bool:
        """Tell whether a forward has allocated the tensors."""
        return self.progress.lengths is not None

    def memory_footprint(self) -> int:
        """Return the size in bytes, recorded states included."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors().values()]
        tensors += [tape.tensor for layer in self.layers for tape in layer.tapes()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # --- Rollback ---

    @property
    def is_recording(self) -> bool:
        """Tell whether forwards keep what `crop` needs."""
        return self.layers[0].record_past  # the same in all layers

    def activate_past_recording(self) -> None:
        """Record the state after each further token, so that `crop` can remove the latest (at most `max_rollback`)."""
        for layer in self.layers:
            layer.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns; 0 removes none. Those left can no longer be removed.

        Raises:
            ValueError: `tokens_to_remove` is positive, or more than was recorded since the last `crop`.
        """
        # Assisted decoding passes a tensor; `columns` would become one, and later additions in place would change it.
        count, progress = -int(tokens_to_remove), self.progress
        if count < 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        if count > progress.recorded:
            hint = "call activate_past_recording() before the forward whose tokens are to be removed"
            if self.is_recording:
                hint = f"only the tokens since the last crop, at most max_rollback={self.max_rollback}, are kept"
            raise ValueError(f"crop({tokens_to_remove}): {progress.recorded} tokens are recorded; {hint}")
        if count:
            removed = torch.full_like(progress.lengths, count)
            if progress.recorded_mask is not None:
                removed = progress.recorded_mask[:, -count:].sum(-1)
            progress.columns -= count
            progress.lengths.sub_(removed)
            for layer in self.layers:
                layer.crop_rows(removed)
        progress.recorded, progress.recorded_mask = 0, None
        progress.end_forward()
        for layer in self.layers:
            layer.forget_tapes()

    # --- Rows of the batch ---

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows (int64 indices or a bool mask over the batch)."""
        progress = self.progress
        if progress.lengths is None:
            return
        rows = _row_indices(indices).to(progress.lengths.device)
        chosen = progress.lengths.index_select(0, rows)
        if chosen.shape == progress.lengths.shape:
            progress.lengths.copy_(chosen)
        else:
            progress.set_lengths(chosen)
        if progress.recorded_mask is not None:
            progress.recorded_mask = progress.recorded_mask.index_select(0, rows)
        progress.end_forward()
        for layer in self.layers:
            layer.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        if self.progress.lengths is not None:
            rows = torch.arange(self.batch_size, device=self.progress.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty the cache; tensors and addresses stay."""
        progress = self.progress
        if progress.lengths is not None:
            progress.lengths.zero_()
        progress.columns, progress.recorded, progress.recorded_mask = 0, 0, None
        progress.end_forward()
        for layer in self.layers:
            layer.reset()

    def fork(self, repeats: int = 1) -> RecurrentGemmaCache:
        """Return an independent copy, each row `repeats` times, for several continuations of one prompt."""
        copied = copy.deepcopy(self, {id(self.config): self.config})
        copied._model = self._model
        if repeats != 1:
            copied.batch_repeat_interleave(repeats)
        return copied

    # --- Persistence ---

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}  # a weak reference cannot be pickled

    def save(self, path: str | os.PathLike) -> None:
        """Write the state (not the record) as safetensors, in constant size, atomically, with fingerprints of the
        config, of the model's weights (`weight_fingerprints`) and of the contents.

        Raises:
            ValueError: the cache is empty, its model is unknown, or `path` is a folder or a device.
            OSError: the file cannot be written.
        """
        if self.progress.lengths is None:
            raise ValueError("this cache is empty; run the model over a prompt before saving it")
        model, weights = None if self._model is None else self._model(), self._saved_weights
        if model is not None:
            weights = weight_fingerprints(model)
        if weights is None:
            raise ValueError(
                "the model that filled this cache is gone or ran in compiled code alone, and a file needs the "
                "fingerprint of its weights; call cache.check(model, cache.batch_size) before"
            )
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous().cpu()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        tensors["lengths"] = self.progress.lengths.cpu()
        metadata = {
            "fingerprint": fingerprint_of(self._made_for),
            "weights": json.dumps(weights),
            "columns": str(self.progress.columns),
        }
        write_file(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: RecurrentGemmaConfig, device: torch.device | str = "cpu", **kwargs: Any
    ) -> RecurrentGemmaCache:
        """Return the cache that `save` wrote, for a model with this `config`. The first forward, or `check`, compares
        the model's weights with those that it was saved with.

        Raises:
            ValueError: the file is damaged, or of another kind or config.
            OSError: the file cannot be read.
        """
        cache = cls(config, **kwargs)
        tensors, metadata = read_file(path)
        if metadata["fingerprint"] != config.fingerprint():
            raise ValueError(
                f"{path} belongs to another config (fingerprint {metadata['fingerprint'][:12]}, this model has "
                f"{config.fingerprint()[:12]}); load it with the model that wrote it"
            )
        cache._restore({name: tensor.to(device) for name, tensor in tensors.items()}, int(metadata["columns"]), path)
        cache._saved_weights = json.loads(metadata["weights"])
        return cache

    def _restore(self, tensors: dict[str, torch.Tensor], columns: int, path: str | os.PathLike) -> None:
        config, lengths = self.config, tensors.get("lengths", torch.empty(0))
        if lengths.ndim != 1 or not len(lengths) or lengths.dtype != torch.int64:
            raise ValueError(f"{path} has no token counts (lengths, one int64 per row); save the cache again")
        if lengths.min() < 0 or lengths.max() > columns:
            raise ValueError(f"{path} counts {lengths.tolist()} tokens in {columns} columns; save the cache again")
        B, D = len(lengths), config.lru_width
        ring = (B, config.num_key_value_heads, config.attention_window_size + 1, config.head_dim)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "recurrent": {"conv": (B, D, config.conv1d_width - 1), "recurrent": (B, D)},
            "attention": {"keys": ring, "values": ring},
        }
        expected: dict[str, tuple[int, ...]] = {"lengths": (B,)} | {
            f"layers.{i}.{name}": shape
            for i, kind in enumerate(config.layers_block_type)
            for name, shape in shapes[kind].items()
        }
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())
            raise ValueError(f"{path} lacks or has too many tensors: {', '.join(odd)}")
        for key, tensor in tensors.items():
            if key != "lengths" and not _fits(tensor, expected[key], is_state=key.endswith(".recurrent")):
                raise ValueError(
                    f"{path} has {key} as {tensor.dtype} {tuple(tensor.shape)}, which must be a float of shape "
                    f"{expected[key]}; save the cache again"
                )
        self.progress.set_lengths(tensors.pop("lengths"))
        self.progress.columns = columns
        for key, tensor in tensors.items():
            _, index, name = key.split(".")
            value = tensor.transpose(1, 2).contiguous().transpose(1, 2) if name == "conv" else tensor
            self.layers[int(index)].set_tensor(name, value)
        for layer in self.layers:
            _mark_static(*layer.tensors().values())


__all__ = ["RecurrentGemmaCache"]
