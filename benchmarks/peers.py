"""Define the peers of equal size, and how the scripts measure and record a comparison.

Every script of this folder runs on a CPU and on a GPU with the same code (`--device`, `--size`, `--dtype`). A peer that
is not installed or fails gets a row with the reason. Shapes: B batch, T tokens, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the GPU's memory

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, GemmaConfig, GemmaForCausalLM
from transformers.models.recurrent_gemma import modeling_recurrent_gemma as in_tree
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig as InTreeConfig

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.transformers_compat import CACHE_NAME

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
OUR_NAMES = ("ours", "ours, compiled")

# --- sizes --------------------------------------------------------------------------------------------------------


def our_config(hidden_size: int, layers: int, heads: int, window: int, vocab_size: int) -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=6 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attention_window_size=window,
        eos_token_id=None,
    )


SIZES: dict[str, Callable[[], RecurrentGemmaConfig]] = {
    "tiny": lambda: our_config(hidden_size=32, layers=3, heads=2, window=16, vocab_size=64),
    "19m": lambda: our_config(hidden_size=512, layers=6, heads=8, window=1024, vocab_size=1024),
    "2b": lambda: RecurrentGemmaConfig.from_preset("recurrentgemma-2b", eos_token_id=None),
}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- the clock ----------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Return the seconds of the fastest of `repeats` runs, because noise on a shared machine only adds time."""
    for _ in range(warmup):
        run()
    best = math.inf
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass
class Clock:
    """Measures milliseconds per call: on a GPU the median between events, on a CPU the minimum wall time."""

    device: torch.device

    @cached_property
    def _flush(self) -> torch.Tensor:
        return torch.empty(1 << 28, dtype=torch.int8, device=self.device)  # several times any L2 cache

    def ms(self, run: Callable[[], Any], repeats: int = 10, warmup: int = 3, flush: bool = False) -> float:
        """Return the time of `run`. `flush`: empty the GPU's L2 cache before each call, which may hold the inputs."""
        if self.device.type != "cuda":
            return seconds(run, repeats, min(warmup, 1)) * 1e3
        for _ in range(warmup):
            run()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            if flush:
                self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in pairs)[repeats // 2]


@dataclass
class Limits:
    """Measures the machine's bandwidth and matmul throughput in the same run; the floors are computed from them."""

    device: torch.device
    dtype: torch.dtype
    elements: int = 1 << 27  # size of the arrays that are copied and read
    side: int = 8192  # size of the square matrices that are multiplied

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, quick: bool) -> Limits:
        if quick:
            return Limits(device, dtype, 1 << 16, 64)
        return Limits(device, dtype) if device.type == "cuda" else Limits(device, dtype, side=2048)

    def _ms(self, run: Callable[[], Any]) -> float:
        return Clock(self.device).ms(run, repeats=9)

    @cached_property
    def copy(self) -> float:
        """Return the bytes per second of a copy, read plus written."""
        source, target = torch.randn(2, self.elements, device=self.device)
        return 8 * self.elements / self._ms(lambda: target.copy_(source)) * 1e3

    @cached_property
    def _matrix(self) -> torch.Tensor:
        columns = min(4096, self.elements)
        return torch.randn(self.elements // columns, columns, device=self.device)

    def read_once(self) -> float:
        """Return the bytes per second of a single sum: the current read bandwidth."""
        return 4 * self.elements / Clock(self.device).ms(self._matrix.sum, repeats=1, warmup=0) * 1e3

    @cached_property
    def read(self) -> float:
        """Return the read bandwidth (bytes/s), decoding's limit: the faster of a sum and a matrix-vector product."""
        matrix, vector = self._matrix, torch.ones(self._matrix.shape[1], device=self.device)
        return 4 * self.elements / min(self._ms(matrix.sum), self._ms(lambda: torch.mv(matrix, vector))) * 1e3

    @cached_property
    def flops(self) -> float:
        """Return the floating-point operations per second of a large matmul in `dtype`."""
        a, b = (torch.randn(self.side, self.side, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * self.side**3 / self._ms(lambda: a @ b) * 1e3

    def row(self) -> dict[str, float]:
        return {"copy GB/s": self.copy / 1e9, "read GB/s": self.read / 1e9, "peak TFLOP/s": self.flops / 1e12}


# --- the peers ----------------------------------------------------------------------------------------------------


class Missing(Exception):
    """Says why a peer cannot run."""


def needed(module: str) -> Any:
    """Import a module that only a peer needs; raise `Missing` if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # an import may fail in any way; the row gives the reason
        raise Missing(f"import {module}: {type(error).__name__}: {error}") from error


def materialized(
    build: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype, twin: torch.nn.Module | None = None
) -> torch.nn.Module:
    """Build a model with small random weights, skipping the initialisation, which takes minutes at 2B. With `twin`,
    share that model's weights of the same names, which saves memory."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build().to(dtype)
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type == "meta"}
    if twin is None:
        model = model.to_empty(device=device)
    else:
        model.load_state_dict(twin.state_dict(), assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if twin is None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.01, 0.01)
    for name, buffer in buffers.items():  # not in checkpoints (RoPE frequencies, ...): any values will do
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.ones_like(buffer, device=device))
    return model


class Peer:
    """One model on one device."""

    name: str
    jits = False  # True: compiles itself, and waits for the device before it returns

    def prefill(self, ids_BT: torch.Tensor) -> None:
        raise NotImplementedError

    def train(self, ids_BT: torch.Tensor) -> None:
        """Run forward, loss and backward."""
        raise NotImplementedError

    def decoder(self, batch: int, context: int) -> Callable[[], None]:
        """Return a function that decodes one token per call after `context` tokens."""
        raise NotImplementedError

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of one sequence's state after `context` tokens."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Return the bytes of weights read by one decoding step: all except an untied embedding."""
        raise NotImplementedError

    def flops(self, tokens: int, training: bool) -> float:
        """Return the floating-point operations for a row of `tokens`: matmuls, and attention within its mask."""
        raise NotImplementedError


def _attention_pairs(tokens: int, window: int | None) -> float:
    """Return the number of (query, key) pairs within the mask in a row of tokens."""
    if window is None or tokens <= window + 1:
        return tokens * (tokens + 1) / 2
    return (window + 1) * (window + 2) / 2 + (tokens - window - 1) * (window + 1)


class TorchPeer(Peer):
    """The common part of the PyTorch models."""

    model: torch.nn.Module

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.attention_layers = config.layers_block_type.count("attention")
        self.window: int | None = config.attention_window_size

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(2, self.config.vocab_size, (batch, tokens), device=self.device)

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def flops(self, tokens: int, training: bool) -> float:
        head = self.config.vocab_size * self.config.hidden_size
        body = sum(p.numel() for p in self.model.parameters() if p.ndim > 1) - head
        matmuls = 2 * (body * tokens + head * (tokens if training else 1))
        attention = 4 * _attention_pairs(tokens, self.window) * self.config.hidden_size * self.attention_layers
        return (matmuls + attention) * (3 if training else 1)


class HuggingFacePeer(TorchPeer):
    """A model with the interface of Transformers."""

    def new_cache(self) -> Any:
        # The in-tree model returns no cache and loses its keys and values unless it is given one, as generate() does.
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def prefill(self, ids_BT: torch.Tensor) -> None:
        self.model.eval()(input_ids=ids_BT, **{CACHE_NAME: self.new_cache()}, use_cache=True, logits_to_keep=1)

    def checkpoint(self) -> None:
        """Enable activation checkpointing per layer, the default of the official code."""
        new = getattr(self.model, "activation_checkpointing_enable", None)  # the name from Transformers 5.23 on
        (new or self.model.gradient_checkpointing_enable)()

    def train(self, ids_BT: torch.Tensor) -> None:
        self.model.train()(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def decoder(self, batch: int, context: int) -> Callable[[], None]:
        self.model.eval()
        cache = self.new_cache()
        seen = self._fill(cache, batch, context)
        ids = self.ids(batch, 1)
        positions = itertools.count(seen)

        @torch.inference_mode()
        def step() -> None:
            position = torch.full((batch, 1), next(positions), device=self.device)
            self._step(ids, position, cache)

        return step

    def _step(self, ids: torch.Tensor, position: torch.Tensor, cache: Any) -> None:
        self.model(input_ids=ids, position_ids=position, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)

    def _fill(self, cache: Any, batch: int, context: int) -> int:
        """Fill the state; return the next position. One window suffices: beyond it only the position changes."""
        tokens = min(context, self.config.attention_window_size + 1)
        self.model(input_ids=self.ids(batch, tokens), **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        return context

    def cache_bytes(self, context: int) -> int:
        config, size = self.config, self.dtype.itemsize
        keys = 2 * min(context, config.attention_window_size + 1) * config.num_key_value_heads * config.head_dim * size
        recurrent = config.num_hidden_layers - self.attention_layers
        return keys * self.attention_layers + recurrent * config.lru_width * (4 + config.conv1d_width * size)


class RecurrentGemmaPeer(HuggingFacePeer):
    """An implementation of RecurrentGemma in Transformers; two can share one set of weights."""

    def __init__(
        self,
        config: RecurrentGemmaConfig,
        device: torch.device,
        dtype: torch.dtype,
        twin: RecurrentGemmaPeer | None = None,
    ) -> None:
        super().__init__(config, device, dtype)
        self.model = materialized(self.build, device, dtype, None if twin is None else twin.model)

    def build(self) -> torch.nn.Module:
        raise NotImplementedError


class Ours(RecurrentGemmaPeer):
    """This package."""

    name = "ours"

    def build(self) -> torch.nn.Module:
        return RecurrentGemmaForCausalLM(self.config)

    def new_cache(self) -> Any:
        return RecurrentGemmaCache(self.config)

    def _fill(self, cache: Any, batch: int, context: int) -> int:
        super()._fill(cache, batch, context)
        # Set the counters as after `context` tokens: the cost of the state does not depend on them.
        cache.progress.lengths.fill_(context)
        cache.progress.columns = context
        return context

    def _step(self, ids: torch.Tensor, position: torch.Tensor, cache: Any) -> None:
        self.model(input_ids=ids, **{CACHE_NAME: cache}, logits_to_keep=1)


class OursCompiled(Ours):
    """This package, compiled; on a GPU a decoding step becomes one CUDA graph."""

    name = "ours, compiled"

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype, **twin: Any) -> None:
        super().__init__(config, device, dtype, **twin)
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self._compiled_step = torch.compile(self.model.forward, fullgraph=True, mode=mode)
        self._compiled = torch.compile(self.model.forward, dynamic=False)

    @torch.inference_mode()
    def prefill(self, ids_BT: torch.Tensor) -> None:
        self.model.eval()
        self._compiled(input_ids=ids_BT, **{CACHE_NAME: self.new_cache()}, use_cache=True, logits_to_keep=1)

    def train(self, ids_BT: torch.Tensor) -> None:
        self.model.train()
        self._compiled(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)

    def _step(self, ids: torch.Tensor, position: torch.Tensor, cache: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self._compiled_step(input_ids=ids, **{CACHE_NAME: cache}, logits_to_keep=1)


class InTree(RecurrentGemmaPeer):
    """Transformers' own RecurrentGemma."""

    name = "in-tree"

    def build(self) -> torch.nn.Module:
        return in_tree_recurrent_gemma(self.config)


def in_tree_recurrent_gemma(config: RecurrentGemmaConfig) -> torch.nn.Module:
    """Build Transformers' own RecurrentGemma with the same shapes."""
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads lru_width "
        "attention_window_size eos_token_id"
    ).split()
    torch.manual_seed(0)
    their_config = InTreeConfig(**{name: getattr(config, name) for name in fields})
    return in_tree.RecurrentGemmaForCausalLM._from_config(their_config, attn_implementation="sdpa")


class Gemma(HuggingFacePeer):
    """A transformer of equal size with torch's fused attention."""

    name = "gemma"
    attention = "sdpa"

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        self.model = materialized(lambda: gemma(config, self.attention), device, dtype)
        self.attention_layers, self.window = config.num_hidden_layers, None

    def _fill(self, cache: Any, batch: int, context: int) -> int:
        """Fill the cache with random keys and values, which cost as much as a text's and need no prefill."""
        heads = self.model.config.num_key_value_heads
        for layer in range(self.config.num_hidden_layers):
            shape = (batch, heads, context, self.config.head_dim)
            key, value = torch.randn(2, *shape, device=self.device, dtype=self.dtype)
            cache.update(key, value, layer)
        return context

    def cache_bytes(self, context: int) -> int:
        return 2 * self.config.num_hidden_layers * context * self.config.head_dim * self.dtype.itemsize


class GemmaFlash(Gemma):
    """The same transformer with the flash-attn package."""

    name = "gemma, flash"
    attention = "flash_attention_2"

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype) -> None:
        needed("flash_attn")
        super().__init__(config, device, dtype)


def gemma(config: RecurrentGemmaConfig, attention: str = "sdpa") -> torch.nn.Module:
    """Build a Gemma with as many layers and heads and the same width; its MLP makes up the number of parameters."""

    def build(width: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return GemmaForCausalLM._from_config(
            GemmaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=1,
                head_dim=config.head_dim,
                max_position_embeddings=1 << 20,
                eos_token_id=None,
            ),
            attn_implementation=attention,
        )

    with torch.device("meta"):
        wanted = parameters(RecurrentGemmaForCausalLM(config))
        base, step = parameters(build(64)), 3 * 64 * config.hidden_size * config.num_hidden_layers
    return build(64 * max(1, 1 + round((wanted - base) / step)))


def official_config(config: RecurrentGemmaConfig) -> Any:
    """Return the official code's config, with the scan that AUTO chooses."""
    common = needed("recurrentgemma.common")
    kinds = {"recurrent": common.TemporalBlockType.RECURRENT, "attention": common.TemporalBlockType.ATTENTION}
    return common.GriffinConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        mlp_expanded_width=config.intermediate_size // 2,
        num_heads=config.num_attention_heads,
        block_types=tuple(kinds[kind] for kind in config.layers_block_type),
        embeddings_scale_by_sqrt_dim=config.embeddings_scale_by_sqrt_dim,
        attention_window_size=config.attention_window_size,
        logits_soft_cap=config.logits_soft_cap,
        lru_width=config.lru_width,
        scan_type=common.ScanType.AUTO,
    )


