"""Time the linear recurrence alone, forward and backward: every backend of ours and the peers' scans.

    python benchmarks/scan.py [--device cuda] [--shapes 1x8192x2560 8x8192x2560]

The floor is the minimal memory traffic at the speed of a copy in the same run: forward reads x and a and writes h,
backward reads dh, a and h and writes dx and da. On a GPU the L2 cache is flushed before every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import (
    Clock,
    Limits,
    Missing,
    arguments,
    attempt,
    name_of,
    needed,
    parsed,
    plot,
    recorded,
    with_ratios,
)

from recurrent_gemma_hf import linear_recurrence, set_backend
from recurrent_gemma_hf.backend import BACKENDS

COLUMNS = ["what", "shape", "model", "ms", "GB/s", "share of floor", "times ours"]
MOVED = {"forward": 3, "backward": 5}  # tensors of (B, T, D), each once
SHAPES = {"cuda": ["1x8192x2560", "8x8192x2560", "1x65536x2560"], "cpu": ["1x1024x512", "1x4096x2560", "1x16384x512"]}


def our_scan(backend: str) -> Callable[[torch.Tensor, torch.Tensor], Callable]:
    def build(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> Callable:
        def scan(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> torch.Tensor:
            set_backend(backend)
            try:
                return linear_recurrence(x_BTD, a_BTD)[0]
            except ValueError as error:
                raise Missing(str(error)) from error
            finally:
                set_backend("auto")

        return scan

    return build


def accelerated_scan(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> Callable:
    """Build accelerated-scan, which needs (B, D, T), T a power of two; its time includes the transposes."""
    T = x_BTD.shape[1]
    if T & (T - 1):
        raise Missing(f"T={T} is no power of two")
    scan = needed("accelerated_scan.warp" if x_BTD.is_cuda else "accelerated_scan.ref").scan
    return lambda x, a: scan(a.transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous()).transpose(1, 2)


def hgrn(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> Callable:
    """Build fla-core's scan. It takes log a, but is given a: any values will do for a timing."""
    if not x_BTD.is_cuda:
        raise Missing("fla's kernels need a GPU")
    chunk_hgrn = needed("fla.ops.hgrn").chunk_hgrn
    return lambda x, a: chunk_hgrn(x, a)[0]


def selective_scan(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> Callable:
    """Build mamba-ssm's scan with one state per channel. It takes delta and A instead of a: any values will do."""
    if not x_BTD.is_cuda:
        raise Missing("mamba-ssm's kernels need a GPU")
    scan = needed("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    B, T, D = x_BTD.shape
    A = -torch.ones(D, 1, device=x_BTD.device)
    ones = torch.ones(B, 1, T, device=x_BTD.device, dtype=x_BTD.dtype)
    return lambda x, a: scan(x.transpose(1, 2), a.transpose(1, 2), A, ones, ones).transpose(1, 2)


def official_torch(x_BTD: torch.Tensor, a_BTD: torch.Tensor) -> Callable:
    rnn_scan = needed("recurrentgemma.torch.layers").rnn_scan
    reset = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
    return lambda x, a: rnn_scan(x, a, reset, None)[0]


PEERS: dict[str, Callable] = {f"ours: {name}": our_scan(name) for name in BACKENDS} | {
    "accelerated-scan": accelerated_scan,
    "fla hgrn": hgrn,
    "mamba-ssm": selective_scan,
    "official torch": official_torch,
}


def jax_scan(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> Callable[[], Any]:
    """Build Google's scan, compiled, with the implementation that its AUTO chooses."""
    jax = needed("jax")
    linear_scan = needed("recurrentgemma.jax.scan").linear_scan
    wanted = {"cuda": "gpu"}.get(device.type, device.type)
    if jax.default_backend() != wanted:
        raise Missing(f"JAX runs on {jax.default_backend()}, not on {wanted}")
    kind = getattr(jax.numpy, str(dtype).removeprefix("torch."))
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, shape, kind) for key in keys[:2])
    a = jax.random.uniform(keys[2], shape, kind)
    forward = jax.jit(lambda x, a: linear_scan(x, a)[0])
    if what == "forward":
        return lambda: forward(x, a).block_until_ready()
    both = jax.jit(lambda x, a, g: jax.vjp(lambda *inputs: linear_scan(*inputs)[0], x, a)[1](g))
    return lambda: jax.block_until_ready(both(x, a, g))


def torch_scan(
    build: Callable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str
) -> Callable:
    x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    a = torch.rand(shape, device=device).to(dtype)
    scan = build(x, a)
    if what == "forward":

        def forward() -> None:
            with torch.no_grad():
                scan(x, a)

        return forward
    x, a = x.requires_grad_(), a.requires_grad_()
    h = scan(x, a)
    return lambda: torch.autograd.grad(h, (x, a), g, retain_graph=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", help="BxTxD")
    args = parsed(parser)
    shapes = args.shapes or (["1x64x32"] if args.quick else SHAPES[args.device.type])
    clock, limits = Clock(args.device), Limits.of(args.device, args.dtype, args.quick)
    name = name_of("scan", args)

    def finish(rows: list[dict]) -> None:
        best = {}
        for row in rows:
            if row["model"].startswith("ours: ") and "ms" in row:
                key = (row["what"], row["shape"])
                best[key] = min(best.get(key, row["ms"]), row["ms"])
        reference = [{"what": w, "shape": s, "model": "ours", "ms": ms} for (w, s), ms in best.items()]
        with_ratios(reference + rows, ("what", "shape"))
        plot(rows, name, "elements", "GB/s", "what")

    with recorded(name, COLUMNS, finish) as add:
        for text in shapes:
            shape = tuple(int(n) for n in text.split("x"))
            for what, moved in MOVED.items():
                size = moved * torch.Size(shape).numel() * args.dtype.itemsize

                def measured(make: Callable[[], Callable], repeats: int, size: int = size) -> dict[str, Any]:
                    ms = clock.ms(make(), repeats, flush=True)
                    floor = size / limits.copy * 1e3
                    return {"ms": ms, "GB/s": size / ms / 1e6, "share of floor": floor / ms, **limits.row()}

                row = {"what": what, "shape": text, "elements": torch.Size(shape).numel(), "dtype": str(args.dtype)}
                for peer, build in PEERS.items():
                    slow = peer == "official torch"
                    inputs = (build, shape, args.dtype, args.device, what)
                    attempt(
                        {**row, "model": peer},
                        lambda i=inputs, n=1 if slow else 4 * args.repeats: measured(lambda: torch_scan(*i), n),
                        add,
                    )
                inputs = (shape, args.dtype, args.device, what)
                # Wall time, because JAX has no events. The backward includes a forward, which XLA may not remove.
                wall = Clock(torch.device("cpu"))
                attempt(
                    {**row, "model": "official jax"},
                    lambda i=inputs, size=size, wall=wall: {
                        "ms": (ms := wall.ms(jax_scan(*i), args.repeats)),
                        "GB/s": size / ms / 1e6,
                        "share of floor": size / limits.copy * 1e3 / ms,
                    },
                    add,
                )


if __name__ == "__main__":
    main()
