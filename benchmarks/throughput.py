"""Measure tokens per second of the largest batch that fits: prompts of 2k, sampling 512 to 32k tokens, as in the
Griffin paper's figure 1(b).

    python benchmarks/throughput.py [--device cuda] [--prompt 2048] [--lengths 512 2048 8192 32768] [--memory-gb 60]

Memory is reserved for the whole length of a sequence; the cost of a step is measured half way through it (a
transformer's step grows linearly, a recurrent model's is constant). The batch is the largest that fits beside the
weights, reduced if a step runs out of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import (
    PEERS,
    SIZES,
    Clock,
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

COLUMNS = ["sampled", "model", "B", "ms", "tokens/s", "GB per sequence", "peak GB", "times ours"]
SPARE = 0.85  # of the free memory; the rest is for activations, logits and fragments


def free_bytes(args: Any, peer: Peer) -> float:
    if args.memory_gb:
        return args.memory_gb * 1e9 - peer.weight_bytes()
    if args.device.type != "cuda":
        raise SystemExit("on a CPU say how much memory to use: --memory-gb")
    return torch.cuda.mem_get_info()[0]


def largest(args: Any, peer: Peer, sampled: int) -> tuple[int, Callable[[], None]]:
    """Return the size of the largest batch that fits, and its decoding step half way through a sequence."""
    total = args.prompt + sampled
    # The state, and two copies of the logits in float32.
    per_sequence = peer.cache_bytes(total) + 8 * SIZES[args.size]().vocab_size
    batch = max(1, min(args.max_batch, int(SPARE * free_bytes(args, peer) / per_sequence)))
    while True:
        try:
            # Reserve memory for the whole length, although the step is measured half way.
            reserve = batch * (peer.cache_bytes(total) - peer.cache_bytes(args.prompt + sampled // 2))
            room = torch.empty(max(0, reserve), dtype=torch.int8, device=args.device)
            step = peer.decoder(batch, args.prompt + sampled // 2)
            step()
            step()
            del room
            return batch, step
        except (torch.OutOfMemoryError, RuntimeError) as error:
            is_memory = isinstance(error, torch.OutOfMemoryError) or "memory" in str(error).lower()
            if batch == 1 or not is_memory:
                raise
        step = None
        release()
        batch = batch * 3 // 4 or 1


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--memory-gb", type=float, help="instead of all that the GPU has")
    parser.add_argument("--max-batch", type=int, default=4096)
    parser.set_defaults(peers=[name for name in PEERS if name != "gemma, flash"])
    args = parsed(parser)
    if args.quick:
        args.prompt, args.lengths, args.max_batch, args.memory_gb = 8, [8, 32], 2, args.memory_gb or 0.1
    config, clock, name = SIZES[args.size](), Clock(args.device), name_of("throughput", args)

    def measured(peer: Peer, sampled: int) -> dict[str, Any]:
        release()
        batch, step = largest(args, peer, sampled)
        own = Clock(torch.device("cpu")) if peer.jits else clock
        ms = own.ms(step, max(3, args.repeats), warmup=2)
        return {
            "B": batch,
            "ms": ms,
            "tokens/s": batch / ms * 1e3,
            "ms per token": ms / batch,
            "GB per sequence": peer.cache_bytes(args.prompt + sampled) / 1e9,
            "peak GB": peak_gb(),
        }

    def finish(rows: list[dict]) -> None:
        with_ratios(rows, ("sampled",), "ms per token")
        plot(rows, name, "sampled", "tokens/s", "title")

    with recorded(name, COLUMNS, finish) as add:
        for peer_name in args.peers:
            row = {"model": peer_name, "prompt": args.prompt, "dtype": str(args.dtype), "size": args.size}
            row["title"] = f"prompts of {args.prompt}"
            made: list[Peer] = []
            if not attempt(
                row,
                lambda n=peer_name, m=made: m.append(PEERS[n](config, args.device, args.dtype)) or {},
                lambda r: "error" in r and add(r),
            ):
                continue
            for sampled in args.lengths:
                attempt({**row, "sampled": sampled}, lambda s=sampled, m=made: measured(m[0], s), add)
            made.clear()
            release()


if __name__ == "__main__":
    main()