class OfficialTorch(TorchPeer):
    """Google's code in PyTorch."""

    name = "official torch"

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        griffin = needed("recurrentgemma.torch").Griffin
        self.model = materialized(
            lambda: griffin(official_config(config), gradient_checkpointing=False, dtype=dtype, device="meta"),
            device,
            dtype,
        )

    def checkpoint(self) -> None:
        self.model.gradient_checkpointing = True

    def _positions(self, ids_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        T = ids_BT.shape[1]
        return torch.arange(start, start + T, dtype=torch.int32, device=self.device).expand(ids_BT.shape)

    @torch.inference_mode()
    def prefill(self, ids_BT: torch.Tensor) -> None:
        self.model.eval()(ids_BT, self._positions(ids_BT))

    def train(self, ids_BT: torch.Tensor) -> None:
        logits = self.model.train()(ids_BT, self._positions(ids_BT), return_cache=False)[0]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten()).backward()
        self.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def decoder(self, batch: int, context: int) -> Callable[[], None]:
        self.model.eval()
        prompt = self.ids(batch, min(context, self.config.attention_window_size + 1))
        cache = self.model(prompt, self._positions(prompt))[1]
        ids, positions = self.ids(batch, 1), itertools.count(context)

        @torch.inference_mode()
        def step() -> None:
            nonlocal cache
            cache = self.model(ids, self._positions(ids, next(positions)), cache)[1]

        return step

    cache_bytes = HuggingFacePeer.cache_bytes


