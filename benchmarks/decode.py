"""Writing token after token: milliseconds per token, ours beside its peers, and beside what reading the weights takes.

    python benchmarks/decode.py [--device cuda] [--contexts 1000 8192 1000000] [--batch 1]
    python benchmarks/decode.py --weights int8 --peers ours      # torchao's weight-only quantization (CPU)

The floor of a step is the time to read every weight once and the state of every row, at the bandwidth that the fastest
read in the same run reached. Peers take turns, so that a disturbance of the machine meets all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peers import (
    PEERS,
    SIZES,
    Clock,
    Limits,
    Peer,
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
FULL_ATTENTION = ("gemma", "gemma, flash")  # their state grows: no million tokens


def quantize(peer: Any, weights: str) -> None:
    """As docs/quantization.md does it, the head included."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if weights == "int8":
        quantize_(peer.model, Int8WeightOnlyConfig())
        return
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    quantize_(peer.model, PrototypeInt4WeightOnlyConfig(group_size=32))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Also of torchao's tensors, which are made of several."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="per turn")
    parser.add_argument("--weights", choices=["as they are", "int8", "int4"], default="as they are")
    parser.add_argument("--one-by-one", action="store_true", help="one peer in memory at a time: no turns")
    args = parsed(parser)
    args.tokens = min(args.tokens, 2) if args.quick else args.tokens
    config, clock = SIZES[args.size](), Clock(args.device)
    limits = Limits.of(args.device, args.dtype, args.quick)
    args.tag = "_".join(part for part in (args.tag, "" if args.weights == "as they are" else args.weights) if part)
    name = name_of("decode", args)

    def build(peer_name: str) -> Peer:
        peer = PEERS[peer_name](config, args.device, args.dtype)
        if args.weights != "as they are":
            quantize(peer, args.weights)
        return peer

    def read_bytes(peer: Any, context: int) -> int:
        state = args.batch * peer.cache_bytes(context)
        if args.weights == "as they are":
            return peer.weight_bytes() + state
        table = peer.model.model.embed_tokens.weight  # not read once the head has weights of its own
        return sum(tensor_bytes(p) for p in peer.model.parameters() if p is not table) + state

    def measured(peer: Peer, context: int, step: Callable[[], None], best: float) -> dict[str, Any]:
        floor = read_bytes(peer, context) / limits.read * 1e3
        speed = {"ms": best, "tokens/s": args.batch / best * 1e3, "floor ms": floor, "share of floor": floor / best}
        return {**speed, "peak GB": peak_gb(), **limits.row()}

    def turns(names: list[str], context: int, made: dict[str, Peer], add: Callable[[dict], None]) -> None:
        row = {"weights": args.weights, "B": args.batch, "context": context, "dtype": str(args.dtype), "size": args.size}
        steps: dict[str, Callable[[], None]] = {}
        best: dict[str, float] = {}
        for peer_name in names:
            head = {**row, "model": peer_name}
            if peer_name in FULL_ATTENTION and context > 200_000:
                add({**head, "error": "keys and values of every layer for every token: not tried"})
                continue

            def start(peer_name: str = peer_name) -> dict[str, Any]:
                step = made[peer_name].decoder(args.batch, context)
                for _ in range(1 if args.quick else 4):  # compiles, captures
                    step()
                steps[peer_name] = step
                return {}

            attempt(head, start, lambda r: "error" in r and add(r))
        for _ in range(args.repeats):
            for peer_name, step in steps.items():
                own = Clock(torch.device("cpu")) if made[peer_name].jits else clock

                def several(step: Callable[[], None] = step) -> None:
                    for _ in range(args.tokens):
                        step()

                ms = own.ms(several, repeats=1, warmup=0) / args.tokens
                best[peer_name] = min(best.get(peer_name, math.inf), ms)
        for peer_name, ms in best.items():
            add({**row, "model": peer_name, **measured(made[peer_name], context, steps[peer_name], ms)})
        steps.clear()
        release()

    def finish(rows: list[dict]) -> None:
        with_ratios(rows, ("B", "context"))
        plot(rows, name, "context", "ms", "weights")

    contexts = args.contexts or ([8] if args.quick else CONTEXTS[args.device.type])
    with recorded(name, COLUMNS, finish) as add:
        groups = [[peer] for peer in args.peers] if args.one_by_one or args.device.type == "cuda" else [args.peers]
        for group in groups:
            made: dict[str, Peer] = {}
            for peer_name in group:
                attempt(
                    {"weights": args.weights, "model": peer_name},
                    lambda n=peer_name: made.update({n: build(n)}) or {},
                    lambda r: "error" in r and add(r),
                )
            for context in contexts:
                turns(list(made), context, made, add)
            made.clear()
            release()


if __name__ == "__main__":
    main()
