"""Compare the peak of `recurrent-gemma memory` with the allocator's, for every strategy that runs on this machine.

    python benchmarks/memory.py --hidden-size 512 --layers 12 --vocab-size 32000 --tokens 2048

torch's profiler counts every allocation and release of the second training step; the weights and the optimizer state
that exist before it are added. `--loss` compares one step at a vocabulary of 256,000 with the loss from all logits and
with ours, measured in the same way and as the peak resident memory of the process.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from peers import our_config, recorded
from peft import LoraConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, parameter_groups
from recurrent_gemma_hf.memory import STRATEGIES, training_memory


def allocated_peak(step: Callable[[], object]) -> int:
    """Return the peak number of bytes that torch allocates during the step, without those allocated before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measured_peak(config, strategy: str, tokens: int, checkpointing: bool, rank: int = 16) -> int:
    """Return the peak bytes of a model's second training step, weights and optimizer state included; not for QLoRA."""
    how = STRATEGIES[strategy]
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(config)
    if how.bytes_per_weight == 2:
        model.to(torch.bfloat16)
    if how.has_adapter:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, foreach=False)
    ids = torch.randint(3, config.vocab_size, (1, tokens))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how.compute_dtype == torch.bfloat16)

    def step() -> None:
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    there = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    return there + allocated_peak(step)


def compare(options: argparse.Namespace) -> None:
    config = our_config(options.hidden_size, options.layers, options.hidden_size // 64, 1024, options.vocab_size)
    rows = []
    for strategy in STRATEGIES:
        for checkpointing in (False, True):
            if strategy == "qlora":
                continue
            computed = training_memory(config, strategy, tokens=options.tokens, checkpointing=checkpointing)
            measured = measured_peak(config, strategy, options.tokens, checkpointing)
            row = {
                "strategy": strategy, "checkpointing": checkpointing, "tokens": options.tokens, "measured": measured,
                "hidden_size": options.hidden_size, "layers": options.layers, "vocab_size": options.vocab_size,
                "computed": asdict(computed), "computed_over_measured": round(computed.peak / measured, 3),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row)
    columns = ["strategy", "checkpointing", "tokens", "measured", "computed_over_measured"]
    with recorded("cpu_training_memory", columns) as write:
        for row in rows:
            write(row)


def one_step(kind: str, tokens: int, hidden_size: int, dtype: str) -> dict[str, float]:
    """Measure the peak memory of a forward and backward pass at a vocabulary of 256,000, in this process."""
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(our_config(hidden_size, 3, hidden_size // 64, 2048, 256_000))
    model.to(getattr(torch, dtype)).train()
    if kind == "plain":
        model.loss_function = lambda **kwargs: ForCausalLMLoss(**kwargs)
    ids = torch.randint(3, 256_000, (1, tokens))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())

    peak = allocated_peak(step)
    with open("/proc/self/status", encoding="ascii") as status:
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
    return {"loss": losses[0], "gradient_norm": norm, "weights": weights, "allocated": weights + peak} | {
        "resident": resident, "kind": kind, "tokens": tokens, "hidden_size": hidden_size, "dtype": dtype
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of --loss")
    parser.add_argument("--loss", action="store_true", help="compare the two losses instead")
    parser.add_argument("--one-step", choices=["plain", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_step:
        print(json.dumps(one_step(options.one_step, options.tokens, options.hidden_size, options.dtype)))
    elif options.loss:
        rows = []
        for kind in ("ours", "plain"):  # in separate processes, because the peak of resident memory never falls
            command = [sys.executable, __file__, "--one-step", kind, "--tokens", str(options.tokens)]
            command += ["--hidden-size", str(options.hidden_size), "--dtype", options.dtype]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if done.returncode:
                raise SystemExit(f"the {kind} step ended with {done.returncode}: {done.stderr[-500:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        with recorded("cpu_loss_memory", ["kind", "tokens", "loss", "gradient_norm", "allocated", "resident"]) as write:
            for row in rows:
                write(row)
    else:
        compare(options)


if __name__ == "__main__":
    main()
