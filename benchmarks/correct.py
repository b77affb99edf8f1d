"""Check correctness on this device before timing: compare the model with itself on the CPU and with the official code.

    python benchmarks/correct.py [--device cuda]

Each line is a claim with its deviation and its limit. The exit status is 1 if any claim fails.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from block import block_backends, select
from peers import arguments, needed, our_config, parsed, recorded
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM, demo_checkpoint
from recurrent_gemma_hf.recurrent_block import (
    RecurrentBlockParameters,
    causal_conv1d,
    recurrent_block,
    recurrent_block_reference,
    recurrent_block_step,
)
from recurrent_gemma_hf.rg_lru import CausalConv1d
from recurrent_gemma_hf.scan import (
    available_backends,
    linear_recurrence,
    resolve_backend,
    triton_refusal,
)

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # relative, in norm


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return ((ours - exact).norm() / exact.norm()).item()


def model_of_test() -> RecurrentGemmaForCausalLM:
    config = our_config(hidden_size=256, layers=3, heads=4, window=64, vocab_size=200)
    torch.manual_seed(0)
    return RecurrentGemmaForCausalLM(config).eval()


def scans(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    claims = []
    for backend in available_backends():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((1, 1, 7), (2, 257, 100), (3, 1000, 256)):
                try:
                    resolve_backend(backend, device, dtype)
                except ValueError as error:
                    print(f"scan {backend}: {error}")
                    continue

                def claim(backend: str = backend, dtype: torch.dtype = dtype, shape: tuple = shape):
                    x, a = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)
                    results = []
                    for where, kind, name in ((device, dtype, backend), ("cpu", torch.float64, "reference")):
                        inputs = [t.to(where, kind).detach().clone().requires_grad_() for t in (x, a)]
                        h, last = linear_recurrence(*inputs, backend=name)
                        (h.double().square().sum() + last.double().sum()).backward()
                        results.append([h, last, inputs[0].grad, inputs[1].grad])
                    return max(off(*pair) for pair in zip(*results, strict=True)), LIMITS[dtype] / 4

                claims.append((f"scan {backend} {dtype} {shape}", claim))
    return claims


def convolutions(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    """Check the convolution of the unfused block, and its gradients."""
    refusal = triton_refusal(device)
    if refusal is not None:
        print(f"convolution: triton {refusal}")
        return []

    def claim(dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[float, float]:
        inputs = [
            tensor.to(dtype) for tensor in (torch.randn(shape), torch.randn(shape[2], 1, 4), torch.randn(shape[2]))
        ]
        conv_tap_mask = (torch.rand(1, shape[1] - 3, 4) < 0.8).to(dtype)
        results = []
        for where, kind, function in ((device, dtype, causal_conv1d), ("cpu", torch.float64, CausalConv1d.apply)):
            mine = [tensor.to(where, kind).detach().clone().requires_grad_() for tensor in inputs]
            out = function(*mine, conv_tap_mask.to(where, kind))
            out.double().square().sum().backward()
            results.append([out, *(tensor.grad for tensor in mine)])
        return max(off(*pair) for pair in zip(*results, strict=True)), LIMITS[dtype] / 4

    return [
        (f"convolution {dtype} {shape}", lambda d=dtype, s=shape: claim(d, s))
        for dtype in LIMITS
        for shape in ((1, 4, 7), (2, 260, 100), (3, 1003, 256))
    ]


def blocks(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    """Check the kernels of the inside of the block and their gradients, and of its step, with every option at once."""
    if triton_refusal(device) is not None:
        return []

    def drawn(shape: tuple[int, int, int, int]) -> tuple[list[torch.Tensor], list[torch.Tensor], dict, dict]:
        B, T, H, d = shape
        D, K = H * d, 4
        parameters = [
            torch.randn(D, 1, K) / 2, torch.randn(D), torch.randn(H, d, d) / d**0.5, torch.randn(H, d),
            torch.randn(H, d, d) / d**0.5, torch.randn(H, d), torch.randn(D),
        ]  # fmt: skip
        states = {"context_BCD": torch.randn(B, K - 1, D), "h0_BD": torch.randn(B, D)}
        flags = {"reset_BT": torch.rand(B, T) < 0.01, "hold_BT": torch.rand(B, T) < 0.05}
        flags["reach_BTK"] = (torch.rand(B, T, K) < 0.9).float()
        return [torch.randn(B, T, D) for _ in range(2)], parameters, states, flags

    def claim(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[float, float]:
        inputs, parameters, states, flags = drawn(shape)
        inputs, parameters = ([tensor.to(dtype) for tensor in group] for group in (inputs, parameters))
        states = {name: state.to(torch.float32 if name == "h0_BD" else dtype) for name, state in states.items()}
        results = []
        for where, exact, function in ((device, False, recurrent_block), ("cpu", True, recurrent_block_reference)):

            def leaf(tensor: torch.Tensor, where: object = where, exact: bool = exact) -> torch.Tensor:
                return tensor.to(where, torch.float64 if exact else tensor.dtype).detach().clone().requires_grad_()

            u, y = map(leaf, inputs)
            mine = RecurrentBlockParameters(*map(leaf, parameters))
            starts = {name: leaf(state) for name, state in states.items()}
            out, last = function(u, y, mine, **starts, **{name: flag.to(where) for name, flag in flags.items()})
            (out.double().square().sum() + last.double().square().sum()).backward()
            results.append([out, last, *(leaf.grad for leaf in (u, y, *mine, *starts.values()))])
        return max(off(*pair) for pair in zip(*results, strict=True)), LIMITS[dtype]

    def step(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[float, float]:
        inputs, parameters, states, flags = drawn((shape[0], 1, *shape[2:]))
        u, y = (tensor[:, 0].to(device, dtype) for tensor in inputs)
        theirs = [tensor.to(dtype).double() for tensor in (*inputs, *parameters, states["context_BCD"])]
        out, last = recurrent_block_reference(
            *theirs[:2], RecurrentBlockParameters(*theirs[2:-1]), context_BCD=theirs[-1],
            h0_BD=states["h0_BD"].double(), **flags,
        )  # fmt: skip
        conv_state = states["context_BCD"].transpose(1, 2).to(device, dtype).contiguous()
        h = states["h0_BD"].to(device)
        mine = recurrent_block_step(
            u, y, RecurrentBlockParameters(*(p.to(device, dtype) for p in parameters)), conv_state, h,
            reset_B=flags["reset_BT"][:, 0].to(device), hold_B=flags["hold_BT"][:, 0].to(device),
            reach_BK=flags["reach_BTK"][:, 0].to(device),
        )  # fmt: skip
        return max(off(mine, out[:, 0]), off(h, last)), LIMITS[dtype]

    return [
        (f"{what} {dtype} {shape}", lambda c=check, d=dtype, s=shape: c(d, s))
        for what, check in (("block", claim), ("step", step))
        for dtype in LIMITS
        for shape in ((1, 1, 1, 16), (2, 257, 4, 80), (1, 3000, 10, 256), (5, 130, 2, 128))
    ]


def models(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    exact = model_of_test().double()
    ids = torch.randint(2, 200, (2, 150))

    def gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        return [model(ids).logits, *(p.grad for p in model.parameters())]

    expected = gradients(exact, ids)

    def claim(backend: str, dtype: torch.dtype, attention: str) -> tuple[float, float]:
        select(backend)
        try:
            model = model_of_test()
            model.set_attn_implementation(attention)
            actual = gradients(model.to(device, dtype), ids.to(device))
            return max(off(*pair) for pair in zip(actual, expected, strict=True)), LIMITS[dtype] * 3
        finally:
            select("auto")

    return [
        (f"model and gradients: block {b}, {d}, {a}", lambda b=b, d=d, a=a: claim(b, d, a))
        for b in block_backends()
        for d in LIMITS
        for a in ("eager", "sdpa")
    ]


def generation(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    """Compare greedy text of the demo model with the CPU's: on the device, compiled, and far into a text."""
    reference = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    model = copy.deepcopy(reference).to(device)
    ids = torch.randint(2, 900, (2, 40))
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = reference.generate(ids, **options)

    def differs(**more: object) -> tuple[float, float]:
        return (model.generate(ids.to(device), **options, **more).cpu() != expected).float().mean().item(), 0.0

    def compiled() -> tuple[float, float]:
        config = CompileConfig(fullgraph=True)
        config._compile_all_devices = True
        return differs(cache_implementation="static", compile_config=config)

    def far() -> tuple[float, float]:
        """Compare the steps at positions 10 and 1,000,000 with those on the CPU."""
        worst = 0.0
        for position in (10, 1_000_000):
            outs = []
            for m in (model, reference):
                cache = RecurrentGemmaCache(m.config)
                with torch.no_grad():
                    m(ids.to(m.device), cache=cache)
                    cache.progress.lengths.fill_(position)
                    cache.progress.columns = position
                    outs.append(m(ids[:, :1].to(m.device), cache=cache).logits)
            worst = max(worst, off(*outs))
        return worst, 1e-4

    return [
        ("greedy text as on the CPU", differs),
        ("the same, step compiled", compiled),
        ("logits at position 10 and 1,000,000", far),
    ]


