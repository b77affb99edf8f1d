"""Time decoding: milliseconds per token for ours and the peers, and the share of the memory-bandwidth floor.

    python benchmarks/decode.py [--device cuda] [--contexts 1000 8192 1000000] [--batch 1]
    python benchmarks/decode.py --weights int8 --peers ours      # torchao's weight-only quantization (CPU)
    python benchmarks/decode.py --size 2b --weights int8 --dtype bfloat16 --peers ours in-tree --float32 in-tree

The floor of a step is the time to read every weight and the state of every row once, at the bandwidth of the fastest
read of the same run. Peers are interleaved, so that a disturbance of the machine affects all of them. The memory
bandwidth of a CPU shared with other machines can double within a second: on a CPU each step is followed by a read of
half a gigabyte, and the share of the floor is the median over the steps. Peers named after --float32 run in float32,
whatever --dtype and --weights are. In-tree and ours (compiled or not) share their weights in memory if they are equal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peers import (
    PEERS,
    SIZES,
    Clock,
    Limits,
    arguments,
    attempt,
    name_of,
    parsed,
    peak_gb,
    plot,
    recorded,
    release,
    with_ratios,
)

COLUMNS = ["weights", "B", "context", "model", "ms", "tokens/s", "floor ms", "share of floor", "peak GB", "times ours"]
CONTEXTS = {"cuda": [1000, 8192, 32768, 1_000_000], "cpu": [128, 1024, 8192]}
AS_THEY_ARE = "as they are"
FULL_ATTENTION = ("gemma", "gemma, flash")  # their state grows: no million tokens


def quantize(peer: Any, weights: str) -> None:
    """Quantize a peer as in docs/quantization.md, the head included."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if weights == "int8":
        quantize_(peer.model, Int8WeightOnlyConfig())
        return
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    quantize_(peer.model, PrototypeInt4WeightOnlyConfig(group_size=32))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; torchao's consist of several tensors."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class Decoding:
    """The peers of one run, and their measurement."""

    def __init__(self, args: Any, add: Callable[[dict], None]) -> None:
        self.args, self.add = args, add
        self.clock = Clock(args.device)
        self.limits = Limits.of(args.device, args.dtype, args.quick)
        self.made: dict[str, Any] = {}

    def refused(self, row: dict[str, Any]) -> None:
        """Record the row of a failed preparation."""
        if "error" in row:
            self.add(row)

    def dtype_and_weights(self, name: str) -> tuple[torch.dtype, str]:
        """Return the dtype and the weights of a peer."""
        return (torch.float32, AS_THEY_ARE) if name in self.args.float32 else (self.args.dtype, self.args.weights)

    def build(self, names: list[str]) -> None:
        self.made.clear()
        release()
        for name in names:

            def make(name: str = name) -> dict[str, Any]:
                dtype, weights = self.dtype_and_weights(name)
                can_share = name in ("in-tree", "ours, compiled") and "ours" in self.made
                is_twin = can_share and self.dtype_and_weights("ours") == (dtype, weights) == (dtype, AS_THEY_ARE)
                shared = {"twin": self.made["ours"]} if is_twin else {}
                peer = PEERS[name](SIZES[self.args.size](), self.args.device, dtype, **shared)
                if weights != AS_THEY_ARE:
                    quantize(peer, weights)
                self.made[name] = peer
                return {}

            attempt({"weights": self.dtype_and_weights(name)[1], "model": name}, make, self.refused)

    def read_bytes(self, peer: Any, context: int) -> int:
        state = self.args.batch * peer.cache_bytes(context)
        if self.dtype_and_weights(peer.name)[1] == AS_THEY_ARE:
            return peer.weight_bytes() + state
        table = peer.model.model.embed_tokens.weight  # not read: the quantized head has its own weights
        return sum(tensor_bytes(p) for p in peer.model.parameters() if p is not table) + state

    def row(self, name: str, context: int) -> dict[str, Any]:
        dtype, weights = self.dtype_and_weights(name)
        about = {"weights": weights, "B": self.args.batch, "context": context, "model": name}
        return {**about, "dtype": str(dtype), "size": self.args.size}

    def started(self, context: int) -> dict[str, Callable[[], None]]:
        """Return a decoding step, compiled and captured, of every peer that can run."""
        steps: dict[str, Callable[[], None]] = {}
        for name, peer in self.made.items():
            if name in FULL_ATTENTION and context > 200_000:
                self.add({**self.row(name, context), "error": "keys and values for every token and layer: not tried"})
                continue

            def start(name: str = name, peer: Any = peer) -> dict[str, Any]:
                step = peer.decoder(self.args.batch, context)
                for _ in range(1 if self.args.quick else 4):
                    step()
                steps[name] = step
                return {}

            attempt(self.row(name, context), start, self.refused)
        return steps

    def time_tokens(self, name: str, step: Callable[[], None], read_bytes: int) -> tuple[float, list[float]]:
        """Return the milliseconds per token, over `args.tokens`, and the shares of the floor (on a CPU per token)."""
        if self.args.device.type != "cpu":
            clock = Clock(torch.device("cpu")) if self.made[name].jits else self.clock

            def several() -> None:
                for _ in range(self.args.tokens):
                    step()

            ms = clock.ms(several, repeats=1, warmup=0) / self.args.tokens
            return ms, [read_bytes / self.limits.read * 1e3 / ms]
        steps, shares = [], []
        for _ in range(self.args.tokens):
            steps.append(self.clock.ms(step, repeats=1, warmup=0))
            read = self.limits.read_once()
            self.limits.read = max(self.limits.read, read)
            shares.append(read_bytes / read * 1e3 / steps[-1])
        return statistics.mean(steps), shares

    def measure(self, context: int) -> None:
        steps, best = self.started(context), {}
        shares: dict[str, list[float]] = {name: [] for name in steps}
        read_bytes = {name: self.read_bytes(self.made[name], context) for name in steps}
        for _ in range(self.args.repeats):
            for name, step in steps.items():
                ms, step_shares = self.time_tokens(name, step, read_bytes[name])
                best[name] = min(best.get(name, math.inf), ms)
                shares[name] += step_shares
        for name, ms in best.items():
            floor = read_bytes[name] / self.limits.read * 1e3
            speed = {"ms": ms, "tokens/s": self.args.batch / ms * 1e3, "floor ms": floor}
            speed["share of floor"] = statistics.median(shares[name])
            self.add({**self.row(name, context), **speed, "peak GB": peak_gb(), **self.limits.row()})
        steps.clear()
        release()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="timed per peer and repeat")
    parser.add_argument("--weights", choices=[AS_THEY_ARE, "int8", "int4"], default=AS_THEY_ARE)
    parser.add_argument("--float32", nargs="+", choices=list(PEERS), default=[], help="peers that run in float32")
    parser.add_argument("--one-by-one", action="store_true", help="one peer in memory at a time, as on a GPU")
    args = parsed(parser)
    args.tokens = min(args.tokens, 2) if args.quick else args.tokens
    args.tag = "_".join(part for part in (args.tag, "" if args.weights == AS_THEY_ARE else args.weights) if part)
    contexts = args.contexts or ([8] if args.quick else CONTEXTS[args.device.type])
    name = name_of("decode", args)

    def finish(rows: list[dict]) -> None:
        with_ratios(rows, ("B", "context"))
        plot(rows, name, "context", "ms", "weights")

    with recorded(name, COLUMNS, finish) as add:
        decoding = Decoding(args, add)
        groups = [[peer] for peer in args.peers] if args.one_by_one or args.device.type == "cuda" else [args.peers]
        for group in groups:
            decoding.build(group)
            for context in contexts:
                decoding.measure(context)


if __name__ == "__main__":
    main()
