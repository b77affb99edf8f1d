"""Sample 200,000 tokens from the demo model: time per token and resident memory, compared with a transformer.

    python benchmarks/long_sampling.py [--tokens 200000] [--transformer-tokens 20000]

Writes results/long_sampling.jsonl and ../docs/long_sampling.png. The transformer is a Gemma of the demo's size; it
stops early because its time per token grows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from peers import gemma, recorded
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from recurrent_gemma_hf import demo_checkpoint
from recurrent_gemma_hf.transformers_compat import CACHE_NAME

EVERY = 1000
FIGURE = Path(__file__).parents[1] / "docs" / "long_sampling.png"


@torch.inference_mode()
def sample(model: torch.nn.Module, tokens: int, name: str) -> list[dict[str, float | int | str]]:
    """Sample tokens one by one; return a row of measurements per `EVERY` tokens."""
    model.eval()
    process, rows = psutil.Process(), []
    ids, cache = torch.tensor([[2]]), None
    start = time.perf_counter()
    for n in tqdm(range(1, tokens + 1), desc=name, mininterval=5):
        out = model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        cache = out[CACHE_NAME]
        ids = torch.multinomial(torch.softmax(out.logits[:, -1].float() / 0.8, dim=-1), 1)
        if n % EVERY == 0:
            now = time.perf_counter()
            rows.append({
                "model": name, "tokens": n, "ms/token": (now - start) / EVERY * 1e3,
                "resident MB": process.memory_info().rss / 1e6,
            })  # fmt: skip
            start = now
    return rows


def plot(rows: list[dict[str, float | int | str]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, color in (("Griffin (this package)", "C0"), ("transformer of equal size", "C3")):
        mine = [row for row in rows if row["model"] == name]
        x = [row["tokens"] for row in mine]
        left.plot(x, [row["ms/token"] for row in mine], color=color, label=name)
        base = mine[0]["resident MB"]
        right.plot(x, [row["resident MB"] - base for row in mine], color=color, label=name)
    left.set(xlabel="tokens written", ylabel="ms per token", ylim=(0, None))
    right.set(xlabel="tokens written", ylabel="resident memory gained, MB")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--transformer-tokens", type=int, default=20_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    rows = sample(model, args.tokens, "Griffin (this package)")
    rows += sample(gemma(model.config), args.transformer_tokens, "transformer of equal size")
    with recorded("long_sampling", ["model", "tokens", "ms/token", "resident MB"]) as add:
        for row in rows:
            add(row)
    plot(rows)


if __name__ == "__main__":
    main()
