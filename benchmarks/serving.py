"""Measure requests per second on vLLM, with `generate()` and a transformer of equal size on the same vLLM.

Each process measures one system; the last command plots all results. Run them in the environment of `make test-vllm` or
in one with a GPU and vLLM:

    python benchmarks/serving.py vllm
    python benchmarks/serving.py vllm-gemma
    python benchmarks/serving.py generate
    python benchmarks/serving.py plot

64 requests arrive at the start, with prompts of 32 to 512 random tokens and answers of 16 to 112 (none stops early); at
most `concurrent` of them run at a time. `generate()` runs them in padded batches of that size, each as long as its
longest answer. `vllm long` and `vllm-gemma long`: 16 concurrent requests of 3072 to 4096 tokens, answers of 64 to 128,
so that the window of 1024 is full.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from peers import RESULTS, gemma, our_config, parameters, recorded

from recurrent_gemma_hf import RecurrentGemmaForCausalLM

CONCURRENT = (1, 4, 16, 64)
VOCAB = 4096
LONG = (16, (3072, 4096), (64, 128))  # requests, prompts, answers
SHORT = (64, (32, 512), (16, 112))
COLUMNS = ["system", "concurrent", "requests_per_s", "tokens_per_s", "seconds", "parameters"]
SYSTEMS = {
    "vllm": ("this package on vLLM", "#1b6ca8", "o-"),
    "vllm-gemma": ("Gemma of equal size on vLLM", "#c8553d", "s-"),
    "generate": ("generate(), batches of that size", "#7a7a7a", "^--"),
}


def requests(kind: tuple[int, tuple[int, int], tuple[int, int]]) -> list[tuple[list[int], int]]:
    """Return (prompt, tokens of the answer) per request, the same for every system."""
    rng, (count, prompts, answers) = random.Random(0), kind
    return [
        ([rng.randrange(3, VOCAB) for _ in range(rng.randint(*prompts))], rng.randint(*answers)) for _ in range(count)
    ]


def config():
    """Return the config of the training and decoding benchmarks with a larger vocabulary: 20.9 million parameters."""
    return our_config(hidden_size=512, layers=6, heads=8, window=1024, vocab_size=VOCAB)


def vllm_seconds(model: torch.nn.Module):
    """Return run(concurrent, requests), which serves at most `concurrent` at a time and returns the seconds it took."""
    from vllm import LLM, SamplingParams

    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    llm = LLM(
        folder, dtype="float32", max_model_len=LONG[1][1] + LONG[2][1], max_num_seqs=max(CONCURRENT),
        skip_tokenizer_init=True, kv_cache_memory_bytes=2 << 30, enable_prefix_caching=False,
        max_num_batched_tokens=2048,
    )  # fmt: skip

    def run(concurrent: int, work: list[tuple[list[int], int]]) -> float:
        engine, waiting, running, n = llm.llm_engine, list(work), 0, 0
        start = time.perf_counter()
        while waiting or running:
            while waiting and running < concurrent:
                prompt, tokens = waiting.pop(0)
                params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                engine.add_request(f"{start}-{n}", {"prompt_token_ids": prompt}, params)
                running, n = running + 1, n + 1
            running -= sum(output.finished for output in engine.step())
        return time.perf_counter() - start

    return run


def generate_seconds(model: torch.nn.Module):
    """Return the same for `generate()`, with padded batches of `concurrent` requests of similar length."""

    def run(concurrent: int, work: list[tuple[list[int], int]]) -> float:
        start = time.perf_counter()
        ordered = sorted(work, key=lambda request: len(request[0]))
        for i in range(0, len(ordered), concurrent):
            batch = ordered[i : i + concurrent]
            T, tokens = max(len(prompt) for prompt, _ in batch), max(n for _, n in batch)
            ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=None)
        return time.perf_counter() - start

    return run


def measure(system: str, is_long: bool) -> None:
    with recorded(f"serving_{system}" + ("_long" if is_long else ""), COLUMNS) as row, torch.no_grad():
        torch.manual_seed(0)
        model = gemma(config()) if system == "vllm-gemma" else RecurrentGemmaForCausalLM(config())
        run = (generate_seconds if system == "generate" else vllm_seconds)(model.eval())
        run(16, requests(SHORT)[:16])  # warm-up: compilation, first use of the memory
        work = requests(LONG if is_long else SHORT)
        for concurrent in CONCURRENT[2:3] if is_long else CONCURRENT:
            part = work if concurrent >= 16 else work[: 16 * concurrent]  # all would take long
            seconds = run(concurrent, part)
            row({
                "system": system, "concurrent": concurrent, "requests_per_s": len(part) / seconds,
                "tokens_per_s": sum(n for _, n in part) / seconds, "seconds": seconds,
                "parameters": parameters(model),
            })  # fmt: skip


def plot() -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    about = ""
    for system, (label, colour, style) in SYSTEMS.items():
        lines = (RESULTS / f"serving_{system}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        about = rows[0]["device"]
        for axes, name in ((left, "requests_per_s"), (right, "tokens_per_s")):
            axes.plot([r["concurrent"] for r in rows], [r[name] for r in rows], style, color=colour, label=label)
    for axes, title in ((left, "requests per second"), (right, "new tokens per second")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(CONCURRENT, [str(c) for c in CONCURRENT])
        axes.set_xlabel("requests at a time")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(f"20.9 million parameters, float32, {about}", fontsize=9)
    figure.savefig(RESULTS.parents[1] / "docs" / "serving.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] == ["plot"]:
        plot()
    elif len(sys.argv) > 1 and sys.argv[1] in SYSTEMS and sys.argv[2:] in ([], ["long"]):
        measure(sys.argv[1], is_long=len(sys.argv) > 2)
    else:
        sys.exit(f"usage: python benchmarks/serving.py plot | {' | '.join(SYSTEMS)} [long]")
