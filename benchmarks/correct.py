"""Check correctness on this device before timing: compare the model with itself on the CPU and with the official code.

    python benchmarks/correct.py [--device cuda]

Each line is a claim with its deviation and its limit. The exit status is 1 if any claim fails.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable

import torch
from peers import arguments, needed, our_config, parsed, recorded
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CompileConfig

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaForCausalLM,
    demo_checkpoint,
    linear_recurrence,
    set_backend,
)
from recurrent_gemma_hf.backend import BACKENDS, triton_refusal
from recurrent_gemma_hf.causal_conv1d import causal_conv1d
from recurrent_gemma_hf.rg_lru import RgLruParameters, rg_lru, rg_lru_step
from recurrent_gemma_hf.scan import linear_recurrence_reference
from tests import reference
from tests.helpers import VARIANTS, build, tiny_config

Claims = list[tuple[str, Callable[[], tuple[float, float]]]]
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # relative, in norm


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return ((ours - exact).norm() / exact.norm()).item()


def model_of_test() -> RecurrentGemmaForCausalLM:
    config = our_config(hidden_size=256, layers=3, heads=4, window=64, vocab_size=200)
    torch.manual_seed(0)
    return RecurrentGemmaForCausalLM(config).eval()


def compared(device: torch.device, ours: Callable, exact: Callable, tensors: list[torch.Tensor | None]) -> float:
    """Return the largest relative deviation (in norm) of the results and gradients of `ours`, on the device, from those
    of `exact`, in float64 on the CPU."""
    results = []
    for where, dtype, function in ((device, None, ours), ("cpu", torch.float64, exact)):
        leaves = [
            None if t is None else t.to(where, dtype or t.dtype).detach().clone().requires_grad_() for t in tensors
        ]
        outs = [out for out in function(*leaves) if out is not None]
        sum(out.double().square().sum() for out in outs).backward()
        results.append([*outs, *(leaf.grad for leaf in leaves if leaf is not None)])
    return max(off(*pair) for pair in zip(*results, strict=True))


def scans(device: torch.device) -> Claims:
    def claim(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[float, float]:
        set_backend(backend)
        x, a, h0 = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype), torch.randn(shape[0], shape[2])
        return compared(device, linear_recurrence, linear_recurrence_reference, [x, a, h0]), LIMITS[dtype] / 4

    return [
        (f"scan {b} {d} {s}", lambda b=b, d=d, s=s: claim(b, d, s))
        for b in backends(device)
        for d in LIMITS
        for s in ((1, 2, 7), (2, 257, 100), (3, 1000, 256), (1, 5000, 64))
    ]


def backends(device: torch.device) -> tuple[str, ...]:
    return BACKENDS if triton_refusal(device) is None else ("portable",)


def convolutions(device: torch.device) -> Claims:
    """Check the convolution with and without earlier inputs in front."""

    def claim(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], past: int) -> tuple[float, float]:
        set_backend(backend)
        B, T, D = shape
        tensors = [t.to(dtype) for t in (torch.randn(B, T + past, D), torch.randn(D, 1, 4), torch.randn(D))]
        mask = torch.rand(1, T, 4) < 0.8

        def ours(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
            return (causal_conv1d(*inputs, mask.to(device), past=past),)

        def exact(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
            return (reference.conv(*inputs, mask, past),)

        return compared(device, ours, exact, tensors), LIMITS[dtype] / 4

    return [
        (f"convolution {b} {d} {s}, {p} before", lambda b=b, d=d, s=s, p=p: claim(b, d, s, p))
        for b in backends(device)
        for d in LIMITS
        for s in ((1, 2, 7), (2, 257, 100), (3, 1000, 256))
        for p in (0, 3)
    ]


def drawn(B: int, T: int, H: int, d: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draw x, y, the parameters of the RG-LRU and h0; and the masks of document starts and of padding."""
    D = H * d
    x, y = (torch.randn(B, T, D).to(dtype) for _ in range(2))
    weights = [tensor for _ in range(2) for tensor in (torch.randn(H, d, d) / d**0.5, torch.randn(H, d))]
    learned = [tensor.to(dtype) for tensor in (*weights, torch.randn(D))]
    return [x, y, *learned, torch.randn(B, D)], [torch.rand(B, T) < 0.01, torch.rand(B, T) < 0.05]


