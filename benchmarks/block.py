"""Time the recurrent block alone, forward and backward: every backend of ours and the peers.

    python benchmarks/block.py [--device cuda] [--shapes 1x8192 8x8192] [--lru-widths 2560 3840]

"inside" replaces the block's linear layers by identities and times the rest (convolution, gates, scan, gelu gate); its
floor is the time to move each tensor once at the speed of a copy. "block" is the whole block, "products" its three
matmuls alone, a bound on the cost of a wider RNN. "gate and up" and "q, k and v" compare separate matmuls with one
fused matmul, for one token, where launches dominate, and for many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import (
    SIZES,
    Clock,
    Limits,
    Missing,
    arguments,
    attempt,
    in_tree_recurrent_gemma,
    materialized,
    name_of,
    needed,
    parsed,
    plot,
    recorded,
    release,
    with_ratios,
)
from peers import in_tree as in_tree_code
from torch import nn
from torch.nn import functional as F

from recurrent_gemma_hf import RecurrentGemmaConfig, set_backend
from recurrent_gemma_hf.backend import BACKENDS
from recurrent_gemma_hf.modeling_recurrent_gemma import LayerInputs, RecurrentGemmaRecurrentBlock

COLUMNS = ["what", "direction", "shape", "lru_width", "model", "ms", "share of floor", "times ours"]
SHAPES = {"cuda": ["1x8192", "8x8192", "1x65536"], "cpu": ["1x1024", "1x4096"]}
Block = Callable[[torch.Tensor], torch.Tensor]


def ours(backend: str, compiled: bool = False) -> Callable[..., Block]:
    def build(config: RecurrentGemmaConfig, x_BTE: torch.Tensor, inside: bool) -> Block:
        set_backend(backend)
        module = materialized(lambda: RecurrentGemmaRecurrentBlock(config, 0), x_BTE.device, x_BTE.dtype)
        if inside:
            module.linear_x = module.linear_y = module.linear_out = nn.Identity()
        reset = torch.zeros(1, x_BTE.shape[1], dtype=torch.bool, device=x_BTE.device)
        inputs = LayerInputs(
            cos_BTr=None, sin_BTr=None, reset_BT=reset, is_padding_BT=None, conv_tap_mask_BTK=None, attention=None
        )  # type: ignore[arg-type]
        call = torch.compile(module.forward, dynamic=False) if compiled else module
        return lambda x: call(x, inputs, None)[0]

    return build


def in_tree(config: RecurrentGemmaConfig, x_BTE: torch.Tensor, inside: bool) -> Block:
    if config.lru_width != config.hidden_size:
        raise Missing("the in-tree model fails where lru_width is not hidden_size")
    with torch.device("meta"):
        theirs = in_tree_recurrent_gemma(config).config
    module = materialized(lambda: in_tree_code.RecurrentGemmaRecurrentBlock(theirs, 0), x_BTE.device, x_BTE.dtype)
    if inside:
        module.linear_x = module.linear_y = module.linear_out = nn.Identity()
    positions = torch.arange(x_BTE.shape[1], device=x_BTE.device).expand(x_BTE.shape[:2])
    return lambda x: module(x, positions, None, use_cache=False)[0]


def official_torch(config: RecurrentGemmaConfig, x_BTE: torch.Tensor, inside: bool) -> Block:
    block = needed("recurrentgemma.torch.modules").RecurrentBlock
    sizes = (config.hidden_size, config.num_attention_heads, config.lru_width)
    module = materialized(lambda: block(*sizes, device="meta"), x_BTE.device, x_BTE.dtype)
    if inside:
        module.linear_x = module.linear_y = module.linear_out = nn.Identity()
    positions = torch.arange(x_BTE.shape[1], dtype=torch.int32, device=x_BTE.device).expand(x_BTE.shape[:2])
    return lambda x: module(x, positions, return_cache=False)[0]


PEERS: dict[str, Callable[..., Block]] = {f"ours: {name}": ours(name) for name in BACKENDS} | {
    "ours: portable, compiled": ours("portable", compiled=True),
    "in-tree": in_tree,
    "official torch": official_torch,
}


def products(config: RecurrentGemmaConfig, x_BTE: torch.Tensor, inside: bool) -> Block:
    """Build only the block's linear layers: the cost of the block if its inside were free."""
    E, D = config.hidden_size, config.lru_width
    layers = [(nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, E))]
    x_layer, y_layer, out_layer = (layer.to(x_BTE.device, x_BTE.dtype) for layer in layers[0])
    return lambda x: out_layer(x_layer(x) + y_layer(x))


def jax_block(config: RecurrentGemmaConfig, x_BTE: torch.Tensor, direction: str) -> Callable[[], Any]:
    """Build Google's whole block, compiled, with the scan that its AUTO chooses."""
    jax = needed("jax")
    modules = needed("recurrentgemma.jax.modules")
    wanted = "gpu" if x_BTE.is_cuda else "cpu"
    if jax.default_backend() != wanted:
        raise Missing(f"JAX runs on {jax.default_backend()}, not on {wanted}")
    scan_type = needed("recurrentgemma.common").ScanType.AUTO
    kind = getattr(jax.numpy, str(x_BTE.dtype).removeprefix("torch."))
    sizes = {"width": config.hidden_size, "num_heads": config.num_attention_heads, "lru_width": config.lru_width}
    block = modules.RecurrentBlock(**sizes, scan_type=scan_type, dtype=kind, param_dtype=kind)
    x = jax.random.normal(jax.random.key(0), tuple(x_BTE.shape), kind)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(x.shape[1]), x.shape[:2])
    variables = jax.jit(lambda x, p: block.init(jax.random.key(0), x, p))(x[:, :4], positions[:, :4])

    def apply(variables: Any, x: Any) -> Any:
        return block.apply(variables, x, positions, return_cache=False)[0]

    if direction == "forward":
        forward = jax.jit(apply)
        return lambda: forward(variables, x).block_until_ready()
    both = jax.jit(lambda variables, x: jax.vjp(apply, variables, x)[1](x))
    return lambda: jax.block_until_ready(both(variables, x))