class OfficialJax(Peer):
    """Google's code in JAX, compiled, with the scan that its AUTO chooses."""

    name = "official jax"
    jits = True

    def __init__(self, config: RecurrentGemmaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.jax = jax = needed("jax")
        griffin = needed("recurrentgemma.jax").Griffin
        platform_name = {"cuda": "gpu"}.get(device.type, device.type)
        if jax.default_backend() != platform_name:
            raise Missing(f"JAX runs on {jax.default_backend()}, not on {platform_name}")
        self.config, self.dtype, self.size = config, dtype, dtype.itemsize
        self.jax_dtype = getattr(jax.numpy, str(dtype).removeprefix("torch."))
        self._build = lambda remat: griffin(
            official_config(config), dtype=self.jax_dtype, param_dtype=self.jax_dtype, gradient_checkpointing=remat
        )
        self.model = self._build(False)
        token = jax.ShapeDtypeStruct((1, 4), "int32")
        shapes = jax.eval_shape(lambda t: self.model.init(jax.random.key(0), t, t), token)
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        self.variables = jax.tree.map(
            lambda leaf: jax.random.uniform(next(keys), leaf.shape, leaf.dtype, -0.01, 0.01), shapes
        )

    def checkpoint(self) -> None:
        self.model = self._build(True)

    def _inputs(self, batch: int, tokens: int, start: int = 0) -> tuple[Any, Any]:
        np = self.jax.numpy
        return np.full((batch, tokens), 3, "int32"), np.broadcast_to(np.arange(start, start + tokens), (batch, tokens))

    @cached_property
    def _forward(self) -> Callable[..., Any]:
        return self.jax.jit(lambda variables, ids, pos, cache=None: self.model.apply(variables, ids, pos, cache))

    @cached_property
    def _gradients(self) -> Callable[..., Any]:
        jax = self.jax

        def loss(variables: Any, ids: Any, positions: Any) -> Any:
            logits = self.model.apply(variables, ids, positions, return_cache=False)[0]
            log_p = jax.nn.log_softmax(logits[:, :-1].astype("float32"))
            return -jax.numpy.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()

        return jax.jit(jax.grad(loss))

    def prefill(self, ids_BT: torch.Tensor) -> None:
        self.jax.block_until_ready(self._forward(self.variables, *self._inputs(*ids_BT.shape)))

    def train(self, ids_BT: torch.Tensor) -> None:
        self.jax.block_until_ready(self._gradients(self.variables, *self._inputs(*ids_BT.shape)))

    def decoder(self, batch: int, context: int) -> Callable[[], None]:
        prompt = min(context, self.config.attention_window_size + 1)
        cache = self._forward(self.variables, *self._inputs(batch, prompt))[1]
        positions = itertools.count(context)

        def step() -> None:
            nonlocal cache
            logits, cache = self._forward(self.variables, *self._inputs(batch, 1, next(positions)), cache)
            logits.block_until_ready()

        return step

    def cache_bytes(self, context: int) -> int:
        layers = self.config.layers_block_type
        keys = 2 * self.config.attention_window_size * self.config.head_dim * self.size
        return layers.count("attention") * keys + layers.count("recurrent") * self.config.lru_width * 12

    def weight_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.jax.tree.leaves(self.variables))

    def flops(self, tokens: int, training: bool) -> float:
        head = self.config.vocab_size * self.config.hidden_size
        body = sum(leaf.size for leaf in self.jax.tree.leaves(self.variables) if leaf.ndim > 1) - head
        pairs = _attention_pairs(tokens, self.config.attention_window_size)
        attention = 4 * pairs * self.config.hidden_size * self.config.layers_block_type.count("attention")
        return (2 * (body + head * training) * tokens + attention) * (3 if training else 1)