def rg_lrus(device: torch.device) -> Claims:
    """Check the RG-LRU with every option at once."""

    def act(y: torch.Tensor) -> torch.Tensor:
        return F.gelu(y, approximate="tanh")

    def claim(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[float, float]:
        set_backend(backend)
        tensors, flags = drawn(*shape, dtype)

        def ours(x: torch.Tensor, y: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            here = [flag.to(device) for flag in flags]
            return rg_lru(x, y, RgLruParameters(*rest[:5]), rest[5], *here, act, is_gelu_tanh=True)

        def exact(x: torch.Tensor, y: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reference.rg_lru(x, y, RgLruParameters(*rest[:5]), rest[5], *flags)

        return compared(device, ours, exact, tensors), LIMITS[dtype]

    return [
        (f"RG-LRU {b} {d} {s}", lambda b=b, d=d, s=s: claim(b, d, s))
        for b in backends(device)
        for d in LIMITS
        for s in ((1, 2, 1, 16), (2, 257, 4, 80), (1, 3000, 10, 256), (5, 130, 2, 128), (1, 9000, 1, 100))
    ]


def steps(device: torch.device) -> Claims:
    """Check the kernels of one token: convolution, RG-LRU and both states."""

    def claim(dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[float, float]:
        B, H, d = shape
        tensors, flags = drawn(B, 1, H, d, dtype)
        x, y, *learned, h0 = tensors
        conv = [torch.randn(H * d, 1, 4).to(dtype), torch.randn(H * d).to(dtype)]
        past = torch.randn(B, 3, H * d).to(dtype)
        mask = torch.rand(B, 1, 4) < 0.9
        x_exact = reference.conv(torch.cat([past, x], 1).double(), *(t.double() for t in conv), mask, 3)
        exact = reference.rg_lru(
            x_exact, y.double(), RgLruParameters(*(t.double() for t in learned)), h0.double(), *flags
        )
        conv_state, h = past.to(device).transpose(1, 2), h0.to(device)
        out = rg_lru_step(
            x[:, 0].to(device), y[:, 0].to(device), *(t.to(device) for t in conv),
            RgLruParameters(*(t.to(device) for t in learned)), conv_state, h,
            reset_B=flags[0][:, 0].to(device), is_padding_B=flags[1][:, 0].to(device),
            conv_tap_mask_BK=mask[:, 0].to(device),
        )  # fmt: skip
        return max(off(out, exact[0][:, 0]), off(h, exact[1])), LIMITS[dtype]

    if triton_refusal(device) is not None:
        return []
    return [
        (f"step {d} {s}", lambda d=d, s=s: claim(d, s))
        for d in LIMITS
        for s in ((1, 1, 16), (2, 4, 80), (1, 10, 256), (35, 2, 128))
    ]


def models(device: torch.device) -> Claims:
    exact = model_of_test().double()
    ids = torch.randint(2, 200, (2, 150))

    def gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        return [model(ids).logits, *(p.grad for p in model.parameters())]

    expected = gradients(exact, ids)

    def claim(backend: str, dtype: torch.dtype, attention: str) -> tuple[float, float]:
        set_backend(backend)
        model = model_of_test()
        model.set_attn_implementation(attention)
        actual = gradients(model.to(device, dtype), ids.to(device))
        return max(off(*pair) for pair in zip(actual, expected, strict=True)), LIMITS[dtype] * 3

    return [
        (f"model and gradients: {b}, {d}, {a}", lambda b=b, d=d, a=a: claim(b, d, a))
        for b in backends(device)
        for d in LIMITS
        for a in ("eager", "sdpa")
    ]


def generation(device: torch.device) -> Claims:
    """Compare the demo model with itself on the CPU: greedy text, compiled too, and logits far into a text."""
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
        """Compare the logits of a step at positions 10 and 1,000,000 with the CPU's."""
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


def official(device: torch.device) -> Claims:
    def claim() -> tuple[float, float]:
        needed("recurrentgemma.torch")
        from tests import oracles

        worst = 0.0
        for variant in VARIANTS:
            config = tiny_config(variant)
            model = build(config)
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
        for kind in (scans, convolutions, rg_lrus, steps, models, generation, official):
            for claim, check in kind(args.device):
                row: dict[str, object] = {"claim": claim}
                try:
                    deviation, limit = check()
                    row |= {"deviation": deviation, "limit": limit, "holds": deviation <= limit}
                except Exception as error:
                    traceback.print_exc()
                    row |= {"holds": False, "error": f"{type(error).__name__}: {error}"[:300]}
                finally:
                    set_backend("auto")
                failed += not row["holds"]
                add(row)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