def official(device: torch.device) -> list[tuple[str, Callable[[], tuple[float, float]]]]:
    def claim() -> tuple[float, float]:
        needed("recurrentgemma.torch")
        sys.path.insert(0, "tests")
        import oracles
        import small_models

        worst = 0.0
        for variant in small_models.VARIANTS:
            config = small_models.tiny_config(variant)
            model = small_models.build(config)
            theirs = oracles.official_torch(config, model.state_dict())
            ids = torch.randint(2, config.vocab_size, (2, 40))
            with torch.no_grad():
                worst = max(
                    worst, off(model.to(device)(ids.to(device)).logits, oracles.official_torch_logits(theirs, ids))
                )
        return worst, 1e-4

    return [("official PyTorch code, every variant", claim)]


def main() -> None:
    args = parsed(arguments(__doc__))
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    with recorded(f"correct_{args.device.type}", ["claim", "deviation", "limit", "holds"]) as add:
        for kind in (scans, convolutions, blocks, models, generation, official):
            for claim, check in kind(args.device):
                row: dict[str, object] = {"claim": claim}
                try:
                    deviation, limit = check()
                    row |= {"deviation": deviation, "limit": limit, "holds": deviation <= limit}
                except Exception as error:
                    row |= {"holds": False, "error": f"{type(error).__name__}: {error}"[:300]}
                failed += not row["holds"]
                add(row)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
