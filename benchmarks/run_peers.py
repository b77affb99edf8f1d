"""Run one pass over T tokens with each peer: the common part of prefill.py and train.py."""

from __future__ import annotations

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

COLUMNS = ["what", "B", "T", "model", "ms", "tokens/s", "share of peak", "peak GB", "times ours"]
SLOW = ("in-tree", "official torch")  # a Python loop over time


def run(
    what: str, about: str, lengths: dict[str, list[int]], act: Callable[[Peer, torch.Tensor], None], training: bool
) -> None:
    parser = arguments(about)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slow-peers-up-to", type=int, default=4096, help="longest T for loops over time")
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the backward pass")
    args = parsed(parser)
    config, clock = SIZES[args.size](), Clock(args.device)
    limits = Limits.of(args.device, args.dtype, args.quick)
    wanted = args.lengths or ([40] if args.quick else lengths[args.device.type])
    name = name_of(what, args)

    def measured(peer: Peer, T: int) -> dict[str, Any]:
        release()
        ids = torch.randint(2, config.vocab_size, (args.batch, T), device=args.device)
        takes_minutes = args.device.type == "cpu" and T > 8192
        repeats = 1 if peer.name in SLOW or takes_minutes else args.repeats
        own = Clock(torch.device("cpu")) if peer.jits else clock  # JAX synchronises before it returns
        ms = own.ms(lambda: act(peer, ids), repeats, warmup=0 if takes_minutes else 2)
        flops = args.batch * peer.flops(T, training)
        return {
            "ms": ms,
            "tokens/s": args.batch * T / ms * 1e3,
            "share of peak": flops / limits.flops / ms * 1e3,
            "peak GB": peak_gb(),
            **limits.row(),
        }

    def finish(rows: list[dict]) -> None:
        with_ratios(rows, ("what", "B", "T"))
        plot(rows, name, "T", "tokens/s", "what")

    with recorded(name, COLUMNS, finish) as add:
        row = {"what": what, "B": args.batch, "dtype": str(args.dtype), "size": args.size}
        if training and args.checkpoint:
            row["checkpoint"] = True
        for peer_name in args.peers:
            made: list[Peer] = []

            def make(peer_name: str = peer_name, made: list[Peer] = made) -> dict[str, Any]:
                made.append(PEERS[peer_name](config, args.device, args.dtype))
                if training and args.checkpoint:
                    made[0].checkpoint()  # type: ignore[attr-defined]
                return {}

            if not attempt({**row, "model": peer_name}, make, lambda r: "error" in r and add(r)):
                continue
            for T in wanted:
                if peer_name in SLOW and args.slow_peers_up_to < T:
                    add({**row, "T": T, "model": peer_name, "error": f"a loop over {T} steps takes too long"})
                    continue
                attempt({**row, "T": T, "model": peer_name}, lambda t=T, m=made: measured(m[0], t), add)
            made.clear()
            release()