PEERS: dict[str, type] = {
    peer.name: peer for peer in (Ours, OursCompiled, InTree, Gemma, GemmaFlash, OfficialTorch, OfficialJax)
}


# --- what the scripts share ---------------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SIZES), help="2b on a GPU, 19m on a CPU by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on a GPU by default")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tag", default="", help="added to the name of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds instead of minutes")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    args.size = args.size or ("tiny" if args.quick else "2b" if on_gpu else "19m")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    args.repeats = 1 if args.quick else args.repeats
    return args


def name_of(benchmark: str, args: argparse.Namespace) -> str:
    parts = (benchmark, args.device.type, args.size, str(args.dtype).removeprefix("torch."), args.tag)
    return "_".join(part for part in parts if part)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]], add: Callable[[dict[str, Any]], None]) -> bool:
    """Measure and add the row, or add it with the reason for the failure; return True if the measurement succeeded."""
    try:
        measured = measure()
    except Exception as error:  # one peer's failure must not lose the others' results
        text = str(error).strip().splitlines() or [""]
        said = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {text[0]}"
        add({**row, "error": said[:300]})
        release()
        return False
    add({**row, **measured})
    return True


def machine() -> dict[str, Any]:
    """Return the hardware, the commit and the versions that are recorded in every row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    versions = {}
    for package in ("jax", "triton", "recurrentgemma", "fla-core", "accelerated-scan", "mamba-ssm", "torchao"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "commit": commit.stdout.strip() or os.environ.get("BENCHMARK_COMMIT", ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **versions,
    }


def with_ratios(rows: list[dict[str, Any]], group: Iterable[str], value: str = "ms") -> None:
    """Add "times ours" to the rows: their time as a multiple of ours in the same group."""
    group = tuple(group)
    ours: dict[tuple, float] = {}
    for row in rows:
        if row["model"] == "ours" and value in row:
            ours.setdefault(tuple(row.get(key) for key in group), row[value])
    for row in rows:
        reference = ours.get(tuple(row.get(key) for key in group))
        if reference and value in row:
            row["times ours"] = row[value] / reference


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


@contextmanager
def recorded(
    name: str, columns: list[str], finish: Callable[[list[dict[str, Any]]], None] | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that records rows. It writes each row immediately, so that results survive a later failure; at
    the end `finish` may extend the rows, the file is rewritten and a table printed."""
    rows: list[dict[str, Any]] = []
    console, about = Console(width=None if os.isatty(1) else 160), machine()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    path.write_text("")

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps({**row, **about}) + "\n")
        console.print(" ".join(f"{key}={_cell(value)}" for key, value in row.items()), highlight=False, markup=False)

    try:
        yield add
    finally:
        if finish:
            finish(rows)
        path.write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows))
        has_errors = "error" not in columns and any("error" in row for row in rows)
        shown = [*columns, "error"] if has_errors else columns
        table = Table(*shown, title=f"{name}: {about['device']}, {about['commit']}")
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in shown))
        console.print(table)


def plot(rows: list[dict[str, Any]], name: str, x: str, y: str, panel: str, series: str = "model") -> None:
    """Draw a PNG beside the results: y over x, one panel per `panel`, one line per `series`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if y in row]
    panels = list(dict.fromkeys(row[panel] for row in rows))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained", squeeze=False)
    lines = list(dict.fromkeys(row[series] for row in rows))
    for axis, title in zip(axes[0], panels, strict=True):
        for index, line in enumerate(lines):
            mine = [row for row in rows if row[panel] == title and row[series] == line]
            axis.plot([r[x] for r in mine], [r[y] for r in mine], "o-", color=f"C{index}", label=line)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)