def call(block: Block, x_BTE: torch.Tensor, direction: str) -> Callable[[], Any]:
    """Return a function that runs the forward pass or, for "both", also the backward pass with all gradients."""
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                block(x_BTE)

        return forward
    x, gradient = x_BTE.clone().requires_grad_(), torch.randn_like(x_BTE)
    return lambda: torch.autograd.backward(block(x), gradient)


def fused_or_not(config: RecurrentGemmaConfig, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return functions that run the matmuls of several weights ("ours") and of one weight in their place ("fused")."""
    E, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    widths = {"gate and up": [config.intermediate_size // 2] * 2, "q, k and v": [E, kv, kv]}
    x = torch.randn(1, rows, E, device=device).to(dtype)
    runs = {}
    for what, sizes in widths.items():
        weights = [torch.randn(size, E, device=device).to(dtype) for size in sizes]
        fused = torch.cat(weights)
        runs[what, "ours"] = lambda weights=weights: [F.linear(x, w) for w in weights]
        runs[what, "fused"] = lambda fused=fused, sizes=sizes: F.linear(x, fused).split(sizes, dim=-1)
    return runs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", help="BxT")
    parser.add_argument("--lru-widths", type=int, nargs="+")
    parser.add_argument("--slow-peers-up-to", type=int, default=8192, help="longest T for loops over time")
    args = parsed(parser)
    clock, limits = Clock(args.device), Limits.of(args.device, args.dtype, args.quick)
    name, base = name_of("block", args), SIZES[args.size]()

    def finish(rows: list[dict]) -> None:
        keys = ("what", "direction", "shape", "lru_width")
        ours_first = [{**row, "model": "ours"} for row in rows if row["model"].startswith("ours: ") and "ms" in row]
        with_ratios(ours_first + rows, keys)
        plot([r for r in rows if r.get("lru_width") == base.lru_width], name, "tokens", "ms", "title")

    with recorded(name, COLUMNS, finish) as add:
        for text in args.shapes or (["1x40"] if args.quick else SHAPES[args.device.type]):
            B, T = (int(n) for n in text.split("x"))
            for width in args.lru_widths or [base.lru_width, base.lru_width * 3 // 2]:
                config = RecurrentGemmaConfig(**{**base.to_dict(), "lru_width": width})
                for what in ("inside", "block"):
                    if what == "inside" and width != base.lru_width:
                        continue
                    for direction in ("forward", "both"):
                        measure_peers(args, clock, limits, config, (B, T), what, direction, add)
        for rows in (1, 16, 1024):
            for (what, model), run in fused_or_not(base, rows, args.device, args.dtype).items():
                ms = clock.ms(run, 4 * args.repeats, flush=True)
                add({"what": what, "direction": "forward", "shape": f"1x{rows}", "model": model, "ms": ms,
                     "tokens": rows, "title": what})  # fmt: skip


def measure_peers(
    args: Any,
    clock: Clock,
    limits: Limits,
    config: RecurrentGemmaConfig,
    shape: tuple[int, int],
    what: str,
    direction: str,
    add: Callable[[dict], None],
) -> None:
    B, T = shape
    width = config.lru_width if what == "inside" else config.hidden_size
    x_BTE = torch.randn(B, T, width, device=args.device).to(args.dtype)
    row = {"what": what, "direction": direction, "shape": f"{B}x{T}", "lru_width": config.lru_width, "tokens": B * T}
    row |= {"dtype": str(args.dtype), "title": f"{what}, {direction}"}
    # Forward reads u and y and writes the output; backward reads u, y and the output's gradient and writes two.
    moved = {"forward": 3, "both": 8}[direction] * B * T * config.lru_width * args.dtype.itemsize
    flops = 6 * B * T * config.hidden_size * config.lru_width * (1 if direction == "forward" else 3)
    floor = moved / limits.copy * 1e3 + (0 if what == "inside" else flops / limits.flops * 1e3)
    peers = PEERS if what == "inside" else {**PEERS, "products": products}
    for peer, build in peers.items():
        if args.quick and "compiled" in peer:
            continue
        slow = peer in ("in-tree", "official torch")
        if slow and args.slow_peers_up_to < T:
            add({**row, "model": peer, "error": f"a loop over {T} steps takes too long"})
            continue

        def measured(build: Callable = build, slow: bool = slow) -> dict[str, Any]:
            release()
            run = call(build(config, x_BTE, what == "inside"), x_BTE, direction)
            ms = clock.ms(run, 1 if slow else 2 * args.repeats, flush=True)
            return {"ms": ms, "floor ms": floor, "share of floor": floor / ms, **limits.row()}

        attempt({**row, "model": peer}, measured, add)
    set_backend("auto")
    if what == "block":
        wall = Clock(torch.device("cpu"))
        attempt(
            {**row, "model": "official jax"},
            lambda: {
                "ms": (ms := wall.ms(jax_block(config, x_BTE, direction), args.repeats)),
                "floor ms": floor,
                "share of floor": floor / ms,
            },
            add,
        )


if __name__ == "__main__":
    main()
